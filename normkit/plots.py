"""Curves, galleries and confusions of trained networks, and the pictures of studies.

Each returns its figure, which a notebook shows. To keep it, figure.savefig("name.png"): pyplot knows nothing of it.
"""

import io
import itertools
import math

import numpy as np
import torch
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D

from normkit.checks import whole_number
from normkit.predictions import class_names, logits_by_name, logits_of
from normkit.style import axes_or_new, colors_of, gallery, new_figure, on_page, panels, percent_axis, styled, subplots
from normkit.tables import about, groups_of, histories_of, last_epochs, refuse_mix, separated
from normkit.text import (
    LINE,
    broken,
    height_for,
    label_ends,
    label_point,
    legend_below,
    legend_beside,
    line_count,
    point_labels,
    set_heading,
    shortened,
    some_of,
)

CHANCE = 10  # percent, of CIFAR-10's ten classes


@styled
def plot_curves(histories, title=None, until=None):
    """Draws loss and accuracy of several runs on shared axes, training dashed and test solid.

    histories: results of utils.run, or a dict from a label to a history, or a list of histories, or a single history;
    results of one norm are labelled by the settings that tell them apart.
    until: the epoch that the axis reaches, if further than the histories do. Returns the figure, which has a savefig.
    """
    until = 1 if until is None else whole_number("until", until)
    runs, data = histories_of(histories)
    first = min(history[0]["epoch"] for history in runs.values())
    last = max(history[-1]["epoch"] for history in runs.values())
    title, colors = title or data, colors_of(runs)
    figure, axes = subplots(1, 2, figsize=(11, height_for(runs, 4.4)))
    for ax, metric in zip(axes, ("loss", "acc")):
        ends = {}
        for label, history in runs.items():
            epochs = [row["epoch"] for row in history]
            train, test = ([row[f"{split}_{metric}"] for row in history] for split in ("train", "test"))
            dashed = "--" if len(epochs) > 1 else "_"
            ax.plot(epochs, train, dashed, color=colors[label], linewidth=1.3, alpha=0.8, markersize=9)
            ax.plot(epochs, test, "-o", color=colors[label], markersize=3.5)
            ends[label] = test
        if until >= last:
            ax.set_xlim(min(1, first) - 0.5, until + 0.5)
        mark_learning_rates(ax, runs.values(), high=metric == "loss")
        label_ends(ax, ends, colors, "{:.1f} %" if metric == "acc" else "{:.2f}")
        ax.set(xlabel="epoch", title={"loss": "Loss", "acc": "Accuracy"}[metric])
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[0].set_ylabel("cross-entropy, nats")
    percent_axis(axes[1].yaxis, "accuracy, %")
    one_epoch = all(len(history) == 1 for history in runs.values())
    styles = [("", "o"), ("", "_")] if one_epoch else [("-", None), ("--", None)]
    styles = [Line2D([], [], color="#555555", linestyle=line, marker=mark) for line, mark in styles]
    legend_below(figure, styles, ["test, after the epoch", "training, during the epoch"])
    if title:
        figure.suptitle(title)
    return figure


def mark_learning_rates(ax, histories, high):
    """Marks each epoch that starts with another learning rate, where these are few, and the same in all runs.

    Of rates that follow closely, as in a warm-up, the last alone is named. high: whether the names stand at the top.
    """
    longest = max(histories, key=lambda history: history[-1]["epoch"])
    changes = rate_changes(longest)
    alike = all(
        rate_changes(history) == {epoch: lr for epoch, lr in changes.items() if epoch <= history[-1]["epoch"]}
        for history in histories
    )
    room = np.ptp(ax.get_xlim()) / 7
    if alike and len(changes) <= 4:
        for (epoch, lr), following in zip(changes.items(), [*changes, math.inf][1:]):
            ax.axvline(epoch - 0.5, color="#999999", linewidth=1, linestyle=":")
            if following - epoch < room:
                continue
            text = {"va": "top" if high else "bottom", "fontsize": 9, "color": "#666666"}
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            ax.annotate(f"lr {lr:.3g}", (epoch - 0.5, int(high)), (3, -2 if high else 2), **place, **text)


def rate_changes(history):
    """Returns a dict from each epoch that starts with another learning rate than the one before to that rate."""
    pairs = itertools.pairwise(history)
    return {row["epoch"]: row["lr"] for before, row in pairs if abs(row["lr"] - before["lr"]) > 0}


