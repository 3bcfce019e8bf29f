"""What computes a network: its modules, the fused kernel, or torch.compile."""

import torch
from torch import nn

from normkit.checks import check_choice, check_model, device_of
from normkit.fused import Fused, fuse

BACKENDS = ("auto", "eager", "fused", "compile")


def choose_backend(backend, model):
    """Returns a callable that computes the model, and a line that says which it is and why not a faster one.

    "auto": the fused kernel where it can be, else the model itself. "fused": raises ValueError where it cannot be.
    Of a Fused or Compiled, the model in it counts; but a Compiled is kept by "auto" and "compile".
    backend None: what was chosen before, and is called as it is.
    """
    if backend is None:
        return model, ""
    check_choice("backend", backend, BACKENDS)
    check_model(model)
    if isinstance(model, Compiled) and backend in ("auto", "compile"):
        return model, "torch.compile"
    model = plain_model(model)
    if backend == "eager":
        return model, "eager: PyTorch's modules"
    if backend == "compile":
        return Compiled(model), "torch.compile"
    fused = fuse(model)
    if fused.reason is None:
        fused.required = backend == "fused"
        return fused, "fused: one kernel for the whole network"
    if backend == "fused":
        raise ValueError(f"backend='fused' cannot be had: {fused.reason}. Choose 'auto' or 'eager'")
    return model, f"eager: PyTorch's modules (no fused kernel: {fused.reason})"


def plain_model(network):
    """Returns the model that a Fused or Compiled computes, or else what was given."""
    return network.model if isinstance(network, Fused | Compiled) else network


class Compiled(nn.Module):
    """Calls what torch.compile makes of the model, on CUDA as graphs that are launched whole.

    Where it cannot be compiled, says so once and calls the model itself; reason is then what went wrong.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)  # a frozen ScriptModule has no mode
        self.reason = None
        torch.compiler.reset()  # what it keeps of earlier models would soon fill its limit, and then it stops compiling
        device = device_of(model)
        mode = "reduce-overhead" if device is not None and device.type == "cuda" else "default"
        self.compiled = [torch.compile(model, mode=mode, dynamic=False)]  # in a list, so as not to be a submodule

    def forward(self, images):
        if self.reason is not None:
            return self.model(images)
        try:
            return self.compiled[0](images)
        except Exception as error:  # Dynamo, Inductor, Triton, the C++ compiler and CUDA each have errors of their own
            output = self.model(images)  # an error of the images or the model comes again here
            self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"Not compiled, goes on with PyTorch's modules. {self.reason}", flush=True)
            return output
