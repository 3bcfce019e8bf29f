"""A data set in memory."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normkit.checks import check_split, shown, whole_number
from normkit.checksum import crc32_of


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Holds a data set: name, class names, and per split images uint8 (N, 3, H, W) and labels int64 (N,).

    Grey images (N, H, W) take three channels by images[:, None].expand(-1, 3, -1, -1).
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __repr__(self):
        sizes = f"{len(self.train_labels):,} training and {len(self.test_labels):,} test images"
        return f"Data({self.name}: {sizes} of shape {tuple(self.train_images.shape[1:])}, {len(self.classes)} classes)"

    def __eq__(self, other):
        """Returns whether names, images and labels are the same."""
        if not isinstance(other, Data):
            return NotImplemented
        pairs = zip(vars(self).values(), vars(other).values())
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise TypeError(f"name is {shown(self.name)}: expected text, which tables and pictures will show")
        if isinstance(self.classes, str | dict | set | frozenset) or not hasattr(self.classes, "__len__"):
            raise TypeError(
                f"classes is {shown(self.classes)}: expected the names of the classes in the order of their labels, "
                "such as ('cat', 'dog')"
            )
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))  # as pictures show them
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            check_split(f"{split}_", images, labels)
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(
                    f"{split}_labels run from {labels.min()} to {labels.max()}: "
                    f"expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes"
                )

    @property
    def synthetic(self):
        return self.name.startswith("synthetic")

    def crc32(self):
        """Returns a checksum of all images and labels, in hexadecimal."""
        checksum = 0
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            checksum = crc32_of(tensor, checksum)
        return f"{checksum:#010x}"

    def first(self, train_size, test_size=None):
        """Returns a Data of the first train_size training images and the first test_size (None: all) test images."""
        train_images, test_images = len(self.train_labels), len(self.test_labels)
        train_size = whole_number("train_size", train_size, most=train_images)
        test_size = whole_number("test_size", test_images if test_size is None else test_size, most=test_images)
        tests = f" and {test_size} test images" if test_size < test_images else ""
        return replace(
            self,
            name=f"{self.name}, first {train_size} training images{tests}",
            train_images=self.train_images[:train_size],
            train_labels=self.train_labels[:train_size],
            test_images=self.test_images[:test_size],
            test_labels=self.test_labels[:test_size],
        )


def train_val_split(data, size=5000):
    """Returns a Data in which `size` held-out training images replace the test images, for choosing settings.

    Held out are the last images of each class, in proportion to its size, whatever the order of the data.
    """
    check_data(data)
    labels = data.train_labels
    size = whole_number("size", size, most=len(labels) - 1)
    shares = labels.bincount(minlength=len(data.classes)).double() * size / len(labels)
    quotas = shares.floor().long()
    largest_remainders = (quotas - shares).argsort(stable=True)
    quotas[largest_remainders[: size - int(quotas.sum())]] += 1
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        members = (labels == label).nonzero().flatten()
        held[members[len(members) - quota :]] = True
    name = f"{data.name}, {size} training images held out class by class"
    images = data.train_images
    return Data(name, data.classes, images[~held], labels[~held], images[held], labels[held])


def check_data(data, most_classes=math.inf):
    """Raises unless data is a Data of no more classes than the network tells apart, if that is given."""
    if not isinstance(data, Data):
        raise TypeError(
            f"data is a {type(data).__name__}: expected what utils.load_data returns, or a normkit.data.Data"
        )
    if len(data.classes) > most_classes:
        raise ValueError(
            f"{data.name} has {len(data.classes)} classes, and the network tells {most_classes} apart: train a network "
            "of your own with utils.fit"
        )
