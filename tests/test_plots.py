import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import THREE, drawn, linear, study
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

import utils
from normkit import anatomy, plots, robustness, tables
from normkit.data import Data
from normkit.style import COLORS, colors_of


def test_curves_show_the_histories(results):
    figure = plots.plot_curves(results)
    for ax, name in zip(figure.axes, ("loss", "acc"), strict=True):
        lines = [line for line in ax.lines if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [1, 2]]
        for result, train, test in zip(results, lines[::2], lines[1::2], strict=True):
            for line, split in ((train, "train"), (test, "test")):
                assert list(line.get_ydata()) == [row[f"{split}_{name}"] for row in result.history]
                assert to_hex(line.get_color()) == COLORS[result.norm].lower()
    assert "synthetic" in drawn(figure)
    assert plt.get_fignums() == []  # nothing left open, so a notebook shows it once


def test_curves_of_plain_histories_seeds_and_a_single_epoch(results):
    history = results[0].history
    figure = plots.plot_curves({"mine": history[:1]})
    assert "mine" in drawn(figure) and [line.get_marker() for line in figure.axes[0].lines] == ["_", "o"]
    assert "run 2" in drawn(plots.plot_curves([history, history]))
    assert "batch, run 2" in drawn(plots.plot_curves([results[0], results[0]]))
    other = dataclasses.replace(results[0], seed=1)
    assert "batch, seed 1" in drawn(plots.plot_curves([results[0], other, results[1]]))
    for nothing in ([], {}, {"batch": []}):
        with pytest.raises(ValueError, match="at least one"):
            plots.plot_curves(nothing)


def test_samples_and_mistakes(data):
    assert [len(ax.images) for ax in plots.plot_samples(data, each=3).axes] == [30]
    logits = torch.nn.functional.one_hot(data.test_labels, 10).float() * 5
    logits[7] = torch.eye(10)[(data.test_labels[7] + 1) % 10] * 50
    figure = plots.plot_mistakes(data, logits)
    assert len(figure.axes) == len(plots.plot_disagreements(data, {"batch": logits}).axes) == 5  # one row of two
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    truth, guess = (data.classes[(data.test_labels[7] + i) % 10] for i in (0, 1))
    assert titles == [f"{guess} 100 %\nis {truth}"]
    assert "synthetic" in drawn(figure)


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


def variant_of(ax):
    return ax.get_title().split(",")[0]


def test_confusions_are_the_same_whatever_the_default(data, logits):
    expected = drawn(plots.plot_confusions(data, logits["group"].numpy()))
    with torch.device("meta"):
        assert drawn(plots.plot_confusions(data, logits["group"].numpy())) == expected


def test_confusions_are_counted_by_class(data, logits):
    figure = plots.plot_confusions(data, logits)
    below = next(ax for ax in figure.axes if ax.containers)
    shade = {name: ax.images[0].get_array() for ax in figure.axes if ax is not below for name in [variant_of(ax)]}
    assert shade["batch"].sum() == 0
    assert shade["group"][5, 1] == 100 and shade["group"].sum() == 100
    heights = [[bar.get_height() for bar in bars] for bars in below.containers]
    assert heights[0] == [100] * 10 and heights[1] == [100] * 5 + [0] + [100] * 4
    assert all(height == pytest.approx(90, abs=1.5) for height in heights[2])
    assert "synthetic" in drawn(figure)
    assert {ax.get_xlabel() for ax in figure.axes} == {"predicted", ""} and "true" in drawn(figure)
    none = dataclasses.replace(data, test_labels=torch.where(data.test_labels == 3, 4, data.test_labels))
    figure = plots.plot_confusions(none, {("batch", 0): logits["batch"]})  # a key such as groupby gives
    bars = [bar.get_height() for ax in figure.axes for bar in ax.patches]
    assert np.isnan(bars[3]) and np.isfinite(np.delete(bars, 3)).all()
    assert not [text for text in figure.axes[1].texts if text.get_position()[1] == 3] and "batch, 0" in drawn(figure)


