import numpy as np
import pytest
import torch
from helpers import THREE, drawn, study
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import model
import utils
from normkit import anatomy, plots
from normkit.fused import fuse
from normkit.norms import MORE_NORMS, PixelNorm

SHARED = {  # values that share a mean with one of them: images, channels of 6, 8
    "batch": (6, 1),
    "group": (1, 2),
    "layer": (1, 8),
    "instance": (1, 1),
}


@pytest.fixture
def layers():
    return {name: model.NORMS[name](8, 4) for name in THREE} | {"instance": torch.nn.InstanceNorm2d(8)}


def test_a_norm_may_be_a_function(monkeypatch):
    def rms(x):
        return x / torch.sqrt((x * x).mean((1, 2, 3), keepdim=True) + 1e-5)

    monkeypatch.setitem(model.NORMS, "rms", lambda channels, num_groups: rms)
    module = torch.nn.Identity()
    module.forward = rms
    x = torch.randn(4, 8, 2, 2)
    by_function, by_module = (anatomy.norm_table({"rms": each}, x) for each in (rms, module))
    assert by_function.equals(by_module)
    anatomy.plot_norm_sets({"rms": rms})
    anatomy.plot_activations({"start": {"rms": model.Net("rms")}}, torch.randn(4, 3, 32, 32), "d")


def test_norm_sets_are_those_of_the_layers(layers):
    x = torch.randn(6, 8, 3, 3)
    for name, (images, channels) in SHARED.items():
        shared = anatomy.moved_by(layers[name].train(), x, 5, 7, 0, 0)
        expected = torch.zeros(6, 8, 3, 3, dtype=torch.bool)
        expected[-images:, -channels:] = True
        assert torch.equal(shared, expected)


def test_norm_sets_hold_values_that_hardly_move_anything():
    x = torch.tensor([100.0, -100.0]).repeat(2, 4, 3, 3)  # opposite ones cancel, but for the norm's epsilon
    assert anatomy.moved_by(torch.nn.GroupNorm(1, 4), x, 0, 0, 0, 0)[0].all()


def test_norm_sets_are_drawn_as_they_are(layers):
    figure = anatomy.plot_norm_sets(layers, images=6, channels=8, size=2)
    for ax, (name, (images, channels)) in zip(figure.axes, SHARED.items(), strict=True):
        assert f"{images * channels * 4} values" in ax.get_title()
        colored = [patch for patch in ax.patches if len(set(patch.get_facecolor()[:3])) > 1]
        # Of the visible faces: the front, 4 pixels high; the top; the right-hand side.
        assert len(colored) == channels * 4 + images * channels + images * 4
        assert len(ax.patches) == 8 * 4 + 6 * 8 + 6 * 4
        assert name in ax.get_title()


def test_numbers_in_the_picture_of_norm_sets_agree_with_their_nouns():
    text = drawn(anatomy.plot_norm_sets({"none": torch.nn.Identity()}, images=1, channels=1))
    assert "no values share a mean" in text and "1 image " in text + " " and "1 channel " in text + " "


def test_a_further_norm_is_drawn_too_and_drawing_leaves_it_alone():
    further = torch.nn.BatchNorm2d(16)
    assert "mine norm" in drawn(anatomy.plot_norm_sets({"mine": further}))
    assert further.running_mean.eq(0).all() and further.num_batches_tracked == 0
    rows = study(norm=["mine"], batch_size=[2, 8], seed=range(2))
    assert "mine" in drawn(plots.plot_batch_sizes(rows))
    assert "mine" in drawn(plots.plot_seeds(rows.assign(recipe="best")))


def test_norm_table_counts_sets_statistics_and_trained_numbers(layers):
    weight = {name: layer.weight.clone() for name, layer in layers.items() if name != "instance"}
    table = anatomy.norm_table(layers, torch.randn(6, 8, 5, 5) * 3 + 2)
    assert table["values that share a mean"].to_dict() == {n: i * c * 25 for n, (i, c) in SHARED.items()}
    assert table["statistics"].tolist() == ["16 a batch", "8 an image", "2 an image", "16 an image"]
    assert table["trainable parameters"].tolist() == [16, 16, 16, 0]
    assert table["running statistics"].tolist() == [16, 0, 0, 0]
    assert (table["variance"] == "1.000 to 1.000").all() and (table["largest |mean|"].astype(float) < 1e-6).all()
    assert layers["batch"].running_mean.eq(0).all() and all(layers[n].weight.equal(w) for n, w in weight.items())


