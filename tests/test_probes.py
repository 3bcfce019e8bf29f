"""Gradients, similarity of activations and range of the loss, against their definitions."""

import collections
import copy
import itertools
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torchvision import ops

import model
from normkit import probes
from normkit.backend import Compiled
from normkit.fused import fuse
from normkit.graph import Graphed

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


def test_images_that_are_not_normalised_are_not_measured(batch, data):
    pixels = data.train_images[: len(batch[1])]
    with pytest.raises(ValueError, match="^images of torch.uint8 .*expected a batch of normalised floats"):
        probes.measure(model.Net("batch"), pixels, batch[1], rates=[0.1])


@pytest.mark.parametrize("wrap", [fuse, Graphed, Compiled, AveragedModel, nn.DataParallel, torch.compile])
def test_a_network_is_measured_within_its_wrappers(wrap, batch):
    net = model.Net("batch")
    expected = probes.measure(net, *batch, rates=[0.1])
    wrapper = wrap(nn.DataParallel(net))
    assert probes.measure(wrapper, *batch, rates=[0.1]) == expected


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, torch.jit.script])
def test_a_trace_of_a_network_around_another_is_measured_as_a_whole(trace, batch):
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 10))

        def forward(self, images):
            return 2 * self.model(images)

    net = Doubled()
    expected = list(probes.losses_along_gradient(net, *batch, [0.1]))
    assert list(probes.losses_along_gradient(trace(net), *batch, [0.1])) == [pytest.approx(expected[0])]


@pytest.mark.parametrize(
    "dropout",
    [nn.Dropout(0.5), nn.Dropout3d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5),
     ops.StochasticDepth(0.5, "row"), ops.DropBlock2d(0.5, 3)],
)  # fmt: skip
def test_no_kind_of_dropout_is_at_work(dropout, batch):
    net = model.Net("group", dropout=0.0)
    expected = probes.measure(net, *batch, rates=[0.1])
    net.GAP = nn.Sequential(dropout, net.GAP)
    assert probes.measure(net, *batch, rates=[0.1]) == expected


class OverPixels(nn.Module):
    """Hands the pixels of a map, one after the other, to a module for sequences."""

    def __init__(self, inner, inputs=1):
        super().__init__()
        self.inner, self.inputs = inner, inputs

    def forward(self, x):
        sequence = x.flatten(2).transpose(1, 2)
        return self.inner(*[sequence] * self.inputs)[0].transpose(1, 2).view_as(x)


@pytest.mark.parametrize(
    "layer",
    [OverPixels(nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True), 3),
     OverPixels(nn.GRU(32, 32, num_layers=2, dropout=0.5, batch_first=True))],
)  # fmt: skip
def test_nor_is_that_within_attention_and_recurrent_layers(layer, batch):
    net = model.Net("group", dropout=0.0)
    net.GAP = nn.Sequential(layer, net.GAP)
    assert probes.measure(net, *batch, rates=[0.1]) == probes.measure(net, *batch, rates=[0.1])


def test_blocks_are_found_within_a_network_of_ones_own(batch):
    net = nn.Sequential(collections.OrderedDict(scale=nn.AvgPool2d(1), model=model.Net("batch")))
    found, expected = (dict(probes.similarities(each, batch[0])) for each in (net, net.model))
    assert found == {f"model.{name}": value for name, value in expected.items()}


def test_frozen_layers_are_left_out_and_stay_where_they_are(batch):
    net = model.Net("group", dropout=0.0)
    free = dict(probes.gradient_norms(net, *batch))
    for layer in (net.C1, net.C2, net.c3):
        layer.requires_grad_(False)
    norms = dict(probes.gradient_norms(net, *batch))
    assert norms == {name: pytest.approx(free[name]) for name in CONVOLUTIONS[3:]}
    ((_, found),) = probes.losses_along_gradient(net, *batch, [0.1])
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert found == pytest.approx(F.cross_entropy(net(batch[0]), batch[1]).item(), rel=1e-5)
    net.requires_grad_(False)
    measured = pd.DataFrame(probes.measure(net, *batch, rates=[0.1, 0.2]))
    losses = measured.loc[measured["quantity"] == "loss", "value"]
    assert len(losses) == 2 and losses.nunique() == 1 and "gradient norm" not in set(measured["quantity"])