def test_disagreements_are_images_on_which_someone_is_right(data, logits):
    text = drawn(plots.plot_disagreements(data, logits))
    share = 100 * len({*range(10), *(data.test_labels == 5).nonzero().flatten().tolist()}) / len(data.test_labels)
    assert f"disagree on {share:.0f} %" in text
    assert "is cross" in text and "group: ring 100 %" in text
    figure = plots.plot_disagreements(data, logits)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for ax in figure.axes for text in (ax.title, *ax.texts) if text.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "disagree on 0 %" in drawn(plots.plot_disagreements(data, {name: logits["batch"] for name in logits}))


def test_what_predict_returns_goes_straight_into_the_pictures(results, data):
    predicted = utils.predict(results[0].model, utils.get_loaders(data, 64, device="cpu")[1])
    shades = []
    for given in (predicted, predicted[0], predicted[0].numpy(), {"batch": predicted}, {"classes": predicted[0]}):
        figures = [plots.plot_confusions(data, given), plots.plot_disagreements(data, given)]
        figures.append(robustness.plot_calibration(data, given))
        shades.append(figures[0].axes[1].images[0].get_array())
        name = next(iter(given)) if isinstance(given, dict) else "one network"
        assert all(name in drawn(figure) for figure in figures[::2])
        if not isinstance(given, dict):
            assert "most confident mistakes" in drawn(plots.plot_mistakes(data, given))
    assert all(np.array_equal(shade, shades[0]) for shade in shades)


def test_what_are_no_logits_of_the_test_images_is_refused(data, logits):
    right = logits["batch"]
    wrong = [
        ([right, right], TypeError, "list: expected logits .N, classes.; give what utils.predict"),
        (None, TypeError, "NoneType: expected logits"),
        (data.test_labels, TypeError, "expected logits"),
        (right[:20], ValueError, "20 images, and synthetic stand-in has 101 test images: give what utils.predict"),
        ((right, data.test_labels.roll(1)), ValueError, "other labels"),
    ]
    several = (plots.plot_confusions, plots.plot_disagreements, robustness.plot_calibration)
    for given, error, message in wrong:
        for draw in (plots.plot_mistakes, *several):
            with pytest.raises(error, match=message):
                draw(data, given)
    for draw in several:
        with pytest.raises(ValueError, match="the dict is empty"):
            draw(data, {})
        with pytest.raises(ValueError, match=r"logits\['layer'\] has logits of 20 images"):
            draw(data, logits | {"layer": right[:20]})
    with pytest.raises(TypeError, match="logits is a dict: expected"):
        plots.plot_mistakes(data, logits)


def test_each_variant_has_a_colour_of_its_own(data, results):
    names = ["batch", "instance", *(f"v{i}" for i in range(12))]
    colors = colors_of(names)
    assert len(set(colors.values())) == 14 and colors["batch"] == COLORS["batch"]
    assert colors_of(names) == colors  # the same each time
    history = results[0].history
    lines = plots.plot_curves({name: history for name in names}).axes[0].lines
    assert len({line.get_color() for line in lines}) == 14
    below = plots.plot_confusions(data, {name: torch.rand(101, 10) for name in names[:7]}).axes[0]
    bars = [bar for container in below.containers for bar in container]
    assert len({bar.get_facecolor() for bar in bars}) == 7
    ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert all(right <= left for (_, right), (left, _) in zip(ends, ends[1:]))  # no bar hides another


# --------------------------------------------------------------------------------------- study


