"""What was found out about a network, and whether it still holds."""

import functools
import operator

from torch import nn

from normkit.fused import legality, params
from normkit.fused.function import layouts_of, prepare_call
from normkit.fused.layers import layers_of


class Inspection:
    """The conditions on a network, gone through once; is_current() tells in a third of the time whether they hold.

    reason: why the kernel cannot compute the network, or None; then there are layers, parameters and norms.
    """

    def __init__(self, net):
        # First of all, so that a change in the meantime, by another thread, is noticed at the next call.
        self.modules = list(net.modules()) if isinstance(net, nn.Module) else []
        self.types = list(map(type, self.modules))
        self.attributes = [copy_attributes(module) for module in self.modules]
        self.tensors = tensors_of(self.modules)
        self.layouts = layouts_of(self.tensors)
        self.reason = next(legality.of_network(net), None)
        if self.reason is None:
            self.layers = layers_of(net)
            self.parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
            norms = [layer.norm for layer in self.layers if layer.kind == params.CONV_NORM_RELU]
            self.frozen = any(type(norm) is nn.BatchNorm2d and not norm.training for norm in norms)
            self.prepare_call = functools.lru_cache(functools.partial(prepare_call, self.layers))

    def is_current(self):
        """Whether nothing of what was looked at has changed but numbers: one attribute more or less is a change."""
        if self.reason is not None:
            return False
        try:
            if list(map(type, self.modules)) != self.types or list(map(vars, self.modules)) != self.attributes:
                return False
        except Exception:  # of somebody's own attribute, which need not have an answer to ==
            return False
        tensors = tensors_of(self.modules)  # by themselves: == compares the numbers of a tensor with one element
        return all(map(operator.is_, tensors, self.tensors)) and layouts_of(tensors) == self.layouts


def copy_attributes(module):
    """Returns a module's attributes; its dicts, of hooks and children, as they are now."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}


def tensors_of(modules):
    return [
        tensor
        for attributes in map(vars, modules)
        for tensors in ("_parameters", "_buffers")
        for tensor in attributes.get(tensors, {}).values()
    ]
