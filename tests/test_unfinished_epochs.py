"""What is made, grows or moves in an epoch that is stopped, and what of it is told when the run goes on."""

import copy

import pytest
import torch
from helpers import fit, linear, same
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset


class Counting(Dataset):
    """Counts what it gives; after so many images somebody presses the stop button."""

    def __init__(self, pairs, stop=None):
        self.pairs, self.given, self.stop = pairs, 0, stop

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        self.given += 1
        if self.given == self.stop:
            self.stop = None
            raise KeyboardInterrupt
        return self.pairs[i]


class Remembering(nn.Module):
    """Keeps what each training batch came to."""

    def __init__(self):
        super().__init__()
        self.layers = linear()
        self.register_buffer("means", torch.zeros(0))

    def forward(self, x):
        logits = self.layers(x)
        if self.training:
            self.means = torch.cat([self.means, logits.detach().mean()[None]])
        return logits


def trained(pairs, file, epochs=4, stop=None, build=linear, on_epoch=None):
    net, images = build(), Counting(pairs, stop)
    loader, optimizer = DataLoader(images, 32), torch.optim.SGD(net.parameters(), 0.01, 0.9)
    options = {"epochs": epochs, "checkpoint": file, "on_epoch": on_epoch}
    histories = [fit(net, (loader, loader), optimizer, **options) for _ in range(1 + (stop is not None))]
    return net.state_dict(), images.given, histories[-1]


@pytest.mark.parametrize("build", [linear, Remembering])
@pytest.mark.parametrize("kept", [True, False])
def test_stopped_in_an_epoch_it_goes_on_with_the_same_objects(build, kept, pairs, tmp_path):
    whole = trained(pairs, tmp_path / "whole", build=build)
    stop = 2 * 2 * len(pairs) + 40  # each epoch trains and tests on all
    if kept:
        assert same(trained(pairs, tmp_path / "parts", stop=stop, build=build), whole)
    else:
        net, images = build(), Counting(pairs, stop)
        loader, optimizer = DataLoader(images, 32), torch.optim.SGD(net.parameters(), 0.01, 0.9)
        assert fit(net, (loader, loader), optimizer, epochs=4).unfinished == 3
        two = trained(pairs, tmp_path / "two", 2, build=build)
        assert same(net.state_dict(), two[0]) and len(optimizer.state) == len(list(net.parameters()))


def test_what_an_unfinished_epoch_moved_is_no_difference(pairs, tmp_path, capsys):
    net, images = linear(), Counting(pairs, 2 * 2 * len(pairs) + 40)
    loader, optimizer = DataLoader(images, 32), torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(2):
        fit(net, (loader, loader), optimizer, epochs=4, checkpoint=tmp_path / "c", progress=True)
    said = capsys.readouterr().out
    assert "Interrupted in epoch 3" in said and "Going on after epoch 2" in said and "may differ" not in said


class Keeping:
    """Makes something of the network when the second epoch is done."""

    def __init__(self, net, make):
        self.net, self.make, self.kept = net, make, None

    def __call__(self, history):
        if self.kept is None and len(history) >= 2:
            self.kept = self.make(self.net)


@pytest.mark.parametrize("make", [copy.deepcopy, AveragedModel])
def test_weights_that_are_made_on_the_way_and_cannot_be_kept_are_told(make, pairs, tmp_path, capsys):
    for epochs in (3, 4):
        net = linear()
        loader, optimizer = DataLoader(pairs, 64), torch.optim.SGD(net.parameters(), 0.01)
        options = {"checkpoint": tmp_path / "c", "on_epoch": Keeping(net, make), "progress": True}
        fit(net, (loader, loader), optimizer, epochs=epochs, **options)
    assert "It may differ from an uninterrupted run: on_epoch.kept cannot be kept" in capsys.readouterr().out


def test_a_part_that_was_made_after_the_file_was_written_is_told_so(pairs, tmp_path):
    net = linear()
    loader, optimizer = DataLoader(pairs, 64), torch.optim.SGD(net.parameters(), 0.01)
    keeping = Keeping(net, AveragedModel)
    fit(net, (loader, loader), optimizer, epochs=2, checkpoint=tmp_path / "c", on_epoch=keeping)
    with pytest.raises(
        ValueError, match="does not fit this run's on_epoch.kept: it was made after the file was written"
    ):
        fit(net, (loader, loader), optimizer, epochs=3, checkpoint=tmp_path / "c", on_epoch=keeping)
