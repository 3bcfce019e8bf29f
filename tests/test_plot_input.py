"""What pictures are given: histories and predictions as files, other tools and other functions have them."""

import csv
import dataclasses
import io
import json
import math

import pandas as pd
import pytest
import torch
from helpers import drawn, study, texts_of
from matplotlib import pyplot as plt

import model
import utils
from normkit import anatomy, plots, probes
from normkit.data import Data
from normkit.robustness import calibration, corruptions, plot_calibration, plot_corruptions


def row(**changes):
    metrics = {"train_loss": 2.0, "train_acc": 40.0, "test_loss": 1.5, "test_acc": 50.0}
    return {"epoch": 1, "lr": 0.01} | metrics | changes


HISTORY = [row(epoch=epoch, test_loss=1 / epoch) for epoch in (1, 2, 10)]


def as_text(history):
    """What csv reads of a file: text alone."""
    text = pd.DataFrame(history).to_csv(index=False)
    return list(csv.DictReader(io.StringIO(text)))


def as_null(history):
    """What a NaN becomes in many a JSON file."""
    return json.loads(json.dumps([{**each, "test_loss": None} for each in history]))


def as_tensors(history):
    return [{name: torch.tensor(float(each), requires_grad=True) for name, each in row.items()} for row in history]


def as_table(history):
    return pd.DataFrame(history).convert_dtypes()


def last_first(history):
    return history[::-1]


@pytest.mark.parametrize("form", [as_text, as_tensors, as_table, last_first])
def test_numbers_of_a_history_in_other_forms(form):
    line = plots.plot_curves({"mine": form(HISTORY)}).axes[0].lines[1]
    assert line.get_xdata().tolist() == [1, 2, 10] and line.get_ydata().tolist() == pytest.approx([1, 0.5, 0.1])


def test_a_missing_number_of_a_history_is_not_drawn():
    for form in (as_null(HISTORY), pd.DataFrame(HISTORY).assign(test_loss=pd.NA)):
        assert all(map(math.isnan, plots.plot_curves({"mine": form}).axes[0].lines[1].get_ydata()))


def test_what_is_no_number_in_a_history_is_told():
    for name, value in (("epoch", "one"), ("test_acc", [1, 2]), ("lr", torch.zeros(2))):
        with pytest.raises(ValueError, match=rf"mine has {name}=.* in a row: expected a number"):
            plots.plot_curves({"mine": [row(**{name: value})]})


def test_names_that_read_alike_are_told():
    for keys in ((1, "1"), (("batch", 0), "batch, 0")):
        with pytest.raises(ValueError, match=rf"2 of the keys read '{keys[1]}' in a picture"):
            plots.plot_curves(dict.fromkeys(keys, HISTORY))


def test_a_huge_number_leaves_room_for_the_curves():
    figure = plots.plot_curves([row(epoch=epoch, test_loss=10.0 ** (10 * epoch)) for epoch in (1, 2, 3)])
    assert "run: 1.0e+30" in drawn(figure)
    left, right = (ax.get_window_extent().width for ax in figure.axes)
    assert left == pytest.approx(right, rel=0.2)


def test_data_without_test_images_has_nothing_to_draw(data):
    data = dataclasses.replace(data, test_images=data.test_images[:0], test_labels=data.test_labels[:0])
    for plot in (plots.plot_mistakes, plots.plot_confusions, plots.plot_disagreements, plot_calibration):
        with pytest.raises(ValueError, match="synthetic stand-in has no test images: there is nothing to draw"):
            plot(data, torch.zeros(0, 10))


def test_data_without_training_images_has_no_samples(data):
    none = dataclasses.replace(data, train_images=data.train_images[:0], train_labels=data.train_labels[:0])
    with pytest.raises(ValueError, match="synthetic stand-in has no training images: there is nothing to draw"):
        plots.plot_samples(none)


def test_samples_of_many_classes_fit_on_a_page():
    labels = torch.arange(200) % 100
    own = Data("mine", range(100), *[torch.zeros(200, 3, 8, 8, dtype=torch.uint8), labels] * 2)
    (ax,) = (figure := plots.plot_samples(own)).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [str(label) for label in range(0, 100, 4)]
    assert len(ax.images) == 50 and "25 of 100 classes" in drawn(figure)  # two each
    assert max(figure.get_size_inches()) < 20


def test_where_there_are_no_mistakes_the_picture_says_so(data):
    right = 9.0 * torch.nn.functional.one_hot(data.test_labels, 10)
    assert "no mistakes" in drawn(plots.plot_mistakes(data, right, "batch norm"))
    assert "no mistakes" not in drawn(plots.plot_mistakes(data, -right))


