"""Pictures under settings of the user's: they are the same, and the settings stay."""

import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pandas as pd
import pytest
from helpers import study
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from normkit import plots, probes
from normkit.style import new_figure, styled
from normkit.text import PAD

SETTINGS = [
    {"figure.autolayout": True},
    {"figure.constrained_layout.use": True},
    {"axes.grid": False, "axes.facecolor": "black", "text.color": "white", "lines.linewidth": 9},
    {"font.size": 6},
    {"savefig.bbox": "tight", "figure.dpi": 40, "axes.prop_cycle": plt.cycler(color=["red"])},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_users_own_settings_change_no_picture(results, settings):
    pictures = []
    for own in ({}, settings):
        with plt.rc_context(own):
            figure = plots.plot_curves(results)
            figure.draw_without_rendering()
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            legend = figure.legends[0].get_window_extent()
            assert all(ax.xaxis.label.get_window_extent().y0 >= legend.y1 for ax in figure.axes)
            pictures.append(np.asarray(canvas.buffer_rgba()))
            assert all(plt.rcParams[name] == value for name, value in own.items())  # and the user's stay
    assert np.array_equal(*pictures)


FONTS = [
    {"font.family": "STIXGeneral"},
    {"font.sans-serif": ["STIXGeneral"]},
    {"font.family": "serif", "font.serif": ["STIXGeneral"]},
]


@pytest.mark.parametrize("setting", FONTS)
def test_a_users_font_serves_for_the_letters_that_the_pictures_own_lacks(results, recwarn, setting):
    """As one with Chinese letters does; of the fonts that come with matplotlib only STIX's has this one."""
    pictures = []
    for own in ({}, setting):
        with plt.rc_context(own):
            canvas = FigureCanvasAgg(plots.plot_curves({"smile \u2323": results[0].history}))
            canvas.draw()
            pictures.append(np.asarray(canvas.buffer_rgba()))
            missing = [str(each.message) for each in recwarn if "missing from" in str(each.message)]
            recwarn.clear()
            assert bool(missing) == (not own)
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("accuracy", [0.0, 100.0])
def test_names_of_curves_that_end_alike_keep_apart_beside_the_axes(accuracy):
    row = {"epoch": 1, "lr": 0.01, "train_loss": 2.0, "train_acc": 40.0, "test_loss": 1.0}
    ax = plots.plot_curves({f"run {i}": [row | {"test_acc": accuracy}] for i in range(8)}).axes[1]
    boxes = [text.get_window_extent() for text in ax.texts if f"{accuracy} %" in text.get_text()]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 8 and all(above.y0 >= below.y1 for below, above in zip(boxes, boxes[1:]))
    assert ax.bbox.y0 - PAD <= boxes[0].y0 and boxes[-1].y1 <= ax.bbox.y1 + PAD


@pytest.mark.parametrize("accuracy", [0.0, 100.0])
def test_no_axis_of_accuracies_has_ticks_beyond_0_and_100(accuracy):
    rows = study(norm=["group"], batch_size=[2, 4], seed=range(2)).assign(test_acc=accuracy)
    one = rows[rows["batch_size"] == 2].assign(base_lr=0.1, num_groups="4")
    row = {"lr": 0.01, "train_loss": 2.0, "train_acc": accuracy, "test_loss": 1.0, "test_acc": accuracy}
    axes = [
        plots.plot_curves([row | {"epoch": epoch} for epoch in (1, 2)]).axes[1].yaxis,
        plots.plot_seeds(rows).axes[0].yaxis,
        plots.plot_league(rows).axes[0].xaxis,
        plots.plot_batch_sizes(rows).axes[0].yaxis,
        plots.plot_learning_rates(one).axes[0].yaxis,
        plots.plot_groups(one).axes[0].yaxis,
    ]
    for axis in axes:
        assert "accuracy, %" in axis.label.get_text() and accuracy in axis.get_ticklocs().round(9)
        assert all(0 <= tick <= 100 for tick in axis.get_ticklocs())


def test_ticks_that_a_user_has_set_stay():
    _, ax = plt.subplots()
    ax.set_yticks([60, 70, 80])
    plots.plot_batch_sizes(study(norm=["group"], batch_size=[2, 4], seed=range(2)), ax=ax)
    assert [*ax.get_yticks()] == [60, 70, 80]
    plt.close("all")


def test_a_saved_picture_is_on_its_own_background(results, tmp_path):
    with plt.style.context(["dark_background", {"savefig.facecolor": "black"}]):  # as that style has had it, too
        figure = pickle.loads(pickle.dumps(plots.plot_curves(results)))
        figure.savefig(tmp_path / "curves.png")
        figure.savefig(tmp_path / "asked.png", facecolor="red")
        figure.savefig(tmp_path / "clear.png", transparent=True)
    corners = [plt.imread(tmp_path / f"{name}.png")[0, 0].tolist() for name in ("curves", "asked", "clear")]
    assert corners == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]]


