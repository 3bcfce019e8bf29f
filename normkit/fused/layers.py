"""The network as the kernel sees it: a list of layers, each of a few plain modules of PyTorch."""

from typing import NamedTuple

from torch import nn

from normkit.fused import params

# Modules and parameters are read from PyTorch's own dictionaries: this runs at every call, and attributes of a module
# take ten times as long.


class ConvNormReLU(NamedTuple):
    """3×3 convolution, the output of layer number skip_source added (-1: none), norm, ReLU, dropout."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | nn.GroupNorm
    dropout: nn.Dropout2d
    skip_source: int = -1

    kind = params.CONV_NORM_RELU

    def parameters(self):
        return [*parameters_of(self.conv), *parameters_of(self.norm)]

    def out_size(self, H, W):
        return H, W


class Conv1x1MaxPool(NamedTuple):
    """1×1 convolution, 2×2 max pooling."""

    conv: nn.Conv2d
    pool: nn.MaxPool2d

    kind = params.CONV1X1_MAXPOOL

    def parameters(self):
        return parameters_of(self.conv)

    def out_size(self, H, W):
        return H // 2, W // 2


class AvgPoolLinear(NamedTuple):
    """Global average pooling, 1×1 convolution of what it leaves."""

    pool: nn.Module
    conv: nn.Conv2d

    kind = params.AVGPOOL_LINEAR

    def parameters(self):
        return parameters_of(self.conv)

    def out_size(self, H, W):
        return 1, 1


def parameters_of(module):
    """Returns a module's weight and bias; None for one that it lacks."""
    return module._parameters.get("weight"), module._parameters.get("bias")


def layers_of(net):
    """Returns the layers of a model.Net, in the order in which they run."""
    modules = net._modules

    def conv(name, skip_source=-1):
        block = modules[name]._modules
        return ConvNormReLU(block["conv"], block["norm"], block["dropout"], skip_source if net.skip else -1)

    return [
        conv("C1"),
        conv("C2"),
        Conv1x1MaxPool(modules["c3"], modules["P1"]),
        conv("C3"),
        conv("C4"),
        conv("C5", skip_source=3),  # C3
        Conv1x1MaxPool(modules["c6"], modules["P2"]),
        conv("C7"),
        conv("C8"),
        conv("C9", skip_source=7),  # C7
        AvgPoolLinear(modules["GAP"], modules["C10"]),
    ]
