"""What normalisation changes in training, measured: gradients, similarity of activations, range of the loss."""

import itertools
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torchvision.ops import DropBlock2d, StochasticDepth

from normkit.checks import check_choice, check_images
from normkit.copies import blocks_of, copy_of
from normkit.style import colors_of, panels, styled
from normkit.tables import data_of
from normkit.text import counted, legend_below

# The modules of PyTorch and torchvision that drop something, the last two within.
DROPPING = _DropoutNd, DropBlock2d, StochasticDepth, nn.MultiheadAttention, nn.RNNBase


def measure(model, images, labels, rates):
    """Returns all measures of a network on one batch, as rows {quantity, layer, rate, value}.

    images: normalised floats (N, 3, H, W), N at least 2. labels: int64 (N,). rates: of the steps along the gradient.
    """
    images = check_images(images, "cpu", torch.float32)
    rows = [
        {"quantity": "gradient norm", "layer": name, "value": x} for name, x in gradient_norms(model, images, labels)
    ]
    rows += [{"quantity": "similarity", "layer": name, "value": x} for name, x in similarities(model, images)]
    losses = losses_along_gradient(model, images, labels, rates)
    return rows + [{"quantity": "loss", "rate": rate, "value": loss} for rate, loss in losses]


def in_training(model, images):
    """Returns a copy of the model, in training mode but without dropout, and of the images, in float32 on the CPU."""
    model = copy_of(model).train()
    for module in model.modules():
        if isinstance(module, DROPPING):
            module.eval()
    return model, images.detach().to("cpu", torch.float32, copy=True)


def loss_of(model, images, labels):
    with torch.device("cpu"):  # whichever is the default
        return F.cross_entropy(model(images), labels.to("cpu", copy=True))


def backward(model, images, labels):
    """Computes the gradients of the loss, unless all is frozen."""
    loss = loss_of(model, images, labels)
    if loss.requires_grad:
        loss.backward()


@torch.inference_mode(False)  # with gradients, wherever it is called
def gradient_norms(model, images, labels):
    """Yields (layer, norm of the loss's gradient by its weight) for each convolution that is not frozen."""
    weights = {}

    def record(name, convolution, args, output):
        if convolution.weight.requires_grad:
            convolution.weight.retain_grad()  # a pruned weight is no parameter, but computed from one
            weights[name.removesuffix(".conv")] = convolution.weight

    model, images = in_training(model, images)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(partial(record, name))
    with parametrize.cached():  # else the hook would have a weight computed anew
        backward(model, images, labels)
    yield from ((name, weight.grad.norm().item()) for name, weight in weights.items() if weight.grad is not None)


