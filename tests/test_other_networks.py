"""The picture of networks that are not the kit's: receptive fields, and text that keeps apart."""

import itertools

import pytest
import torch
from torchvision.models import resnet18

import model
from normkit import anatomy


class Branches(torch.nn.Module):
    """Runs layers side by side, as an Inception block does."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], 1)


class Halves(torch.nn.Module):
    """Writes its output into memory of its own, part by part."""

    def forward(self, x):
        out = torch.empty(x.shape)
        out[:, :2], out[:, 2:] = x[:, 2:], x[:, :2]
        return out


class Pooled(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.max_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1)), 2)


def conv(*size, kind=torch.nn.Conv2d, **options):
    return kind(*size, **options)


OF_ONES_OWN = {
    "branches": [
        Branches(conv(3, 4, 1), conv(3, 4, 3, padding=1), conv(3, 4, 5, padding=2)),
        Branches(torch.nn.Sequential(conv(12, 4, 3, padding=1), conv(4, 4, 3, padding=1)), torch.nn.Identity()),
    ],
    "transposed": [
        conv(3, 4, 4, stride=2, padding=1),
        conv(4, 4, 3, kind=torch.nn.ConvTranspose2d, stride=2, padding=1, output_padding=1),
        conv(4, 4, 3, padding=1),
    ],
    "functions": [conv(3, 4, 3, padding=1), Pooled(), conv(4, 4, 5), torch.nn.Upsample(scale_factor=2), conv(4, 4, 3)],
    "written in parts": [conv(3, 4, 3, padding=1), Halves(), conv(4, 4, 3)],
    "pooling of its own stride": [torch.nn.LPPool2d(2, 2), conv(3, 4, 3)],
}


@pytest.mark.parametrize("layers", OF_ONES_OWN.values(), ids=OF_ONES_OWN)
def test_the_receptive_field_of_ones_own_network_is_how_far_a_pixel_reaches(layers):
    """Probed: an image for each column, which is not a number there; whatever sees it is none, either."""
    x, size = torch.zeros(64, 3, 64, 64), 64
    x[range(size), :, :, range(size)] = torch.nan
    steps, _ = anatomy.trace_network(torch.nn.Sequential(*layers), size)
    for layer, step in zip(layers, steps, strict=True):
        x = layer(x)
        assert step["field"] == int(x.isnan().any(1)[:, x.shape[2] // 2].sum(0).max())


def test_the_texts_of_any_network_keep_apart():
    wide = torch.nn.Sequential(conv(3, 64, 5, stride=2), torch.nn.Flatten(), torch.nn.LazyLinear(10))
    up = torch.nn.Sequential(*[conv(3, 3, 2, kind=torch.nn.ConvTranspose2d, stride=2) for _ in range(3)])  # to 256×256
    wide(torch.zeros(1, 3, 32, 32))
    for net, size in ((wide, 32), (up, 32), (model.Net(), 224), (resnet18(), 64), (conv(3, 4, 3), 32)):
        figure = anatomy.plot_network(net, size)
        figure.canvas.draw()
        (ax,) = figure.axes
        boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
        boxes += [patch.get_window_extent() for patch in ax.patches]
        assert not any(a.padded(-1).overlaps(b.padded(-1)) for a, b in itertools.combinations(boxes, 2))
