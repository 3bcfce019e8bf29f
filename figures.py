"""Pictures and tables of networks and their histories, and the images of the synthetic stand-in."""

import copy
import io
import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from scipy import stats
from torch import nn

# Okabe and Ito's palette, told apart by colour-blind readers too: one colour a norm, everywhere.
COLORS = {"batch": "#0072B2", "group": "#D55E00", "layer": "#009E73", "instance": "#CC79A7"}
FURTHER_COLORS = ("#E69F00", "#56B4E9", "#CC79A7", "#000000")


def color_of(norm):
    return COLORS.get(norm, FURTHER_COLORS[0])


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


styled = plt.rc_context(STYLE)  # as a decorator: the style holds while the picture is made, and nowhere else


def subplots(*shape, **options):
    """plt.subplots, released from pyplot: the figure is its caller's, and a notebook shows it once."""
    figure, axes = plt.subplots(*shape, **options)
    plt.close(figure)
    return figure, axes


@styled
def plot_curves(histories, title=None, until=None):
    """Loss and accuracy of several runs on shared axes, training dashed and test solid.

    histories: results of utils.run, or a dict from a label to a history, or a list of histories.
    until: the epoch that the axis reaches, if further than the histories do.
    """
    if isinstance(histories, dict):
        runs = dict(histories)
    elif all(hasattr(result, "history") for result in histories):
        repeated = len({result.norm for result in histories}) < len(histories)
        runs = {f"{r.norm}, seed {r.seed}" if repeated else r.norm: r.history for r in histories}
        title = title or ", ".join(sorted({result.data for result in histories}))
    else:
        runs = {f"run {i}": history for i, history in enumerate(histories, 1)}
    if not runs or not all(runs.values()):
        raise ValueError("there is nothing to draw: give at least one history of at least one epoch")

    figure, axes = subplots(1, 2, figsize=(11, 4.4))
    further = iter(FURTHER_COLORS * len(runs))
    colors = {label: COLORS.get(label) or next(further) for label in runs}
    for ax, figure_name, unit in zip(axes, ("loss", "acc"), ("cross-entropy, nats", "accuracy, %")):
        ends = {}
        for label, history in runs.items():
            epochs = [row["epoch"] for row in history]
            train, test = ([row[f"{split}_{figure_name}"] for row in history] for split in ("train", "test"))
            ax.plot(epochs, train, "--", color=colors[label], linewidth=1.3, alpha=0.8)
            ax.plot(epochs, test, "-o", color=colors[label], markersize=3.5)
            ends[label] = (epochs[-1], test[-1])
        if until:
            ax.set_xlim(0.5, until + 0.5)
        mark_learning_rates(ax, next(iter(runs.values())), high=figure_name == "loss")
        label_ends(ax, ends, colors, "{:.1f} %" if figure_name == "acc" else "{:.2f}")
        ax.set(xlabel="epoch", ylabel=unit, title={"loss": "Loss", "acc": "Accuracy"}[figure_name])
        ax.xaxis.get_major_locator().set_params(integer=True)
    styles = [Line2D([], [], color="#555555", linestyle=style) for style in ("-", "--")]
    figure.legend(
        styles,
        ["test, after the epoch", "training, during the epoch"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    if title:
        figure.suptitle(title)
    return figure


def mark_learning_rates(ax, history, high):
    """A line at each epoch that starts with another learning rate, where these are few; its name high or low."""
    changes = [row for before, row in zip(history, history[1:]) if row["lr"] != before["lr"]]
    if len(changes) <= 4:
        for row in changes:
            ax.axvline(row["epoch"] - 0.5, color="#999999", linewidth=1, linestyle=":")
            ax.annotate(
                f"lr {row['lr']:.0e}".replace("e-0", "e-"),
                (row["epoch"] - 0.5, 1 if high else 0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -2 if high else 2),
                textcoords="offset points",
                va="top" if high else "bottom",
                fontsize=9,
                color="#666666",
            )


def label_ends(ax, ends, colors, number):
    """Names each curve at its end, the names kept apart from one another."""
    low, high = ax.get_ylim()
    gap = (high - low) * 0.065
    places, last = {}, low - gap
    for label in sorted(ends, key=lambda label: ends[label][1]):
        last = places[label] = max(ends[label][1], last + gap)
    surplus = max(0, last - high)
    for label, (epoch, value) in ends.items():
        ax.annotate(
            f"{label} {number.format(value)}",
            (epoch, value),
            xytext=(1.02, places[label] - surplus),
            textcoords=("axes fraction", "data"),
            va="center",
            color=colors[label],
            fontweight="bold",
            fontsize=10,
            annotation_clip=False,
        )


class LiveCurves:
    """Curves that grow while runs train, in one output of the notebook; outside of a notebook nothing is shown.

    labels: the runs to come, in order. on_epoch=live.follow(label) has a run drawn, with the time that all still need.
    """

    def __init__(self, labels, epochs, title=""):
        self.labels, self.epochs, self.title = list(labels), epochs, title
        self.histories = {}
        self.handle = None
        if get_ipython() is not None:
            self.handle = display(self.picture(), display_id=True)

    def follow(self, label):
        def show(history):
            self.histories[label] = list(history)
            if self.handle is not None:
                self.handle.update(self.picture())

        return show

    def seconds_left(self):
        """Of every label: what an epoch took it, or before its first epoch took the others, for those to come."""
        known = {label: np.mean([row["seconds"] for row in rows]) for label, rows in self.histories.items()}
        usual = np.mean(list(known.values()))
        return sum(
            known.get(label, usual) * (self.epochs - len(self.histories.get(label, []))) for label in self.labels
        )

    def picture(self):
        """A PNG of one size, whatever it shows, so that the page does not jump."""
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
        png = io.BytesIO()
        figure.savefig(png, dpi=100, bbox_inches=None)
        return Image(png.getvalue(), width=1000)


def moved_by(layer, x, image, channel):
    """The mask of the inputs (N, C, H, W) that move a layer's output for one channel of one image.

    Asked in float64: in float32, one run in sixty met a gradient that rounding had made zero.
    """
    layer, x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    layer(x)[image, channel, 0, 0].backward()
    return x.grad != 0


@styled
def plot_norm_sets(layers, images=6, channels=16, size=2):
    """The block of activations, images by channels by pixels, and in it the values that share a mean with one of them.

    layers: a dict from a name to a norm layer of that many channels. What is coloured was found by asking the layer
    which inputs move its output for the front image's last channel.
    """
    figure, axes = subplots(1, len(layers), figsize=(2.9 * len(layers), 2.5), squeeze=False)
    x = torch.randn(images, channels, size, size, generator=torch.Generator().manual_seed(0))
    for ax, (name, layer) in zip(axes[0], layers.items()):
        shared = moved_by(copy.deepcopy(layer).train(), x, 0, channels - 1).flatten(2)  # N, C, H·W
        draw_block(ax, shared, color_of(name))
        ax.set_title(f"{name} norm\n{int(shared.sum())} values share a mean")
    return figure


def draw_block(ax, shared, color):
    """A cube a value: channels to the right, images into the depth, pixels upwards; shared (N, C, P) coloured."""
    images, channels, pixels = shared.shape
    width, depth, height = 8 / channels, np.array([0.5, 0.42]), 0.95

    def corner(c, n, p):
        return np.array([c * width, p * height]) + n * depth

    def face(corners, is_shared, light):
        tint = np.array(to_rgb(color if is_shared else "#D9D9D9"))
        ax.add_patch(Polygon([corner(*c) for c in corners], facecolor=tint * light, edgecolor="white", linewidth=0.9))

    for c, p in np.ndindex(channels, pixels):
        face([(c, 0, p), (c + 1, 0, p), (c + 1, 0, p + 1), (c, 0, p + 1)], shared[0, c, p], 1)
    for n, c in np.ndindex(images, channels):
        top = [(c, n, pixels), (c + 1, n, pixels), (c + 1, n + 1, pixels), (c, n + 1, pixels)]
        face(top, shared[n, c, -1], 0.92)
    for n, p in np.ndindex(images, pixels):
        end = [(channels, n, p), (channels, n + 1, p), (channels, n + 1, p + 1), (channels, n, p + 1)]
        face(end, shared[n, -1, p], 0.8)
    text = {"fontsize": 9, "color": "#555555"}
    ax.text(*corner(channels / 2, 0, -0.25), f"{channels} channels", ha="center", va="top", **text)
    ax.text(*corner(-0.4, 0, pixels / 2), "pixels", ha="right", va="center", rotation=90, **text)
    ax.text(*(corner(channels, images / 2, 0) + (0.35, -0.1)), f"{images} images", ha="left", va="top", **text)
    ax.autoscale_view()
    ax.set_aspect("equal")
    ax.axis("off")


def norm_table(layers, x):
    """What norm layers make of activations x (N, C, H, W), set by set: a DataFrame, one row a layer.

    layers: a dict from a name to a layer, as yet untrained, so that its scale and shift leave the values alone.
    Which values share a mean is found by asking the layer.
    """
    rows = []
    for name, layer in layers.items():
        layer = copy.deepcopy(layer).train()
        with torch.no_grad():
            y = layer(x)
        masks = torch.stack([moved_by(layer, x, n, c) for n, c in np.ndindex(*x.shape[:2])]).unique(dim=0)
        sets = torch.stack([y[mask] for mask in masks])
        across_images = masks[0].flatten(1).any(1).sum() > 1
        variance = sets.var(1, correction=0)
        rows.append(
            {
                "norm": name,
                "values that share a mean": sets.shape[1],
                "largest |mean|": f"{sets.mean(1).abs().max():.0e}",
                "variance": f"{variance.min():.3f} to {variance.max():.3f}",
                "statistics": f"{2 * len(sets)} a batch" if across_images else f"{2 * len(sets) // len(x)} an image",
                "trained numbers": sum(p.numel() for p in layer.parameters()),
                "running statistics": sum(b.numel() for b in layer.buffers() if b.dim()),
            }
        )
    return pd.DataFrame(rows).set_index("norm")


@styled
def plot_network(model, size=32):
    """The network step by step, for images of size×size pixels: channels, map, parameters, receptive field."""
    steps, skips = trace_network(model, size)
    figure, ax = subplots(figsize=(11, 3.4))
    colors = {"3×3 convolution, norm, ReLU": "#4C6A92", "1×1 convolution": "#9DB2CC", "pooling": "#D4D9E0"}
    x, places = 0.0, {}
    for step in steps:
        height, width = step["map"] ** 0.5 / 2.2, 0.12 + step["channels"] / 45
        pitch = max(width, 0.62)
        places[step["name"]] = middle = x + pitch / 2
        color = colors.get(step["kind"], "#4C6A92")
        ax.add_patch(plt.Rectangle((middle - width / 2, -height / 2), width, height, color=color))
        field = f"{step['field']}" if step["field"] < size else "all"
        ax.text(middle, 1.45, step["name"], ha="center", va="bottom", fontweight="bold")
        lines = (f"{step['channels']}", f"{step['map']}×{step['map']}", f"{step['parameters']:,}", field)
        for line, text in enumerate(lines):
            ax.text(middle, -1.65 - 0.36 * line, text, ha="center", va="center", fontsize=9.5)
        x += pitch + 0.14
    for line, text in enumerate(("channels", "map", "parameters", "sees, px")):
        ax.text(-0.35, -1.65 - 0.36 * line, text, ha="right", va="center", fontsize=9.5, color="#666666")
    for start, end in skips:
        arrow = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.25", "color": "#666666", "linewidth": 1.4}
        ax.annotate("", (places[end], 0.95), (places[start], 0.95), arrowprops=arrow)
    ax.set(xlim=(-1.6, x), ylim=(-2.9, 1.8))
    ax.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    handles.append(Line2D([], [], color="#666666", linewidth=1.4))
    figure.legend(handles, [*colors, "skip"], loc="outside lower center", ncols=4, frameon=False)
    total = sum(p.numel() for p in model.parameters())
    ax.set_title(f"The network and its {total:,} parameters")
    return figure


def trace_network(model, size):
    """Each step of the network, in the order in which it runs, and the pairs of steps that a skip connects."""
    steps, skips, outputs = [], [], {}
    field, jump = 1, 1

    def look(name):
        def hook(module, args, keywords, output):
            nonlocal field, jump
            for layer in module.modules():
                if isinstance(layer, nn.AdaptiveAvgPool2d):
                    field = size
                elif hasattr(layer, "kernel_size"):
                    kernel, stride = (n if isinstance(n, int) else n[0] for n in (layer.kernel_size, layer.stride))
                    field, jump = field + (kernel - 1) * jump, jump * stride
            skips.extend((key, name) for key, kept in outputs.items() if any(kept is x for x in keywords.values()))
            outputs[name] = output
            weights = [p for p in module.parameters() if p.dim() > 1]
            kind = "pooling" if not weights else f"{weights[0].shape[2]}×{weights[0].shape[3]} convolution"
            steps.append(
                {
                    "name": name,
                    "kind": kind + ", norm, ReLU" if len(list(module.children())) else kind,
                    "channels": output.shape[1],
                    "map": output.shape[2],
                    "parameters": sum(p.numel() for p in module.parameters()),
                    "field": field,
                }
            )

        return hook

    model = copy.deepcopy(model).cpu().eval()
    for name, module in model.named_children():
        module.register_forward_hook(look(name), with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return steps, skips


@styled
def plot_samples(data, each=10):
    """A row of training images for each class."""
    classes = len(data.classes)
    figure, axes = subplots(classes, each, figsize=(each * 0.72, classes * 0.72), squeeze=False)
    for label, row in enumerate(axes):
        chosen = data.train_images[data.train_labels == label][:each]
        for ax in row:
            ax.axis("off")
        for ax, image in zip(row, chosen):
            ax.imshow(image.permute(1, 2, 0).numpy())
        row[0].text(-0.25, 0.5, data.classes[label], transform=row[0].transAxes, ha="right", va="center")
    figure.suptitle(f"{data.name}, training images")
    return figure


@styled
def plot_mistakes(data, logits, title=None, rows=2, columns=5):
    """The test images that a network gets wrong with most confidence. logits: (N, classes), from utils.predict."""
    confidence, predicted = logits.softmax(1).cpu().max(1)
    wrong = (predicted != data.test_labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][: rows * columns]
    figure, axes = subplots(rows, columns, figsize=(columns * 1.9, rows * 2.3), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, i in zip(axes.flat, wrong.tolist()):
        ax.imshow(data.test_images[i].permute(1, 2, 0).numpy())
        truth, guess = data.classes[data.test_labels[i]], data.classes[predicted[i]]
        ax.set_title(f"{guess} {100 * confidence[i]:.0f} %\nis {truth}", fontsize=10, fontweight="normal")
    figure.suptitle(title or f"{data.name}, most confident mistakes")
    return figure


@styled
def plot_disagreements(data, logits, columns=5, rows=2):
    """Test images of which the variants think differently, one of them rightly, the surest first.

    logits: a dict from a variant to its logits (N, classes), from utils.predict.
    """
    confidence, predicted = zip(*(each.softmax(1).cpu().max(1) for each in logits.values()))
    confidence, predicted = torch.stack(confidence), torch.stack(predicted)  # variants, N
    differ = (predicted != predicted[0]).any(0) & (predicted == data.test_labels).any(0)
    chosen = differ.nonzero().flatten()
    chosen = chosen[confidence[:, chosen].min(0).values.argsort(descending=True)][: rows * columns]
    line_height = 4  # of text below an image, in its pixels
    bottom = 32 + line_height * len(logits)
    size = (columns * 2.2, rows * (2.1 * bottom / 32 + 0.3) + 0.3)
    figure, axes = subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, i in zip(axes.flat, chosen.tolist()):
        ax.imshow(data.test_images[i].permute(1, 2, 0).numpy())
        ax.set_ylim(bottom, -0.5)  # the text lies within the axes, so that no layout can push it onto a neighbour
        ax.set_title(f"is {data.classes[data.test_labels[i]]}", fontsize=10)
        for line, name in enumerate(logits):
            guess = f"{name}: {data.classes[predicted[line, i]]} {100 * confidence[line, i]:.0f} %"
            text = {"ha": "center", "va": "center", "fontsize": 9.5, "color": color_of(name)}
            ax.text(15.5, 32 + line_height * (line + 0.5), guess, **text)
    differing = 100 * (predicted != predicted[0]).any(0).float().mean()
    figure.suptitle(f"{data.name}: the variants disagree on {differing:.0f} % of the test images")
    figure.get_layout_engine().set(h_pad=0.1)  # inches, that the heading keeps clear of the first row's titles
    return figure


@styled
def plot_confusions(data, logits):
    """For each variant, how often the images of a class are taken for each other one; below, each class's accuracy.

    logits: a dict from a variant to its logits (N, classes), from utils.predict.
    """
    classes = range(len(data.classes))
    figure = plt.figure(figsize=(11, 7.2))
    plt.close(figure)
    axes = figure.subplot_mosaic([list(logits), ["classes"] * len(logits)], height_ratios=[3, 2])
    for name, each in logits.items():
        predicted = each.argmax(1).cpu()
        counts = torch.zeros(len(classes), len(classes))
        counts.index_put_((data.test_labels, predicted), torch.ones(len(predicted)), accumulate=True)
        percent = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
        color = color_of(name)
        ax = axes[name]
        shades = LinearSegmentedColormap.from_list(name, ["white", color])
        mistakes = percent * (1 - np.eye(len(classes)))
        ax.imshow(mistakes, cmap=shades, vmax=20)
        for truth, guess in np.ndindex(*percent.shape):
            if truth == guess or percent[truth, guess] >= 5:
                dark = mistakes[truth, guess] > 11
                ax.text(
                    *(guess, truth, f"{percent[truth, guess]:.0f}"),
                    **{"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else "#333333"},
                    fontweight="bold" if truth == guess else "normal",
                )
        ax.set_xticks(classes, data.classes, rotation=90, fontsize=9)
        ax.set_yticks(classes, data.classes if ax is axes[next(iter(logits))] else [], fontsize=9)
        ax.grid(False)
        ax.spines[:].set(visible=True, color="#CCCCCC")
        ax.tick_params(length=0)
        ax.set(xlabel="called", title=f"{name} norm, % of a class")
        place = np.array(classes) + 0.16 * (list(logits).index(name) - (len(logits) - 1) / 2)
        axes["classes"].bar(place, percent.diagonal(), 0.14, color=color, label=name)
    axes[next(iter(logits))].set_ylabel("is really")
    ax = axes["classes"]
    ax.set_xticks(classes, data.classes)
    ax.grid(axis="x", visible=False)
    ax.set(ylabel="accuracy, %", title=f"Accuracy by class, {data.name}")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.get_layout_engine().set(w_pad=0.08)
    return figure


@styled
def plot_activations(stages, images, title=None):
    """Where the activations lie through the depth of networks, before and after each norm.

    stages: a dict from a caption ("at the start") to a dict from a variant to its network. images: (N, 3, H, W).
    A thick bar holds the middle half of the values, a thin one 98 %.
    """
    variants = next(iter(stages.values()))
    shape = (len(variants), len(stages))
    figure, axes = subplots(*shape, figsize=(11, 2.3 * len(variants) + 0.6), sharex=True, sharey=True, squeeze=False)
    for column, (caption, models) in enumerate(stages.items()):
        for row, (name, model) in enumerate(models.items()):
            ax = axes[row, column]
            depths = norm_quantiles(model, images)
            for side, color, shift in ((0, "#9A9A9A", -0.16), (1, color_of(name), 0.16)):
                for place, quantiles in enumerate(depths.values()):
                    least, low, middle, high, most = quantiles[side]
                    ax.plot([place + shift] * 2, [least, most], color=color, linewidth=1.2)
                    ax.plot([place + shift] * 2, [low, high], color=color, linewidth=7, solid_capstyle="butt")
                    ax.plot(place + shift, middle, "_", color="white", markersize=7)
            ax.axhline(0, color="#999999", linewidth=0.8, zorder=0)
            ax.set_xticks(range(len(depths)), depths)
            ax.set_title(f"{name} norm, {caption}")
    for ax in axes[:, 0]:
        ax.set_ylabel("activation")
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(max(low, -10), min(high, 10))
    handles = [Line2D([], [], color=color, linewidth=7) for color in ("#9A9A9A", *map(color_of, variants))]
    names = ["before the norm", *(f"after {name} norm" for name in variants)]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title)
    return figure


@torch.no_grad()
def norm_quantiles(model, images):
    """For each block with a norm, by name: the 1, 25, 50, 75 and 99 % quantiles of what goes in and what comes out."""
    model = copy.deepcopy(model).cpu().float().eval()  # no dropout
    found = {}

    def look(name):
        levels = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
        thin = slice(None, None, 7)  # torch.quantile takes 16 million values at most

        def hook(module, args, output):
            found[name] = [x.float().flatten()[thin].quantile(levels).tolist() for x in (args[0], output)]

        return hook

    for name, block in model.named_children():
        if hasattr(block, "norm"):
            block.norm.train().register_forward_hook(look(name))  # by the batch's own statistics
    model(images.cpu())
    return found


@styled
def plot_running_statistics(model, loaders, block="C9", channel=0, steps=120, title=None):
    """What batch norm keeps: the mean of one channel in each batch, and the running mean, at several batch sizes.

    model: with batch norm; a copy in training mode sees the batches, and nothing is learnt. loaders: training loaders.
    """
    figure, axes = subplots(1, len(loaders), figsize=(11, 3.2), sharey=True, squeeze=False)
    color = COLORS["batch"]
    for ax, loader in zip(axes[0], loaders):
        twin = copy.deepcopy(model).cpu().float().train()
        norm = getattr(twin, block).norm
        norm.reset_running_stats()
        means, running = [], []

        def look(norm, args, output, means=means, running=running):
            means.append(args[0][:, channel].mean().item())
            running.append(norm.running_mean[channel].item())

        norm.register_forward_hook(look)
        with torch.no_grad():
            for images, _ in itertools.islice(loader, steps):
                twin(images.cpu())
        ax.plot(range(1, len(means) + 1), means, ".", color="#9A9A9A", markersize=5)
        ax.plot(range(1, len(running) + 1), running, color=color)
        ax.set(xlabel="batches seen", title=f"batches of {loader.batch_size}: ± {np.std(means):.2f}")
    axes[0, 0].set_ylabel(f"mean of {block}, channel {channel}")
    handles = [Line2D([], [], color="#9A9A9A", marker=".", linestyle=""), Line2D([], [], color=color)]
    names = ["mean of one batch (used in training)", "running mean (used in evaluation)"]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def results_table(results):
    """A DataFrame, one row a result: last-epoch figures, the best epoch beside them, cost."""
    rows = []
    for result in results:
        if not result.history:
            raise ValueError(f"the {result.norm} run has no finished epoch: train it before you tabulate it")
        last, best = result.history[-1], max(result.history, key=lambda row: row["test_acc"])
        rows.append(
            {
                "variant": result.norm,
                "training accuracy %": round(last["train_acc"], 2),
                "test accuracy %": round(last["test_acc"], 2),
                "total parameters": sum(p.numel() for p in result.model.parameters()),
                "epochs": last["epoch"],
                "best test % (epoch)": f"{best['test_acc']:.2f} ({best['epoch']})",
                "seconds an epoch": round(float(np.median([row["seconds"] for row in result.history])), 1),
                "seed": result.seed,
                "data": result.data,
            }
        )
    return pd.DataFrame(rows).set_index("variant")


def save_results(results, folder):
    """Writes every epoch of every run to folder/histories.csv, and the curves to folder/curves.png.

    Results on the stand-in get names that say so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "synthetic-" if any(result.data.startswith("synthetic") for result in results) else ""
    rows = [
        {"norm": result.norm, "seed": result.seed, "data": result.data} | row
        for result in results
        for row in result.history
    ]
    pd.DataFrame(rows).to_csv(folder / f"{prefix}histories.csv", index=False, float_format="%.6g")
    plot_curves(results).savefig(folder / f"{prefix}curves.png", dpi=110)
    print(f"Saved {prefix}histories.csv and {prefix}curves.png in {folder}/")


def last_epochs(rows):
    """The rows of each run's last epoch."""
    return rows[rows["epoch"] == rows.groupby("settings")["epoch"].transform("max")]


def seeds_table(rows):
    """Last-epoch accuracies of many seeds, mean ± standard deviation, by recipe and norm. rows: of run_many."""
    last = last_epochs(rows)
    cells = []
    for (recipe, norm), each in last.groupby(["recipe", "norm"], sort=False):
        cell = {"recipe": recipe, "variant": norm}
        for column, name in (("train_acc", "training accuracy %"), ("test_acc", "test accuracy %")):
            cell[name] = f"{each[column].mean():.2f} ± {each[column].std():.2f}"
        cells.append(cell | {"lowest test %": f"{each['test_acc'].min():.2f}", "seeds": len(each)})
    return pd.DataFrame(cells).set_index(["recipe", "variant"])


def trials_table(rows):
    """What was tried, a line a run: the settings in which the runs differ, and the last epoch's figures.

    rows: of run_many, with utils.hold_out(data): its "test" images are the training images held out.
    """
    last = last_epochs(rows)
    settings = [dict(pair.split("=", 1) for pair in line.rpartition(": ")[2].split()) for line in last["settings"]]
    table = pd.DataFrame(settings)
    table = table.loc[:, table.nunique() > 1]
    for column, name in (("train_acc", "training accuracy %"), ("test_acc", "held-out accuracy %")):
        table[name] = [f"{accuracy:.2f}" for accuracy in last[column]]
    table["held-out loss"] = [f"{loss:.3f}" for loss in last["test_loss"]]
    return table.set_index("norm")


def compare_norms(rows):
    """Differences in last-epoch test accuracy between norms, in points, paired by seed, with 95 % confidence intervals.

    rows: of run_many. A difference is real, by this measure, where its interval leaves out zero (Student's t).
    """
    lines = []
    for recipe, each in last_epochs(rows).groupby("recipe", sort=False):
        accuracies = each.pivot(index="seed", columns="norm", values="test_acc")
        for a, b in itertools.combinations(dict.fromkeys(each["norm"]), 2):
            both = accuracies[[a, b]].dropna()
            low, high = stats.ttest_rel(both[a], both[b]).confidence_interval(0.95)
            line = {"recipe": recipe, "difference": f"{a} - {b}", "points": f"{(both[a] - both[b]).mean():+.2f}"}
            line |= {"95 % interval": f"{low:+.2f} to {high:+.2f}", "real": "yes" if low * high > 0 else "not shown"}
            lines.append(line | {"seeds": len(both)})
    return pd.DataFrame(lines).set_index(["recipe", "difference"])


def count_seeds(rows):
    """How many seeds lie behind each point of a picture, in words."""
    settings = last_epochs(rows)["settings"].str.replace(r" seed=\d+", "", regex=True)
    fewest, most = settings.value_counts().agg(["min", "max"])
    return f"{fewest} to {most} seeds each" if fewest < most else f"{most} seed{'s' * (most > 1)} each"


@styled
def plot_seeds(rows, ax=None):
    """Last-epoch test accuracy of each run (dots), mean and standard deviation (bars), by recipe and norm.

    rows: of utils.run_many, with the columns recipe and norm.
    """
    ax, last = ax or subplots(figsize=(7.5, 4))[1], last_epochs(rows)
    recipes, norms = list(dict.fromkeys(last["recipe"])), list(dict.fromkeys(last["norm"]))
    for place, (recipe, norm) in enumerate(itertools.product(recipes, norms)):
        place += 0.8 * recipes.index(recipe)
        values = last.query("recipe == @recipe and norm == @norm")["test_acc"]
        if len(values):
            color = color_of(norm)
            dots = place + np.linspace(-0.15, 0.15, len(values))
            ax.plot(dots, values, "o", color=color, alpha=0.45, markersize=6, markeredgewidth=0)
            mean, deviation = values.mean(), values.std() if len(values) > 1 else 0.0
            ax.errorbar(place, mean, deviation, color=color, fmt="_", markersize=24, capsize=5)
            label = f"{norm}\n{mean:.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")
            text = {"ha": "center", "va": "top", "color": color, "fontweight": "bold", "fontsize": 10}
            lowest = min(values.min(), mean - deviation)
            ax.annotate(label, (place, lowest), (0, -8), textcoords="offset points", **text)
    middles = [i * (len(norms) + 0.8) + (len(norms) - 1) / 2 for i in range(len(recipes))]
    ax.set_xticks(middles, [f"{recipe} recipe" for recipe in recipes])
    ax.grid(axis="x", visible=False)
    ax.margins(x=0.08, y=0.25)
    ax.set(ylabel="test accuracy, %", title=f"{last['data'].iloc[0]}: {count_seeds(last)}, last epoch")
    return ax.figure


@styled
def plot_batch_sizes(rows, ax=None):
    """Test accuracy of each norm over the batch size, mean and standard deviation. rows: of utils.run_many."""
    ax = ax or subplots(figsize=(7.5, 4.2))[1]
    ends = {}
    for norm, each in last_epochs(rows).groupby("norm", sort=False):
        by_size = each.groupby("batch_size")["test_acc"]
        mean, deviation = by_size.mean(), by_size.std().fillna(0)
        ax.errorbar(mean.index, mean, deviation, color=color_of(norm), marker="o", capsize=3)
        ends[norm] = (mean.index[-1], mean.iloc[-1])
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(rows["batch_size"].unique()), sorted(rows["batch_size"].unique()))
    label_ends(ax, ends, {norm: color_of(norm) for norm in ends}, "{:.1f} %")
    ax.set(xlabel="batch size", ylabel="test accuracy, %", title=f"{rows['data'].iloc[0]}\n{count_seeds(rows)}")
    return ax.figure


@styled
def plot_groups(rows, ax=None):
    """Test accuracy of group norm over its number of groups, mean and standard deviation. rows: of utils.run_many."""
    ax = ax or subplots(figsize=(7.5, 3.4))[1]
    by_groups = last_epochs(rows).groupby("num_groups")["test_acc"].agg(["mean", "std"]).fillna(0)
    by_groups = by_groups.sort_index(key=lambda names: pd.to_numeric(names, errors="coerce").fillna(math.inf))
    mean, deviation = by_groups["mean"], by_groups["std"]
    ax.errorbar(range(len(mean)), mean, deviation, color=COLORS["group"], marker="o", capsize=3)
    names = {"1": "1\n(layer norm)", "channels": "one a channel\n(instance norm)"}
    ax.set_xticks(range(len(mean)), [names.get(str(groups), str(groups)) for groups in mean.index])
    ax.set(xlabel="groups", ylabel="test accuracy, %", title=f"{rows['data'].iloc[0]}\n{count_seeds(rows)}")
    return ax.figure


SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "stripes", "checks", "dots", "crescent")


def draw_shapes(labels, rng):
    """labels (N,) -> uint8 images (N, 3, 32, 32)."""
    n = len(labels)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    # u and v: each pixel's place in the shape's own frame, where the shape fills about [-1, 1].
    y, x = np.mgrid[-1:1:32j, -1:1:32j].astype(np.float32)
    x, y = x - uniform(-0.3, 0.3, 1, 1), y - uniform(-0.3, 0.3, 1, 1)
    angle, scale = uniform(-0.5, 0.5, 1, 1), uniform(0.4, 0.75, 1, 1)
    u = (x * np.cos(angle) + y * np.sin(angle)) / scale
    v = (y * np.cos(angle) - x * np.sin(angle)) / scale
    radius, box = np.hypot(u, v), np.maximum(abs(u), abs(v))
    wave = uniform(4, 6, 1, 1)
    shapes = (
        radius < 0.9,
        (radius < 1) & (radius > 0.55),
        box < 0.8,
        (box < 0.9) & (box > 0.5),
        (v < 0.8) & (v > 2 * abs(u) - 0.9),
        (np.minimum(abs(u), abs(v)) < 0.3) & (box < 1),
        (box < 1) & (np.sin(wave * v) > 0),
        (box < 1) & (np.sin(wave * u) * np.sin(wave * v) > 0),
        (box < 1) & (np.cos(1.4 * wave * u) + np.cos(1.4 * wave * v) > 0.7),
        (radius < 1) & (np.hypot(u - 0.5, v) > 0.75),
    )
    mask = np.choose(labels[:, None, None], shapes)[:, None]

    # Each class leans towards a hue of its own: what colour tells in an epoch, shape has to complete.
    hue = labels / len(SHAPES) + rng.normal(0, 0.12, n)
    color = 0.5 + 0.45 * np.cos(2 * np.pi * (hue[:, None] + np.arange(3) / 3))[:, :, None, None]
    background = uniform(0.2, 0.8, 3, 1, 1)
    shade = uniform(-0.2, 0.2, 1, 1, 1) * np.mgrid[-1:1:32j, -1:1:32j][0] + uniform(-0.2, 0.2, 1, 1, 1) * x[:, None]
    noise = rng.normal(0, 1, (n, 3, 32, 32)) * uniform(0.05, 0.2, 1, 1, 1)
    images = background + (color - background) * mask + shade + noise
    return (images.clip(0, 1) * 255).astype(np.uint8)
