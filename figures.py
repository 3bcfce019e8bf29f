"""The pictures: the figures of a study, each returned by its function, and the images of the synthetic stand-in."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D

# Okabe and Ito's palette, told apart by colour-blind readers too: one colour a norm, everywhere.
COLORS = {"batch": "#0072B2", "group": "#D55E00", "layer": "#009E73"}
FURTHER_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
def plot_curves(histories, title=None):
    """Loss and accuracy of several runs on shared axes, training dashed and test solid.

    histories: results of utils.run, or a dict from a label to a history, or a list of histories.
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


@styled
def plot_norm_sets(layers, images=8, channels=16, size=4):
    """What shares a mean with one value: found by asking each layer which inputs move one of its outputs.

    layers: a dict from a name to a norm layer of that many channels.
    """
    figure, axes = subplots(1, len(layers), figsize=(3.7 * len(layers), 2.9), squeeze=False)
    image, channel = images // 2, channels // 2 + 2
    for ax, (name, layer) in zip(axes[0], layers.items()):
        x = torch.randn(images, channels, size, size, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer.train()(x)[image, channel, 0, 0].backward()
        share = (x.grad != 0).float().mean((2, 3))
        ax.imshow(np.ones((images, channels)), cmap="Greys", vmin=0, vmax=12, aspect="auto")
        color = COLORS.get(name, FURTHER_COLORS[0])
        for i, c in share.nonzero().tolist():
            ax.add_patch(plt.Rectangle((c - 0.5, i - 0.5), 1, 1, color=color, alpha=0.85, linewidth=0))
        ax.plot(channel, image, "o", color="white", markersize=7)
        ax.set_xticks(np.arange(channels + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(images + 1) - 0.5, minor=True)
        ax.grid(False, which="major")
        ax.grid(True, which="minor", color="white", linewidth=2)
        ax.tick_params(which="both", length=0)
        ax.set_xticks(range(0, channels, 3), range(1, channels + 1, 3))
        ax.set_yticks(range(images), range(1, images + 1))
        ax.spines[:].set_visible(False)
        count = int((x.grad != 0).sum())
        ax.set(xlabel="channel", title=f"{name} norm\n{count} values share a mean")
    axes[0, 0].set_ylabel("image of the batch")
    return figure


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
            ax.imshow(image.permute(1, 2, 0))
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
        ax.imshow(data.test_images[i].permute(1, 2, 0))
        truth, guess = data.classes[data.test_labels[i]], data.classes[predicted[i]]
        ax.set_title(f"{guess} {100 * confidence[i]:.0f} %\nis {truth}", fontsize=10, fontweight="normal")
    figure.suptitle(title or f"{data.name}, most confident mistakes")
    return figure


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
