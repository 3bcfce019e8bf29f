"""What a pass over a loader adds up to, while it goes on."""

import math
from typing import NamedTuple

import torch

EXPLODED = 1e12  # nats: no classifier's loss, but float32 goes on to 1e38 before it overflows
MAX_WAITING = 1000  # batches, each of which keeps 512 bytes of a GPU's memory


class Metrics(NamedTuple):
    """Of one pass over a loader: mean loss of an image, accuracy in percent, correct images, all images."""

    loss: float
    accuracy: float
    correct: int
    total: int


class Meter:
    """Adds up the batches' losses and correct images, as Python's numbers.

    Those on a GPU wait there, to be read many at once: to read a number is to wait for it.
    """

    def __init__(self):
        self.loss, self.loss_sum, self.correct, self.total = math.nan, 0.0, 0, 0  # loss: the latest batch's
        self.batches, self.first_unsound, self.waiting = 0, None, []

    def add(self, loss, correct, size):
        """Takes a batch's mean loss, how many of its images are right, and how many there are."""
        if loss.device.type == "cpu":
            return self.count(loss.item(), int(correct), size)
        dtype = torch.promote_types(loss.dtype, torch.float32)
        numbers = torch.stack((loss.detach().to(dtype), correct.to(dtype)))  # copies: a graph writes there again
        self.waiting.append((numbers, size))
        if len(self.waiting) == MAX_WAITING:
            self.read()

    def read(self):
        """Counts what waits on a GPU."""
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
    """Returns int64 (N,) of labels: of shares of classes, the largest."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def count_correct(logits, labels):
    """Returns how many of the logits (N, K) are largest where the labels, (N,) or (N, K), are."""
    return (logits.argmax(1) == classes_of(labels)).sum()