def test_norm_table_counts_no_frozen_parameter_as_trainable():
    frozen = torch.nn.BatchNorm2d(8).requires_grad_(False)
    half = torch.nn.BatchNorm2d(8)
    half.bias.requires_grad_(False)
    table = anatomy.norm_table({"frozen": frozen, "half": half}, torch.randn(2, 8, 2, 2))
    assert [*table["trainable parameters"]] == [0, 8]


def test_norm_table_finds_out_a_norm_that_does_not_normalise():
    class Halved(torch.nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) / 2

    table = anatomy.norm_table({"halved": Halved(2, 8)}, torch.randn(2, 8, 5, 5))
    assert table.loc["halved", "variance"] == "0.250 to 0.250"


def test_norm_table_asks_each_norm_for_its_own_sets():
    x = torch.randn(18, 16, 1, 2)
    lines = {**MORE_NORMS, "lrn": lambda channels, num_groups: torch.nn.LocalResponseNorm(5)}
    table = anatomy.norm_table({name: build(16, 4) for name, build in lines.items()}, x)
    assert table[["values that share a mean", "statistics"]].T.to_dict("list") == {
        "none": [1, "0 an image"],
        "instance": [2, "32 an image"],
        "RMS": [32, "1 an image"],
        "pixel": [16, "4 an image"],
        "standardised": [8, "8 an image"],
        "ghost": ["4 to 32", "64 a batch"],
        "lrn": ["3 to 5", "0 an image"],
    }


def test_norm_table_looks_at_every_pixel():
    class Partly(PixelNorm):
        def forward(self, x):
            return super().forward(x) * torch.tensor([1, 1, 1, 2])  # by column

    table = anatomy.norm_table({"partly": Partly(16)}, torch.randn(2, 16, 2, 4))
    assert table.loc["partly", "variance"] == "1.000 to 4.000"


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_norms_are_asked_where_gradients_are_switched_off(off, layers):
    x = torch.randn(3, 8, 2, 2)
    expected = anatomy.norm_table(layers, x)
    with off():
        assert anatomy.norm_table(layers, x.double()).equals(expected)
        assert "32 values" in drawn(anatomy.plot_norm_sets({"layer": layers["layer"]}, 3, 8, 2))


@pytest.mark.parametrize("norm", THREE)
def test_the_network_as_it_is(norm):
    steps, skips = anatomy.trace_network(model.Net(norm), 32)
    assert " ".join(step["name"] for step in steps) == "C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10"
    assert sum(step["parameters"] for step in steps) == 48178
    assert [step["channels"] for step in steps] == [16, 16, 8, 8, 32, 32, 32, 16, 16, 32, 32, 32, 32, 10]
    assert [step["map"] for step in steps] == [32] * 3 + [16] * 5 + [8] * 4 + [1] * 2
    assert skips == [("C3", "C5"), ("C7", "C9")]
    assert anatomy.trace_network(model.Net(norm, skip=False), 32)[1] == []
    text = drawn(anatomy.plot_network(model.Net(norm)))
    assert "48,178" in text and "9,312" in text and "skip" in text
    assert "skip" not in drawn(anatomy.plot_network(model.Net(norm, skip=False)))


def test_the_receptive_field_is_how_far_a_pixel_reaches():
    """Probed: positive weights, so that nothing cancels, and maxima that a moved pixel always takes part in."""
    net = model.Net("batch").eval()
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.01 if parameter.dim() > 1 else 1.0)
    fields = {step["name"]: step["field"] for step in anatomy.trace_network(net, 64)[0]}
    base = torch.full((1, 3, 64, 64), 0.1)
    with torch.no_grad():
        x, reached = net.C2(net.C1(base)), {}
        for name in ("c3", "P1", "C3"):
            x = getattr(net, name)(x)
        for column in range(64):
            moved = base.clone()
            moved[:, :, :, column] += 1
            y = net.C3(net.P1(net.c3(net.C2(net.C1(moved)))))
            reached[column] = bool((y - x)[0, :, 16, 16].abs().max() > 0)
    assert sum(reached.values()) == fields["C3"] == 10


