from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import THREE
from torch import nn

import model
from normkit.anatomy import summarize
from normkit.fused import fuse
from normkit.norms import RMSNorm

NORM_LAYERS = {"batch": "BatchNorm2d", "group": "GroupNorm", "layer": "GroupNorm"}

# Layer, output shape and parameters of each row that torchsummary prints.
ROWS = """
Conv2d-1 16,32,32 448 | NORM-2 16,32,32 32 | Dropout2d-3 16,32,32 0 | Conv2d-4 16,32,32 2320
NORM-5 16,32,32 32 | Dropout2d-6 16,32,32 0 | Conv2d-7 8,32,32 136 | MaxPool2d-8 8,16,16 0
Conv2d-9 32,16,16 2336 | NORM-10 32,16,16 64 | Dropout2d-11 32,16,16 0 | Conv2d-12 32,16,16 9248
NORM-13 32,16,16 64 | Dropout2d-14 32,16,16 0 | Conv2d-15 32,16,16 9248 | NORM-16 32,16,16 64
Dropout2d-17 32,16,16 0 | Conv2d-18 16,16,16 528 | MaxPool2d-19 16,8,8 0 | Conv2d-20 32,8,8 4640
NORM-21 32,8,8 64 | Dropout2d-22 32,8,8 0 | Conv2d-23 32,8,8 9248 | NORM-24 32,8,8 64
Dropout2d-25 32,8,8 0 | Conv2d-26 32,8,8 9248 | NORM-27 32,8,8 64 | Dropout2d-28 32,8,8 0
AvgPool2d-29 32,1,1 0 | Conv2d-30 10,1,1 330
"""


def images(n=4, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_norms_in_order():
    assert list(model.NORMS)[:3] == THREE


@pytest.mark.parametrize("norm", THREE)
def test_parameter_count(norm):
    assert sum(p.numel() for p in model.Net(norm).parameters()) == 48_178


def test_parameters_are_fewer_than_the_limit(norm):
    assert sum(p.numel() for p in model.Net(norm).parameters()) < 50_000


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("skip", [True, False])
def test_parameter_count_whatever_the_options(num_groups, skip):
    assert sum(p.numel() for p in model.Net("group", num_groups, 0.1, skip).parameters()) == 48_178


@pytest.mark.parametrize("norm", THREE)
def test_summary_rows(norm, capsys):
    summarize(model.Net(norm))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "[-1" in line]
    printed = [(row[0], "".join(row[2:-1]).rstrip("]"), row[-1].replace(",", "")) for row in rows]
    expected = [
        tuple(row.split())
        for row in ROWS.replace("NORM", NORM_LAYERS[norm]).replace("\n", "|").split("|")
        if row.strip()
    ]
    assert printed == expected
    totals = [
        line.split(": ")[1] for line in lines if line.startswith(("Total p", "Train", "Input", "Forw", "Params", "Est"))
    ]
    assert totals == ["48,178", "48,178", "0.01", "1.57", "0.18", "1.77"]


def test_every_registered_module_runs(norm):
    net, ran = model.Net(norm), set()
    leaves = {name: module for name, module in net.named_modules() if not list(module.children())}
    for name, module in leaves.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    net(images())
    assert ran == set(leaves)


def test_gradient_reaches_every_parameter(norm):
    net = model.Net(norm, dropout=0)
    F.cross_entropy(net(images(8)), torch.arange(8)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not (norm == "batch" and name.endswith("conv.bias")):  # batch norm takes a channel's bias away again
            assert parameter.grad.abs().max() > 0, name


def test_layer_norm_is_layer_norm_over_channels_and_pixels():
    layer, x = model.NORMS["layer"](16, 4), torch.randn(3, 16, 5, 6)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    weight, bias = (p[:, None, None].expand(16, 5, 6) for p in (layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (16, 5, 6), weight, bias))


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8, 16])
def test_group_norm_by_hand(num_groups):
    layer, x = model.NORMS["group"](16, num_groups), torch.randn(3, 16, 5, 6)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    sets = x.view(3, num_groups, -1)
    normal = (sets - sets.mean(2, keepdim=True)) / (sets.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = normal.view_as(x) * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_batch_norm_by_hand():
    layer, x = model.NORMS["batch"](16, 4), torch.randn(3, 16, 5, 6)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    expected = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)


def test_one_group_equals_layer_norm():
    torch.manual_seed(0)
    group = model.Net("group", num_groups=1, dropout=0)
    torch.manual_seed(0)
    layer = model.Net("layer", dropout=0)
    assert torch.equal(group(images()), layer(images()))


def test_an_image_does_not_depend_on_its_batch_but_under_batch_norm(norm):
    net, batch = model.Net(norm, dropout=0), images()
    other = torch.cat([batch[:1], 2 * images(7)[4:]])
    with torch.no_grad():
        for mode, depends in ((net.train, norm == "batch"), (net.eval, False)):
            mode()
            assert torch.allclose(net(batch)[0], net(other)[0], atol=1e-4) != depends