@pytest.mark.parametrize("size", [(16, 64), (64, 16)])
def test_long_images_of_mistakes_fill_their_place(size):
    labels = torch.arange(20) % 2
    own = Data("mine", ("a", "b"), *[torch.zeros(20, 3, *size, dtype=torch.uint8), labels] * 2)
    figure = plots.plot_mistakes(own, -torch.eye(2)[labels])
    drawn(figure)
    assert all(ax.get_window_extent().width > 1.6 * figure.dpi for ax in figure.axes)
    assert figure.get_size_inches()[1] == pytest.approx(2 * (1.7 * size[0] / size[1] + 0.6))


def test_the_legend_of_a_single_epoch_shows_the_marks_that_are_drawn():
    figure = plots.plot_curves({"batch": HISTORY[:1], "group": HISTORY[:1]})
    test, train = figure.legends[0].legend_handles
    assert [(each.get_marker(), each.get_linestyle()) for each in (test, train)] == [("o", "None"), ("_", "None")]
    test, train = plots.plot_curves({"batch": HISTORY, "group": HISTORY[:1]}).legends[0].legend_handles
    assert [(each.get_marker(), each.get_linestyle()) for each in (test, train)] == [("None", "-"), ("None", "--")]


def test_axes_may_be_of_a_subfigure_and_have_to_be_straight():
    rows = study(norm=["batch"], batch_size=[2, 4], seed=range(2))
    figure = plt.figure(layout="constrained")
    assert plots.plot_batch_sizes(rows, figure.subfigures(1, 2)[1].subplots()) is figure
    for projection in ("polar", "3d"):
        with pytest.raises(TypeError, match=r"ax is a \w*Axes\w*: give one of matplotlib's axes, .* straight x and y"):
            plots.plot_batch_sizes(rows, plt.figure().add_subplot(projection=projection))
    plt.close("all")


def test_probabilities_are_as_good_as_logits(data):
    logits = 3 * torch.randn(len(data.test_labels), 10)
    expected = calibration(logits, data.test_labels)[0]
    draws = plot_calibration, plots.plot_confusions, plots.plot_mistakes, plots.plot_disagreements
    pictures = {draw: drawn(draw(data, logits)) for draw in draws}
    for given in (logits.softmax(1), logits.log_softmax(1), logits.softmax(1).half(), logits.softmax(1).numpy()):
        assert calibration(given, data.test_labels)[0] == pytest.approx(expected, abs=1e-3)
        for draw, picture in pictures.items():
            assert drawn(draw(data, given)) == picture
    rounded = logits.softmax(1).round(decimals=2)
    assert calibration(rounded, data.test_labels)[0] == pytest.approx(expected, abs=1e-2)
    sure = torch.nn.functional.one_hot(data.test_labels.roll(1), 10)  # classes alone
    assert " 100 %" in drawn(plots.plot_mistakes(data, sure))


def test_a_table_of_logits_is_as_good_as_an_array(data):
    logits = torch.randn(len(data.test_labels), 10)
    table = pd.DataFrame(logits.numpy())
    assert calibration(table, data.test_labels) == calibration(logits, data.test_labels)
    for draw in (plot_calibration, plots.plot_confusions, plots.plot_mistakes):
        assert drawn(draw(data, table)) == drawn(draw(data, (table, data.test_labels))) == drawn(draw(data, logits))


