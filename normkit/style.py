"""Colours and style of all pictures."""

import colorsys
import contextlib
import functools
import itertools
import math
import threading

import matplotlib.style
from matplotlib.colors import to_hex
from matplotlib.ticker import AutoLocator

from normkit.checks import describe
from normkit.text import fit_text

# Okabe and Ito's palette, told apart by colour-blind readers too: one colour a norm, everywhere.
COLORS = {"batch": "#0072B2", "group": "#D55E00", "layer": "#009E73", "instance": "#CC79A7", "none": "#7A7A7A"}
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
    "axes.formatter.useoffset": False,  # of a network that learns nothing, 10.002 rather than 0.002 and, aside, 1e1
}
PAGE = 14.5  # inches
LOCK = threading.RLock()  # rcParams are the whole process's


@contextlib.contextmanager
def in_style():
    """Sets the style of pictures, whatever the user's says, and gives the user's back.

    The user's fonts serve for letters that the style's own lacks, such as those of Chinese names.
    """
    from matplotlib.font_manager import get_font_names  # may take a while to import, and training draws nothing

    with LOCK:
        families = [*matplotlib.rcParams["font.family"], "sans-serif"]  # fonts, and kinds that have a list of their own
        own = [*families, *(name for each in families for name in matplotlib.rcParams.get(f"font.{each}", ()))]
        further = {*get_font_names()}.difference(matplotlib.rcParamsDefault["font.sans-serif"])
        fonts = ["sans-serif", *(name for name in dict.fromkeys(own) if name in further)]
        with matplotlib.style.context(["default", STYLE | {"font.family": fonts}]):
            yield


def styled(plot):
    """Decorates a function that returns a figure, or the axes it drew in: the style holds, whatever the user's says.

    Of a user's figure, only these axes are touched.
    """

    @functools.wraps(plot)
    def wrapper(*args, **options):
        with in_style():
            matplotlib.rcParams["text.parse_math"] = False  # a name with a $ is one, and no formula
            drawn = plot(*args, **options)
            matplotlib.rcParams["text.parse_math"] = True  # as the ticks' powers of ten are
            fit_text(drawn)  # ticks are made here, in the style of the moment
            interactive = matplotlib.is_interactive()
        matplotlib.interactive(interactive)  # a notebook's first figure turns it on, and the end of the style off again
        return drawn.figure.figure  # of a subfigure, the figure around it

    return wrapper


def colors_of(names):
    """Returns the colour of each name in a picture: a norm's own, or else one that no other name in it has."""
    names = list(dict.fromkeys(names))
    own = {name: COLORS[name] for name in names if name in COLORS}
    further = (color for color in further_colors() if color not in own.values())
    return {name: own.get(name) or next(further) for name in names}


def further_colors():
    """Yields colours without end: the rest of the palette, then hues that lie far apart."""
    yield from FURTHER_COLORS
    for i in itertools.count():
        yield to_hex(colorsys.hsv_to_rgb(i * 0.618 % 1, 0.6 + 0.2 * (i % 3), 0.75 - 0.2 * (i % 2)))


# ------------------------------------------------------------------------------------- figures


class PercentLocator(AutoLocator):
    """Places ticks as matplotlib does, but none below 0 or above 100 %."""

    def tick_values(self, low, high):
        return super().tick_values(max(low, 0), min(high, 100))


def percent_axis(axis, label):
    """Labels an axis, such as ax.yaxis, as one of percentages; ticks that a user has placed stay."""
    axis.set_label_text(label)
    if axis.isDefault_majloc:
        axis.set_major_locator(PercentLocator())


def axes_or_new(ax, figsize):
    """Returns the axes given to draw in, or where none are, those of a new figure."""
    if ax is None:
        return subplots(figsize=figsize)[1]
    if getattr(ax, "name", None) != "rectilinear":
        raise TypeError(
            f"ax is a {describe(ax)}: give one of matplotlib's axes, such as axes[0], with straight x and y"
        )
    return ax


def new_figure(figsize):
    """Returns a figure of such a size that has the style whenever it is drawn."""
    from normkit.figure import new_picture  # takes a while to import, and training draws nothing

    return new_picture(figsize, in_style)


def subplots(*shape, figsize, **options):
    """Returns such a figure and its axes, as plt.subplots does."""
    figure = new_figure(figsize)
    return figure, figure.subplots(*shape, **options)


def on_page(count, width):
    """Returns the numbers of rows and columns in which so many panels of a width in inches fit on a page."""
    if not count:
        raise ValueError("there is nothing to draw: what was given is empty")
    rows = math.ceil(count / int(PAGE / width))
    return rows, math.ceil(count / rows)


def panels(count, size, ylabel="", sharey=False):
    """Returns such a figure and a list of its axes, so many of a size in inches, in rows no wider than a page."""
    rows, columns = on_page(count, size[0])
    figure, axes = subplots(rows, columns, figsize=(columns * size[0], rows * size[1]), sharey=sharey, squeeze=False)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    for ax in axes.flat[count:]:
        ax.remove()
    figure.get_layout_engine().set(hspace=0.05)
    return figure, list(axes.flat[:count])


def gallery(images, columns, size, heading=0):
    """Returns a figure of images uint8 (N, 3, H, W), so many a row, and a list of their axes.

    size: inches that each takes with its text. heading: inches that the one above them takes beyond that.
    """
    rows = max(1, math.ceil(len(images) / columns))
    figure, axes = subplots(rows, columns, figsize=(columns * size[0], rows * size[1] + heading), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image in zip(axes.flat, images):
        ax.imshow(image.permute(1, 2, 0).numpy())
    return figure, list(axes.flat)