class LiveCurves:
    """Curves that grow while runs train, in one output of the notebook; outside of a notebook nothing is shown.

    labels: the runs to come, in order, or the only one. on_epoch=live.follow(label) has a run drawn, with the time that
    all still need.
    """

    def __init__(self, labels, epochs, title=""):
        self.labels, self.planned, self.title = [labels] if isinstance(labels, str) else list(labels), epochs, title
        self.histories = {}
        self.handle = None
        if hasattr(get_ipython(), "kernel"):  # IPython's terminal has none, and shows no pictures
            self.handle = display(self.picture(), display_id=True)

    def follow(self, label):
        def show(history):
            self.histories[label] = list(history)
            if self.handle is not None:
                self.handle.update(self.picture())

        return show

    @property
    def epochs(self):
        """Returns the epochs of a run: as planned, or as many as one of them has turned out to have."""
        return max([self.planned, *map(len, self.histories.values())])

    def seconds_left(self):
        """Returns the seconds of all epochs to come: each takes as long as the label's own so far, else the others'."""
        known = {label: np.mean([row.get("seconds", 0) for row in rows]) for label, rows in self.histories.items()}
        usual = np.mean(list(known.values()))
        return sum(
            known.get(label, usual) * (self.epochs - len(self.histories.get(label, []))) for label in self.labels
        )

    def picture(self):
        """Returns a PNG of one size, however many of the runs it shows, so that the page does not jump."""
        if not self.histories:
            figure, ax = subplots(figsize=(11, 4.4))
            ax.axis("off")
            ax.text(0.5, 0.5, "The curves begin with the first finished epoch.", ha="center")
        else:
            label, history = list(self.histories.items())[-1]
            left = self.seconds_left()
            time = f"about {left / 60:.0f} min left for all" if left > 90 else f"about {left:.0f} s left for all"
            progress = f": {label}, epoch {len(history)} of {self.epochs}, {time}" if left else ""
            figure = plot_curves(self.histories, self.title + progress, self.epochs)
        figure.set_size_inches(11, height_for([*dict.fromkeys([*self.labels, *self.histories])], 4.4))
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100, bbox_inches=figure.bbox_inches, transparent=False)
        return Image(png.getvalue(), width=1000, alt=figure.alternative_text())


@styled
def plot_samples(data, each=10):
    """Draws a row of training images for each class, or of many classes for some: every second, say."""
    each = whole_number("each", each)
    if not len(data.train_labels):
        raise ValueError(f"{data.name} has no training images: there is nothing to draw")
    shown = some_of(range(len(data.classes)))
    names = [broken(name) for name in some_of(class_names(data))]
    longest = max(len(line) for name in names for line in name.splitlines())
    height, width = data.train_images.shape[2:]
    gap, widest, text = 0.09, max(0.63, 11 / each), LINE * max(line_count([name]) for name in names)  # inches
    pixel = min(0.63 / height, widest / width)  # inches
    across, down = width + gap / pixel, max(height + gap / pixel, text / pixel)  # pixels, to the next image
    size = each * across * pixel + 0.1 * longest + 0.3, len(shown) * down * pixel + 0.4
    figure, ax = subplots(figsize=(max(size[0], 4), size[1]))
    for row, label in enumerate(shown):
        for i, image in enumerate(data.train_images[data.train_labels == label][:each]):
            place = i * across, i * across + width, row * down + height, row * down
            ax.imshow(image.permute(1, 2, 0).numpy(), extent=place)
    ax.set(xlim=(0, (each - 1) * across + width), ylim=((len(shown) - 1) * down + height, 0), xticks=[])
    ax.set_yticks([row * down + height / 2 for row in range(len(shown))], names)
    ax.tick_params(length=0, pad=9)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    of_some = f" of {len(shown)} of {len(data.classes)} classes" if len(shown) < len(data.classes) else ""
    figure.suptitle(f"{data.name}, training images{of_some}")
    return figure


@styled
def plot_mistakes(data, logits, title=None, rows=2, columns=5):
    """Draws the test images that a network gets wrong with most confidence, in at most so many rows.

    logits: (N, classes), from utils.predict.
    """
    logits = logits_of(data, logits)
    names = class_names(data, logits)
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != data.test_labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][: rows * columns]
    height, width = data.test_images.shape[2:]
    figure, axes = gallery(data.test_images[wrong], columns, (1.9, 1.7 * height / width + 0.6))
    if not len(wrong):
        axes[0].set_title("no mistakes")
    for ax, i in zip(axes, wrong.tolist()):
        truth, guess = names[data.test_labels[i]], names[predicted[i]]
        ax.set_title(f"{guess} {100 * confidence[i]:.0f} %\nis {truth}", fontsize=10, fontweight="normal")
    figure.suptitle(title or f"{data.name}, most confident mistakes")
    return figure


