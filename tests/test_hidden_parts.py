"""What is trained along in places that no part's state_dict shows goes on, and back, with the weights."""

import pytest
import torch
from helpers import fit, linear, same
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(scope="module")
def pairs(loaders):
    return TensorDataset(*(torch.cat(parts) for parts in zip(*loaders[1])))


class Stopping(DataLoader):
    """Stops the run after the first batch of the third epoch."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for batch in super().__iter__():
            yield batch
            if self.passes == 3:
                raise KeyboardInterrupt


def scale_in_a_criterion(net):
    scale = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*net.parameters(), scale], 0.1, 0.9)
    return optimizer, lambda logits, labels: cross_entropy(logits * scale, labels), lambda: scale.detach()


def scale_in_a_hook(net):
    scale = torch.ones(1, requires_grad=True)
    net[1].register_forward_hook(lambda module, args, logits: logits * scale)
    return torch.optim.SGD([*net.parameters(), scale], 0.1, 0.9), cross_entropy, lambda: scale.detach()


def scale_with_an_optimizer_of_its_own(net):
    scale = torch.ones(1, requires_grad=True)
    optimizer, own = torch.optim.SGD(net.parameters(), 0.1, 0.9), torch.optim.SGD([scale], 0.1, 0.9)

    def criterion(logits, labels):
        if torch.is_grad_enabled():
            (scale.grad,) = torch.autograd.grad(cross_entropy(logits.detach() * scale, labels), scale)
            own.step()
        return cross_entropy(logits * scale.detach(), labels)

    return optimizer, criterion, lambda: scale.detach()


KINDS = [scale_in_a_criterion, scale_in_a_hook, scale_with_an_optimizer_of_its_own]


def trained(build, pairs, epochs, loader=DataLoader, **options):
    """Trains with what a function builds for a network; returns all that has moved."""
    net = linear()
    optimizer, criterion, hidden = build(net)
    history = fit(
        net, (loader(pairs, 32), DataLoader(pairs, 64)), optimizer, epochs=epochs, criterion=criterion, **options
    )
    return list(history), net.state_dict(), optimizer.state_dict(), hidden()


@pytest.mark.parametrize("build", KINDS)
def test_what_is_hidden_goes_on_as_if_never_stopped(pairs, tmp_path, build):
    trained(build, pairs, 2, checkpoint=tmp_path / "c")
    assert same(trained(build, pairs, 4, checkpoint=tmp_path / "c"), trained(build, pairs, 4))


@pytest.mark.parametrize("build", KINDS)
def test_what_is_hidden_is_set_back_with_the_weights(pairs, build):
    assert same(trained(build, pairs, 3, Stopping), trained(build, pairs, 2))
