"""What accuracy alone does not tell: calibration, and accuracy on images that were corrupted."""

import itertools
import math

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from normkit.checks import check_choice, check_pixels, whole_number
from normkit.meter import classes_of
from normkit.predictions import as_logits, logits_by_name
from normkit.style import colors_of, panels, styled, subplots
from normkit.text import legend_below

HATCHES = ("///", "...", "xxx", "\\\\\\", "ooo")


def calibration(logits, labels, bins=10):
    """Returns the expected calibration error, and for each bin (confidence, accuracy, share of the images).

    Bins are of equal width in confidence; the error is the mean gap between a bin's confidence and its accuracy,
    weighted by its share (Naeini et al. 2015). Empty bins are left out. All are from 0 to 1.
    """
    bins, labels = whole_number("bins", bins), classes_of(torch.as_tensor(labels, device="cpu"))
    confidence, predicted = as_logits(logits).softmax(1).max(1)
    if labels.shape != predicted.shape:
        raise ValueError(f"labels {tuple(labels.shape)} of {len(predicted)} logits: expected one label an image")
    right = (predicted == labels).float()
    place = (confidence * bins).long().clamp(max=bins - 1)
    points = []
    for b in place.unique().tolist():
        members = place == b
        points.append((confidence[members].mean().item(), right[members].mean().item(), members.float().mean().item()))
    return sum(abs(sure - accurate) * share for sure, accurate, share in points), points


@styled
def plot_calibration(data, logits):
    """Draws accuracy over confidence for each variant; on the diagonal, a probability is how often it is right.

    logits: a dict from a variant to its logits (N, classes) of the test images, from utils.predict.
    """
    logits = logits_by_name(data, logits)
    colors = colors_of(logits)
    figure, axes = panels(len(logits), (max(3.2, 7 / len(logits)), 3.6), "accuracy", sharey=True)
    for ax, (name, each) in zip(axes, logits.items()):
        error, points = calibration(each, data.test_labels)
        confidence, accuracy, share = map(np.array, zip(*points))
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        dots = {"s": 800 * share, "alpha": 0.75, "linewidths": 0, "clip_on": False}  # at 0 and 1, too, whole
        ax.scatter(confidence, accuracy, color=colors[name], **dots)
        ax.set(title=f"{name}: ECE {100 * error:.1f} %", xlabel="confidence", aspect="equal")
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    figure.suptitle(f"Test images of {data.name}; a dot's area is its share of them")
    return figure


def corruptions(images):
    """Returns images uint8 (N, 3, H, W), clean and corrupted in three ways, by name; the noise is always the same."""
    check_pixels("images", images)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device="cpu").to(images.device)
    return {
        "clean": images,
        "noise": (images + 20 * noise).round().clamp(0, 255).to(torch.uint8),  # deviation 20 of 255
        "blur": transforms.gaussian_blur(images, kernel_size=5, sigma=1.0),  # pixels
        "contrast": transforms.adjust_contrast(images, 0.4),
    }


@styled
def plot_corruptions(rows, images, title=None):
    """Draws accuracy under each corruption, a bar a variant, and above it what the corruption makes of one image.

    rows: a DataFrame with the columns images (the corruption), norm, test_acc; of several runs the mean is drawn, and
    of none a gap. A norm with something after a comma is hatched, each of its variants in another way. images: of
    corruptions.
    """
    if rows.empty:
        raise ValueError("there are no rows: give one for each corruption and variant, with images, norm and test_acc")
    accuracies = rows.astype({"test_acc": float}).groupby(["images", "norm"], observed=True)["test_acc"].mean()
    kinds, variants = list(dict.fromkeys(rows["images"])), list(dict.fromkeys(rows["norm"]))
    colors = colors_of(variant.split(",")[0] for variant in variants)
    further = {norm: itertools.cycle(HATCHES) for norm in colors}
    hatches = {variant: next(further[variant.split(",")[0]]) for variant in variants if "," in variant}
    size = (max(5, 2.75 * len(kinds)), 4.6)
    figure, axes = subplots(2, len(kinds), figsize=size, height_ratios=[1, 2], squeeze=False)
    for (above, ax), kind in zip(axes.T, kinds):
        check_choice("corruption", kind, list(images))
        above.imshow(images[kind][0].permute(1, 2, 0).numpy())
        above.set_title(kind)
        above.axis("off")
        for place, variant in enumerate(variants):
            value = accuracies.get((kind, variant), math.nan)
            color, hatch = colors[variant.split(",")[0]], hatches.get(variant)
            ax.bar(place, value, color=color, hatch=hatch, edgecolor="white", linewidth=0)
            if math.isfinite(value):
                ax.text(place, value, f"{value:.0f}", ha="center", va="bottom", fontsize=10)
        ax.set(xticks=[], ylim=(0, 100), yticks=[0, 25, 50, 75, 100] if ax is axes[1, 0] else [])
        ax.set_xlim(-0.6, len(variants) - 0.4)
        ax.grid(False)
    axes[1, 0].set_ylabel("test accuracy, %")
    bars = axes[1, -1].patches
    legend_below(figure, bars, variants)
    figure.suptitle(title)
    return figure
