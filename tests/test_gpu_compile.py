"""Triton compiles the GPU kernels to machine code, for which it needs no GPU: its interpreter takes more than that."""

import os
import subprocess
import sys
import types

import pytest
import torch

import model
from normkit.fused.layers import layers_of
from normkit.gpu import step

pytest.importorskip("triton.backends.nvidia.compiler")
MAX_SHARED = 99 * 1024  # bytes of shared memory that a program can have on each of NVIDIA's GPUs since 2020
OF_ALL = {"conv3x3", "conv3x3_weight_grad", "conv1x1_maxpool", "conv1x1_maxpool_backward", "avgpool_linear_loss"}
OF_NORM = {
    "batch": {"batch_norm_relu", "batch_norm_sums", "batch_norm_backward"},
    "group": {"group_norm_relu", "group_norm_backward"},
}


class Compiling:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            print(self.kernel.fn.__name__, compiled.metadata.shared, len(compiled.asm["cubin"]))

        return launch


def compile_step(norm, capability):
    """Prints each kernel of a training step, its shared memory, and the size of its machine code, in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from normkit.gpu import kernels

    none = {"get_current_device": lambda: 0, "get_current_stream": lambda device=None: 0}
    target = GPUTarget("cuda", int(capability), 32)
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target, **none))
    compiling = {name: Compiling(each) for name, each in vars(kernels).items() if isinstance(each, JITFunction)}
    step.kernels = lambda: (types.SimpleNamespace(**compiling), None)
    step.training_step(layers_of(model.Net(norm)), torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("norm, capability", [("batch", "90"), ("group", "80")])  # an H100's, an A100's
def test_the_kernels_compile(norm, capability, tmp_path):
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, norm, capability]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in lines} == OF_ALL | OF_NORM[norm] | {"sum_shares"}
    assert all(int(shared) <= MAX_SHARED and int(size) > 0 for _, shared, size in lines)


if __name__ == "__main__":
    compile_step(*sys.argv[1:])
