"""Pictures and tables of what norms and networks do."""

import contextlib
import io
import itertools
import math
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchsummary import summary

from normkit.checks import check_choice, whole_number
from normkit.copies import blocks_of, copy_of
from normkit.style import COLORS, colors_of, panels, styled, subplots
from normkit.text import counted, legend_below


class Function(nn.Module):
    """Wraps a function as a module: a norm in model.NORMS may be a plain function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def layer_of(norm):
    """Returns a copy of a norm in training mode, as a layer in float32 on the CPU."""
    return copy_of(norm if isinstance(norm, nn.Module) else Function(norm)).train()


def doubles(x):
    """Returns a copy of x in float64 on the CPU."""
    return x.detach().to("cpu", torch.float64, copy=True)


@torch.inference_mode(False)  # with gradients, wherever it is called
def moved_by(layer, x, *place):
    """Returns a bool mask (N, C, H, W): where in x the gradient of the output at place (n, c, h, w) is not zero.

    Computed in float64: in float32, rounding made a gradient zero in one run of sixty.
    """
    layer, x = copy_of(layer).double(), doubles(x).requires_grad_()
    layer(x)[place].backward()
    return x.grad != 0


def sets_of(layer, x):
    """Yields a bool mask, shaped like x, of each set of values that share statistics, until the sets cover x."""
    missing = torch.ones(x.shape, dtype=torch.bool, device="cpu")
    while missing.any():
        place = tuple(missing.nonzero()[0].tolist())
        mask = moved_by(layer, x, *place)
        mask[place] = True  # also where no input moves the output
        missing &= ~mask
        yield mask


@torch.no_grad()
def statistics_of(layer, x):
    """Returns how many statistics a layer removes from each set: 2 for mean and deviation, 1 for one of them.

    Removing the mean makes the output invariant to shifting x; removing the deviation or root mean square, to
    doubling it.
    """
    layer, x = copy_of(layer).double(), doubles(x)
    x = x / x.std()  # so that the norm's eps is negligible in nearly every set
    y = layer(x)
    return sum(int((layer(moved) - y).norm() <= 0.1 * y.norm()) for moved in (x + 1, 2 * x))


@styled
def plot_norm_sets(layers, images=6, channels=16, size=2):
    """Draws activations as a block, images × channels × pixels, and colours the values that share a mean with one.

    layers: a dict from a name to a norm layer for `channels` channels. Which to colour is measured: those where
    the gradient of one output of the front image's last channel is not zero.
    """
    figure, axes = panels(len(layers), (2.9, 2.5))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, size, size, generator=generator, dtype=torch.float32, device="cpu")
    colors = colors_of(layers)
    for ax, (name, layer) in zip(axes, layers.items()):
        shared = moved_by(layer_of(layer), x, 0, channels - 1, 0, 0).flatten(2)  # N, C, H·W
        draw_block(ax, shared, colors[name])
        values = int(shared.sum())
        ax.set_title(f"{name} norm\n{values if values > 1 else 'no'} values share a mean")
    return figure


def draw_block(ax, shared, color):
    """Draws a cube for each value: channels to the right, images behind, pixels upwards; shared (N, C, P) in colour."""
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
    ax.text(*corner(channels / 2, 0, -0.25), counted(channels, "channel"), ha="center", va="top", **text)
    ax.text(*corner(-0.4, 0, pixels / 2), "pixels", ha="right", va="center", rotation=90, **text)
    ax.text(*(corner(channels, images / 2, 0) + (0.35, -0.1)), counted(images, "image"), ha="left", va="top", **text)
    ax.autoscale_view()
    ax.set_aspect("equal")
    ax.axis("off")


def norm_table(layers, x):
    """Returns a DataFrame, one row per norm layer: its sets, and the mean and variance of its output in each.

    layers: a dict from a name to an untrained layer, whose scale and shift are the identity. x: (N, C, H, W), small,
    as the sets of values that share statistics are measured, with a backward pass in float64 for each.
    """
    rows = []
    for name, layer in layers.items():
        layer = layer_of(layer)
        with torch.no_grad():
            y = layer(x.cpu().float())
        masks = list(sets_of(layer, x))
        sizes = sorted({int(mask.sum()) for mask in masks})
        means = torch.stack([y[mask].mean() for mask in masks])
        variances = torch.stack([y[mask].var(correction=0) for mask in masks])
        across_images = any(mask.flatten(1).any(1).sum() > 1 for mask in masks)
        statistics = statistics_of(layer, x) * len(masks)
        rows.append(
            {
                "norm": name,
                "values that share a mean": sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}",
                "largest |mean|": f"{means.abs().max():.0e}",
                "variance": f"{variances.min():.3f} to {variances.max():.3f}",
                "statistics": f"{statistics} a batch" if across_images else f"{statistics // len(x)} an image",
                "trainable parameters": sum(p.numel() for p in layer.parameters() if p.requires_grad),
                "running statistics": sum(b.numel() for b in layer.buffers() if b.dim()),
            }
        )
    return pd.DataFrame(rows).set_index("norm")


@styled
def plot_network(model, size=32):
    """Draws the network step by step, for images of size×size pixels: channels, map, parameters, receptive field."""
    steps, skips = trace_network(model, size)
    most, highest = max([32, *(step["channels"] for step in steps)]), max([size, *(step["map"] for step in steps)])
    figure, ax = subplots(figsize=(11, 3.4))
    shades = {"norm": "#4C6A92", "convolution": "#9DB2CC", "pooling": "#D4D9E0", "other": "#ECEFF2"}
    colors = {step["kind"]: next(shades[word] for word in shades if word in step["kind"]) for step in steps}
    x, places = 0.0, {}
    for step in steps:
        height, width = 2.57 * (step["map"] / highest) ** 0.5, 0.12 + 32 / 45 * step["channels"] / most
        field = f"{step['field']}" if step["field"] < size else "all"
        lines = (f"{step['channels']}", f"{step['map']}×{step['map']}", f"{step['parameters']:,}", field)
        pitch = max(width, 0.62, 0.105 * max(map(len, lines)), 0.15 * len(step["name"]))
        places[step["name"]] = middle = x + pitch / 2
        ax.add_patch(Rectangle((middle - width / 2, -height / 2), width, height, color=colors[step["kind"]]))
        ax.text(middle, 1.45, step["name"], ha="center", va="bottom", fontweight="bold")
        for line, text in enumerate(lines):
            ax.text(middle, -1.65 - 0.36 * line, text, ha="center", va="center", fontsize=9.5)
        x += pitch + 0.14
    for line, text in enumerate(("channels", "map", "parameters", "sees, px")):
        ax.text(-0.35, -1.65 - 0.36 * line, text, ha="right", va="center", fontsize=9.5, color="#666666")
    for start, end in skips:
        arrow = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.25", "color": "#666666", "linewidth": 1.4}
        ax.annotate("", (places[end], 0.95), (places[start], 0.95), arrowprops=arrow)
    spare = max(0, 12 - x) / 2  # beside a network of few steps
    figure.set_figwidth(max(11, 0.8 * (x + 1.6)))
    ax.set(xlim=(-1.6 - spare, x + spare), ylim=(-2.9, 1.8))
    ax.axis("off")
    legend = {kind: Rectangle((0, 0), 1, 1, color=color) for kind, color in colors.items()}
    if skips:
        legend["skip"] = Line2D([], [], color="#666666", linewidth=1.4)
    legend_below(figure, [*legend.values()], [*legend])
    total = sum(p.numel() for p in model.parameters())
    ax.set_title(f"The network and its {total:,} parameters")
    return figure


def first_of(given):
    """Returns a tensor as it is, or the first of a tuple or list."""
    return given[0] if isinstance(given, tuple | list) else given


class Reaching(TorchFunctionMode):
    """Has tensors know their reach: receptive field and stride in pixels of the images, each of rows and columns.

    What is computed from several tensors reaches as far as the furthest of them. What makes maps smaller, and is no
    layer with a kernel, is taken for a pooling without overlap. Behind several transposed convolutions a field may be
    a pixel or two smaller than said, as they see their inputs in turn.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        known = [x for x in tree_leaves((args, kwargs)) if hasattr(x, "reach")]
        for y in tree_leaves(args[:1] if output is None else output):  # None: of x[:, :2] = y, say
            if known and isinstance(y, torch.Tensor):
                field, stride = np.max([x.reach for x in known], axis=0)
                if y.dim() == known[0].dim() == 4:
                    before, after = (np.array(x.shape[2:]) for x in (known[0], y))
                    smaller, larger = (np.maximum(1, np.round(ratio)) for ratio in (before / after, after / before))
                    field, stride = field + (smaller - 1) * stride, stride * smaller / larger
                y.reach = field, stride
        return output


