"""Calibration and corruptions, against their definitions."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from normkit import robustness


def logits_of(confidences, predicted, classes=10):
    """Logits whose softmax gives the predicted class that confidence, and the others equal shares of the rest."""
    shares = torch.tensor([[(1 - c) / (classes - 1)] * classes for c in confidences], dtype=torch.float64)
    shares[range(len(predicted)), predicted] = torch.tensor(confidences, dtype=torch.float64)
    return shares.log()


def test_calibration_by_hand():
    logits = logits_of([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], [0, 1, 2, 3, 4, 5])
    error, points = robustness.calibration(logits, torch.tensor([0, 1, 2, 9, 4, 9]))
    assert error == pytest.approx(4 / 6 * (0.95 - 0.75) + 2 / 6 * (0.55 - 0.5), abs=1e-6)
    assert points == [pytest.approx(point, abs=1e-6) for point in [(0.55, 0.5, 2 / 6), (0.95, 0.75, 4 / 6)]]


def test_a_network_that_is_always_sure_is_as_wrong_as_its_error():
    error, points = robustness.calibration(1e4 * torch.eye(10), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 0, 0]))
    assert error == pytest.approx(0.3) and points == [pytest.approx((1, 0.7, 1))]


@pytest.mark.parametrize("right, edge", [(True, 1), (False, 0)])
def test_a_dot_at_the_edge_is_whole(data, right, edge):
    """Where all are right, or none, it reaches as far beyond the axes as its size says."""
    logits = 1e4 * torch.nn.functional.one_hot((data.test_labels + (not right)) % 10, 10)
    with pytest.raises(ValueError, match="bins=0: expected a whole number of at least 1"):
        robustness.calibration(logits, data.test_labels, bins=0)
    figure = robustness.plot_calibration(data, {"batch": logits})
    canvas, (ax,) = FigureCanvasAgg(figure), figure.axes
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).astype(int)
    x, y = ax.transData.transform((1, edge)).astype(int)
    radius = (420**0.5 / 2 - 2) * figure.dpi / 72
    beyond = pixels[round(len(pixels) - y - (radius if right else -radius)), x]
    assert beyond[2] > beyond[0] + 50  # blue


def test_calibration_takes_shares_and_refuses_too_few_labels():
    logits, labels = 1e4 * torch.eye(10), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    shares = torch.nn.functional.one_hot(labels, 10) * 0.8 + 0.02
    assert robustness.calibration(logits, shares) == robustness.calibration(logits, labels)
    with pytest.raises(ValueError, match=r"labels \(1,\) of 10 logits: expected one label an image"):
        robustness.calibration(logits, labels[:1])


def test_calibration_of_what_says_its_frequency_is_zero():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50_000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    assert robustness.calibration(logits, labels)[0] < 0.01


def test_calibration_of_arrays_and_of_what_has_a_gradient():
    logits, labels = torch.randn(50, 10, requires_grad=True), torch.arange(50) % 10
    expected = robustness.calibration(logits, labels)
    assert robustness.calibration(logits.detach().numpy(), labels.numpy()) == expected


def test_corruptions_are_the_same_whatever_the_default(data):
    expected = robustness.corruptions(data.test_images)
    with torch.device("meta"):
        found = [robustness.corruptions(data.test_images)]
    torch.set_default_dtype(torch.float64)
    try:
        found.append(robustness.corruptions(data.test_images))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(each[kind], images) for each in found for kind, images in expected.items())


def test_corruptions(data):
    before = data.test_images.clone()
    found = robustness.corruptions(data.test_images)
    again = robustness.corruptions(data.test_images)
    assert torch.equal(found["clean"], before) and torch.equal(data.test_images, before)
    for kind, images in found.items():
        assert images.dtype == torch.uint8 and images.shape == before.shape and torch.equal(images, again[kind])
    gray = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    found = robustness.corruptions(gray)
    assert found["noise"].float().std().item() == pytest.approx(20, abs=0.5)
    assert all((found[kind].int() - 128).abs().max() <= 1 for kind in ("blur", "contrast"))
    pixels = before.float()
    point = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    point[..., 4, 4] = 255
    gauss = torch.exp(-torch.arange(-2.0, 3).square() / 2)
    gauss /= gauss.sum()
    blurred = robustness.corruptions(point)["blur"][0, 0, 2:7, 2:7].float()
    torch.testing.assert_close(blurred, 255 * torch.outer(gauss, gauss), rtol=0, atol=0.51)
    contrast = robustness.corruptions(before)["contrast"].float()
    assert (contrast.std((1, 2, 3)) / pixels.std((1, 2, 3))).median().item() == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize("kind", [torch.Tensor.float, torch.Tensor.numpy, lambda images: images[0]])
def test_corruptions_of_other_images_than_a_data_sets_are_refused(data, kind):
    with pytest.raises(ValueError, match="expected a tensor uint8"):
        robustness.corruptions(kind(data.test_images))


@pytest.mark.parametrize("size", [8, 32])
def test_pictures(data, size):
    logits = {name: torch.randn(len(data.test_labels), 10) for name in ("batch", "none")}
    figure = robustness.plot_calibration(data, logits)
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["batch", "none"]
    images = robustness.corruptions(data.test_images[:3, :, :size, :size])
    variants = ["batch", "layer", "batch, statistics anew"]
    rows = [{"images": kind, "norm": norm, "test_acc": 50.0} for kind in images for norm in variants]
    figure = robustness.plot_corruptions(pd.DataFrame(rows), images, "title")
    bars = [bar for ax in figure.axes for bar in ax.patches]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, False, True] * 4
    rows = [{"images": kind, "norm": norm, "test_acc": 50.0} for kind in images for norm in ("mine", "yours")]
    figure = robustness.plot_corruptions(pd.DataFrame(rows), images)
    assert len({bar.get_facecolor() for bar in figure.axes[-1].patches}) == 2


def test_corruptions_one_alone_missing_or_measured_twice(data):
    images = robustness.corruptions(data.test_images[:1])
    rows = pd.DataFrame(
        {"images": kind, "norm": norm, "test_acc": 50.0} for kind in images for norm in ("batch", "a, b")
    )
    one = robustness.plot_corruptions(rows.query("images == 'blur'"), images)
    assert [ax.get_title() for ax in one.axes] == ["blur", ""]
    figure = robustness.plot_corruptions(pd.concat([rows[1:], rows[-1:].assign(test_acc=60.0)]), images)
    below = [ax for ax in figure.axes if ax.patches]
    bars = [[bar.get_height() for bar in ax.patches] for ax in below]
    assert (
        np.isnan(bars[0][1]) and bars[0][0] == 50 and bars[1:] == [[50, 50], [50, 50], [55, 50]]
    )  # of "a, b", "batch"
    assert [len(ax.texts) for ax in below] == [1, 2, 2, 2] and len({ax.get_xlim() for ax in below}) == 1
    with pytest.raises(ValueError, match="there are no rows"):
        robustness.plot_corruptions(pd.DataFrame([]), images)


def test_variants_of_one_norm_are_told_apart(data):
    images = robustness.corruptions(data.test_images[:1])
    variants = ["batch", "batch, seed 0", "group, lr 0.1", "batch, seed 1", "group, lr 0.3"]
    rows = pd.DataFrame({"images": kind, "norm": norm, "test_acc": 50.0} for kind in images for norm in variants)
    bars = robustness.plot_corruptions(rows, images).axes[-1].patches
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 5
    with pytest.raises(ValueError, match="unknown corruption 'fog': choose clean, noise, blur or contrast"):
        robustness.plot_corruptions(rows.replace({"images": {"blur": "fog"}}), images)
