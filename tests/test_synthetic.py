import numpy as np
import torch

import utils
from normkit.synthetic import draw_shapes, make_synthetic


def test_stand_in_is_marked_seeded_and_balanced():
    data, again = utils.load_data("synthetic"), make_synthetic()
    assert data.synthetic and "synthetic" in data.name
    assert torch.equal(data.train_images, again.train_images)
    assert data.train_images.shape == (5000, 3, 32, 32) and data.train_labels.bincount().tolist() == [500] * 10
    assert not torch.equal(make_synthetic(10, 10).train_images, make_synthetic(10, 10, seed=1).train_images)


def test_labels_are_int64_where_numpys_whole_numbers_have_32_bits(monkeypatch):
    """As those of NumPy 1 have on Windows."""
    arange = np.arange
    monkeypatch.setattr(np, "arange", lambda *args, dtype=np.int32: arange(*args, dtype=dtype))
    assert make_synthetic(10, 10).train_labels.tolist() == list(range(10))


def test_a_picture_depends_on_its_own_label_alone():
    labels = np.arange(100) % 10
    others = np.random.default_rng(0).permutation(labels)
    one, another = (draw_shapes(each, np.random.default_rng(0)) for each in (labels, others))
    assert np.array_equal((one == another).all((1, 2, 3)), labels == others) and (labels == others).any()
