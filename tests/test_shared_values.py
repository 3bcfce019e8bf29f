"""A value that two places hold is changed in both, or put in the place of one, as it was before the stop."""

import copy
import types

import numpy as np
import pytest
import torch
from helpers import fit, linear, same
from torch import nn
from torch.utils.data import DataLoader, Dataset

from normkit.attributes import MovingAttributes


class Pairs(Dataset):
    """What it gives begins as what it was given."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.current, self.order = images, list(range(len(labels)))
        self.used = self.order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        i = self.used[i % len(self.used)]
        return torch.as_tensor(self.current[i]), self.labels[i]


def put_other_images(pairs, history):
    pairs.current = pairs.images * (1 + len(history))


def use_some(pairs, history):
    pairs.used = [pairs.order[:8], pairs.order[::-1], pairs.order][len(history) - 1]


def change_the_images(pairs, history):
    pairs.current *= 0.5


def change_the_order(pairs, history):
    pairs.used.append(pairs.used.pop(3))


ACTIONS = put_other_images, use_some, change_the_images, change_the_order


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda each: each.__name__)
def test_what_two_attributes_hold(action, kind, loaders, tmp_path):
    images, labels = next(iter(loaders[1]))
    images, labels = images[:24], labels[:24]

    def trained(epochs, file):
        given = images.clone() if kind is torch.Tensor else images.numpy().copy()
        pairs, net = Pairs(given, labels), linear()
        loader, optimizer = DataLoader(pairs, 8), torch.optim.SGD(net.parameters(), 0.01)
        fit(
            net,
            (loader, loader),
            optimizer,
            epochs=epochs,
            checkpoint=file,
            on_epoch=lambda history: action(pairs, history),
        )
        return net.state_dict(), torch.as_tensor(given), vars(pairs)

    whole = trained(3, tmp_path / "whole")
    trained(2, tmp_path / "parts")
    assert same(trained(3, tmp_path / "parts"), whole)
    assert (action is change_the_images) == (not torch.equal(whole[1], images)), "else the caller's are as they were"


class Cached(nn.Linear):
    """Keeps what it last computed with, which begins as the weight itself."""

    def __init__(self):
        super().__init__(3 * 16 * 16, 10)
        self.used = self.weight.data

    def forward(self, x):
        self.used = (self.weight / self.weight.norm()).detach()
        return super().forward(x.flatten(1))


def normalised():
    return nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(3 * 16 * 16, 10)))


@pytest.mark.parametrize("build", [Cached, normalised])
def test_what_begins_as_a_weight_is_not_written_into_it(build, loaders, tmp_path):
    torch.manual_seed(0)
    start = build()

    def trained(epochs, file):
        net = copy.deepcopy(start) if build is Cached else build()
        net.load_state_dict(start.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
        fit(net, loaders, optimizer, epochs=epochs, checkpoint=file)
        return {name: value.clone() for name, value in net.state_dict().items()}

    whole, once = trained(2, tmp_path / "whole"), trained(1, tmp_path / "parts")
    assert same(trained(1, tmp_path / "parts"), once) and same(trained(2, tmp_path / "parts"), whole)


class Count:
    def __init__(self, number):
        self.number = number


def test_a_global_that_is_replaced_is_told_from_what_it_began_as():
    """Both are found under the function and the global's name."""

    def begun():
        function = types.FunctionType((lambda: best).__code__, {"best": Count(1)})  # noqa: F821
        holder, first = types.SimpleNamespace(count=None), function()
        owners = {"on_epoch": function, "on_epoch best": first, "other": holder}
        return function, holder, first, MovingAttributes(owners, owners)

    function, holder, first, attributes = begun()
    holder.count, function.__globals__["best"] = first, Count(2)
    state = attributes.state_dict()
    function, holder, first, attributes = begun()
    attributes.load_state_dict(state | {"started": {}})  # as in another process
    assert holder.count is first and (first.number, function().number) == (1, 2)
