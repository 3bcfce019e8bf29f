"""One call of a C++ kernel for the whole network, on a CPU. See README.md beside this file."""

from normkit.fused.loss import FusedLoss
from normkit.fused.module import Fused, fuse

__all__ = ["Fused", "FusedLoss", "fuse"]
