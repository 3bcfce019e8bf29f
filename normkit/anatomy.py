"""Pictures and tables of what norms and networks do."""

import copy
import itertools

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from torch import nn
from torchsummary import summary

from normkit.checks import check_choice, whole_number
from normkit.style import COLORS, colors_of, styled, subplots


class Function(nn.Module):
    """A function as a layer: model.NORMS may have norms that are no more."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def layer_of(norm):
    """Returns a copy of a norm in training mode, as a layer."""
    return (copy.deepcopy(norm) if isinstance(norm, nn.Module) else Function(norm)).train()


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
    colors = colors_of(layers)
    for ax, (name, layer) in zip(axes[0], layers.items()):
        shared = moved_by(layer_of(layer), x, 0, channels - 1).flatten(2)  # N, C, H·W
        draw_block(ax, shared, colors[name])
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
        layer = layer_of(layer)
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
        ax.add_patch(Rectangle((middle - width / 2, -height / 2), width, height, color=color))
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
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    handles.append(Line2D([], [], color="#666666", linewidth=1.4))
    figure.legend(handles, [*colors, "skip"], loc="outside lower center", ncols=4, frameon=False)
    total = sum(p.numel() for p in model.parameters())
    ax.set_title(f"The network and its {total:,} parameters")
    return figure


def trace_network(model, size):
    """Each step of the network, in the order in which it runs, and the pairs of steps that a skip connects."""
    steps, skips, outputs = [], [], {}
    field, jump = 1, 1

    def record(name):
        def hook(module, args, keywords, output):
            nonlocal field, jump
            for layer in module.modules():
                if hasattr(layer, "kernel_size"):
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

    model = copy.deepcopy(model).cpu().float().eval()
    for name, module in model.named_children():
        module.register_forward_hook(record(name), with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size, dtype=torch.float32, device="cpu"))
    return steps, skips


@styled
def plot_activations(stages, images, title=None):
    """Where the activations lie through the depth of networks, before and after each norm.

    stages: a dict from a caption ("at the start") to a dict from a variant to its network. images: (N, 3, H, W).
    A thick bar holds the middle half of the values, a thin one 98 %.
    """
    variants = next(iter(stages.values()))
    colors = colors_of(variants)
    shape = (len(variants), len(stages))
    figure, axes = subplots(*shape, figsize=(11, 2.3 * len(variants) + 0.6), sharex=True, sharey=True, squeeze=False)
    for column, (caption, models) in enumerate(stages.items()):
        for row, (name, model) in enumerate(models.items()):
            ax = axes[row, column]
            depths = norm_quantiles(model, images)
            for side, color, shift in ((0, "#9A9A9A", -0.16), (1, colors[name], 0.16)):
                for place, sides in enumerate(depths.values()):
                    least, low, middle, high, most = sides[side]
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
    handles = [Line2D([], [], color=color, linewidth=7) for color in ("#9A9A9A", *colors.values())]
    names = ["before the norm", *(f"after {name} norm" for name in variants)]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title)
    return figure


@torch.no_grad()
def norm_quantiles(model, images):
    """For each block with a norm, by name: the 1, 25, 50, 75 and 99 % quantiles of what goes in and what comes out."""
    model = copy.deepcopy(model).cpu().float().eval()  # no dropout
    quantiles = {}

    def record(name):
        levels = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
        thin = slice(None, None, 7)  # torch.quantile takes 16 million values at most

        def hook(module, args, output):
            quantiles[name] = [x.float().flatten()[thin].quantile(levels).tolist() for x in (args[0], output)]

        return hook

    for name, block in model.named_children():
        if hasattr(block, "norm"):
            block.norm = layer_of(block.norm)  # by the batch's own statistics
            block.norm.register_forward_hook(record(name))
    model(images.cpu().float())
    return quantiles


def keeps_statistics(block):
    """Whether a block has a norm with running statistics."""
    return getattr(getattr(block, "norm", None), "running_mean", None) is not None


@styled
def plot_running_statistics(model, loaders, block="C9", channel=0, steps=120, title=None):
    """What batch norm keeps: the mean of one channel in each batch, and the running mean, at several batch sizes.

    model: with batch norm; a copy in training mode sees the batches, and nothing is learnt. loaders: one training
    loader, or a list of them. block: the name of a block of the model with a norm.
    """
    kept = {name: each.norm.running_mean for name, each in model.named_children() if keeps_statistics(each)}
    if not kept:
        raise ValueError("the model keeps no running statistics: give one with batch norm, such as model.Net('batch')")
    check_choice("block", block, list(kept))
    if whole_number("channel", channel, 0) >= len(kept[block]):
        raise ValueError(f"channel={channel!r}: {block} has the channels 0 to {len(kept[block]) - 1}")
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    figure, axes = subplots(1, len(loaders), figsize=(11, 3.2), sharey=True, squeeze=False)
    color = COLORS["batch"]
    for ax, loader in zip(axes[0], loaders):
        model_copy = copy.deepcopy(model).cpu().float().train()
        norm = getattr(model_copy, block).norm
        norm.reset_running_stats()
        means, running = [], []

        def record(norm, args, output, means=means, running=running):
            means.append(args[0][:, channel].mean().item())
            running.append(norm.running_mean[channel].item())

        norm.register_forward_hook(record)
        with torch.no_grad():
            for images, _ in itertools.islice(loader, steps):
                model_copy(images.cpu().float())
        ax.plot(range(1, len(means) + 1), means, ".", color="#9A9A9A", markersize=5)
        ax.plot(range(1, len(running) + 1), running, color=color)
        ax.set(xlabel="batches seen", title=f"batches of {loader.batch_size}: ± {np.std(means):.2f}")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel(f"mean of {block}, channel {channel}")
    handles = [Line2D([], [], color="#9A9A9A", marker=".", linestyle=""), Line2D([], [], color=color)]
    names = ["mean of one batch (used in training)", "running mean (used in evaluation)"]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def summarize(model, input_size=(3, 32, 32)):
    """Prints torchsummary's table of a copy of the model, in float32, so that looking leaves model and seeds alone."""
    with torch.random.fork_rng(), torch.no_grad():
        summary(copy.deepcopy(model).cpu().float().eval(), input_size, device="cpu")
