"""The stand-in for CIFAR-10: ten kinds of shapes and textures of any colour, place, size and angle, under noise."""

import numpy as np
import torch

from normkit.data import Data

SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "stripes", "checks", "dots", "crescent")


def make_synthetic(train_size=5000, test_size=1000, seed=0):
    """Returns the stand-in as Data, the classes in turn."""
    rng = np.random.default_rng(seed)
    tensors = []
    for size in (train_size, test_size):
        labels = np.arange(size) % len(SHAPES)
        tensors += [torch.from_numpy(draw_shapes(labels, rng)), torch.from_numpy(labels)]
    return Data("synthetic stand-in", SHAPES, *tensors)


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
