"""What a pass adds up to, whether its numbers are read one by one or many at once."""

import math

import pytest
import torch

from normkit.meter import MAX_WAITING, Meter, count_correct

BATCHES = [(2.5, 3, 8), (0.5, 8, 8), (2e12, 0, 8), (math.nan, 1, 8), (1.0, 5, 5)]


def test_sums_and_the_first_loss_that_is_no_loss(device):
    meter = Meter()
    for loss, correct, size in BATCHES[:2]:
        meter.add(torch.tensor(loss, device=device), torch.tensor(correct, device=device), size)
    meter.read()
    assert (meter.loss_sum, meter.correct, meter.total, meter.loss) == (24.0, 11, 16, 0.5)
    assert meter.first_unsound is None and type(meter.loss_sum) is float and type(meter.correct) is int
    for loss, correct, size in BATCHES[2:]:
        meter.add(torch.tensor(loss, device=device), torch.tensor(correct, device=device), size)
    meter.read()
    assert meter.first_unsound == 2 and (meter.correct, meter.total, meter.batches) == (17, 37, 5)


def test_numbers_that_wait_are_counted_like_others():
    meter, waiting = Meter(), Meter()
    for loss, correct, size in BATCHES[:2]:
        meter.add(torch.tensor(loss), torch.tensor(correct), size)
        waiting.waiting.append((torch.tensor([loss, correct]), size))
    assert waiting.total == 0
    waiting.read()
    waiting.read()
    assert vars(meter) == vars(waiting)


def test_few_numbers_wait_and_those_of_a_graph_are_copied(device):
    """A graph writes the next batch's to the same place."""
    meter, loss, correct = Meter(), torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(MAX_WAITING + 2):
        loss += 1
        correct += 1
        meter.add(loss, correct, 1)
        assert len(meter.waiting) < MAX_WAITING
    meter.read()
    assert meter.loss_sum == meter.correct == sum(range(1, MAX_WAITING + 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_no_digits_are_lost(dtype, device):
    meter = Meter()
    meter.add(torch.tensor(1 / 3, dtype=dtype, device=device), torch.tensor(60_001, device=device), 60_002)
    meter.read()
    assert meter.loss == float(torch.tensor(1 / 3, dtype=dtype)) and meter.correct == 60_001


def test_correct_images_by_labels_or_by_shares():
    logits, labels = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0], [0.0, 1.0, 5.0]]), torch.tensor([1, 2, 2])
    assert count_correct(logits, labels) == count_correct(logits, torch.eye(3)[labels]) == 2