@styled
def plot_disagreements(data, logits, rows=2, columns=5):
    """Draws test images that the variants classify differently, one of them rightly, the surest first.

    logits: a dict from a variant to its logits (N, classes), from utils.predict. rows: at most.
    """
    logits = logits_by_name(data, logits)
    names, colors = class_names(data, *logits.values()), colors_of(logits)
    confidence, predicted = zip(*(each.softmax(1).max(1) for each in logits.values()))
    confidence, predicted = torch.stack(confidence), torch.stack(predicted)  # variants, N
    differ = (predicted != predicted[0]).any(0) & (predicted == data.test_labels).any(0)
    chosen = differ.nonzero().flatten()
    chosen = chosen[confidence[:, chosen].min(0).values.argsort(descending=True)][: rows * columns]
    longest = max(map(len, names)) + len(": 100 %")
    labels = {name: broken(name) + (": " if len(name) + longest <= 28 else ":\n") for name in logits}
    texts = {}
    for name, guesses, shares in zip(logits, predicted[:, chosen].tolist(), 100 * confidence[:, chosen]):
        guesses = [broken(f"{names[guess]} {share:.0f} %", 28) for guess, share in zip(guesses, shares)]
        texts[name] = [labels[name] + guess for guess in guesses]
    depths = {name: max(text.count("\n") for text in [*each, ""]) + 1 for name, each in texts.items()}  # in lines
    height, width = data.test_images.shape[2:]
    line_height = width / 8  # of text below an image, in its pixels
    bottom = height + line_height * sum(depths.values())
    figure, axes = gallery(data.test_images[chosen], columns, (2.2, 2.1 * bottom / width + 0.3), heading=0.3)
    for place, (ax, i) in enumerate(zip(axes, chosen.tolist())):
        ax.set_ylim(bottom, -0.5)  # the text lies within the axes, so that no layout can push it onto a neighbour
        ax.set_title(broken(f"is {names[data.test_labels[i]]}"), fontsize=10)
        top = height
        for name, depth in depths.items():
            text = {"ha": "center", "va": "center", "fontsize": 9.5, "color": colors[name]}
            ax.text((width - 1) / 2, top + line_height * depth / 2, texts[name][place], **text)
            top += line_height * depth
    differing = 100 * (predicted != predicted[0]).any(0).float().mean()
    figure.suptitle(f"{data.name}: the variants disagree on {differing:.0f} % of the test images")
    figure.get_layout_engine().set(h_pad=0.1)  # inches, that the heading keeps clear of the first row's titles
    return figure


