"""Accumulates loss and accuracy over a loader."""

import math
from typing import NamedTuple

import torch

EXPLODED = 1e12  # nats: no classifier's loss, yet far below 1e38, where float32 overflows
MAX_WAITING = 1000  # batches, each of which keeps 512 bytes of a GPU's memory


class Metrics(NamedTuple):
    """Holds a pass's mean loss per image, accuracy in percent, number of correct images and number of images."""

    loss: float
    accuracy: float
    correct: int
    total: int


class Meter:
    """Accumulates the batches' losses and correct images as Python numbers.

    Results on a GPU are queued and read many at once, as each read synchronises.
    """

    def __init__(self):
        self.loss, self.loss_sum, self.correct, self.total = math.nan, 0.0, 0, 0  # loss: the latest batch's
        self.batches, self.first_unsound, self.waiting = 0, None, []

    def add(self, loss, correct, size):
        """Adds a batch: its mean loss, its number of correct images, and its size."""
        if loss.device.type == "cpu":
            return self.count(loss.item(), int(correct), size)
        dtype = torch.promote_types(loss.dtype, torch.float32)
        numbers = torch.stack((loss.detach().to(dtype), correct.to(dtype)))  # copies: a graph writes there again
        self.waiting.append((numbers, size))
        if len(self.waiting) == MAX_WAITING:
            self.read()

    def read(self):
        """Adds the results that are queued on a GPU."""
        if self.waiting:
            waiting, self.waiting = self.waiting, []
            for (loss, correct), (_, size) in zip(torch.stack([numbers for numbers, _ in waiting]).tolist(), waiting):
                self.count(loss, int(correct), size)

    def count(self, loss, correct, size):
        if self.first_unsound is None and not abs(loss) < EXPLODED:  # not less, where it is NaN
            self.first_unsound = self.batches
        self.loss, self.batches = loss, self.batches + 1
        self.loss_sum, self.correct, self.total = self.loss_sum + loss * size, self.correct + correct, self.total + size

    def metrics(self):
        """Returns the Metrics of all batches so far."""
        self.read()
        return Metrics(self.loss_sum / self.total, 100 * self.correct / self.total, self.correct, self.total)


def classes_of(labels):
    """Returns labels as classes, int64 (N,); of class probabilities (N, K), the largest."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def count_correct(logits, labels):
    """Returns the number of correct predictions, for logits (N, K) and labels (N,) or (N, K)."""
    return (logits.argmax(1) == classes_of(labels)).sum()
