"""Text in pictures, whatever its length and number: none is cut off, and none lies on another."""

import dataclasses
import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import study, texts_of
from matplotlib.colors import to_hex

import model
import utils
from normkit import anatomy, plots, probes, robustness
from normkit.data import Data

LONG = "CIFAR-10, JPEG copy, 5000 training images held out class by class"
STAND_INS = [f"synthetic stand-in, first {n} training images" for n in (50, 80, 100)]


def boxes_of(figure):
    """Yields (text, box in pixels) of all text that shows."""
    figure.draw_without_rendering()
    for text in texts_of(figure):
        if text.get_visible() and text.get_text().strip():
            yield text.get_text(), text.get_window_extent()


def check_layout(figure):
    """Asserts that all text lies within the figure and apart, and leaves room for the axes."""
    boxes = list(boxes_of(figure))
    width, height = figure.bbox.size
    outside = [text for text, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]
    assert not outside
    boxes = [(text, box.padded(-1)) for text, box in boxes]
    for (text, box), (other, meets) in itertools.combinations(boxes, 2):
        assert not box.overlaps(meets), f"{text!r} lies on {other!r}"
    assert all(ax.get_window_extent().width > 45 and ax.get_window_extent().height > 45 for ax in figure.axes)


def history(**changes):
    row = {"lr": 0.01, "train_loss": 1.0, "train_acc": 50.0, "test_loss": 1.0, "test_acc": 50.0}
    return [row | changes | {"epoch": epoch} for epoch in range(1, 5)]


def studies(data=("CIFAR-10",), **columns):
    """Rows of a study of these columns on each of the data, which their lines of settings name."""
    for each in data:
        rows = study(**columns).assign(data=each)
        yield rows.assign(
            settings=[f"{each}: norm={norm} " + line for norm, line in zip(rows["norm"], rows["settings"])]
        )


def rows_of(data=("CIFAR-10",), **columns):
    return pd.concat(studies(data, norm=["layer", "batch"], seed=range(2), **columns), ignore_index=True)