def test_what_a_network_does_not_use_has_no_gradient(batch):
    net = model.Net("layer")
    expected = probes.measure(net, *batch, rates=[0.1])
    net.unused = nn.Conv2d(3, 3, 1)
    assert probes.measure(net, *batch, rates=[0.1]) == expected


def test_pruned_and_reparametrised_networks_are_measured_as_they_compute(batch):
    net = model.Net("group", dropout=0.0)
    same = copy.deepcopy(net)
    for each in (net, same):
        prune.l1_unstructured(each.C4.conv, "weight", 0.5)
    prune.remove(same.C4.conv, "weight")
    F.cross_entropy(net(batch[0]), batch[1]).backward()  # leaves the pruned weight with a graph
    assert dict(probes.gradient_norms(net, *batch)) == pytest.approx(dict(probes.gradient_norms(same, *batch)))
    assert dict(probes.similarities(net, batch[0])) == pytest.approx(dict(probes.similarities(same, batch[0])))
    for reparametrise in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        net = copy.deepcopy(same)
        reparametrise(net.C4.conv)
        assert dict(probes.gradient_norms(net, *batch)) == pytest.approx(dict(probes.gradient_norms(same, *batch)))


def test_outputs_that_hooks_keep_do_not_stop_the_measuring(batch):
    net = model.Net("layer", dropout=0.0)
    expected = probes.measure(net, *batch, rates=[0.1])
    net.C9.register_forward_hook(lambda block, args, output: setattr(block, "kept", [output]))
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    kept = net.C9.kept[0]
    assert probes.measure(net, *batch, rates=[0.1]) == expected and net.C9.kept[0] is kept
    net.C9.lock = threading.Lock()
    with pytest.raises(TypeError, match="is copied to be looked at, .* '_thread.lock' object. Remove the hook"):
        probes.measure(net, *batch, rates=[0.1])


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_measuring_where_gradients_are_switched_off(off, batch):
    net = model.Net("batch")
    expected = probes.measure(net, *batch, rates=[0.1])
    with off():
        assert probes.measure(net, *(each.clone() for each in batch), rates=[0.1]) == expected
        loss = probes.losses_along_gradient(net, *batch, [0.1])
        next(loss)
        assert not torch.is_grad_enabled()
    next(probes.losses_along_gradient(net, *batch, [0.1]))
    assert torch.is_grad_enabled()


def test_measuring_under_another_default_device(batch):
    net = model.Net("batch")
    expected = probes.measure(net, *batch, rates=[0.1])
    with torch.device("meta"):
        assert probes.measure(net, *batch, rates=[0.1]) == expected


def test_one_image_has_no_other_to_be_like(batch):
    with pytest.raises(ValueError, match="two images or more"):
        list(probes.similarities(model.Net("layer"), batch[0][:1]))


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
    twice = pd.concat([rows, rows.assign(seed=1, value=3 * rows["value"])]).assign(data="some images")
    figure = probes.plot_loss_ranges(twice)
    assert figure.get_suptitle() == probes.plot_by_layer(twice, "similarity").get_suptitle() == "some images: 2 seeds"
    losses = rows[(rows["quantity"] == "loss") & (rows["norm"] == "batch")].groupby("step")["value"].agg(np.ptp)
    assert figure.axes[0].get_title() == f"batch: {np.median([*losses, *3 * losses]):.2f} nats"
    figure = probes.plot_loss_ranges(rows)
    assert not figure.get_suptitle()
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["batch", "layer"]
    for step, title in ((0, "at the start"), (5, "after 5 steps")):
        (ax,) = probes.plot_by_layer(rows[rows["step"] == step], "similarity").axes
        assert ax.get_title() == title and len(ax.lines) == 2
        for ax in probes.plot_loss_ranges(rows[rows["step"] == step]).axes:
            (bar,) = ax.containers[0].lines[2]
            assert np.ptp(bar.get_segments()[0][:, 1]) > 0
    with pytest.raises(ValueError, match="unknown quantity 'loss': choose gradient norm or similarity"):
        probes.plot_by_layer(rows, "loss")
    shuffled = probes.plot_by_layer(rows.sample(frac=1, random_state=0), "gradient norm")
    assert [label.get_text() for label in shuffled.axes[0].get_xticklabels()] == CONVOLUTIONS
    without = rows[(rows["norm"] != "batch") | (rows["layer"] != "C1")]  # one that was frozen, say
    names = [label.get_text() for label in probes.plot_by_layer(without, "gradient norm").axes[0].get_xticklabels()]
    assert names == CONVOLUTIONS
    figure = probes.plot_by_layer(rows.replace({"norm": {"batch": "mine", "layer": "yours"}}), "similarity")
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