def trace_network(model, size):
    """Returns (steps, skips): a dict per child module, in execution order, and name pairs (start, end) of skips."""
    steps, skips, outputs = [], [], {}
    images = torch.zeros(1, 3, size, size, dtype=torch.float32, device="cpu")
    images.reach = np.ones(2), np.ones(2)

    def widen(layer, args, keywords, output):
        x, y = first_of([*args, *keywords.values()]), first_of(output)
        field, stride = getattr(x, "reach", images.reach)
        span = (np.array(layer.kernel_size) - 1) * getattr(layer, "dilation", 1)
        step = np.array(layer.stride or layer.kernel_size)  # LPPool2d's None means that
        if isinstance(layer, nn.ConvTranspose2d):
            span, step = span // step, 1 / step
        y.reach = field + span * stride, stride * step

    def record(name, module, args, keywords, output):
        output = first_of(output)
        kind, side = "other", output.shape[2] if output.dim() == 4 else 1
        last = steps[-1] if steps else {"channels": 3, "map": size}
        if output.shape[1] == last["channels"] and side < last["map"]:
            kind = "pooling"
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):  # the last as if of a 1×1 map
                transposed = "transposed " * isinstance(layer, nn.ConvTranspose2d)
                kind = "{}×{} {}convolution".format(*getattr(layer, "kernel_size", (1, 1)), transposed)
        field, _ = getattr(output, "reach", images.reach)
        skips.extend((key, name) for key, kept in outputs.items() if any(kept is x for x in keywords.values()))
        outputs[name] = output
        steps.append(
            {
                "name": name,
                "kind": kind + ", norm, ReLU" if callable(getattr(module, "norm", None)) else kind,
                "channels": output.shape[1],
                "map": side,
                "parameters": sum(p.numel() for p in module.parameters()),
                "field": size if side == 1 else min(size, int(field.max())),  # 1: after global pooling
            }
        )

    model = copy_of(model).eval()
    for layer in model.modules():
        if hasattr(layer, "kernel_size"):
            layer.register_forward_hook(widen, with_kwargs=True)
    for name, module in model.named_children():
        module.register_forward_hook(partial(record, name), with_kwargs=True)
    with torch.no_grad(), torch.device("cpu"), Reaching():
        model(images)
    return steps, skips