@styled
def plot_confusions(data, logits):
    """Draws how often each variant takes images of a class for another one; below, its accuracy in each class.

    logits: a dict from a variant to its logits (N, classes), from utils.predict.
    """
    logits = logits_by_name(data, logits)
    names, colors = class_names(data, *logits.values()), colors_of(logits)
    short = long = [shortened(name) for name in some_of(names)]
    if len(long) <= 10:  # which have room for two lines
        long = [broken(name, max(24, len(name) // 2 + 5)) for name in names]
    classes, spacing, longest = range(len(names)), min(0.16, 0.8 / len(logits)), max(map(len, short))
    rows, columns = on_page(len(logits), 3.6)
    figure = new_figure((max(11, 3.6 * columns), 2.9 + rows * 4.3 + 0.16 * max(0, longest - 10)))
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[3] * rows + [2])
    below = figure.add_subplot(grid[-1, :])
    for i, (name, each) in enumerate(logits.items()):
        pairs = len(classes) * data.test_labels + each.argmax(1)
        counts = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1).float()
        percent = (100 * counts / counts.sum(1, keepdim=True)).numpy()  # of a class without a test image, NaN
        ax = figure.add_subplot(grid[divmod(i, columns)])
        shades = LinearSegmentedColormap.from_list(name, ["white", colors[name]])
        mistakes = percent * (1 - np.eye(len(classes)))
        ax.imshow(mistakes, cmap=shades, vmax=20)
        for truth, guess in np.ndindex(*percent.shape):
            if len(short) == len(names) and percent[truth, guess] >= (0 if truth == guess else 5):
                color = "white" if mistakes[truth, guess] > 11 else "#333333"
                weight = "bold" if truth == guess else "normal"
                text = {"ha": "center", "va": "center", "fontsize": 8, "color": color, "fontweight": weight}
                ax.text(guess, truth, f"{percent[truth, guess]:.0f}", **text)
        ax.set_xticks(some_of(classes), short, rotation=90, fontsize=9)
        first = i % columns == 0
        ax.set_yticks(some_of(classes), long if first else [], fontsize=9)
        ax.grid(False)
        ax.spines[:].set(visible=True, color="#CCCCCC")
        ax.tick_params(length=0)
        ax.set(xlabel="predicted", ylabel="true" if first else "", title=f"{name}, % of a class")
        places = np.array(classes) + spacing * (i - (len(logits) - 1) / 2)
        below.bar(places, percent.diagonal(), spacing * 0.875, color=colors[name])
    below.set_xticks(some_of(classes), short, rotation=90 * (longest > 12 or len(names) > 12))
    below.set_xlim(-0.7, len(names) - 0.3)
    below.set_ylim(0, max(1, below.get_ylim()[1]))  # also where all are at 0 %
    below.grid(axis="x", visible=False)
    below.set(ylabel="accuracy, %", title=f"Accuracy by class, {data.name}")
    legend_beside(below, logits)
    figure.get_layout_engine().set(w_pad=0.08, hspace=0.06)
    return figure


@styled
def plot_seeds(rows, ax=None):
    """Draws last-epoch test accuracy of each run (dots), mean and standard deviation (bars), by recipe and norm.

    rows: of study.run_many. Each value of a setting that was swept as well has a group of its own. A run that diverged
    is a cross, and counts as chance, one image in ten guessed right.
    """
    last = last_epochs(rows, "norm", "data")
    data, shared = about(last)
    last, names = separated(last)
    groups, colors = list(groups_of(last, names)), colors_of(last["norm"])
    norms, captions = list(colors), [broken("\n".join(captions_of(group)), 26) for group, _ in groups]
    labels = {norm: broken(norm, 12) for norm in norms}
    pitch, width = len(norms) + 0.8, max(0.9, 0.1 * min(12, max(map(len, norms))))  # inches, that a norm has
    height = 4 + 0.19 * max(caption.count("\n") for caption in captions)
    ax = axes_or_new(ax, (max(7.5, width * pitch * len(groups)), height))
    if point_labels(ax):
        raise ValueError("plot_seeds has drawn in these axes before: give it others, or call ax.clear() first")
    for i, (_, runs) in enumerate(groups):
        for norm, each in runs.groupby("norm", sort=False, observed=True):
            place, values, color = i * pitch + norms.index(norm), each["test_acc"].fillna(CHANCE), colors[norm]
            half = 0.15 * (len(values) > 1)
            dots, diverged = place + np.linspace(-half, half, len(values)), each["test_acc"].isna().to_numpy()
            ax.plot(dots[~diverged], values[~diverged], "o", color=color, alpha=0.45, markersize=6, markeredgewidth=0)
            ax.plot(dots[diverged], values[diverged], "x", color=color, markersize=9)
            mean, deviation = values.mean(), values.std() if values.count() > 1 else 0.0
            ax.errorbar(place, mean, deviation, color=color, fmt="_", markersize=24, capsize=5)
            label = f"{labels[norm]}\n{mean:.1f}" + (f" ± {deviation:.1f}" if values.count() > 1 else "")
            label_point(ax, (place, min(values.min(), mean - deviation)), label, color)
    ax.set_xticks([i * pitch + (len(norms) - 1) / 2 for i in range(len(captions))], captions, parse_math=False)
    ax.grid(axis="x", visible=False)
    ax.margins(x=0.08, y=0.25 + 0.08 * max(label.count("\n") for label in labels.values()))
    left, right = ax.get_xlim()  # and room for the outer labels, which may be as wide as points are apart
    ax.set_xlim(min(left, -0.5), max(right, (len(groups) - 1) * pitch + len(norms) - 0.5))
    percent_axis(ax.yaxis, "test accuracy, %")
    set_heading(ax, f"{data}: {shared}")
    return ax


def captions_of(group):
    """Returns the settings of a group of runs in words."""
    return [f"{value} recipe" if name == "recipe" else f"{name} {value}" for name, value in group.items()]


@styled
def plot_league(rows):
    """Draws last-epoch test accuracy of many norms, a line each: runs (dots), mean and standard deviation (bars).

    rows: of study.run_many. Each recipe, and each value of a setting that was swept as well, has a panel of its own. A
    run that diverged counts as chance, one image in ten guessed right.
    """
    last = last_epochs(rows, "norm", "data")
    data, shared = about(last)
    last, names = separated(last)
    last = last.fillna({"test_acc": CHANCE})
    norms = last.groupby("norm", observed=True)["test_acc"].mean().sort_values().index
    groups, colors = list(groups_of(last, names)), colors_of(last["norm"])
    titles = [broken(", ".join(captions_of(group)), 48) for group, _ in groups]
    height = 1.2 + 0.42 * max(3, len(norms)) + 0.2 * max(title.count("\n") for title in titles)
    figure, axes = panels(len(groups), (5.5, height), sharey=True)
    for ax, title, (_, runs) in zip(axes, titles, groups):
        for norm, each in runs.groupby("norm", observed=True):
            place, values, color = norms.get_loc(norm), each["test_acc"], colors[norm]
            ax.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=6, markeredgewidth=0)
            deviation = values.std() if values.count() > 1 else 0.0
            ax.errorbar(values.mean(), place, xerr=deviation, color=color, fmt="|", markersize=16, capsize=4)
            text = {"va": "center", "color": color, "fontweight": "bold", "fontsize": 10}
            end = (max(values.max(), values.mean() + deviation), place)
            ax.annotate(f"{values.mean():.1f}", end, (9, 0), textcoords="offset points", **text)
        ax.set_yticks(range(len(norms)), norms)
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.14)
        percent_axis(ax.xaxis, "test accuracy, %")
        ax.set(title=title, ylim=(-0.6, len(norms) - 0.4))
    figure.suptitle(f"{data}: {shared}")
    return figure