@torch.no_grad()
def similarities(model, images):
    """Yields (layer, mean cosine of the activations of two different images) for each block with a norm.

    After Lubana et al. 2021: where all images give the same activations, nothing can be learnt from the layer.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} image: similarity is that of two images or more, so give a batch of them")
    found = {}

    def record(name, block, args, output):
        directions = F.normalize(output.flatten(1))
        cosines = directions @ directions.T
        found[name] = cosines[~torch.eye(len(cosines), dtype=torch.bool, device="cpu")].mean().item()

    model, images = in_training(model, images)
    for name, block in blocks_of(model):
        block.register_forward_hook(partial(record, name))
    with torch.device("cpu"):
        model(images)
    yield from found.items()


@torch.inference_mode(False)  # with gradients, wherever it is called
def losses_along_gradient(model, images, labels, rates):
    """Yields (rate, loss) after a step of each rate against the gradient: on a smooth loss these lie close together.

    What is frozen stays where it is. After Santurkar et al. 2018.
    """
    model, images = in_training(model, images)
    backward(model, images, labels)
    start = [(p, p.detach().clone(), p.grad) for p in model.parameters() if p.grad is not None]
    for rate in rates:
        with torch.no_grad():
            for parameter, value, gradient in start:
                parameter.copy_(value - rate * gradient)
            loss = loss_of(model, images, labels).item()
        yield rate, loss


# ------------------------------------------------------------------------------------- pictures


@styled
def plot_by_layer(rows, quantity):
    """Draws a quantity through the depth of the network, at the start and after training, a line a norm.

    rows: a DataFrame with the columns norm, step, quantity, layer, value, of which the index tells the order in which
    they were measured, layer by layer; the mean of the runs is drawn. step: how many were done, 0 at the start.
    Columns data and seed are for the heading.
    """
    captions = {"gradient norm": "norm of the gradient", "similarity": "cosine of two images"}
    check_choice("quantity", quantity, list(captions))
    rows = rows_of(rows, quantity).sort_index(kind="stable")
    colors = colors_of(rows["norm"])
    start, last = rows["step"].min(), rows.groupby("norm")["step"].transform("max")  # each norm's own
    parts = [rows[rows["step"] == start], rows[(rows["step"] == last) & (last > start)]]
    parts = [part for part in parts if len(part)]
    figure, axes = panels(len(parts), (5.5, 3.4), captions[quantity], sharey=True)
    orders = [each["layer"].unique() for _, each in rows.groupby("norm", sort=False)]
    layers = list(dict.fromkeys(itertools.chain(*sorted(orders, key=len, reverse=True))))  # some may lack some
    for ax, part in zip(axes, parts):
        for norm, each in part.groupby("norm", sort=False):
            means = each.groupby("layer")["value"].mean().reindex(layers)  # a gap where a network has no such layer
            ax.plot(range(len(layers)), means, "-o", color=colors[norm], markersize=5)
        ax.set_xticks(range(len(layers)), layers)
        steps = " to ".join(map(str, sorted({part["step"].min(), part["step"].max()})))
        ax.set_title("at the start" if steps == "0" else f"after {steps} steps")
    if quantity == "gradient norm":
        axes[0].set_yscale("log")
        for tick in (*axes[0].yaxis.majorTicks, *axes[0].yaxis.minorTicks):  # also those that no number has yet
            tick.label1.set_parse_math(True)  # powers of ten are formulas, which names are not
    lines = [Line2D([], [], color=color, marker="o") for color in colors.values()]
    legend_below(figure, lines, colors)
    name_data(figure, rows)
    return figure


@styled
def plot_loss_ranges(rows):
    """Draws the range of the loss along the gradient during training, one panel a norm.

    rows: a DataFrame with the columns norm, seed, step, quantity, rate, value. Each norm's first seed's are drawn; the
    median width in a heading is that of all. A column data is named above them. What reaches beyond five times the
    usual loss is cut off, and a heading says how far it goes, so that one spike leaves all others their room.
    """
    rows = rows_of(rows, "loss")
    drawn = rows[rows["seed"] == rows.groupby("norm", observed=True)["seed"].transform("min")]
    top = 5 * drawn.groupby(["norm", "step"], observed=True)["value"].max().median() or np.inf  # nats
    colors = colors_of(rows["norm"])
    figure, axes = panels(len(colors), (max(2, 11 / len(colors)), 3), "loss, nats", sharey=True)
    for ax, norm in zip(axes, colors):
        own = rows[rows["norm"] == norm]
        by_step = drawn[drawn["norm"] == norm].groupby("step")["value"]
        low, high = by_step.min().clip(upper=2 * top), by_step.max().clip(upper=2 * top)
        ax.fill_between(low.index, low, high, color=colors[norm], alpha=0.35, linewidth=0)
        ax.plot(low.index, low, color=colors[norm], linewidth=1)
        if len(low) == 1:  # of which neither shows anything
            ax.errorbar(low.index, low, [0 * low, high - low], color=colors[norm], fmt="none", capsize=8)
            ax.set_xticks(low.index)
        ranges = own.groupby(["seed", "step"])["value"].agg(np.ptp)
        beyond = f"\nup to {by_step.max().max():.3g} nats" if high.max() > top else ""
        ax.set(title=f"{norm}: {ranges.median():.2f} nats{beyond}", xlabel="step")
    axes[0].set_ylim(0, np.nanmin([top, axes[0].get_ylim()[1]]))
    name_data(figure, rows)
    return figure


def rows_of(rows, quantity):
    """Returns the rows of a quantity, if there are some."""
    rows = rows[rows["quantity"] == quantity]
    if rows.empty:
        raise ValueError(f"there are no rows of {quantity!r}: give those of measure, with norm, seed and step")
    return rows


def name_data(figure, rows):
    """Writes the data and the number of seeds above a figure, if rows have columns of both."""
    if {"data", "seed"} <= {*rows}:
        seeds = rows["seed"].nunique()
        figure.suptitle(f"{data_of(rows)}: {counted(seeds, 'seed')}")
