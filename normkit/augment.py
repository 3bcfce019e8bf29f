"""Augmentation: every way to shift and flip an image, as a table of pixels."""

import torch

MAX_SHIFT = 2  # pixels by which an image is shifted at most, each way


def list_views(height, width):
    """Returns each way to shift an image by up to MAX_SHIFT pixels, edges reflected, and to flip it or not.

    (views, H·W) int64: which pixel of the image each pixel of the view is.
    """
    shifts = torch.arange(-MAX_SHIFT, MAX_SHIFT + 1, device="cpu")[:, None]
    rows, columns = (reflect(torch.arange(size, device="cpu") - shifts, size) for size in (height, width))
    columns = torch.cat([columns, width - 1 - columns])
    return (rows[:, None, :, None] * width + columns[:, None, :]).flatten(0, 1).flatten(1)


def shift_and_flip(images, views):
    """Returns images (B, C, H, W) as views (B, H·W) show them, the same in each channel."""
    pixels = views[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, pixels).view_as(images)


def reflect(index, size):
    """Returns indices that fall outside 0 … size-1 reflected back in."""
    return size - 1 - (size - 1 - index.abs()).abs()