@styled
def plot_activations(stages, images, title=None):
    """Draws quantiles of the activations before and after each norm, through the depth of networks.

    stages: a dict from a caption ("at the start") to a dict from a variant to its network. images: (N, 3, H, W).
    A thick bar holds the middle half of the values, a thin one 98 %.
    """
    variants = list(dict.fromkeys(name for models in stages.values() for name in models))
    if not variants:
        raise ValueError("there are no networks: give a dict from a caption to a dict from a variant to its network")
    colors = colors_of(variants)
    shape = (len(variants), len(stages))
    figure, axes = subplots(*shape, figsize=(11, 2.3 * len(variants) + 0.6), sharex=True, sharey=True, squeeze=False)
    for column, (caption, models) in enumerate(stages.items()):
        for ax, name in zip(axes[:, column], variants):
            if name not in models:
                ax.set_title(f"no {name} norm, {caption}")
                continue
            depths = norm_quantiles(models[name], images)
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
    legend_below(figure, handles, names)
    figure.suptitle(title)
    return figure


def thinned(x):
    """Returns at most every seventh value, flat: torch.quantile takes 16 million at most.

    The step is coprime to an image's size, so that every row, column and channel is sampled alike.
    """
    step = next(step for step in itertools.count(7) if math.gcd(step, x[0].numel()) == 1)
    return x.flatten()[::step]


