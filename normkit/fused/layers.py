"""The network as the kernel sees it: a list of layers, each of a few plain modules of PyTorch."""

from typing import NamedTuple

from torch import nn

from normkit.fused import params


class ConvNormReLU(NamedTuple):
    """3×3 convolution, the output of layer number skip_source added (-1: none), norm, ReLU, dropout."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | nn.GroupNorm
    dropout: nn.Dropout2d
    skip_source: int = -1

    kind = params.CONV_NORM_RELU

    def out_size(self, H, W):
        return H, W

    def named_parameters(self):
        conv, norm = self.conv, self.norm
        return {"weight": conv.weight, "bias": conv.bias, "norm_weight": norm.weight, "norm_bias": norm.bias}


class Conv1x1MaxPool(NamedTuple):
    """1×1 convolution, 2×2 max pooling."""

    conv: nn.Conv2d
    pool: nn.MaxPool2d

    kind = params.CONV1X1_MAXPOOL

    def out_size(self, H, W):
        return H // 2, W // 2

    def named_parameters(self):
        return {"weight": self.conv.weight, "bias": self.conv.bias}


class AvgPoolLinear(NamedTuple):
    """Global average pooling, 1×1 convolution of what it leaves."""

    pool: nn.Module
    conv: nn.Conv2d

    kind = params.AVGPOOL_LINEAR

    def out_size(self, H, W):
        return 1, 1

    def named_parameters(self):
        return {"weight": self.conv.weight, "bias": self.conv.bias}


def layers_of(net):
    """Returns the layers of a model.Net, in the order in which they run."""

    def conv(block, skip_source=-1):
        return ConvNormReLU(block.conv, block.norm, block.dropout, skip_source if net.skip else -1)

    return [
        conv(net.C1),
        conv(net.C2),
        Conv1x1MaxPool(net.c3, net.P1),
        conv(net.C3),
        conv(net.C4),
        conv(net.C5, skip_source=3),  # C3
        Conv1x1MaxPool(net.c6, net.P2),
        conv(net.C7),
        conv(net.C8),
        conv(net.C9, skip_source=7),  # C7
        AvgPoolLinear(net.GAP, net.C10),
    ]