def test_study_pictures_show_means_and_deviations_of_the_last_epoch():
    rows = study(recipe=["best", "classic"], norm=["batch", "layer"], seed=range(5))
    values = rows.query("epoch == 2 and recipe == 'best' and norm == 'layer'")["test_acc"]
    text = drawn(plots.plot_seeds(rows))
    assert f"{values.mean():.1f} ± {values.std():.1f}" in text and "5 seeds each" in text
    assert "4 to 5 seeds each" in drawn(plots.plot_seeds(rows.query("seed < 4 or norm != 'layer'")))

    rows = study(norm=["batch", "layer"], batch_size=[2, 8, 32], seed=range(3))
    figure = plots.plot_batch_sizes(rows)
    expected = rows.query("epoch == 2 and norm == 'batch'").groupby("batch_size")["test_acc"].mean()
    assert list(figure.axes[0].containers[0][0].get_ydata()) == pytest.approx(expected.tolist())

    rows = study(norm=["group"], num_groups=["8", "16", "1", "channels"], seed=range(3))
    figure = plots.plot_groups(rows)
    labels = [label.get_text().split("\n")[0] for label in figure.axes[0].get_xticklabels()]
    assert labels == ["1", "8", "16", "one a channel"]
    own = plt.figure().subplots()
    assert plots.plot_groups(rows, own) is own.figure and plots.plot_seeds(
        study(recipe=["a"], norm=["batch"], seed=[0])
    )
    plt.close("all")


def test_live_curves_tell_the_time_left_and_keep_their_size():
    live = plots.LiveCurves(["batch", "group"], 4)
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
    live.follow("batch")([row | {"epoch": n, "seconds": 10.0} for n in range(1, 7)])  # more epochs than planned
    assert live.epochs == 6 and live.seconds_left() == 40


@pytest.mark.parametrize("shell", [None, object(), SimpleNamespace(kernel=1)])
def test_live_curves_show_themselves_in_a_notebook_alone(shell, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "get_ipython", lambda: shell)  # IPython's terminal has a shell, but no kernel
    monkeypatch.setattr(plots, "display", lambda picture, display_id: shown.append(picture))
    plots.LiveCurves(["batch"], 1)
    assert len(shown) == hasattr(shell, "kernel")


# ----------------------------------------------------------------------------------- elsewhere


def test_the_curves_take_what_is_at_hand(results):
    for given in (results[0], {"a": results[0]}, (result for result in results), iter(results)):
        assert len(plots.plot_curves(given).axes) == 2
    with pytest.raises(TypeError, match="draws histories, not a table"):
        plots.plot_curves(tables.histories_table(results))
    assert len(tables.results_table(results[0])) == len(tables.results_table({"a": results[0]})) == 1
    figure = plt.figure()
    rows = study(recipe=["best"], norm=["batch"], seed=range(2))
    plots.plot_seeds(rows, figure.subfigures(1, 2)[0].subplots())
    plt.close(figure)


def test_runs_of_one_norm_are_told_apart_by_what_differs(results):
    first = results[0]
    runs = [
        dataclasses.replace(first, recipe=first.recipe.replace(lr=lr), seed=seed) for lr, seed in ((0.1, 0), (1, 5))
    ]
    figure = plots.plot_curves([*runs, results[1]])
    text = drawn(figure)
    assert len([line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]) == 6
    assert "batch, lr 0.1: " in text and "batch, lr 1: " in text and "group: " in text and "seed" not in text


def test_curves_take_tables_rows_and_mixtures_and_refuse_the_rest(results):
    history = results[0].history
    table = tables.histories_table(results)
    text = drawn(plots.plot_curves({norm: rows for norm, rows in table.groupby("norm")}))
    assert all(f"{norm}: {rows['test_loss'].iloc[-1]:.2f}" in text for norm, rows in table.groupby("norm"))
    assert "batch: " in drawn(plots.plot_curves([results[0], history])) and "run: " in drawn(
        plots.plot_curves(history[0])
    )
    wrong = [
        (None, TypeError, "NoneType: expected a result of utils.run, or what utils.fit returns"),
        ("a.csv", TypeError, "str: expected a result"),
        ({"loss": [1, 2]}, TypeError, "loss is a list: expected a result"),
        ([{"epoch": 1, "loss": 2}], ValueError, "rows lack lr, train_loss, train_acc, test_loss, test_acc, which"),
    ]
    for given, error, message in wrong:
        with pytest.raises(error, match=message):
            plots.plot_curves(given)
    for until in (0, "9", 1.5):
        with pytest.raises(ValueError, match=f"until={until!r}: expected a whole number"):
            plots.plot_curves(results, until=until)
    assert plots.plot_curves(results, until=np.int64(9)).axes[0].get_xlim() == (0.5, 9.5)
    assert plots.plot_curves(results, until=1).axes[0].get_xlim()[1] > 2  # the histories reach further


