import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from normkit.cifar10 import CLASSES
from normkit.data import Data, train_val_split


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": torch.zeros(5, 3, 32, 32)}, "expected a tensor uint8"),
        ({"test_images": torch.zeros(5, 32, 32, 3, dtype=torch.uint8)}, "expected a tensor uint8"),
        (
            {"train_images": np.zeros((5, 32, 32, 3), np.uint8)},
            r"ndarray.*expected a tensor uint8.*torch.from_numpy\(array\).permute\(0, 3, 1, 2\)",
        ),
        ({"train_labels": [0, 1, 2, 3, 4]}, "list: expected a tensor int64"),
        ({"train_labels": torch.zeros(4, dtype=torch.int64)}, "one label an image"),
        ({"train_labels": torch.full((5,), 10)}, "expected 0 to 9"),
        ({"test_labels": torch.full((5,), -1)}, "expected 0 to 9"),
    ],
)
def test_data_of_ones_own_is_checked(change, message):
    images, labels = torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5)
    good = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    Data("mine", CLASSES, **good)
    with pytest.raises(ValueError, match=message):
        Data("mine", CLASSES, **(good | change))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=80), st.data(), st.booleans())
def test_images_are_held_out_class_by_class(labels, draw, in_order):
    labels = torch.tensor(sorted(labels) if in_order else labels)
    size = draw.draw(st.integers(1, len(labels) - 1))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    held = train_val_split(Data("any", tuple("abcdef"), images, labels, images[:1], labels[:1]), size)
    parts = [each[:, 0, 0, 0].tolist() for each in (held.train_images, held.test_images)]
    assert sorted(parts[0] + parts[1]) == list(range(len(labels))) and len(parts[1]) == size
    for part, own in zip(parts, (held.train_labels, held.test_labels)):
        assert part == sorted(part) and torch.equal(labels[part], own)
    for label, count in enumerate(labels.bincount().tolist()):
        share = count * size / len(labels)
        chosen = [i for i in parts[1] if labels[i] == label]
        assert abs(len(chosen) - share) < 1
        assert chosen == (labels == label).nonzero().flatten().tolist()[count - len(chosen) :]  # the last ones
    assert f"{size} training images held out class by class" in held.name


@pytest.mark.parametrize("size", [0, -1, 1.5, 101])
def test_what_is_held_out_is_some_of_the_training_images_and_not_all(small, size):
    with pytest.raises(ValueError, match=f"size={size}: expected a whole number from 1 to 100"):
        train_val_split(small, size)


def test_data_says_in_a_line_what_it_is(small):
    said = f"Data({small.name}: 101 training and 40 test images of shape (3, 16, 16), 10 classes)"
    assert repr(small) == said


def test_the_first_images_are_those_of_the_whole(small):
    few = small.first(30, 7)
    assert torch.equal(few.train_images, small.train_images[:30])
    assert torch.equal(few.train_labels, small.train_labels[:30])
    assert torch.equal(few.test_images, small.test_images[:7]) and torch.equal(few.test_labels, small.test_labels[:7])
    assert few.synthetic and "first 30 training images" in few.name
    assert torch.equal(small.first(30).test_images, small.test_images)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0,), "train_size=0: expected a whole number from 1 to 101"),
        ((-5,), "train_size=-5: expected a whole number"),
        ((1e3,), "train_size=1000.0: expected a whole number"),
        ((10**9,), "train_size=1000000000: expected a whole number from 1 to 101"),
        ((30, 41), "test_size=41: expected a whole number from 1 to 40"),
        ((30, 0), "test_size=0: expected a whole number"),
    ],
)
def test_the_first_images_are_as_many_as_the_name_says(small, sizes, message):
    with pytest.raises(ValueError, match=message):
        small.first(*sizes)


def test_the_name_says_also_that_test_images_were_left_out(small):
    assert small.first(30, 7).name == f"{small.name}, first 30 training images and 7 test images"
    assert small.first(30, 40).name == small.first(30).name == f"{small.name}, first 30 training images"


def test_data_sets_are_equal_where_all_in_them_is(small):
    assert small == dataclasses.replace(small, train_images=small.train_images.clone())
    assert small != dataclasses.replace(small, train_labels=small.train_labels.flip(0)) and small != "data"


def test_the_checksum_tells_which_split_is_which_and_the_order_of_the_images(small):
    parts = (small.train_images, small.train_labels, small.test_images, small.test_labels)
    others = [parts[2:] + parts[:2], tuple(each.flip(0) for each in parts)]
    sums = {Data(small.name, small.classes, *each).crc32() for each in (parts, *others)}
    assert len(sums) == 3 and Data("other", small.classes, *map(torch.clone, parts)).crc32() == small.crc32()


def test_a_name_is_text(small):
    for name in (None, 3, Path("photos")):
        with pytest.raises(TypeError, match="name is .*: expected text"):
            dataclasses.replace(small, name=name)
    with pytest.raises(TypeError, match=r"^name is torch.uint8 \(101, 3, 16, 16\): expected text"):
        Data(small.train_images, small.train_labels, small.test_images, small.test_labels, small.classes, small.name)


@pytest.mark.parametrize("classes", [None, 10, "cat", {"dog": 1, "cat": 0}, {1: "dog", 0: "cat"}, {"cat"}])
def test_classes_are_their_names_in_order(small, classes):
    with pytest.raises(TypeError, match=f"classes is {classes!r}: expected the names of the classes in the order"):
        Data("mine", classes, small.train_images, small.train_labels, small.test_images, small.test_labels)


@pytest.mark.parametrize("digits", [range(10), np.arange(10), list("0123456789")])
def test_classes_that_are_numbers_become_their_names(small, digits):
    assert dataclasses.replace(small, classes=digits).classes == tuple("0123456789")


@pytest.mark.parametrize("given", [None, "cifar10", (torch.zeros(1), torch.zeros(1))])
def test_what_is_no_data_is_told(given):
    for function in (utils.get_loaders, train_val_split):
        with pytest.raises(TypeError, match=f"data is a {type(given).__name__}: expected what utils.load_data returns"):
            function(given)


@pytest.mark.parametrize("kind", [list, np.array, pd.Series])
def test_classes_are_taken_from_a_list_or_an_array(small, kind):
    assert dataclasses.replace(small, classes=kind(small.classes)) == small