@styled
def plot_batch_sizes(rows, ax=None):
    """Draws test accuracy of each norm over the batch size, mean and deviation; a cross is a run that diverged.

    rows: of study.run_many. Such a run counts as chance, one image in ten guessed right.
    """
    ax, sizes, means = draw_norms_over("batch_size", rows, ax)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, sizes)
    label_ends(ax, means, colors_of(means), "{:.1f} %")
    ax.set(xlabel="batch size")
    return ax


@styled
def plot_learning_rates(rows, ax=None):
    """Draws test accuracy of each norm over the learning rate, mean and deviation; a cross is a run that diverged.

    rows: of study.run_many with keep_diverged. Such a run counts as chance, one image in ten guessed right.
    """
    ax, rates, means = draw_norms_over("base_lr", rows, ax)
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    ax.minorticks_off()
    legend_beside(ax, means)
    ax.set(xlabel="learning rate")
    return ax


def draw_norms_over(setting, rows, ax):
    """Draws each norm's means over a setting; returns the axes, the setting's values, and the means by norm."""
    last = last_epochs(rows, "norm", setting, "data")
    refuse_mix(last, ["norm", setting])
    colors = colors_of(last["norm"])
    ax = axes_or_new(ax, (7.5, height_for(colors, 4.2)))
    runs = last.groupby("norm", sort=False, observed=True)
    means = {norm: draw_means(ax, each, setting, colors[norm]).tolist() for norm, each in runs}
    percent_axis(ax.yaxis, "test accuracy, %")
    set_heading(ax, "\n".join(about(last)))
    return ax, sorted(last[setting].unique()), means


def draw_means(ax, runs, setting, color):
    """Draws mean and standard deviation over a setting, and a cross where a run diverged; returns the means.

    Such a run counts as chance, one image in ten guessed right.
    """
    by_value = runs.fillna({"test_acc": CHANCE}).groupby(setting)["test_acc"]
    mean, deviation = by_value.mean(), by_value.std().fillna(0)
    ax.errorbar(mean.index, mean, deviation, color=color, marker="o", capsize=3)
    diverged = runs.loc[runs["test_acc"].isna(), setting]
    ax.plot(diverged, [CHANCE] * len(diverged), "x", color=color, markersize=11)
    return mean


@styled
def plot_groups(rows, ax=None):
    """Draws test accuracy of group norm over its number of groups, mean and deviation; a cross is a run that diverged.

    rows: of study.run_many, of which those of group norm are drawn. A run that diverged counts as chance, one image in
    ten guessed right.
    """
    ax, last = axes_or_new(ax, (7.5, 3.4)), last_epochs(rows, "norm", "num_groups", "data")
    last = last[last["norm"] == "group"]
    if last.empty:
        raise ValueError(f"there are no rows of group norm, but of {', '.join(rows['norm'].dropna().unique())}")
    refuse_mix(last, ["num_groups"])
    sizes = sorted(last["num_groups"].unique(), key=lambda size: float(size) if str(size).isdigit() else math.inf)
    draw_means(ax, last.assign(place=last["num_groups"].map(sizes.index)), "place", colors_of(["group"])["group"])
    names = {"1": "1\n(layer norm)", "channels": "one a channel\n(instance norm)"}
    ax.set_xticks(range(len(sizes)), [names.get(str(size), str(size)) for size in sizes])
    percent_axis(ax.yaxis, "test accuracy, %")
    ax.set_xlabel("groups")
    set_heading(ax, "\n".join(about(last)))
    return ax