@pytest.mark.parametrize("each", [0, -1, "3", 1.5])
def test_samples_are_a_whole_number(data, each):
    with pytest.raises(ValueError, match=f"each={each!r}: expected a whole number of at least 1"):
        plots.plot_samples(data, each)


def test_axes_to_draw_in_are_one_and_not_an_array():
    axes = plt.figure().subplots(1, 4)
    rows = study(recipe=["best"], norm=["group"], batch_size=[2], num_groups=["1"], seed=range(2)).assign(base_lr=0.1)
    pictures = (plots.plot_seeds, plots.plot_batch_sizes, plots.plot_groups, plots.plot_learning_rates)
    for draw, ax in zip(pictures, axes, strict=True):
        with pytest.raises(TypeError, match=r"ax is a ndarray .4,.: give one of matplotlib's axes, such as axes.0."):
            draw(rows, ax=axes)
        assert draw(rows, ax=ax) is ax.figure
    plt.close("all")


def test_groups_are_those_of_group_norm():
    rows = study(norm=["group", "batch"], num_groups=["1", "4"], seed=range(2))
    rows["test_acc"] = rows["norm"].map({"group": 80.0, "batch": 20.0})
    ax = plots.plot_groups(rows).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [80.0, 80.0] and "2 seeds each" in ax.get_title()
    with pytest.raises(ValueError, match="no rows of group norm, but of batch"):
        plots.plot_groups(rows[rows["norm"] == "batch"])


def test_what_fit_returns_goes_straight_into_the_curves(data):
    net = linear()
    history = utils.fit(
        net, *utils.get_loaders(data, device="cpu"), torch.optim.SGD(net.parameters(), 0.01), epochs=2, progress=False
    )
    figure = plots.plot_curves(history)
    assert [line.get_ydata()[-1] for line in figure.axes[0].lines[:2]] == [
        history[-1][f"{s}_loss"] for s in ("train", "test")
    ]


