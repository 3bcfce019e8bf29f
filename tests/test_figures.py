import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

import figures
import model
import utils


@pytest.fixture(scope="module")
def results(data):
    return [utils.run(norm, data, 2, progress=False) for norm in model.NORMS]


def drawn(figure):
    figure.canvas.draw()
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


def test_curves_show_the_histories(results):
    figure = utils.plot_curves(results)
    for ax, name in zip(figure.axes, ("loss", "acc"), strict=True):
        lines = [line for line in ax.lines if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [1, 2]]
        for result, train, test in zip(results, lines[::2], lines[1::2], strict=True):
            for line, split in ((train, "train"), (test, "test")):
                assert list(line.get_ydata()) == [row[f"{split}_{name}"] for row in result.history]
                assert to_hex(line.get_color()) == figures.COLORS[result.norm].lower()
    assert "synthetic" in drawn(figure)
    assert plt.get_fignums() == []  # nothing left open, so a notebook shows it once


def test_curves_of_plain_histories_seeds_and_a_single_epoch(results):
    history = results[0].history
    assert "mine" in drawn(utils.plot_curves({"mine": history[:1]}))
    assert "run 2" in drawn(utils.plot_curves([history, history]))
    assert "batch, seed 0" in drawn(utils.plot_curves([results[0], results[0]]))
    for nothing in ([], {}, {"batch": []}):
        with pytest.raises(ValueError, match="at least one"):
            utils.plot_curves(nothing)


SHARED = {  # values that share a mean with one of them: images, channels of 6, 8
    "batch": (6, 1),
    "group": (1, 2),
    "layer": (1, 8),
    "instance": (1, 1),
}


@pytest.fixture
def layers():
    return {name: build(8, 4) for name, build in model.NORMS.items()} | {"instance": torch.nn.InstanceNorm2d(8)}


def test_norm_sets_are_those_of_the_layers(layers):
    x = torch.randn(6, 8, 3, 3)
    for name, (images, channels) in SHARED.items():
        shared = figures.moved_by(layers[name].train(), x, 5, 7)
        expected = torch.zeros(6, 8, 3, 3, dtype=torch.bool)
        expected[-images:, -channels:] = True
        assert torch.equal(shared, expected)


def test_norm_sets_hold_values_that_hardly_move_anything():
    x = torch.tensor([100.0, -100.0]).repeat(2, 4, 3, 3)  # opposite ones cancel, but for the norm's epsilon
    assert figures.moved_by(torch.nn.GroupNorm(1, 4), x, 0, 0)[0].all()


def test_norm_sets_are_drawn_as_they_are(layers):
    figure = utils.plot_norm_sets(layers, images=6, channels=8, size=2)
    for ax, (name, (images, channels)) in zip(figure.axes, SHARED.items(), strict=True):
        assert f"{images * channels * 4} values" in ax.get_title()
        colored = [patch for patch in ax.patches if len(set(patch.get_facecolor()[:3])) > 1]
        # Of the visible faces: the front, 4 pixels high; the top; the right-hand side.
        assert len(colored) == channels * 4 + images * channels + images * 4
        assert len(ax.patches) == 8 * 4 + 6 * 8 + 6 * 4
        assert name in ax.get_title()


def test_a_further_norm_is_drawn_too_and_drawing_leaves_it_alone():
    further = torch.nn.BatchNorm2d(16)
    assert "mine norm" in drawn(utils.plot_norm_sets({"mine": further}))
    assert further.running_mean.eq(0).all() and further.num_batches_tracked == 0
    rows = study(norm=["mine"], batch_size=[2, 8], seed=range(2))
    assert "mine" in drawn(utils.plot_batch_sizes(rows))
    assert "mine" in drawn(utils.plot_seeds(rows.assign(recipe="best")))


def test_norm_table_counts_sets_statistics_and_trained_numbers(layers):
    weight = {name: layer.weight.clone() for name, layer in layers.items() if name != "instance"}
    table = utils.norm_table(layers, torch.randn(6, 8, 5, 5) * 3 + 2)
    assert table["values that share a mean"].to_dict() == {n: i * c * 25 for n, (i, c) in SHARED.items()}
    assert table["statistics"].tolist() == ["16 a batch", "8 an image", "2 an image", "16 an image"]
    assert table["trained numbers"].tolist() == [16, 16, 16, 0]
    assert table["running statistics"].tolist() == [16, 0, 0, 0]
    assert (table["variance"] == "1.000 to 1.000").all() and (table["largest |mean|"].astype(float) < 1e-6).all()
    assert layers["batch"].running_mean.eq(0).all() and all(layers[n].weight.equal(w) for n, w in weight.items())