def test_the_seed_alone_sets_the_convolutions():
    weights = []
    for norm in model.NORMS:
        torch.manual_seed(5)
        weights.append(model.Net(norm).C9.conv.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_head_gain_scales_the_start_of_c10_and_nothing_else():
    states = []
    for head_gain in (1, 2.5):
        torch.manual_seed(0)
        states.append(model.Net(head_gain=head_gain).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor * (2.5 if name == "C10.weight" else 1)), name


@pytest.mark.parametrize("skip", [True, False])
def test_skip_adds_c3_to_c5_and_c7_to_c9_before_the_norm(norm, skip):
    net, seen = model.Net(norm, skip=skip).eval(), {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
    with torch.no_grad():
        net(images())
    for block, source in (("C5", "C3"), ("C9", "C7")):
        convolved = seen[f"{block}.conv"][1]
        added = seen[source][1] if skip else 0
        assert torch.equal(seen[f"{block}.norm"][0], convolved + added)


def test_a_block_is_convolution_norm_relu_dropout_in_this_order(norm, device):
    block = model.ConvBlock(3, 16, model.NORMS[norm](16, 4), dropout=0.3).to(device)
    for parameter in block.norm.parameters():
        nn.init.normal_(parameter)
    x, seen = images().to(device), []
    for forward in (block, lambda x: nn.Dropout2d(0.3)(F.relu(block.norm(block.conv(x))))):
        torch.manual_seed(0)  # the same channels are dropped
        output = forward(x)
        seen.append([output, *torch.autograd.grad(output.square().sum(), list(block.parameters()))])
    assert 0 < (seen[0][0].flatten(2).amax(2) == 0).float().mean() < 1
    assert all(torch.equal(own, plain) for own, plain in zip(*seen))


@pytest.mark.parametrize("n", [1, 3])
def test_the_head_averages_each_map_and_convolves_the_averages(n, device):
    net, x = model.Net().to(device), torch.randn(n, 32, 3, 5, device=device)
    expected = F.conv2d(F.adaptive_avg_pool2d(x, 1), net.C10.weight, net.C10.bias)
    torch.testing.assert_close(net.C10(net.GAP(x)), expected)


@pytest.mark.parametrize("size", [8, 12, 32, 64])
@pytest.mark.parametrize("n", [1, 3])
def test_any_multiple_of_four(norm, size, n, device):
    assert model.Net(norm).to(device)(images(n, size).to(device)).shape == (n, 10)


REFUSED = [(1, 3, 30, 32), (1, 3, 32, 30), (1, 3, 4, 8), (1, 3, 8, 4), (1, 1, 32, 32), (3, 32, 32), (1, 32, 32, 3)]


@pytest.mark.parametrize("shape", REFUSED)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        model.Net()(torch.zeros(shape))


@pytest.mark.parametrize("name", ["batchnorm", "BATCH", None, ""])
def test_unknown_norm(name):
    with pytest.raises(ValueError, match="batch, group, layer"):
        model.Net(name)


@pytest.mark.parametrize("builder", [nn.InstanceNorm2d, partial(nn.BatchNorm2d, momentum=0.01), RMSNorm])
@pytest.mark.parametrize("num_groups", [1, 4, "channels"])
def test_a_class_in_place_of_a_builder_does_not_take_the_groups_for_its_epsilon(builder, num_groups, monkeypatch):
    monkeypatch.setitem(model.NORMS, "mine", builder)
    with pytest.raises(ValueError, match="NORMS\\['mine'\\] took num_groups for eps"):
        model.Net("mine", num_groups)


def test_a_norm_begins_as_it_was_built(monkeypatch):
    class Gated(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.gate = nn.Conv2d(channels, channels, 1)
            nn.init.zeros_(self.gate.weight)

    monkeypatch.setitem(model.NORMS, "gated", lambda channels, num_groups: Gated(channels))
    assert model.Net("gated").C1.norm.gate.weight.count_nonzero() == 0


def test_a_seed_gives_the_same_weights_with_any_number_of_threads():
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        states.append(model.Net().state_dict())
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states)))


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (16, 16, 3, 3), (32, 8, 3, 3), (32, 32, 3, 3), (8, 16, 1, 1)])
def test_initial_weights_are_those_of_pytorchs_orthogonal(shape):
    weights = []
    for draw in (model.orthogonal, nn.init.orthogonal_):
        torch.manual_seed(0)
        weights.append(draw(torch.empty(shape)).float())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "given, kept",
    [
        ({"num_groups": np.int64(8)}, 8),
        ({"num_groups": torch.tensor(8)}, 8),
        ({"dropout": np.float32(0.25)}, 0.25),
        ({"dropout": torch.tensor(0.25)}, 0.25),
        ({"skip": np.bool_(True)}, True),
        ({"skip": 0}, False),
        ({"head_gain": np.float64(2)}, 2.0),
        ({"head_gain": 2}, 2.0),
    ],
)
def test_numbers_of_other_libraries_become_pythons(given, kept):
    net = model.Net("group", **given)
    values = {"num_groups": net.C1.norm.num_groups, "dropout": net.C1.dropout.p}
    [value] = [(values | vars(net))[name] for name in given]
    assert value == kept and type(value) is type(kept)
    assert fuse(net).reason == fuse(model.Net("group")).reason


@pytest.mark.parametrize(
    "given",
    [{"dropout": None}, {"dropout": "0.1"}, {"dropout": 2}, {"dropout": float("nan")}, {"skip": "no"}, {"skip": None},
     {"head_gain": float("inf")}, {"head_gain": 0}, {"head_gain": None}],
)  # fmt: skip
def test_settings_that_mean_nothing(given):
    [name] = given
    with pytest.raises(ValueError, match=f"{name}=.*expected"):
        model.Net(**given)


@pytest.mark.parametrize("num_groups", [0, -1, 3, 32, 2.0, None, True, "4"])
def test_groups_that_do_not_divide(num_groups):
    with pytest.raises(ValueError, match="1, 2, 4, 8, 16 or 'channels'"):
        model.Net("group", num_groups)