def test_learning_rates_show_which_runs_diverged():
    lines = []
    for norm, rate, accuracy in (("batch", 0.01, 70), ("batch", 1.0, 40), ("none", 0.01, 50), ("none", 1.0, None)):
        for seed in (0, 1):
            line = {"settings": f"{norm} lr={rate} seed={seed}", "norm": norm, "base_lr": rate, "epoch": 4}
            lines.append(line | {"test_acc": accuracy, "data": "CIFAR-10", "diverged": None if accuracy else "inf"})
    ax = plots.plot_learning_rates(pd.DataFrame(lines)).axes[0]
    means = [list(container.lines[0].get_ydata()) for container in ax.containers]
    assert means == [[70, 40], [50, plots.CHANCE]]
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == 1 and list(crosses[0].get_xdata()) == [1.0, 1.0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.01", "1"] and "2 seeds each" in ax.get_title()


def test_the_league_has_a_panel_for_each_recipe_and_the_best_norm_on_top():
    rows = study(norm=["none", "batch", "ghost"], recipe=["classic", "best"], seed=range(3))
    places = {"none": 20.0, "batch": 80.0, "ghost": 50.0}
    rows["test_acc"] = rows["norm"].astype(str).map(places) + rows["seed"].astype(int)
    rows.loc[(rows["norm"] == "none") & (rows["seed"] == 0), ["test_acc", "diverged"]] = None, "inf"
    classic, best = plots.plot_league(rows).axes
    assert [text.get_text() for text in classic.get_yticklabels()] == ["none", "ghost", "batch"]
    assert (classic.get_title(), best.get_title()) == ("classic recipe", "best recipe")
    for ax in (classic, best):
        assert sorted(text.get_text() for text in ax.texts) == ["17.7", "51.0", "81.0"]  # (10 + 21 + 22) / 3
        dots = {tuple(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"}
        assert dots == {(10, 21, 22), (50, 51, 52), (80, 81, 82)}


def test_a_run_that_diverged_counts_as_chance_everywhere():
    def half_diverged(**columns):
        rows = study(norm=["group", "none"], seed=range(4), **columns)
        is_half = (rows["norm"] == "none") | (rows["seed"] % 2 == 1)
        return rows.assign(test_acc=np.where(is_half, None, 80.0), diverged=np.where(is_half, "inf", None))

    def crosses(ax):
        return [len(line.get_xdata()) for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]

    ax = plots.plot_seeds(half_diverged()).axes[0]
    assert [text.get_text() for text in ax.texts] == ["group\n45.0 ± 40.4", "none\n10.0 ± 0.0"]
    assert crosses(ax) == [2, 4]
    ax = plots.plot_batch_sizes(half_diverged(batch_size=[2, 4])).axes[0]
    assert [container[0].get_ydata().tolist() for container in ax.containers] == [[45, 45], [10, 10]]
    assert {text.get_text() for text in ax.texts} == {"group: 45.0 %", "none: 10.0 %"} and crosses(ax) == [4, 8]
    ax = plots.plot_groups(half_diverged(num_groups=["channels", "2"])).axes[0]
    assert ax.containers[0][0].get_ydata().tolist() == [45, 45] and crosses(ax) == [4]


def test_a_curve_that_ends_in_no_number_keeps_its_name(results):
    history = results[0].history
    lost = [history[0], history[1] | {"test_loss": math.nan, "test_acc": math.nan}]
    never = [row | {"test_loss": math.inf} for row in history]
    loss, accuracy = plots.plot_curves({"lost": lost, "never": never, "whole": history}).axes
    names = [{text.get_text(): text.get_position()[1] for text in ax.texts} for ax in (loss, accuracy)]
    assert {"lost: diverged", "never: diverged"} < {*names[0]} and "lost: diverged" in names[1]
    assert all(math.isfinite(place) for place in (*names[0].values(), *names[1].values()))


def test_learning_rates_are_not_rounded_to_one_digit(results):
    rows = [results[0].history[0] | {"epoch": i, "lr": lr} for i, lr in enumerate((0.01, 0.0025, 0.00025), 1)]
    assert {"lr 0.0025", "lr 0.00025"} < {text.get_text() for text in plots.plot_curves(rows).axes[0].texts}


def test_learning_rates_are_marked_where_all_runs_have_them(results):
    def rates(*given):
        row = results[0].history[0]
        histories = [[row | {"epoch": i, "lr": lr} for i, lr in enumerate(lrs, 1)] for lrs in given]
        texts = plots.plot_curves({str(i): history for i, history in enumerate(histories)}).axes[0].texts
        return sorted(text.get_text() for text in texts if text.get_text().startswith("lr"))

    assert rates([0.1, 0.1, 0.01], [0.1, 0.1, 0.01]) == rates([0.1, 0.1, 0.01], [0.1, 0.1]) == ["lr 0.01"]
    assert rates([0.1, 0.01], [0.01, 0.001]) == rates([0.1, 0.1], [0.1, 0.01]) == rates([0.1, None]) == []


def test_a_first_epoch_may_have_the_number_zero(results):
    for ax in plots.plot_curves([results[0].history[0] | {"epoch": 0}]).axes:
        assert ax.get_xlim()[0] < 0 < ax.get_xlim()[1]


def test_a_network_that_learns_nothing_has_its_numbers_on_the_axis(results):
    rows = [
        row | {f"{split}_acc": 10 + 1e-3 * row["epoch"] for split in ("train", "test")} for row in results[0].history
    ]
    figure = plots.plot_curves(rows)
    drawn(figure)
    assert [ax.yaxis.get_offset_text().get_text() for ax in figure.axes] == ["", ""]


def test_plot_seeds_says_that_axes_are_taken():
    ax = plots.plot_seeds(study(norm=["batch"], seed=range(2))).axes[0]
    with pytest.raises(ValueError, match=r"has drawn in these axes before: give it others, or call ax.clear\(\)"):
        plots.plot_seeds(study(norm=["group"], seed=range(2)), ax)
    ax.clear()
    plots.plot_seeds(study(norm=["group"], seed=range(2)), ax)
    assert [text.get_text().split()[0] for text in ax.texts] == ["group"]


def test_epochs_may_be_out_of_order_and_not_twice(results):
    history = results[0].history
    assert plots.plot_curves(history[::-1]).axes[0].lines[0].get_xdata().tolist() == [1, 2]
    table = tables.histories_table([results[0], dataclasses.replace(results[0], seed=1)])
    with pytest.raises(ValueError, match=r"batch has epoch 1 more than once.*groupby\(\['norm', 'seed'\]\)"):
        plots.plot_curves({norm: rows for norm, rows in table.groupby("norm")})
    text = drawn(plots.plot_curves({name: rows for name, rows in table.groupby(["norm", "seed"])}))
    assert "batch, 0: " in text and "batch, 1: " in text


SIZES = [(8, 8), (12, 20), (64, 64)]


def data_of(size, classes):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (120, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(120) % len(classes)
    return Data("mine", classes, images, labels, images[:60], labels[:60])


@pytest.mark.parametrize("size", SIZES)
def test_networks_on_images_of_other_sizes(size):
    own = data_of(size, tuple("0123456789"))
    results = [utils.run(norm, own, 1, 60, device="cpu", augment=True, progress=False) for norm in THREE]
    images, _ = next(iter(utils.get_loaders(own, 60, device="cpu")[1]))
    stages = {"at the end": {result.norm: result.model for result in results}}
    figures = [anatomy.plot_activations(stages, images), anatomy.plot_network(results[0].model, size[0])]
    text = " ".join(map(drawn, [*figures, plots.plot_curves(results)]))
    assert "layer norm, at the end" in text and "48,178" in text and "mine" in text


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [("yes", "no"), tuple(f"class with a long name {i}" for i in range(10))])
def test_images_of_other_sizes_and_classes_of_ones_own(size, classes):
    own = data_of(size, classes)
    logits = {norm: torch.randn(60, 10, generator=torch.Generator().manual_seed(i)) for i, norm in enumerate(THREE)}
    logits["group"][:, 9] += 100  # a class that the data may not have
    figures = [plots.plot_samples(own, 3), plots.plot_confusions(own, logits), plots.plot_disagreements(own, logits)]
    figures += [plots.plot_mistakes(own, logits[norm]) for norm in ("batch", "group")]
    text = " ".join(map(drawn, figures))
    assert classes[0] in text and (len(classes) == 10 or "class 9" in text)


def test_dollars_in_names_of_classes_begin_no_formula():
    own = data_of((8, 8), ("$0-$50", "$50-$100", "x^{$ $"))
    logits = torch.randn(60, 3)
    figures = plots.plot_samples(own, 3), plots.plot_confusions(own, logits), plots.plot_mistakes(own, logits)
    for figure in figures:
        figure.draw_without_rendering()  # matplotlib would not read the third
        names = [text for text in figure.findobj(plt.Text) if "$0" in text.get_text()]
        assert names and all(text._preprocess_math(text.get_text())[1] is False for text in names)