def test_ticks_have_room_for_numbers_in_the_pictures_size_not_in_the_users():
    pictures = []
    rows = pd.DataFrame({"norm": "batch", "seed": 0, "quantity": "loss", "step": range(0, 1000, 50), "value": 1.0})
    for own in ({}, {"font.size": 4}):
        with plt.rc_context(own):
            canvas = FigureCanvasAgg(probes.plot_loss_ranges(pd.concat([rows.assign(norm=i) for i in range(4)])))
            canvas.draw()
            pictures.append(np.asarray(canvas.buffer_rgba()))
    assert np.array_equal(*pictures)


def test_pictures_of_two_threads_give_the_users_settings_back():
    entered, left = [threading.Event() for _ in range(2)], threading.Event()

    @styled
    def plot(mine, until):
        entered[mine].set()
        until.wait(0.3)
        return new_figure((2, 1))

    def first():
        plot(0, entered[1])
        left.set()

    with plt.rc_context({"font.size": 7}), ThreadPoolExecutor(2) as threads:
        threads.submit(first)
        entered[0].wait()
        threads.submit(plot, 1, left).result()
        assert plt.rcParams["font.size"] == 7


def test_a_live_picture_is_a_png_of_one_size_whatever_is_said_of_files(results):
    live, sizes = plots.LiveCurves(["batch", "group"], 2), set()
    own = {"savefig.format": "svg", "savefig.bbox": "tight", "savefig.transparent": True, "savefig.dpi": 30}
    with plt.rc_context(own):
        for history in ([], results[0].history[:1], results[0].history):
            live.follow("batch")(history) if history else None
            picture = plt.imread(io.BytesIO(live.picture().data))
            sizes.add(picture.shape)
            assert picture[0, 0].tolist() == [1, 1, 1, 1]
    assert len(sizes) == 1


def test_interactive_mode_stays_as_a_backend_sets_it():
    """A notebook's turns it on with the first figure; otherwise the reader's own plots would not show."""

    @styled
    def plot():
        matplotlib.interactive(True)
        return new_figure((2, 1))

    was = matplotlib.is_interactive()
    try:
        for before in (False, True):
            matplotlib.interactive(before)
            plot()
            assert matplotlib.is_interactive()
    finally:
        matplotlib.interactive(was)


def test_a_notebook_keeps_the_words_of_a_picture_for_who_cannot_see_it(results):
    figure = plots.plot_curves(results[:1])
    words = "synthetic stand-in; Loss; cross-entropy, nats; epoch; Accuracy; accuracy, %"
    assert figure._repr_mimebundle_() == ({}, {"image/png": {"alt": words}})


def test_a_picture_can_be_drawn_and_its_pixels_read(results):
    figure = plots.plot_curves(results[:1])
    figure.canvas.draw()
    assert np.asarray(figure.canvas.buffer_rgba())[..., :3].std() > 10