def test_norm_table_finds_out_a_norm_that_does_not_normalise():
    class Halved(torch.nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) / 2

    table = utils.norm_table({"halved": Halved(2, 8)}, torch.randn(2, 8, 5, 5))
    assert table.loc["halved", "variance"] == "0.250 to 0.250"


@pytest.mark.parametrize("norm", model.NORMS)
def test_the_network_as_it_is(norm):
    steps, skips = figures.trace_network(model.Net(norm), 32)
    assert " ".join(step["name"] for step in steps) == "C1 C2 c3 P1 C3 C4 C5 c6 P2 C7 C8 C9 GAP C10"
    assert sum(step["parameters"] for step in steps) == 48178
    assert [step["channels"] for step in steps] == [16, 16, 8, 8, 32, 32, 32, 16, 16, 32, 32, 32, 32, 10]
    assert [step["map"] for step in steps] == [32] * 3 + [16] * 5 + [8] * 4 + [1] * 2
    assert skips == [("C3", "C5"), ("C7", "C9")]
    assert figures.trace_network(model.Net(norm, skip=False), 32)[1] == []
    text = drawn(utils.plot_network(model.Net(norm)))
    assert "48,178" in text and "9,312" in text


def test_the_receptive_field_is_how_far_a_pixel_reaches():
    """Probed: positive weights, so that nothing cancels, and maxima that a moved pixel always takes part in."""
    net = model.Net("batch").eval()
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.01 if parameter.dim() > 1 else 1.0)
    fields = {step["name"]: step["field"] for step in figures.trace_network(net, 64)[0]}
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


def test_samples_and_mistakes(data):
    assert len(utils.plot_samples(data, each=3).axes) == 30
    logits = torch.nn.functional.one_hot(data.test_labels, 10).float() * 5
    logits[7] = torch.eye(10)[(data.test_labels[7] + 1) % 10] * 50
    figure = utils.plot_mistakes(data, logits)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    truth, guess = (data.classes[(data.test_labels[7] + i) % 10] for i in (0, 1))
    assert titles == [f"{guess} 100 %\nis {truth}"]
    assert "synthetic" in drawn(figure)


def test_saved_results_of_the_stand_in_are_marked(results, tmp_path, capsys):
    utils.save_results(results, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "synthetic-curves.png",
        "synthetic-histories.csv",
    ]
    table = utils.pd.read_csv(tmp_path / "new" / "synthetic-histories.csv")
    assert len(table) == 6 and table["test_acc"].tolist() == pytest.approx(
        [row["test_acc"] for r in results for row in r.history], rel=1e-5
    )


# ------------------------------------------------------------------------------ after training


@pytest.fixture
def logits(data):
    """Three variants: one always right, one that calls every cross a ring, one that is right but for the first ten."""
    right = torch.nn.functional.one_hot(data.test_labels, 10).float() * 9
    rings = right.clone()
    rings[data.test_labels == 5] = torch.eye(10)[1] * 9
    shifted = right.clone()
    shifted[:10] = right[:10].roll(1, 1)
    return {"batch": right, "group": rings, "layer": shifted}


def test_confusions_are_counted_by_class(data, logits):
    figure = utils.plot_confusions(data, logits)
    panels = {ax.get_label(): ax for ax in figure.axes}
    shade = {name: panels[name].images[0].get_array() for name in logits}
    assert shade["batch"].sum() == 0
    assert shade["group"][5, 1] == 100 and shade["group"].sum() == 100
    heights = [[bar.get_height() for bar in bars] for bars in panels["classes"].containers]
    assert heights[0] == [100] * 10 and heights[1] == [100] * 5 + [0] + [100] * 4
    assert all(height == pytest.approx(90, abs=1.5) for height in heights[2])
    assert "synthetic" in drawn(figure)


def test_disagreements_are_images_on_which_someone_is_right(data, logits):
    text = drawn(utils.plot_disagreements(data, logits))
    share = 100 * len({*range(10), *(data.test_labels == 5).nonzero().flatten().tolist()}) / len(data.test_labels)
    assert f"disagree on {share:.0f} %" in text
    assert "is cross" in text and "group: ring 100 %" in text
    figure = utils.plot_disagreements(data, logits)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for ax in figure.axes for text in (ax.title, *ax.texts) if text.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "disagree on 0 %" in drawn(utils.plot_disagreements(data, {name: logits["batch"] for name in logits}))