def test_a_network_with_other_layers_is_drawn_as_it_is():
    net = model.Net()
    net.C7.conv = torch.nn.Conv2d(16, 32, (1, 5), padding=(0, 2))
    net.C8.conv = torch.nn.Conv2d(32, 32, 3, padding=2, dilation=2)
    net.C10 = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 5))
    steps = {step["name"]: step for step in anatomy.trace_network(net, 64)[0]}
    assert [steps[name]["field"] for name in ("P2", "C7", "C8", "C9", "GAP", "C10")] == [20, 36, 52, 60, 64, 64]
    assert [steps[name]["kind"] for name in ("C7", "C10")] == ["1×5 convolution, norm, ReLU", "1×1 convolution"]
    assert [steps["C10"][key] for key in ("channels", "map", "parameters")] == [5, 1, 165]
    assert "1×5 convolution, norm, ReLU" in drawn(anatomy.plot_network(net))


def test_a_network_of_ones_own_is_drawn_as_it_is():
    steps, _ = anatomy.trace_network(resnet18(num_classes=10), 512)
    fields = {step["name"]: step["field"] for step in steps}
    expected = {"conv1": 7, "maxpool": 11, "layer1": 43, "layer2": 99, "layer3": 211, "layer4": 435, "fc": 512}
    assert {name: fields[name] for name in expected} == expected  # of the longer branch; the others are 1×1
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 5), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.AvgPool2d(2),
        torch.nn.Conv2d(6, 16, 5), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10),
    )  # fmt: skip
    steps, _ = anatomy.trace_network(net, 32)
    assert [step["field"] for step in steps] == [5, 5, 5, 6, 14, 32, 32, 32]
    assert [step["kind"].split()[-1] for step in steps] == [
        "convolution", "other", "other", "pooling", "convolution", "pooling", "other", "convolution",
    ]  # fmt: skip
    assert "other" in drawn(anatomy.plot_network(net))


def test_a_step_may_return_more_than_one_tensor():
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = torch.nn.Conv2d(3, 8, 3), torch.nn.MaxPool2d(2, return_indices=True)

        def forward(self, images):
            return self.pool(self.conv(input=images))[0].mean((2, 3))

    steps, _ = anatomy.trace_network(Pooled(), 32)
    assert [(step["map"], step["field"], step["kind"]) for step in steps] == [
        (30, 3, "3×3 convolution"), (15, 4, "pooling"),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [8, 32, 64, 256])
def test_the_boxes_of_a_network_leave_room_for_its_text(size):
    (ax,) = anatomy.plot_network(model.Net(), size).axes
    boxes = [patch.get_bbox() for patch in ax.patches]
    places = [text.get_position()[1] for text in ax.texts]
    assert max(box.y1 for box in boxes) < min(y for y in places if y > 1)
    assert min(box.y0 for box in boxes) > max(y for y in places if y < -1)


@pytest.mark.parametrize("wrap", [fuse, AveragedModel, torch.nn.DataParallel])
def test_pictures_of_a_network_in_a_wrapper_are_those_of_the_network(wrap, loaders, capsys):
    net, images = model.Net("batch", dropout=0.0), torch.randn(2, 3, 16, 16)
    looks = [
        lambda net: anatomy.norm_quantiles(net, images),
        lambda net: anatomy.trace_network(net, 32),
        lambda net: drawn(anatomy.plot_running_statistics(net, loaders[1:], steps=2)),
        lambda net: (anatomy.summarize(net), capsys.readouterr().out),
    ]
    for look in looks:
        assert look(wrap(net)) == look(net)


def test_of_no_network_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="there are no networks"):
        anatomy.plot_activations({"at the start": {}, "at the end": {}}, torch.randn(2, 3, 16, 16))


def test_a_network_without_a_norm_has_no_activations_around_one():
    with pytest.raises(ValueError, match="no block with a norm"):
        anatomy.plot_activations({"start": {"mine": torch.nn.Conv2d(3, 3, 3)}}, torch.randn(2, 3, 8, 8))


