"""Unwrapped copies of networks, so that inspecting one leaves the original as it was."""

import copy

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode

WRAPPED = ["model"], ["module"], ["_orig_mod"]  # the only child of Fused or Graphed, DataParallel, torch.compile's


def unwrapped(network):
    """Returns the network inside wrappers of PyTorch and the kit, which compute the same.

    A traced or scripted module is no wrapper: it has code of its own.
    """
    while (
        type(network).__module__.startswith(("torch.", "normkit."))
        and list(dict(network.named_children())) in WRAPPED
        and not isinstance(network, GraphModule | ScriptModule)
    ):
        (network,) = network.children()
    return network


class Detached(TorchFunctionMode):
    """Lets copy.deepcopy copy tensors that hang on a graph: pruned weights, outputs that hooks have kept."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))


@torch.inference_mode(False)  # what is copied there takes no gradients
def copy_of(network):
    """Returns an unwrapped copy of a network, in float32 on the CPU; raises TypeError if it cannot be copied."""
    try:
        with Detached():
            twin = copy.deepcopy(unwrapped(network))
    except TypeError as error:
        raise TypeError(
            f"a network is copied to be looked at, and this one cannot be: {error}. Remove the hook, or whatever else "
            "holds it, for that time"
        ) from error
    for parameter in twin.parameters():
        if not parameter.is_leaf:  # torch.jit copies weights as results of those that it copies
            parameter.detach_().requires_grad_()
    return twin.cpu().float()


def blocks_of(network, prefix=""):
    """Yields (name, block) for each block with a norm, at whatever depth."""
    for name, module in network.named_children():
        if callable(getattr(module, "norm", None)):
            yield prefix + name, module
        else:
            yield from blocks_of(module, f"{prefix}{name}.")
