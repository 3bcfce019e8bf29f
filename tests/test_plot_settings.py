"""Pictures under settings of the user's: they are the same, and the settings stay."""

import pickle

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from normkit import plots
from normkit.style import new_figure, styled

SETTINGS = [
    {"figure.autolayout": True},
    {"figure.constrained_layout.use": True},
    {"axes.grid": False, "axes.facecolor": "black", "text.color": "white", "lines.linewidth": 9},
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


def test_a_saved_picture_is_on_its_own_background(results, tmp_path):
    with plt.style.context(["dark_background", {"savefig.facecolor": "black"}]):  # as that style has had it, too
        figure = pickle.loads(pickle.dumps(plots.plot_curves(results)))
        figure.savefig(tmp_path / "curves.png")
        figure.savefig(tmp_path / "asked.png", facecolor="red")
        figure.savefig(tmp_path / "clear.png", transparent=True)
    corners = [plt.imread(tmp_path / f"{name}.png")[0, 0].tolist() for name in ("curves", "asked", "clear")]
    assert corners == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]]


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
