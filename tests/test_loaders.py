import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import everything, same
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import utils
from normkit.augment import list_views, shift_and_flip
from normkit.data import Data


def reference(images):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's own, not read from the kit
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 101, 500])
def test_test_loader_equals_a_plain_dataloader(data, batch_size, device):
    _, loader = utils.get_loaders(data, batch_size, device=device)
    plain = DataLoader(TensorDataset(reference(data.test_images), data.test_labels), batch_size)
    assert len(loader) == len(plain)
    for (images, labels), (plain_images, plain_labels) in zip(loader, plain, strict=True):
        assert images.device.type == device.type and images.dtype == torch.float32
        torch.testing.assert_close(images.cpu(), plain_images, atol=1e-6, rtol=0)
        assert torch.equal(labels.cpu(), plain_labels)


def test_train_loader_gives_each_image_once(data, device):
    loader = utils.Loader(data.train_images, torch.arange(198), 64, shuffle=True, device=device)
    images, labels = (torch.cat(parts).cpu() for parts in zip(*loader, strict=True))
    assert sorted(labels.tolist()) == list(range(198)) and labels.tolist() != list(range(198))
    torch.testing.assert_close(images, reference(data.train_images[labels]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_depends_on_its_seed_and_number_alone(data, augment):
    def loader(seed=3, batch_size=50):
        return utils.get_loaders(data, batch_size, augment, "cpu", seed)[0]

    first, second = loader(), loader()
    torch.manual_seed(7)
    for _ in range(3):
        next(iter(second))  # looking
    for _ in range(2):
        (images, labels), (other, other_labels) = everything(first), everything(second)
        assert torch.equal(images, other) and torch.equal(labels, other_labels)
    assert all(map(torch.equal, everything(loader()), everything(loader(batch_size=7))))
    assert not torch.equal(everything(loader())[1], everything(first)[1])  # another epoch
    assert not torch.equal(everything(loader())[1], everything(loader(seed=4))[1])
    later = loader()
    later.set_epoch(1)
    assert not torch.equal(everything(later)[1], everything(loader(seed=4))[1])  # seed and epoch are not added up
    again = loader()
    again.set_epoch(np.int64(1))
    later.set_epoch(1)
    assert torch.equal(everything(again)[1], everything(later)[1])


@pytest.mark.parametrize("epoch", [1.0, "1", None, -1, True])
def test_an_epoch_is_a_whole_number(data, epoch):
    """1.0 would have been another one than 1, with batches of its own."""
    with pytest.raises(ValueError, match=f"epoch={epoch!r}: expected a whole number of at least 0"):
        utils.get_loaders(data)[0].set_epoch(epoch)


STOPS = {
    "after them": lambda loader: list(loader),
    "at the last": lambda loader: [batch for _, batch in zip(range(len(loader)), loader)],
    "by islice": lambda loader: list(itertools.islice(loader, len(loader))),
    "by next": lambda loader: [next(batches) for batches in [iter(loader)] for _ in range(len(loader))],
}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("stop", STOPS)
def test_a_pass_moves_on_to_the_next_epoch_wherever_a_loop_stops(data, stop, drop_last):
    loader = utils.get_loaders(data, 50, True, "cpu", drop_last=drop_last)[0]
    for epoch in range(3):
        found, expected = STOPS[stop](loader), copy.copy(loader)
        expected.set_epoch(epoch)
        assert same(found, list(expected))


def test_passes_side_by_side_move_on_by_one_epoch_and_leave_one_that_was_set(data):
    loader = utils.get_loaders(data, 50, device="cpu")[0]
    assert len(list(zip(loader, loader, strict=True))) == len(loader) and loader.epoch == 1
    for _ in loader:
        loader.set_epoch(7)
    assert loader.epoch == 7


def test_augmentation_equals_torchvisions(data, device):
    images = data.train_images[:3, :, :, :12]  # not square
    ways = itertools.product(range(-2, 3), (False, True), range(-2, 3))
    for pixels, (down, flip, right) in zip(list_views(16, 12), ways, strict=True):
        moved = shift_and_flip(images.to(device), pixels.expand(3, -1).to(device)).cpu()
        padded = v2.functional.pad(images, [2, 2, 2, 2], padding_mode="reflect")
        flipped = v2.functional.horizontal_flip(padded) if flip else padded
        assert torch.equal(moved, v2.functional.crop(flipped, 2 - down, 2 - right, 16, 12))


def test_training_images_are_moved_in_every_way_and_test_images_in_none(data):
    few = Data("few", data.classes, data.train_images[:60], data.train_labels[:60], data.test_images, data.test_labels)
    train_loader, test_loader = utils.get_loaders(few, 32, augment=True, device="cpu")
    plain_loader, _ = utils.get_loaders(few, 32, device="cpu")
    ways = list_views(16, 16)
    seen = torch.zeros(len(ways), dtype=torch.bool)
    for _ in range(10):
        (moved, labels), (plain, plain_labels) = everything(train_loader), everything(plain_loader)
        assert torch.equal(labels, plain_labels)
        each = torch.stack([shift_and_flip(plain, pixels.expand(len(plain), -1)) for pixels in ways], 1)
        found = (each == moved[:, None]).flatten(2).all(2)
        assert found.any(1).all()
        seen |= found.any(0)
    assert seen.all()  # by chance, all but surely
    torch.testing.assert_close(everything(test_loader)[0], reference(few.test_images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None, True, np.float64(8)])
def test_batch_size_is_checked(data, batch_size):
    with pytest.raises(ValueError, match="batch_size=.*at least 1"):
        utils.get_loaders(data, batch_size)


def test_splits_in_place_of_settings_are_named_in_a_line(data):
    with pytest.raises(ValueError, match=r"^batch_size=torch.uint8 \(101, 3, 16, 16\): expected a whole number"):
        utils.Loader(data.train_images, data.train_labels, data.test_images, data.test_labels, device="cpu")


@pytest.mark.parametrize("name", ["shuffle", "augment", "drop_last"])
def test_what_is_neither_true_nor_false_switches_nothing_on(data, name):
    """Such as a device in augment's place, or a text "False", which would augment, shuffle or drop."""
    for value in ("cpu", "False", 2, torch.device("cpu")):
        with pytest.raises(ValueError, match=f"unknown {name} .*: choose False or True"):
            utils.Loader(data.train_images, data.train_labels, 64, device="cpu", **{name: value})
    for value in (np.True_, torch.tensor(1), 1):
        assert getattr(utils.Loader(data.train_images, data.train_labels, device="cpu", **{name: value}), name) is True
    with pytest.raises(ValueError, match="unknown augment 'cpu'"):
        utils.get_loaders(data, 64, "cpu")


def test_numpys_whole_numbers_are_batch_sizes(data):
    train_loader, test_loader = utils.get_loaders(data, np.int64(50), device="cpu")
    assert [len(labels) for _, labels in train_loader] == [50] * 3 + [48] and len(test_loader) == 3


def test_a_ragged_last_training_batch_is_left_out_when_asked(data):
    train_loader, test_loader = utils.get_loaders(data, 50, device="cpu", drop_last=True)
    assert len(train_loader) == 3 and [len(labels) for _, labels in train_loader] == [50] * 3
    assert [len(labels) for _, labels in test_loader] == [50, 50, 1]
    with pytest.raises(ValueError, match="batch_size=199 with drop_last drops all of the 198 images"):
        utils.get_loaders(data, 199, device="cpu", drop_last=True)


def test_unknown_device(data):
    for device in ("tpu", "cuda:99" if not torch.cuda.is_available() else "mps"):
        with pytest.raises(ValueError, match=f"{device}.*choose .*cpu"):
            utils.get_loaders(data, device=device)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_tensors_of_their_own(data, batch_size, augment):
    """Whoever changes one in place, or lets gradients in, changes no other, though several are gathered at once."""
    loader = utils.get_loaders(data.first(60), batch_size, augment, device="cpu")[0]
    expected = [images for images, _ in loader]
    loader.set_epoch(0)
    noise = torch.nn.Parameter(torch.ones(3, 16, 16))
    for (images, _), before in zip(loader, expected, strict=True):
        assert torch.equal(images, before) and images.untyped_storage().nbytes() == images.nbytes
        images += noise
        images.detach_().resize_(70, 3, 16, 16).zero_()


def test_a_loader_that_has_become_empty_yields_nothing(data):
    loader = utils.get_loaders(data.first(40), 8, device="cpu")[0]
    loader.drop_last, loader.batch_size = True, 100
    assert len(loader) == 0 and list(loader) == []
