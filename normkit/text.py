"""The text in pictures, made to fit: labels, legends, headings and the names of ticks."""

import contextlib
import itertools
import math
import textwrap
import weakref

import numpy as np

LINE = 0.21  # inches, that a line of names takes
PAD = 8  # pixels between texts
KEPT = "\N{NO-BREAK SPACE}"  # at which no line is broken
POINT = "_point"  # which marks the labels of points
GIVEN = weakref.WeakSet()  # axes drawn in by themselves: the next picture beside them may leave them less room


def broken(text, longest=24):
    """Returns a text with its lines broken between words, and none longer than so many characters."""
    lines = str(text).replace(" %", KEPT + "%").replace("± ", "±" + KEPT).splitlines()
    return "\n".join(textwrap.fill(line, longest, break_on_hyphens=False) for line in lines).replace(KEPT, " ")


def shortened(text, longest=24):
    """Returns a text in one line of at most so many characters, the rest as an ellipsis."""
    text = " ".join(str(text).split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def counted(number, noun):
    """Returns a number of things in words: 1 image, or 6 images."""
    return f"{number} {noun}{'s' * (number != 1)}"


def some_of(classes):
    """Returns at most 25 of the classes, or of their names: as many as a picture has room for, equally far apart."""
    return classes[:: math.ceil(len(classes) / 25)]


def line_count(names):
    """Returns how many lines names take, each broken, below one another."""
    return sum(broken(name).count("\n") + 1 for name in names)


def height_for(names, least):
    """Returns the height of a figure, in inches, in which there is room for names below one another."""
    return max(least, 1.2 + LINE * line_count(names))


def label_ends(ax, ends, colors, number):
    """Names each curve at its end, the names kept apart from one another.

    ends: a dict from a name to a curve's values. A curve that ends in no number has its name where it last had one.
    """
    low, high = ax.get_ylim()
    line = (high - low) * LINE * ax.figure.dpi / ax.get_window_extent().height
    known = {name: next((y for y in reversed(values) if math.isfinite(y)), low) for name, values in ends.items()}
    upwards = sorted(known, key=known.get)
    half = {name: line * line_count([name]) / 2 for name in ends}  # of a name's height
    places, edge = {}, low - line / 2
    for name in upwards:
        places[name] = max(known[name], edge + half[name])
        edge = places[name] + half[name]
    edge = high + line / 2
    for name in reversed(upwards):
        places[name] = min(places[name], edge - half[name])
        edge = places[name] - half[name]
        last = ends[name][-1]
        end = "diverged" if not math.isfinite(last) else number.format(last) if abs(last) < 1e6 else f"{last:.1e}"
        text = {"va": "center", "color": colors[name], "fontweight": "bold", "fontsize": 10}
        ax.text(1.02, places[name], f"{broken(name)}: {end}", transform=ax.get_yaxis_transform(), **text)


def label_point(ax, point, label, color):
    """Writes a label below a point; fit_labels makes it fit."""
    text = {"ha": "center", "va": "top", "color": color, "fontweight": "bold", "fontsize": 10, "label": POINT}
    ax.annotate(label, point, (0, -8), textcoords="offset points", **text)


def point_labels(ax):
    return [text for text in ax.texts if text.get_label() == POINT]


def set_heading(ax, heading):
    """Sets the heading of axes that may be somebody's: a $ in it begins no formula, one in a later heading may."""
    ax.set_title(heading, parse_math="$" not in heading)


def legend_beside(ax, names):
    """Adds a legend to the right of the axes, of what was drawn last.

    It is given the names, as a label that begins with an underscore counts as none.
    """
    drawn = ax.containers[-len(names) :]
    names = [broken(name) for name in names]
    color = ax.yaxis.label.get_color()  # of axes that somebody else made, their own
    ax.legend(drawn, names, frameon=False, labelcolor=color, loc="center left", bbox_to_anchor=(1, 0.5))


def legend_below(figure, handles, names):
    """Adds a legend below all axes, in as many columns as the figure has room for."""
    for columns in range(len(names), 0, -1):
        options = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        legend = figure.legend(handles, [broken(name, 60) for name in names], **options)
        if columns > 1 and legend.get_window_extent().width > figure.bbox.width:
            legend.remove()
        else:
            return


def fit_text(drawn):
    """Breaks the names of ticks, and the headings, that are cut off or meet their neighbours; then lays out anew.

    drawn: a figure, or axes in somebody's.
    """
    figure, axes, headings = drawn.figure.figure, drawn.axes, drawn.texts  # of a subfigure, the figure around it
    lay_out(figure)
    room = None
    if drawn is not drawn.figure:
        headings = []
        if figure.get_layout_engine() is None:
            axes, room = [drawn], room_of(drawn)
            fit_headings(figure, [drawn.title])  # before the axes make room for a long line
            make_room(drawn, room)
        else:
            GIVEN.add(drawn)
            axes = [ax for ax in figure.axes if ax in GIVEN]
    if any([fit_ticks(ax) | fit_labels(ax) for ax in axes]):  # a list, and no or: all are to be fitted
        lay_out(figure)
    if fit_headings(figure, [*headings, *(ax.title for ax in axes)]):
        lay_out(figure)
    if room is not None:
        make_room(drawn, room)  # for the further lines


def lay_out(figure):
    """Places axes and makes their ticks, as drawing does, which takes half as long again."""
    engine = figure.get_layout_engine()
    if engine is None or not figure.axes:
        figure.draw_without_rendering()
        return
    with contextlib.suppress(ValueError):  # in a window that is hardly open, as drawing does
        engine.execute(figure)
    for ax in figure.axes:
        if ax.get_axes_locator() is None:  # which places a colorbar, say
            ax.apply_aspect()


def fit_headings(figure, headings):
    """Breaks headings that are wider than their room, to the figure's edges or a neighbour; returns whether it did."""
    boxes = [ax.get_window_extent() for ax in figure.axes]
    rooms = []
    for box in [(heading.axes or heading).get_window_extent() for heading in headings]:
        beside = [abs(middle(box) - middle(other)) - PAD for other in boxes if are_beside(box, other)]
        rooms.append(min(2 * middle(box) - PAD, 2 * (figure.bbox.width - middle(box)) - PAD, *beside))
    return any([break_to(heading, room) for heading, room in zip(headings, rooms)])


def make_room(ax, room):
    """Moves the edges of axes inwards, as a colorbar does, where their text reaches out of the room."""
    box, text, (low, high) = ax.bbox.get_points(), ax.get_tightbbox().get_points(), room
    over = np.maximum(0, (low - text[0], text[1] - high))
    if not over.any():
        return
    (left, bottom), (right, top) = over
    width, height = np.maximum(45, box[1] - box[0] - (left + right, bottom + top))  # pixels
    place = ax.get_subplotspec() if ax.get_in_layout() else None  # that of axes that were placed by hand says nothing
    if place is None:
        edges = dict(zip(("left", "bottom", "right", "top"), ax.get_position().extents))
        place = ax.figure.add_gridspec(1, 1, **edges)[0]
    ratios = {"width_ratios": (left, width, right), "height_ratios": (top, height, bottom)}
    ax.set_subplotspec(place.subgridspec(3, 3, wspace=0, hspace=0, **ratios)[1, 1])


def room_of(ax):
    """Returns how far the text of axes may reach: to the figure's edges, its neighbours' text, or halfway to them."""
    box, room = ax.bbox.get_points(), ax.figure.bbox.padded(-PAD).get_points()
    for other in ax.figure.figure.axes:
        near, text = other.bbox.get_points(), (other.get_tightbbox() or other.bbox).get_points()
        for i in (0, 1):  # along x, along y
            if min(box[1, 1 - i], near[1, 1 - i]) > max(box[0, 1 - i], near[0, 1 - i]):
                if near[0, i] >= box[1, i]:
                    room[1, i] = min(room[1, i], (box[1, i] + near[0, i]) / 2, max(box[1, i], text[0, i] - PAD))
                elif near[1, i] <= box[0, i]:
                    room[0, i] = max(room[0, i], (box[0, i] + near[1, i]) / 2, min(box[0, i], text[1, i] + PAD))
    return room


def fit_labels(ax):
    """Breaks the labels of points, and makes them smaller, where they are wider than the points are apart.

    Axes that are too low for the labels reach further down. Returns whether anything has changed.
    """
    labels = point_labels(ax)
    if not labels:
        return False
    points, (low, high) = ax.transData.transform([label.xy for label in labels]), ax.get_ylim()
    room = np.diff(np.unique(points[:, 0]), append=math.inf).min() - PAD / 2
    changed = any([break_to(label, room, 9) for label in labels])
    smaller = min(1, room / max(label.get_window_extent().width for label in labels))
    for label in labels:
        label.set_fontsize(max(6, smaller * label.get_fontsize()))
    for label, (_, y) in zip(labels, points):
        part = min(0.5, (y - label.get_window_extent().y0 + PAD / 2) / ax.bbox.height)  # that a label takes
        ax.set_ylim(min(ax.get_ylim()[0], (label.xy[1] - part * high) / (1 - part)))
    return changed or smaller < 1 or ax.get_ylim()[0] < low


def fit_ticks(ax):
    """Breaks the names of an axis's ticks, or leaves some out, where they meet; returns whether they did.

    Numbers cannot be broken: those that are left out keep their marks.
    """
    labels = ax.get_xticklabels() if ax.axison else []
    boxes = {label: label.get_window_extent() for label in labels if label.get_text()}
    shown = sorted(boxes, key=lambda label: boxes[label].x0)
    neighbours = [(boxes[left], boxes[right]) for left, right in itertools.pairwise(shown)]
    if all(right.x0 - left.x1 >= PAD / 2 for left, right in neighbours):
        return False
    pitch, edge = min(middle(right) - middle(left) for left, right in neighbours), -math.inf
    for label in shown:
        if " " in label.get_text() and not label.get_rotation():  # upright text becomes wider with each line
            break_to(label, pitch - PAD)
        box = label.get_window_extent()
        if box.x0 < edge:
            label.set_text("")
        else:
            edge = box.x1 + PAD / 2
    names = [label.get_text() for label in labels]  # before a look at the axis makes these anew
    ax.set_xticks(ax.get_xticks(), names)
    return True


def break_to(text, width, shortest=12):
    """Breaks a text of a figure until it is so many pixels wide, or so many letters; returns whether it did."""
    whole = text.get_text()
    for longest in range(max(map(len, whole.splitlines()), default=0), shortest - 1, -1):
        if text.get_window_extent().width <= width:
            break
        text.set_text(broken(whole, longest))
    return text.get_text() != whole


def middle(box):
    return (box.x0 + box.x1) / 2


def are_beside(box, other):
    """Returns whether boxes are on one level, and not one above the other."""
    return min(box.y1, other.y1) > max(box.y0, other.y0) and abs(middle(box) - middle(other)) > PAD
