"""The stand-in for CIFAR-10: ten kinds of shapes and textures of any colour, place, size and angle, under noise."""

import numpy as np
import torch

from normkit.data import Data

# name -> where the shape is, of each pixel's place u, v in the shape's own frame, which it fills to about [-1, 1].
SHAPES = {
    "disc": lambda u, v, wave: np.hypot(u, v) < 0.9,
    "ring": lambda u, v, wave: between(0.55, np.hypot(u, v), 1),
    "square": lambda u, v, wave: box(u, v) < 0.8,
    "frame": lambda u, v, wave: between(0.5, box(u, v), 0.9),
    "triangle": lambda u, v, wave: between(2 * abs(u) - 0.9, v, 0.8),
    "cross": lambda u, v, wave: (np.minimum(abs(u), abs(v)) < 0.3) & (box(u, v) < 1),
    "stripes": lambda u, v, wave: (np.sin(wave * v) > 0) & (box(u, v) < 1),
    "checks": lambda u, v, wave: (np.sin(wave * u) * np.sin(wave * v) > 0) & (box(u, v) < 1),
    "dots": lambda u, v, wave: (np.cos(1.4 * wave * u) + np.cos(1.4 * wave * v) > 0.7) & (box(u, v) < 1),
    "crescent": lambda u, v, wave: (np.hypot(u, v) < 1) & (np.hypot(u - 0.5, v) > 0.75),
}


def box(u, v):
    return np.maximum(abs(u), abs(v))


def between(low, x, high):
    return (low < x) & (x < high)


def make_synthetic(train_size=5000, test_size=1000, seed=0):
    """Returns the stand-in as Data, the classes in turn."""
    rng = np.random.default_rng(seed)
    tensors = []
    for size in (train_size, test_size):
        labels = np.arange(size, dtype=np.int64) % len(SHAPES)
        tensors += [torch.from_numpy(draw_shapes(labels, rng)), torch.from_numpy(labels)]
    return Data("synthetic stand-in", tuple(SHAPES), *tensors)


def draw_shapes(labels, rng):
    """labels (N,) -> uint8 images (N, 3, 32, 32)."""
    n = len(labels)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    center_x, center_y = uniform(-0.3, 0.3, 1, 1), uniform(-0.3, 0.3, 1, 1)
    angle, scale, wave = uniform(-0.5, 0.5, 1, 1), uniform(0.4, 0.75, 1, 1), uniform(4, 6, 1, 1)
    # Each class leans towards a hue of its own: what colour tells in an epoch, shape has to complete.
    hue = labels / len(SHAPES) + rng.normal(0, 0.12, n)
    color = 0.5 + 0.45 * np.cos(2 * np.pi * (hue[:, None] + np.arange(3) / 3))[:, :, None, None]
    background = uniform(0.2, 0.8, 3, 1, 1)
    slope_y, slope_x = uniform(-0.2, 0.2, 1, 1, 1), uniform(-0.2, 0.2, 1, 1, 1)
    noise = rng.standard_normal((n, 3, 32, 32))
    noise *= uniform(0.05, 0.2, 1, 1, 1)

    images = np.empty((n, 3, 32, 32), np.uint8)
    rows, columns = np.mgrid[-1:1:32j, -1:1:32j]
    for label, shape in enumerate(SHAPES.values()):
        members = labels == label
        x, y = columns.astype(np.float32) - center_x[members], rows.astype(np.float32) - center_y[members]
        u = (x * np.cos(angle[members]) + y * np.sin(angle[members])) / scale[members]
        v = (y * np.cos(angle[members]) - x * np.sin(angle[members])) / scale[members]
        picture = np.where(shape(u, v, wave[members])[:, None], color[members], background[members])
        picture += slope_y[members] * rows + slope_x[members] * x[:, None]
        picture += noise[members]
        images[members] = picture.clip(0, 1, out=picture) * 255
    return images
