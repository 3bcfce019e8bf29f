"""What computes a network: its modules, the fused kernel, CUDA graphs, or torch.compile."""

import contextlib

import torch
from torch import nn

from normkit.checks import check_choice, check_logits, check_model, in_words
from normkit.device import autocast, device_of
from normkit.fused import Fused, FusedLoss, fuse
from normkit.graph import Graphed, GraphedLoss

BACKENDS = ("auto", "eager", "fused", "compile")


def choose_backend(backend, model):
    """Returns (network, line): what computes the model, and in words which that is and why no faster one runs.

    "auto": the fused kernel on a CPU, CUDA graphs on a GPU, where supported, else the model itself. "fused": the
    kernel; raises ValueError where it is not supported. "compile": torch.compile, on a GPU in CUDA graphs.
    What an earlier call returned is unwrapped first, except that "auto" and "compile" keep a compiled one.
    """
    check_choice("backend", backend, BACKENDS)
    check_model(model)
    if backend in ("auto", "compile") and is_compiled(model):
        return model, compiled_line(model)
    given, model = model, plain_model(model)
    if backend == "eager":
        return model, "eager: PyTorch's modules"
    if backend == "compile":
        graphed = Graphed(model)
        compiled = Compiled(model, in_graphs=graphed.reason is None)
        graphed.compiled.append(compiled)
        network = graphed if graphed.reason is None else compiled
        return network, compiled_line(network)
    device = device_of(model)
    if backend == "auto" and device is not None and device.type == "cuda":
        graphed = given if isinstance(given, Graphed) else Graphed(model)
        if graphed.reason is None:
            return graphed, graphed_line(graphed)
        return model, f"eager: PyTorch's modules (no CUDA graphs: {graphed.reason})"
    fused = fuse(model)
    if fused.reason is None:
        fused.required = backend == "fused"
        return fused, "fused: one kernel for the whole network"
    if backend == "fused":
        raise ValueError(f"backend='fused' cannot be had: {fused.reason}. Choose 'auto' or 'eager'")
    return model, f"eager: PyTorch's modules (no fused kernel: {fused.reason})"


def is_compiled(network):
    return isinstance(network, Compiled) or isinstance(network, Graphed) and bool(network.compiled)


def compiled_line(network):
    compiled = network.compiled[0] if isinstance(network, Graphed) else network
    if compiled.reason is not None:
        return f"eager: PyTorch's modules (not compiled: {compiled.reason})"
    return "torch.compile" if compiled is network else "torch.compile, in CUDA graphs of whole steps"


def graphed_line(graphed):
    if graphed.kernels_reason is None:
        return "CUDA graphs, in bfloat16 of Triton kernels, else of PyTorch's modules"
    return f"CUDA graphs of PyTorch's modules (no Triton kernels: {graphed.kernels_reason})"


def plain_model(network):
    """Returns the model that a Fused, Graphed or Compiled computes, or else what was given."""
    return network.model if isinstance(network, Fused | Graphed | Compiled) else network


def compute_logits(network, images, compute_dtype):
    """Returns checked logits (N, classes): float64 from a float64 network, else float32."""
    with autocast(images.device, compute_dtype):
        logits = check_logits(network(images), images)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def evaluating(network):
    """Puts a network into evaluation mode; on exit, restores each module's mode by its own train().

    An exported program has no modes, and computes in the one in which it was exported.
    """
    modes = [(module, module.training) for module in network.modules() if hasattr(module, "training")]
    with torch.no_grad():  # as train() may merge weights, in place
        try:
            network.eval()
        except NotImplementedError:
            if not isinstance(network, torch.fx.GraphModule):
                raise
    try:
        yield
    finally:
        with torch.no_grad():
            for module, mode in modes:  # parents before children
                if module.training != mode:
                    module.train(mode)


def fast_loss(network, criterion, dtype, undisturbed):
    """Returns a GraphedLoss or a FusedLoss, which computes a batch's loss and gradients without autograd where it can.

    undisturbed: see FusedLoss.
    """
    if isinstance(network, Graphed):
        return GraphedLoss(network, criterion, dtype)
    return FusedLoss(network, criterion, dtype, undisturbed)


class Compiled(nn.Module):
    """Calls the model as compiled by torch.compile, on CUDA in CUDA graphs.

    in_graphs: the caller records it in larger graphs, so it makes none. If compiling fails, prints so once and calls
    the model itself; reason is then the error in words, else None.
    """

    def __init__(self, model, in_graphs=False):
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)  # a frozen ScriptModule has no mode
        self.reason = None
        torch.compiler.reset()  # else earlier models count against Dynamo's limit, past which it stops compiling
        device = device_of(model)
        own_graphs = device is not None and device.type == "cuda" and not in_graphs
        mode = "reduce-overhead" if own_graphs else "default"
        self.compiled = [torch.compile(model, mode=mode, dynamic=False)]  # in a list, so as not to be a submodule

    def forward(self, images):
        if self.reason is not None:
            return self.model(images)
        try:
            return self.compiled[0](images)
        except Exception as error:  # Dynamo, Inductor, Triton, the C++ compiler and CUDA each have errors of their own
            output = self.model(images)  # raises again if images or model are at fault
            self.reason = in_words(error, 200)
            print(f"Not compiled, goes on with PyTorch's modules. {self.reason}", flush=True)
            return output