def test_activations_before_and_after_each_norm(results, data):
    images = next(iter(utils.get_loaders(data, 64)[0]))[0]
    before = {result.norm: {k: v.clone() for k, v in result.model.state_dict().items()} for result in results}
    for result in results:
        found = figures.norm_quantiles(result.model, images)
        assert list(found) == ["C1", "C2", "C3", "C4", "C5", "C7", "C8", "C9"]
    start = figures.norm_quantiles(model.Net("batch"), images)
    for _, after in start.values():  # what leaves an untrained norm has mean 0 and variance 1
        assert -0.6 < after[2] < 0.3 and 0.8 < after[3] - after[1] < 1.6
    stages = {
        "at the start": {r.norm: model.Net(r.norm) for r in results},
        "at the end": {r.norm: r.model for r in results},
    }
    text = drawn(utils.plot_activations(stages, images))
    assert "layer norm, at the end" in text
    for result in results:
        assert all(result.model.state_dict()[k].equal(v) for k, v in before[result.norm].items())


def test_running_statistics_settle_and_tiny_batches_scatter(results, data):
    loaders = [utils.get_loaders(data, size, device="cpu")[0] for size in (2, 32)]
    mean = results[0].model.C1.norm.running_mean.clone()
    figure = utils.plot_running_statistics(results[0].model, loaders, block="C1", steps=30)
    spreads = [np.std(ax.lines[0].get_ydata()) for ax in figure.axes]
    assert spreads[0] > 1.5 * spreads[1]
    dots, line = (np.asarray(figure.axes[0].lines[i].get_ydata()) for i in (0, 1))
    assert line[1] == pytest.approx(0.9 * line[0] + 0.1 * dots[1], abs=1e-5)
    assert results[0].model.C1.norm.running_mean.equal(mean)


# --------------------------------------------------------------------------------------- study


def study(**columns):
    """One row a combination, with an accuracy and a last epoch of 2 of which the first says nothing."""
    rows = [run | {"data": "CIFAR-10"} for run in utils.grid(**columns)]
    rows = [row | {"settings": " ".join(f"{name}={value}" for name, value in row.items())} for row in rows]
    noise = np.random.default_rng(0).normal(0, 1, len(rows))
    return pd.DataFrame(
        row | {"epoch": epoch, "test_acc": 70 + noise[i] if epoch == 2 else 0.0}
        for i, row in enumerate(rows)
        for epoch in (1, 2)
    )


def test_study_pictures_show_means_and_deviations_of_the_last_epoch():
    rows = study(recipe=["best", "classic"], norm=["batch", "layer"], seed=range(5))
    values = rows.query("epoch == 2 and recipe == 'best' and norm == 'layer'")["test_acc"]
    text = drawn(utils.plot_seeds(rows))
    assert f"{values.mean():.1f} ± {values.std():.1f}" in text and "5 seeds each" in text
    assert "4 to 5 seeds each" in drawn(utils.plot_seeds(rows.query("seed < 4 or norm != 'layer'")))

    rows = study(norm=["batch", "layer"], batch_size=[2, 8, 32], seed=range(3))
    figure = utils.plot_batch_sizes(rows)
    expected = rows.query("epoch == 2 and norm == 'batch'").groupby("batch_size")["test_acc"].mean()
    assert figure.axes[0].containers[0][0].get_ydata() == pytest.approx(expected.to_numpy())

    rows = study(num_groups=["8", "16", "1", "channels"], seed=range(3))
    figure = utils.plot_groups(rows)
    labels = [label.get_text().split("\n")[0] for label in figure.axes[0].get_xticklabels()]
    assert labels == ["1", "8", "16", "one a channel"]
    own = plt.figure().subplots()
    assert utils.plot_groups(rows, own) is own.figure and utils.plot_seeds(
        study(recipe=["a"], norm=["batch"], seed=[0])
    )
    plt.close("all")


def test_live_curves_tell_the_time_left_and_keep_their_size():
    live = utils.LiveCurves(["batch", "group"], 4)
    row = {"lr": 0.1, "train_loss": 1.0, "train_acc": 50.0, "test_loss": 1.0, "test_acc": 50.0}
    sizes = {live.picture().data[16:24]}  # width and height in a PNG's header
    live.follow("batch")([row | {"epoch": 1, "seconds": 10.0}])
    assert live.seconds_left() == 30 + 40
    live.follow("batch")([row | {"epoch": n, "seconds": 10.0} for n in range(1, 5)])
    live.follow("group")([row | {"epoch": 1, "seconds": 20.0}])
    assert live.seconds_left() == 60
    sizes.add(live.picture().data[16:24])
    live.follow("group")([row | {"epoch": n, "seconds": 20.0} for n in range(1, 5)])
    assert live.seconds_left() == 0
    sizes.add(live.picture().data[16:24])
    assert len(sizes) == 1
