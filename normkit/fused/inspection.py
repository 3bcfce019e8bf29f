"""Remembers whether a network meets the kernel's conditions, until the network changes."""

import functools
import operator
from itertools import chain

from torch import nn

from normkit.fused import legality, params
from normkit.fused.function import layouts_of, prepare_call
from normkit.fused.layers import layers_of


class Inspection:
    """Checks the conditions on a network once; is_current() says in half the time whether they still hold.

    reason: why no kernel or graph can stand in for the network on device_type, or None. The other attributes exist
    only if it is None: modules, layers, their parameters, the number of classes, and frozen: whether a batch norm is
    in evaluation mode.
    """

    def __init__(self, net, device_type="cpu"):
        self.reason = next(legality.of_network(net, device_type), None)
        if self.reason is not None:
            return
        self.net = net
        self.modules = modules = legality.modules_of(net)
        self.types = list(map(type, modules))
        attributes = list(map(vars, modules))
        inner = [value for each in attributes for value in each.values() if isinstance(value, dict)]
        self.dicts, self.empty = attributes + [each for each in inner if each], [each for each in inner if not each]
        self.keys, self.values = list(chain(*self.dicts)), list(chain(*map(dict.values, self.dicts)))
        self.tensors = tensors_of(modules)
        self.layouts = layouts_of(self.tensors)
        # Checked again, as another thread may have changed the network meanwhile.
        self.reason = next(legality.of_network(net, device_type), None)
        self.layers = layers = layers_of(net)
        self.parameters = [parameter for layer in layers for parameter in layer.parameters()]
        self.classes = len(self.parameters[-1])
        norms = [layer.norm for layer in layers if layer.kind == params.CONV_NORM_RELU]
        self.frozen = any(type(norm) is nn.BatchNorm2d and not norm.training for norm in norms)
        self.prepare_call = functools.lru_cache(functools.partial(prepare_call, layers))

    def is_current(self, net):
        """Returns whether net is the one inspected, with nothing changed but numbers: one attribute more is a change.

        A module's attributes are compared by identity, as a user-defined == may say anything, and so are those
        that its dicts hold: hooks, parameters, buffers and children.
        """
        if self.reason is not None or net is not self.net:
            return False
        modules, values = self.modules, chain.from_iterable(map(dict.values, self.dicts))
        try:
            return (
                all(map(operator.is_, map(vars, modules), self.dicts))
                and list(map(type, modules)) == self.types
                and not any(self.empty)
                and list(chain.from_iterable(self.dicts)) == self.keys
                and all(map(operator.is_, values, self.values))
                and layouts_of(self.tensors) == self.layouts
            )
        except Exception:  # of a dict that another thread changes, or of something user-defined
            return False


def tensors_of(modules):
    return [
        tensor
        for attributes in map(vars, modules)
        for tensors in ("_parameters", "_buffers")
        for tensor in attributes[tensors].values()
    ]
