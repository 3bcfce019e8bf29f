"""Gradients, likeness of activations and range of the loss, against their definitions."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from normkit import probes

CONVOLUTIONS = "C1 C2 c3 C3 C4 C5 c6 C7 C8 C9 C10".split()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_gradient_norms_are_those_of_a_plain_backward_pass(norm, batch):
    net = model.Net(norm, dropout=0.0)
    norms = dict(probes.gradient_norms(net, *batch))
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    assert list(norms) == CONVOLUTIONS
    assert norms["C4"] == pytest.approx(net.C4.conv.weight.grad.norm().item(), rel=1e-5)
    assert norms["C10"] == pytest.approx(net.C10.weight.grad.norm().item(), rel=1e-5)


def test_similarity_is_the_mean_cosine_of_two_different_images(batch):
    net = model.Net("group", dropout=0.5)
    found = dict(probes.similarities(net, batch[0]))
    net.C1.dropout.eval()
    with torch.no_grad():
        flat = net.C1(batch[0]).flatten(1)
    cosines = [F.cosine_similarity(flat[i], flat[j], dim=0).item() for i in range(6) for j in range(6) if i != j]
    assert found["C1"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert list(found) == "C1 C2 C3 C4 C5 C7 C8 C9".split()
    same = batch[0][:1].expand(4, -1, -1, -1)
    assert all(value == pytest.approx(1, abs=1e-4) for _, value in probes.similarities(model.Net("layer"), same))


def test_losses_along_the_gradient_of_a_quadratic():
    """A linear network of one weight a class: the loss after each rate by hand."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
    images, labels = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    found = dict(probes.losses_along_gradient(net, images, labels, [0.0, 0.5, 2.0]))
    weight = net[1].weight
    (gradient,) = torch.autograd.grad(F.cross_entropy(images @ weight.T, labels), weight)
    for rate, loss in found.items():
        expected = F.cross_entropy(images @ (weight - rate * gradient).T, labels)
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_measuring_leaves_the_network_and_the_seeds_as_they_were(batch):
    net = model.Net("batch", dropout=0.5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seeds = torch.get_rng_state()
    rows = probes.measure(net, *batch, rates=[0.1, 0.2])
    assert len(rows) == 11 + 8 + 2
    assert torch.equal(torch.get_rng_state(), seeds) and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_networks_and_images_of_another_dtype_are_measured_too(batch):
    net = model.Net("group", dropout=0.0)
    expected = probes.measure(net, *batch, rates=[0.1])
    assert probes.measure(net.double(), batch[0].double(), batch[1], rates=[0.1]) == expected


def test_pictures(batch):
    rows = []
    for norm in ("batch", "layer"):
        for step in (0, 5):
            measured = probes.measure(model.Net(norm), *batch, rates=[0.1, 0.2])
            rows += [{"norm": norm, "seed": 0, "step": step} | row for row in measured]
    rows = pd.DataFrame(rows)
    for quantity, layers in (("gradient norm", 11), ("similarity", 8)):
        figure = probes.plot_by_layer(rows, quantity)
        assert [ax.get_title() for ax in figure.axes] == ["at the start", "after 5 steps"]
        assert all(len(line.get_xdata()) == layers for ax in figure.axes for line in ax.lines)
    figure = probes.plot_loss_ranges(rows)
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["batch", "layer"]
    with pytest.raises(ValueError, match="unknown quantity 'loss': choose gradient norm or similarity"):
        probes.plot_by_layer(rows, "loss")
    shuffled = probes.plot_by_layer(rows.sample(frac=1, random_state=0), "gradient norm")
    assert [label.get_text() for label in shuffled.axes[0].get_xticklabels()] == CONVOLUTIONS
    figure = probes.plot_by_layer(rows.replace({"norm": {"batch": "mine", "layer": "yours"}}), "similarity")
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
