"""fuse(model): a callable beside the model that computes the same, faster."""

import warnings

import torch
from torch import nn

from normkit.fused.function import FusedFunction, forward_pass
from normkit.fused.inspection import Inspection
from normkit.fused.legality import compute_dtype, reason_against
from normkit.fused.workspace import give_back


def fuse(model):
    """Returns a Fused of the model, as torch.compile(model) returns a compiled one; a Fused as it is."""
    return model if isinstance(model, Fused) else Fused(model)


class Fused(nn.Module):
    """Calls the kernel where it computes what the model would, else the model.

    It shares the model's parameters and buffers, and leaves the model as it is: calling that always runs PyTorch's
    modules. Its train() and eval() are the model's too; as a module of its own it names the parameters "model.C1.…".
    reason: why the last call ran the modules, in words, or None if the kernel ran; before the first call, why the
    kernel cannot run at all. required: raise with the reason instead of running the modules.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)  # a frozen ScriptModule has no mode
        self.required = False
        self.inspection = Inspection(model)
        self.reason = self.known_reason = self.inspection.reason or reason_against()

    def __getstate__(self):  # for copies and pickles, each of which is inspected for itself
        return self.__dict__ | {"inspection": None}

    def __prepare_scriptable__(self):  # for torch.jit.script, which takes modules alone
        return self.model

    def forward(self, images):
        """(N, 3, H, W) images -> (N, 10) logits; where the kernel runs in float32, also under autocast."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which see the model itself, and nothing else
            return self.model(images)
        inspection = self.inspect()
        self.reason = reason = inspection.reason or reason_against(images, inspection.frozen)
        if reason is not None:
            return self.run_modules(images, reason)
        dtype, needs_grad, parameters = compute_dtype(), torch.is_grad_enabled(), inspection.parameters
        nchw = not (needs_grad and images.requires_grad)
        if nchw:
            images = images.float().contiguous()
        else:
            images = images.to(dtype).contiguous(memory_format=torch.channels_last)
        call = inspection.prepare_call(dtype, needs_grad, images.shape, nchw, torch.get_num_threads())
        if not needs_grad:
            logits, _, workspace, _ = forward_pass(call, images, parameters)
            give_back(workspace)
        else:
            logits = FusedFunction.apply(call, images, *parameters)
        return logits.flatten(1)

    def inspect(self):
        """Returns an Inspection of the model as it is now."""
        inspection, model = self.inspection, self.model  # read once: another thread may be here
        if inspection is None or not inspection.is_current(model):
            inspection = self.inspection = Inspection(model)
        return inspection

    def run_modules(self, images, reason):
        """Calls the model, and warns once of a reason that was not there when it was fused."""
        if self.required:
            raise RuntimeError(f"the fused kernel is required, and cannot be used: {reason}")
        output = self.model(images)
        if reason != self.known_reason:
            warnings.warn(f"PyTorch's modules ran in place of the fused kernel: {reason}", stacklevel=4)
            self.known_reason = reason
        return output