@pytest.fixture
def table():
    """What two norms measured with three seeds, at the start and after 4 steps; no network is asked."""
    grid = itertools.product(["batch", "layer"], range(3), (0, 4), ["similarity", "loss"], ("C1", "C2"), (0.1, 0.2))
    rows = pd.DataFrame(grid, columns=["norm", "seed", "step", "quantity", "layer", "rate"])
    return rows.assign(value=rows["rate"] + rows["seed"])


def test_where_there_are_no_rows_of_a_quantity_the_pictures_say_so(table):
    for rows in (table[table["norm"] == "no such norm"], table[table["quantity"] == "gradient norm"]):
        with pytest.raises(ValueError, match="there are no rows of 'similarity': give those of measure"):
            probes.plot_by_layer(rows, "similarity")
        with pytest.raises(ValueError, match="there are no rows of 'loss': give those of measure"):
            probes.plot_loss_ranges(rows)


def test_a_norm_that_lacks_the_first_seed_has_its_own_first_ones_range(table):
    figure = probes.plot_loss_ranges(table[(table["norm"] != "layer") | (table["seed"] > 0)])
    assert [ax.lines[0].get_ydata().tolist() for ax in figure.axes] == [[0.1, 0.1], [1.1, 1.1]]
    assert [ax.get_title() for ax in figure.axes] == ["batch: 0.10 nats", "layer: 0.10 nats"]


@pytest.mark.parametrize("spike", [500.0, np.inf])
def test_a_spike_of_the_loss_leaves_the_others_their_room(table, spike):
    at_spike = (table["norm"] == "layer") & (table["seed"] == 0) & (table["step"] == 4) & (table["rate"] == 0.2)
    figure = probes.plot_loss_ranges(table.assign(value=table["value"].mask(at_spike, spike)))
    batch, layer = figure.axes
    assert batch.get_ylim() == layer.get_ylim() == (0, pytest.approx(1.0))  # 5 times 0.2
    assert (batch.get_title(), layer.get_title()) == ("batch: 0.10 nats", f"layer: 0.10 nats\nup to {spike:.3g} nats")
    (band,) = layer.collections
    assert band.get_paths()[0].vertices[:, 1].max() > 1  # out of the panel


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_losses_that_are_all_zero_or_no_numbers_have_a_picture(table, value):
    figure = probes.plot_loss_ranges(table.assign(value=value))
    figure.draw_without_rendering()
    assert figure.axes[0].get_ylim()[1] > 0


def test_norms_that_end_after_other_steps_are_all_drawn_at_their_end(table):
    longer = table.replace({"step": {4: 8}})[table["norm"] == "layer"]
    start, end = probes.plot_by_layer(pd.concat([table[table["norm"] == "batch"], longer]), "similarity").axes
    assert [len(ax.lines) for ax in (start, end)] == [2, 2]
    assert [ax.get_title() for ax in (start, end)] == ["at the start", "after 4 to 8 steps"]
    only_start = table[(table["norm"] == "batch") | (table["step"] == 0)]
    assert [len(ax.lines) for ax in probes.plot_by_layer(only_start, "similarity").axes] == [2, 1]


@pytest.mark.parametrize("name", ["", np.nan])  # what a file has of it
def test_data_may_lack_a_name(table, name):
    for figure in (
        probes.plot_by_layer(table.assign(data=name), "similarity"),
        probes.plot_loss_ranges(table.assign(data=name)),
    ):
        assert figure.get_suptitle() == "data without a name: 3 seeds"
