"""What normalisation changes in training, measured: gradients, likeness of activations, range of the loss."""

import contextlib
import copy

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from torch import nn

from normkit.checks import check_choice
from normkit.style import colors_of, legend_below, styled, subplots


def measure(model, images, labels, rates):
    """Returns all measures of a network on one batch, as rows {quantity, layer, rate, value}."""
    rows = [
        {"quantity": "gradient norm", "layer": name, "value": x} for name, x in gradient_norms(model, images, labels)
    ]
    rows += [{"quantity": "similarity", "layer": name, "value": x} for name, x in similarities(model, images)]
    losses = losses_along_gradient(model, images, labels, rates)
    return rows + [{"quantity": "loss", "rate": rate, "value": loss} for rate, loss in losses]


@contextlib.contextmanager
def in_training(model, images):
    """Gives a copy of the model, in training mode but without dropout, and the images, both in float32 on the CPU."""
    model = copy.deepcopy(model).cpu().float().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.eval()
    yield model, images.cpu().float()


def gradient_norms(model, images, labels):
    """Yields (layer, norm of the loss's gradient by its weight) for each convolution."""
    with in_training(model, images) as (model, images):
        F.cross_entropy(model(images), labels.cpu()).backward()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                yield name.removesuffix(".conv"), module.weight.grad.norm().item()


def similarities(model, images):
    """Yields (layer, mean cosine of the activations of two different images) for each block with a norm.

    After Lubana et al. 2021: where all images give the same activations, nothing can be learnt from the layer.
    """
    found = {}

    def record(name):
        def hook(block, args, output):
            directions = F.normalize(output.flatten(1))
            cosines = directions @ directions.T
            found[name] = cosines[~torch.eye(len(cosines), dtype=torch.bool)].mean().item()

        return hook

    with in_training(model, images) as (model, images), torch.no_grad():
        for name, block in model.named_children():
            if hasattr(block, "norm"):
                block.register_forward_hook(record(name))
        model(images)
    yield from found.items()


def losses_along_gradient(model, images, labels, rates):
    """Yields (rate, loss) after a step of each rate against the gradient: on a smooth loss these lie close together.

    After Santurkar et al. 2018.
    """
    with in_training(model, images) as (model, images):
        F.cross_entropy(model(images), labels.cpu()).backward()
        start = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
        with torch.no_grad():
            for rate in rates:
                for parameter, value, gradient in start:
                    parameter.copy_(value - rate * gradient)
                yield rate, F.cross_entropy(model(images), labels.cpu()).item()


# ------------------------------------------------------------------------------------- pictures


@styled
def plot_by_layer(rows, quantity):
    """A quantity through the depth of the network, at the start and after training, a line a norm.

    rows: a DataFrame with the columns norm, step, quantity, layer, value, of which the index tells the order in which
    they were measured, layer by layer; the mean of the runs is drawn.
    """
    captions = {"gradient norm": "norm of the gradient", "similarity": "cosine of two images"}
    check_choice("quantity", quantity, list(captions))
    rows = rows[rows["quantity"] == quantity].sort_index(kind="stable")
    colors = colors_of(rows["norm"])
    stages = {rows["step"].min(): "at the start", rows["step"].max(): f"after {rows['step'].max()} steps"}
    figure, axes = subplots(1, 2, figsize=(11, 3.4), sharey=True)
    layers = list(dict.fromkeys(rows["layer"]))
    for ax, (step, caption) in zip(axes, stages.items()):
        for norm, each in rows[rows["step"] == step].groupby("norm", sort=False):
            means = each.groupby("layer")["value"].mean()[layers]
            ax.plot(layers, means, "-o", color=colors[norm], markersize=5)
        ax.set_title(caption)
    if quantity == "gradient norm":
        axes[0].set_yscale("log")
    axes[0].set_ylabel(captions[quantity])
    lines = [Line2D([], [], color=color, marker="o") for color in colors.values()]
    legend_below(figure, lines, colors)
    return figure


@styled
def plot_loss_ranges(rows):
    """The range of the loss along the gradient during training, one panel a norm.

    rows: a DataFrame with the columns norm, seed, step, quantity, rate, value; the first seed's are drawn.
    """
    rows = rows[(rows["quantity"] == "loss") & (rows["seed"] == rows["seed"].min())]
    colors = colors_of(rows["norm"])
    figure, axes = subplots(1, len(colors), figsize=(11, 3), sharey=True, squeeze=False)
    for ax, norm in zip(axes[0], colors):
        by_step = rows[rows["norm"] == norm].groupby("step")["value"]
        low, high = by_step.min(), by_step.max()
        ax.fill_between(low.index, low, high, color=colors[norm], alpha=0.35, linewidth=0)
        ax.plot(low.index, low, color=colors[norm], linewidth=1)
        ax.set(title=f"{norm}: {np.median(high - low):.2f} nats", xlabel="step")
    axes[0, 0].set_ylabel("loss, nats")
    axes[0, 0].set_ylim(bottom=0)
    return figure