def test_pictures_leave_a_network_with_hooks_and_kept_outputs_as_it_was(loaders):
    net = model.Net("batch")
    prune.l1_unstructured(net.C4.conv, "weight", 0.5)
    net.C9.register_forward_hook(lambda block, args, output: setattr(block, "kept", output))
    images = torch.randn(2, 3, 16, 16)
    net(images).sum().backward()
    kept = {(name, key): value for name, module in net.named_modules() for key, value in vars(module).items()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    anatomy.summarize(net)
    figures = [anatomy.plot_network(net), anatomy.plot_activations({"start": {"batch": net}}, images)]
    figures.append(anatomy.plot_running_statistics(net, loaders[1], steps=2))
    assert all(figure.axes for figure in figures)
    now = {(name, key): value for name, module in net.named_modules() for key, value in vars(module).items()}
    assert now.keys() == kept.keys() and all(now[key] is value for key, value in kept.items())
    assert all(value.equal(state[name]) for name, value in net.state_dict().items())


def test_another_default_device_changes_no_picture_and_no_table(layers, loaders, capsys):
    net, x = model.Net("batch", dropout=0.0), torch.randn(3, 8, 1, 2)
    looks = [
        lambda: anatomy.norm_quantiles(net, x.new_ones(2, 3, 32, 32)),
        lambda: anatomy.trace_network(net, 32),
        lambda: anatomy.norm_table(layers, x).to_csv(),
        lambda: drawn(anatomy.plot_norm_sets({"layer": layers["layer"]}, 2, 8, 1)),
        lambda: drawn(anatomy.plot_running_statistics(net, loaders[1], steps=2)),
        lambda: (anatomy.summarize(net), capsys.readouterr().out),
    ]
    for look in looks:
        expected = look()
        with torch.device("meta"):
            assert look() == expected


def test_activations_of_variants_that_not_every_stage_has():
    a, b = model.Net("batch"), model.Net("group")
    stages = {"start": {"batch": a}, "middle": {"group": b, "batch": a}, "end": {"group": b}}
    figure = anatomy.plot_activations(stages, torch.randn(2, 3, 16, 16))
    titles = [[ax.get_title() for ax in figure.axes[row : row + 3]] for row in (0, 3)]
    assert titles == [
        ["batch norm, start", "batch norm, middle", "no batch norm, end"],
        ["no group norm, start", "group norm, middle", "group norm, end"],
    ]
    assert [bool(ax.lines) for ax in figure.axes] == [True, True, False, False, True, True]


# ------------------------------------------------------------------------------ after training


def test_activations_before_and_after_each_norm(results, data):
    images = next(iter(utils.get_loaders(data, 64)[0]))[0]
    before = {result.norm: {k: v.clone() for k, v in result.model.state_dict().items()} for result in results}
    for result in results:
        found = anatomy.norm_quantiles(result.model, images)
        assert list(found) == ["C1", "C2", "C3", "C4", "C5", "C7", "C8", "C9"]
    start = anatomy.norm_quantiles(model.Net("batch"), images)
    for _, after in start.values():  # what leaves an untrained norm has mean 0 and variance 1
        assert -0.6 < after[2] < 0.3 and 0.8 < after[3] - after[1] < 1.6
    stages = {
        "at the start": {r.norm: model.Net(r.norm) for r in results},
        "at the end": {r.norm: r.model for r in results},
    }
    text = drawn(anatomy.plot_activations(stages, images))
    assert "layer norm, at the end" in text
    for result in results:
        assert all(result.model.state_dict()[k].equal(v) for k, v in before[result.norm].items())


@pytest.mark.parametrize("size", [28, 32, 44])
def test_activations_are_those_of_all_rows_and_columns(size):
    net = model.Net("layer")
    net.C1.conv = torch.nn.Identity()
    net.C1.norm = torch.nn.Identity()
    net.C2.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
    images = torch.linspace(0, 1, size).expand(50, 3, size, size)  # darkest at the left
    before, after = anatomy.norm_quantiles(net, images)["C1"]
    assert before == after == pytest.approx([0.01, 0.25, 0.5, 0.75, 0.99], abs=0.03)


def test_running_statistics_settle_and_tiny_batches_scatter(results, data):
    loaders = [utils.get_loaders(data, size, device="cpu")[0] for size in (2, 32)]
    mean = results[0].model.C1.norm.running_mean.clone()
    figure = anatomy.plot_running_statistics(results[0].model, loaders, block="C1", steps=30)
    spreads = [np.std(ax.lines[0].get_ydata()) for ax in figure.axes]
    assert spreads[0] > 1.5 * spreads[1]
    dots, line = (np.asarray(figure.axes[0].lines[i].get_ydata()) for i in (0, 1))
    assert line[1] == pytest.approx(0.9 * line[0] + 0.1 * dots[1], abs=1e-5)
    assert results[0].model.C1.norm.running_mean.equal(mean)
    one = anatomy.plot_running_statistics(results[0].model, loaders[1], block="C1", steps=3)
    assert len(one.axes) == 1 and "batches of 32" in drawn(one)


def test_running_statistics_are_those_of_batch_norm(loaders):
    wrong = [
        ("group", {}, "no block of the model has a norm that keeps running statistics"),
        ("batch", {"block": "C10"}, "unknown block 'C10': choose C1, .* or C9"),
        ("batch", {"channel": 32}, "channel=32: expected a whole number from 0 to 31"),
        ("batch", {"channel": -1}, "channel=-1: expected a whole number"),
    ]
    for norm, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            anatomy.plot_running_statistics(model.Net(norm), loaders[:1], **options)


def test_running_statistics_of_any_loader(small):
    images, labels = next(iter(utils.get_loaders(small, 16, device="cpu")[1]))
    batches = [(images[:12], labels[:12]), (images[12:], labels[12:])]
    sampled = DataLoader(TensorDataset(images, labels), batch_sampler=[range(8), range(8, 16)])
    figure = anatomy.plot_running_statistics(model.Net("batch"), [batches, sampled])
    assert [ax.get_title()[:13] for ax in figure.axes] == ["batches of 12", "batches of 8:"]
    assert "batches of 12:" in drawn(anatomy.plot_running_statistics(model.Net("batch"), batches))


def test_the_running_statistics_of_one_batch_are_seen_and_have_no_deviation(small):
    (ax,) = anatomy.plot_running_statistics(model.Net("batch"), utils.get_loaders(small, 200, device="cpu")[0]).axes
    assert ax.get_title() == "batches of 101" and ax.lines[1].get_marker() == "_"
    assert [tick for tick in ax.get_xticks() if tick % 1] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_in_another_dtype_are_looked_at_too(dtype, capsys):
    anatomy.summarize(model.Net())
    table = capsys.readouterr().out
    net = model.Net().to(dtype)
    assert anatomy.trace_network(net, 32) == anatomy.trace_network(model.Net(), 32)
    anatomy.summarize(net)
    assert capsys.readouterr().out == table and net.C1.conv.weight.dtype == dtype
    images = torch.randn(4, 3, 32, 32)
    same = [anatomy.norm_quantiles(net, x) for x in (images, images.double())]
    assert same[0] == same[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_summary_and_no_picture(dtype, capsys):
    net = model.Net()
    anatomy.summarize(net)
    table = capsys.readouterr().out
    torch.set_default_dtype(dtype)
    try:
        anatomy.summarize(net.to(dtype))
        assert "48,178" in drawn(anatomy.plot_network(net))
        assert "mine norm" in drawn(anatomy.plot_norm_sets({"mine": torch.nn.GroupNorm(4, 16)}))
    finally:
        torch.set_default_dtype(torch.float32)
    assert capsys.readouterr().out == table


def test_a_summary_says_where_it_does_not_count_all_parameters(monkeypatch, capsys):
    class Scale(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.gamma = torch.nn.Parameter(torch.ones(channels, 1, 1))

        def forward(self, x):
            return x * self.gamma

    monkeypatch.setitem(model.NORMS, "scale", lambda channels, num_groups: Scale(channels))
    shared = model.Net()
    shared.C9 = shared.C8  # which runs twice
    for net, total in ((model.Net("scale"), 47_954), (shared, 38_866), (model.Net(), None)):
        anatomy.summarize(net)
        told = f"all parameters: {total:,}" if total else "Estimated Total Size"
        assert told in capsys.readouterr().out.strip("-\n").splitlines()[-1]
