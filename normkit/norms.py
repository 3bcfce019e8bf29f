"""Norms beside the kit's three, for a comparison under the same training: a builder(channels, num_groups) each."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


class RMSNorm(nn.Module):
    """Layer norm without its mean: each image is divided by the root of its mean square, over channels and pixels.

    Zhang and Sennrich 2019, with a scale and a shift for each channel as the kit's norms have.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x):
        rms = (x.square().mean((1, 2, 3), keepdim=True) + self.eps).sqrt()
        return x / rms * self.weight[:, None, None] + self.bias[:, None, None]


class PixelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel by itself, as in transformers and ConvNeXt (Liu et al. 2022)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm in training over 16 images at a time, whatever the batch size (Hoffer et al. 2017)."""

    images = 16

    def forward(self, x):
        parts = x.split(self.images) if self.training else [x]
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in parts])


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised: mean 0 and length 1, so that they keep a signal's size."""

    def _conv_forward(self, x, weight, bias):
        filters = weight.flatten(1)
        filters = F.layer_norm(filters, filters.shape[1:], eps=1e-10) / filters.shape[1] ** 0.5
        return super()._conv_forward(x, filters.view_as(weight), bias)


class StandardisingGroupNorm(nn.GroupNorm):
    """Group norm behind a convolution whose filters are standardised (Qiao et al. 2019)."""


def standardise(block, name, norm):
    """Standardises the convolution beside such a norm; PyTorch calls this where a module becomes part of another."""
    if isinstance(norm, StandardisingGroupNorm) and type(getattr(block, "conv", None)) is nn.Conv2d:
        block.conv.__class__ = StandardisedConv2d


def standardising_group_norm(channels, num_groups):
    if not any(hook is standardise for hook in nn.modules.module._global_module_registration_hooks.values()):
        register_module_module_registration_hook(standardise)
    return StandardisingGroupNorm(channels if num_groups == "channels" else num_groups, channels)


# Functions with names, by which a study tells them apart.
def instance_norm(channels, num_groups):
    return nn.GroupNorm(channels, channels)


def rms_norm(channels, num_groups):
    return RMSNorm(channels)


def pixel_norm(channels, num_groups):
    return PixelNorm(channels)


def ghost_batch_norm(channels, num_groups):
    return GhostBatchNorm(channels)


MORE_NORMS = {
    "none": nn.Identity,
    "instance": instance_norm,
    "RMS": rms_norm,
    "pixel": pixel_norm,
    "standardised": standardising_group_norm,
    "ghost": ghost_batch_norm,
}