@torch.no_grad()
def norm_quantiles(model, images):
    """Returns for each block with a norm, by name, the 1, 25, 50, 75 and 99 % quantiles of its input and its output."""
    model = copy_of(model).eval()  # no dropout
    quantiles = {}
    levels = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=torch.float32, device="cpu")

    def record(name, norm, args, output):
        quantiles[name] = [thinned(x.float()).quantile(levels).tolist() for x in (args[0], output)]

    for name, block in blocks_of(model):
        block.norm = layer_of(block.norm)  # by the batch's own statistics
        block.norm.register_forward_hook(partial(record, name))
    with torch.device("cpu"):
        model(images.cpu().float())
    if not quantiles:
        raise ValueError("the network has no block with a norm, such as model.Net's C1")
    return quantiles


def is_batch(item):
    """Returns whether an item is a batch, a list or tuple that begins with a tensor, rather than a loader."""
    return isinstance(item, list | tuple) and isinstance(item[0], torch.Tensor)


@styled
def plot_running_statistics(model, loaders, block="C9", channel=0, steps=120, title=None):
    """Draws one channel's batch means, and batch norm's running mean, in a panel per loader.

    model: has batch norm; a copy in training mode runs the batches, without optimizer steps. loaders: a training
    loader or list of batches, or a list of these. block: the name of a block with batch norm.
    """
    model = copy_of(model).train()
    kept = {name: each.norm for name, each in blocks_of(model) if getattr(each.norm, "running_mean", None) is not None}
    if not kept:
        raise ValueError(
            "no block of the model has a norm that keeps running statistics: give one with a batch norm called norm, "
            "such as C9 of model.Net('batch')"
        )
    check_choice("block", block, list(kept))
    norm = kept[block]
    channel = whole_number("channel", channel, 0, len(norm.running_mean) - 1)
    loaders = loaders if isinstance(loaders, list | tuple) and not is_batch(loaders[0]) else [loaders]
    size = (max(1.8, 11 / len(loaders)), 3.2)
    figure, axes = panels(len(loaders), size, f"mean of {block}, channel {channel}", sharey=True)
    color = COLORS["batch"]
    for ax, loader in zip(axes, loaders):
        norm.reset_running_stats()
        means, running, sizes = [], [], []

        def record(norm, args, output, means=means, running=running):
            means.append(args[0][:, channel].mean().item())
            running.append(norm.running_mean[channel].item())

        hook = norm.register_forward_hook(record)
        with torch.no_grad():
            for images, _ in itertools.islice(loader, steps):
                sizes.append(len(images))
                with torch.device("cpu"):
                    model(images.cpu().float())
        hook.remove()
        ax.plot(range(1, len(means) + 1), means, ".", color="#9A9A9A", markersize=5)
        ax.plot(range(1, len(running) + 1), running, "-" if len(running) > 1 else "_", color=color, markersize=9)
        spread = f": ± {np.std(means):.2f}" if len(means) > 1 else ""
        ax.set(xlabel="batches seen", title=f"batches of {max(sizes)}{spread}")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles = [Line2D([], [], color="#9A9A9A", marker=".", linestyle=""), Line2D([], [], color=color)]
    names = ["mean of one batch (used in training)", "running mean (used in evaluation)"]
    legend_below(figure, handles, names)
    figure.suptitle(title)
    return figure


def summarize(model, input_size=(3, 32, 32)):
    """Prints torchsummary's table of a float32 copy of the model; model and random state stay as they are.

    torchsummary counts only parameters named weight or bias, once per call of their module; if its total is wrong, a
    last line has the right one.
    """
    model, table = copy_of(model).eval(), io.StringIO()
    with torch.random.fork_rng(), torch.no_grad(), torch.device("cpu"), contextlib.redirect_stdout(table):
        summary(model, input_size, device="cpu")
    print(table.getvalue(), end="")
    total = sum(p.numel() for p in model.parameters())
    if f"Total params: {total:,}\n" not in table.getvalue():
        print(f"The table counts weights and biases of modules that run; all parameters: {total:,}")