def test_predictions_of_labels_as_shares_are_as_good_as_those_of_classes(data):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    images = data.test_images.float() / 255
    smooth = 0.9 * torch.nn.functional.one_hot(data.test_labels, 10) + 0.01
    given, expected = (utils.predict(net, [(images, labels)]) for labels in (smooth, data.test_labels))
    for draw in (plot_calibration, plots.plot_confusions, plots.plot_mistakes):
        assert drawn(draw(data, given)) == drawn(draw(data, expected))
        with pytest.raises(ValueError, match="predicted for other labels"):
            draw(data, (given[0], smooth.roll(1, 0)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told(data, value):
    logits = torch.randn(len(data.test_labels), 10)
    logits[3:5, 2] = value
    for draw in (plot_calibration, plots.plot_confusions, plots.plot_mistakes, plots.plot_disagreements):
        with pytest.raises(ValueError, match="has no finite logits of 2 images"):
            draw(data, logits)


def test_rates_that_follow_closely_are_marked_and_the_last_alone_is_named():
    history = [row(epoch=epoch, lr=min(epoch, 4) / 40) for epoch in range(1, 101)]
    for ax in plots.plot_curves({"batch": history, "group": history}).axes:
        assert len([line for line in ax.lines if line.get_linestyle() == ":"]) == 3
        assert [text.get_text() for text in ax.texts if text.get_text().startswith("lr")] == ["lr 0.1"]


def test_a_live_picture_of_one_run_counts_it_once():
    live = plots.LiveCurves("batch", 3)
    live.follow("batch")([row(seconds=10.0)])
    assert live.seconds_left() == 20


def test_the_names_of_twenty_classes_keep_apart():
    classes = tuple(f"superclass with a long name {i}" for i in range(20))
    images, labels = torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.arange(40) % 20
    own = Data("mine", classes, images, labels, images, labels)
    figure = plots.plot_confusions(own, {name: torch.randn(40, 20) for name in ("batch", "group", "layer")})
    drawn(figure)
    beside = next(ax for ax in figure.axes if ax.get_ylabel() == "true")
    boxes = [label.get_window_extent() for label in beside.get_yticklabels()]
    assert len(boxes) == 20 and all(above.y0 > below.y1 - 2 for above, below in zip(boxes, boxes[1:]))


def test_labels_of_seeds_lie_within_the_axes():
    ax = plt.subplots(2, 2, figsize=(8, 6))[1][1, 1]
    drawn(plots.plot_seeds(study(norm=["batch", "group", "layer"], seed=range(5)), ax))
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 3 and all(ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 for box in boxes)
    plt.close("all")


def test_dollars_in_names_begin_no_formula(data):
    first, second = names = ["$0 to $50", "$\\frac{$"]  # matplotlib would not read the second
    named = dataclasses.replace(data, name=second)
    logits = dict(zip(names, torch.randn(2, len(data.test_labels), 10)))
    swept = study(norm=names, seed=range(2), batch_size=[2, 4]).assign(data=second)
    measured = [
        {"norm": norm, "step": step, "quantity": quantity, "layer": layer, "rate": rate, "value": 1e-12**step}
        for norm in names for step in (0, 1) for quantity in ("gradient norm", "loss") for layer in names
        for rate in (1, 2)
    ]  # fmt: skip
    measured = pd.DataFrame(measured).assign(data=second, seed=0)
    images = corruptions(data.test_images[:1])
    bars = pd.DataFrame({"images": kind, "norm": norm, "test_acc": 50.0} for kind in images for norm in names)
    gradients = probes.plot_by_layer(measured, "gradient norm")
    figures = [
        plots.plot_curves(dict.fromkeys(names, HISTORY), second),
        plots.plot_disagreements(named, logits),
        plots.plot_confusions(named, logits),
        plots.plot_seeds(swept),
        plots.plot_league(swept),
        plots.plot_batch_sizes(swept),
        plots.plot_learning_rates(swept.assign(base_lr=swept["batch_size"])),
        plot_calibration(named, logits),
        plot_corruptions(bars, images, second),
        anatomy.plot_norm_sets(dict.fromkeys(names, torch.nn.GroupNorm(4, 16))),
        anatomy.plot_activations({second: dict.fromkeys(names, model.Net())}, torch.randn(2, 3, 8, 8), second),
        probes.plot_loss_ranges(measured),
        gradients,
    ]
    for figure in figures:
        drawn(figure)
        texts = [text for text in texts_of(figure) if "$0" in text.get_text() or "frac" in text.get_text()]
        assert texts and not any(text._preprocess_math(text.get_text())[1] for text in texts)
    ax = gradients.axes[0]
    powers = [text.get_text() for text in ax.get_yticklabels() if text.get_text()]
    assert powers and all(text.startswith(r"$\mathdefault{10^{") for text in powers)
    for limits in (ax.get_ylim(), (2e-3, 2.3e-3), (1e-14, 1e12)):  # also as a reader zooms in and out
        ax.set_ylim(limits)
        gradients.canvas.draw()
        ticks = ax.get_yticklabels(which="both")
        assert any(text.get_text() for text in ticks) and all(text.get_parse_math() for text in ticks)


def test_dollars_in_names_begin_no_formula_in_a_users_own_axes():
    plain = study(norm=["group"], batch_size=[2, 4], seed=range(2))
    plain = plain.assign(num_groups=plain["batch_size"].astype(str), base_lr=plain["batch_size"])
    named = plain.assign(data="$\\frac{$", recipe="$0 to $50")
    for plot in (plots.plot_seeds, plots.plot_batch_sizes, plots.plot_learning_rates, plots.plot_groups):
        figure, (ax, other) = plt.subplots(1, 2)
        plot(named, ax=ax)
        plot(plain, ax=other)
        figure.draw_without_rendering()
        texts = [text for text in texts_of(figure) if "$" in text.get_text()]
        assert ax.title in texts and not any(text._preprocess_math(text.get_text())[1] for text in texts)
        assert other.title.get_parse_math()  # so that a formula may take its place
    plt.close("all")
