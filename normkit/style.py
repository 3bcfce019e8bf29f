"""Colours and style of all pictures."""

import functools

import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart by colour-blind readers too: one colour a norm, everywhere.
COLORS = {"batch": "#0072B2", "group": "#D55E00", "layer": "#009E73", "instance": "#CC79A7"}
COLORS["none"] = "#7A7A7A"
FURTHER_COLORS = ("#E69F00", "#56B4E9", "#CC79A7", "#000000")

STYLE = {
    "figure.facecolor": "white",  # a card of its own on a dark page
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2,
    "savefig.bbox": "tight",
}


def styled(plot):
    """Decorates a function that returns a figure: the style holds while it is made, whatever the user's own says."""

    @functools.wraps(plot)
    def wrapper(*args, **options):
        with plt.style.context(["default", STYLE]):
            figure = plot(*args, **options)
            figure.figure.draw_without_rendering()  # ticks are made here, in the style of the moment
            return figure

    return wrapper


def color_of(norm):
    return COLORS.get(norm, FURTHER_COLORS[0])


def subplots(*shape, **options):
    """plt.subplots, released from pyplot: the figure is its caller's, and a notebook shows it once."""
    figure, axes = plt.subplots(*shape, **options)
    plt.close(figure)
    return figure, axes