LABELS = {
    "long": [f"batch, data {name}" for name in STAND_INS],
    "many": [f"run {i}" for i in range(30)],
    "one word": ["x" * 60, "batch"],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("spread", [0, 0.3])
def test_names_at_the_ends_of_curves(labels, spread):
    runs = {name: history(test_loss=1 + spread * i, test_acc=50 + spread * i) for i, name in enumerate(labels)}
    check_layout(plots.plot_curves(runs, ", ".join(STAND_INS)))
    check_layout(plots.plot_batch_sizes(study(norm=labels, batch_size=[2, 4], seed=range(2))))
    check_layout(plots.plot_learning_rates(study(norm=labels, seed=range(2)).assign(base_lr=0.1)))


def test_live_curves_of_many_runs_keep_their_size_too():
    live = plots.LiveCurves(LABELS["many"], 4)
    sizes = {live.picture().data[16:24]}  # width and height in a PNG's header
    for label in LABELS["many"][:2]:
        live.follow(label)([row | {"seconds": 1.0} for row in history()])
        sizes.add(live.picture().data[16:24])
    assert len(sizes) == 1


def test_headings_and_captions_of_studies():
    recipes = [utils.get_recipe("best"), utils.get_recipe("classic", lr=0.5)]
    several = rows_of(STAND_INS), rows_of([LONG]), rows_of(recipe=list(map(str, recipes)))
    for rows in (*several, rows_of(warmup=[0.1, 0.2, 0.3, 0.4, 0.5], skip=[True, False])):
        check_layout(plots.plot_seeds(rows))
        check_layout(plots.plot_league(rows))
    names = [f"{name} statistics anew" for name in ("batch", "standardised", "instance")]
    check_layout(plots.plot_seeds(study(norm=names, seed=range(2))))
    for draw in (plots.plot_batch_sizes, plots.plot_learning_rates):
        check_layout(draw(rows_of([LONG]).assign(base_lr=0.1, batch_size=2)))


def test_a_heading_gives_way_to_ticks_that_its_user_moves_above():
    """So headings keep matplotlib's own place, though to have a fixed one would take a sixth less time."""
    figure = plots.plot_curves({"batch": history(test_loss=1.0)})
    for ax in figure.axes:
        ax.set_xticks([sum(ax.get_xlim()) / 2], ["in the middle"])
        ax.xaxis.tick_top()
    check_layout(figure)


def test_numbers_at_ticks_stay_apart():
    rates = np.logspace(-4, 0, 13).tolist()
    rows = study(norm=["batch"], base_lr=rates, seed=range(2))
    figure = plots.plot_learning_rates(rows)
    check_layout(figure)
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(names) == 13 and names[0] == "0.0001" and {"0.00464", "0.01"} & {*names}
    assert all(name in ("", f"{rate:.3g}") for name, rate in zip(names, rates))
    figure = plots.plot_batch_sizes(study(norm=["batch"], batch_size=[2, 50, 96, 100], seed=range(2)))
    check_layout(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "50", "96", ""]


@pytest.fixture
def logits():
    names = ["batch norm, seed 10", "batch, statistics anew", "layer", "a norm whose name goes on, and on, and on"]
    return {name: torch.randn(101, 10) for name in names}


def test_long_names_of_variants(data, logits):
    check_layout(
        plots.plot_disagreements(dataclasses.replace(data, classes=tuple(f"automobile {i}" for i in range(10))), logits)
    )
    check_layout(plots.plot_confusions(data, logits))
    check_layout(robustness.plot_calibration(data, logits))
    images = robustness.corruptions(data.test_images[:1])
    for names, kinds in ((logits, ["clean"]), ([f"batch, statistics anew, {i}" for i in range(5)], images)):
        rows = [{"images": kind, "norm": norm, "test_acc": 50.0} for kind in kinds for norm in names]
        check_layout(robustness.plot_corruptions(pd.DataFrame(rows), images, LONG))


def test_panels_of_many_variants_stay_on_a_page(data):
    torch.manual_seed(0)
    names = [f"standardised {i}" for i in range(10)]
    logits = {name: torch.randn(len(data.test_labels), 10) for name in names}
    losses = pd.DataFrame(itertools.product(names, [0], ["loss"], [0, 1], [1.0, 2.0]))
    losses.columns = ["norm", "seed", "quantity", "step", "value"]
    batches = [[(torch.randn(2, 3, 8, 8), None) for _ in range(5)]] * 10
    figures = [
        plots.plot_confusions(data, logits),
        plots.plot_league(study(norm=["batch"], seed=range(2), batch_size=range(2, 12))),
        robustness.plot_calibration(data, logits),
        anatomy.plot_norm_sets(dict.fromkeys(names, torch.nn.GroupNorm(4, 16))),
        anatomy.plot_running_statistics(model.Net("batch"), batches),
        probes.plot_loss_ranges(losses),
    ]
    for figure in figures:
        check_layout(figure)
        assert len(figure.axes) in (10, 11) and figure.get_size_inches()[0] <= 14.5
    with pytest.raises(ValueError, match="there is nothing to draw: what was given is empty"):
        anatomy.plot_norm_sets({})


CLASSES = {
    "long": "long-horned beetle of the southern forests, the male",
    "two lines": "two\nlines",
    "one word": "x" * 40,
}


@pytest.mark.parametrize("name", CLASSES.values(), ids=CLASSES)
def test_names_of_classes(data, name):
    data = dataclasses.replace(data, classes=(name, *data.classes[1:]))
    chosen = data.test_labels.roll(1)  # wrong now and then
    logits = {norm: 9.0 * torch.eye(10)[each] for norm, each in [("batch", data.test_labels), ("group", chosen)]}
    for figure in (
        plots.plot_samples(data, 3),
        plots.plot_disagreements(data, logits),
        plots.plot_confusions(data, logits),
    ):
        check_layout(figure)


@pytest.mark.parametrize("size", [(8, 256), (256, 8)])
def test_samples_of_long_images_fit_on_a_page(data, size):
    images = torch.zeros(10, 3, *size, dtype=torch.uint8)
    figure = plots.plot_samples(dataclasses.replace(data, train_images=images, train_labels=torch.arange(10)), 10)
    check_layout(figure)
    assert all(2 <= inches <= 14 for inches in figure.get_size_inches())


@pytest.mark.parametrize("each", [1, 3, 10])
def test_headings_of_narrow_pictures(data, each):
    data = dataclasses.replace(data, name=LONG)
    check_layout(plots.plot_samples(data, each))
    check_layout(plots.plot_mistakes(data, torch.randn(101, 10), rows=2, columns=each))


def test_names_of_many_layers():
    layers = [f"layer{i}.conv{j}" for i in range(6) for j in range(4)]
    rows = [{"norm": f"a norm with a long name, {norm}", "step": step, "quantity": "similarity", "layer": layer}
            for norm in range(6) for step in (0, 1) for layer in layers]  # fmt: skip
    check_layout(probes.plot_by_layer(pd.DataFrame(rows).assign(value=0.5), "similarity"))


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(data):
    rows = study(norm=["_mine", "batch"], seed=range(2)).assign(base_lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = [plots.plot_learning_rates(rows), plots.plot_confusions(data, {"_mine": torch.randn(101, 10)})]
    for figure in figures:
        assert "_mine" in [text.get_text() for ax in figure.axes if ax.get_legend() for text in ax.get_legend().texts]


def test_axes_of_ones_own_keep_their_figures_size():
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    plots.plot_batch_sizes(rows_of([LONG], batch_size=[2]), axes[0])
    plots.plot_batch_sizes(rows_of([LONG], batch_size=[2]), axes[1])
    assert figure.get_size_inches().tolist() == [9, 3]
    check_layout(figure)
    plt.close(figure)


@pytest.mark.parametrize("shape, size", [((1, 4), (14, 3)), ((2, 2), (11, 8))])
def test_axes_of_a_plain_figure_make_room_for_their_text(shape, size):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(*shape, figsize=size)
    rows = rows_of(batch_size=[2, 4], num_groups=[1, "channels"]).replace({"norm": {"layer": "group"}})
    rows = rows.assign(base_lr=rows["batch_size"] / 10)
    of_groups, of_sizes = rows[rows["batch_size"] == 2], rows[rows["num_groups"] == "channels"]
    plots.plot_batch_sizes(of_sizes, axes.flat[0])
    plots.plot_learning_rates(of_sizes, axes.flat[1])
    plots.plot_seeds(of_groups, axes.flat[2])
    plots.plot_groups(of_groups, axes.flat[3])
    check_layout(figure)
    figure.tight_layout()
    check_layout(figure)
    plt.close(figure)


def test_a_long_heading_takes_a_second_line_before_it_takes_room_from_its_axes():
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    whole = axes[0].get_window_extent().width
    plots.plot_seeds(rows_of(["CIFAR-10, JPEG copy"]), axes[0])
    check_layout(figure)
    assert axes[0].get_title().count("\n") == 1 and axes[0].get_window_extent().width > 0.8 * whole
    plt.close(figure)


def test_upright_names_stay_in_one_line():
    breeds = [f"long {name} retriever" for name in "abcdefghijklmnopqrst"]
    labels = torch.arange(60) % 20
    split = torch.zeros(60, 3, 8, 8, dtype=torch.uint8), labels
    data = Data("dogs", breeds, *split, *split)
    figure = plots.plot_confusions(data, {norm: torch.randn(60, 20) for norm in ("batch", "group", "layer")})
    check_layout(figure)
    names = [label.get_text() for ax in figure.axes for label in ax.get_xticklabels() if label.get_text()]
    assert len(names) >= 40 and not any("\n" in name for name in names)


def test_other_axes_of_a_figure_stay_as_they_are():
    from matplotlib import pyplot as plt

    pictures, locators = [], []
    for also in (False, True):
        figure, (mine, ax) = plt.subplots(1, 2, figsize=(8, 3))
        mine.plot(pd.date_range("2024-01-01", periods=8), range(8))
        mine.set_title("a heading that reaches further than it should, to be mended by whoever made it")
        figure.suptitle(mine.get_title() + ", and once more " * 8)
        if also:
            plots.plot_batch_sizes(rows_of(batch_size=[2, 4]), ax)
        ax.remove()
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba()))
        locators.append(type(mine.xaxis.get_major_locator()))
        plt.close(figure)
    assert np.array_equal(*pictures) and locators[0] is locators[1]


def test_text_in_dark_axes_can_be_read():
    from matplotlib import pyplot as plt

    with plt.style.context("dark_background"):
        figure, axes = plt.subplots(1, 4, figsize=(20, 4))
    rows = rows_of(batch_size=[2, 4], num_groups=[1]).assign(base_lr=0.1).replace({"norm": {"layer": "group"}})
    one = rows[rows["batch_size"] == 2]
    for draw, ax in zip((plots.plot_seeds, plots.plot_batch_sizes, plots.plot_learning_rates, plots.plot_groups), axes):
        draw(rows if draw is plots.plot_batch_sizes else one, ax=ax)
        assert "#000000" not in [to_hex(text.get_color()) for text in ax.findobj(plt.Text) if text.get_text()]
    plt.close(figure)
