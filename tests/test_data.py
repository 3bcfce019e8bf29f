import itertools
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

import utils


def write_image_folder(root, each=2, size=(32, 32), suffix="png"):
    """Images numbered across the classes; returns the pixels in the order of their numbers."""
    rng = np.random.default_rng(0)
    pixels = {}
    for split in ("train", "test"):
        pixels[split] = rng.integers(0, 256, (each * 10, size[1], size[0], 3), dtype=np.uint8)
        for i, image in enumerate(pixels[split]):
            folder = root / split / utils.CLASSES[i % 10]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:05d}.{suffix}")
    return pixels


def same(tensor, pixels):
    return torch.equal(tensor, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_image_folder(tmp_path):
    pixels = write_image_folder(tmp_path)
    data = utils.load_data("cifar10", tmp_path)
    assert data.name == "CIFAR-10, PNG copy" and data.classes == utils.CLASSES and not data.synthetic
    assert same(data.train_images, pixels["train"]) and same(data.test_images, pixels["test"])
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]


def test_jpeg_folder_says_so(tmp_path):
    write_image_folder(tmp_path, each=1, suffix="jpg")
    assert utils.load_data("auto", tmp_path).name == "CIFAR-10, JPEG copy"


def test_environment_overrides_root(tmp_path, monkeypatch):
    pixels = write_image_folder(tmp_path / "there", each=1)
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "there"))
    assert same(utils.load_data("cifar10", tmp_path / "elsewhere").test_images, pixels["test"])


def test_official_files_and_archive(tmp_path, official, monkeypatch):
    monkeypatch.setattr(utils, "fetch_archive", lambda root: pytest.fail("fetched what is on disk"))
    (tmp_path / "files").mkdir()
    shutil.unpack_archive(official.archive, tmp_path / "files")
    (tmp_path / "archive").mkdir()
    shutil.copy(official.archive, tmp_path / "archive" / utils.ARCHIVE)
    for root in (tmp_path / "files", tmp_path / "archive", tmp_path / "archive"):
        data = utils.load_data("cifar10", root)
        assert data.name == "CIFAR-10" and same(data.train_images, official.pixels["train"])
        assert data.train_labels.tolist() == official.labels["train"]
        assert data.test_labels.tolist() == official.labels["test"]


def test_damaged_archive_is_refused_and_kept(tmp_path, official):
    archive = tmp_path / utils.ARCHIVE
    archive.write_bytes(official.archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged.*delete it"):
        utils.load_data("auto", tmp_path)
    assert archive.exists() and list(tmp_path.iterdir()) == [archive]


def test_damaged_files_are_refused_before_they_are_unpickled(tmp_path, official):
    shutil.unpack_archive(official.archive, tmp_path)
    trap = tmp_path / "sprung"
    batch = tmp_path / datasets.CIFAR10.base_folder / "data_batch_3"
    batch.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="damaged or incomplete.*delete it"):
        utils.load_data("cifar10", tmp_path)
    assert not trap.exists()
    pickle.loads(batch.read_bytes())
    assert trap.exists()  # the trap does work


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_unknown_name():
    with pytest.raises(ValueError, match="'mnist'.*auto, cifar10 or synthetic"):
        utils.load_data("mnist")


def test_root_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        utils.load_data("auto", tmp_path / "file")


def test_empty_root_without_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "MIRRORS", ("http://127.0.0.1:9/none",))
    with pytest.raises(utils.DataUnavailable, match="By hand"):
        utils.load_data("cifar10", tmp_path)
    assert utils.load_data("auto", tmp_path).synthetic
    assert "THIS IS NOT CIFAR-10" in capsys.readouterr().out


def test_missing_and_unknown_class_folders(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "test" / "horse").rename(tmp_path / "test" / "zebra")
    with pytest.raises(ValueError, match="missing: horse; not a class: zebra"):
        utils.load_data("auto", tmp_path)


def test_empty_class_folder(tmp_path):
    write_image_folder(tmp_path, each=1)
    next((tmp_path / "train" / "cat").iterdir()).unlink()
    with pytest.raises(ValueError, match="no image.*cat"):
        utils.load_data("auto", tmp_path)


def test_wrong_size_and_unreadable_image(tmp_path):
    write_image_folder(tmp_path, size=(32, 28))
    with pytest.raises(ValueError, match="32×28 pixels: CIFAR-10 images have 32×32"):
        utils.load_data("auto", tmp_path)
    write_image_folder(tmp_path)
    (tmp_path / "train" / "airplane" / "00000.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="00000.png cannot be read"):
        utils.load_data("auto", tmp_path)


def test_stand_in_is_marked_seeded_and_balanced():
    data, again = utils.load_data("synthetic"), utils.make_synthetic()
    assert data.synthetic and "synthetic" in data.name
    assert torch.equal(data.train_images, again.train_images)
    assert data.train_images.shape == (5000, 3, 32, 32) and data.train_labels.bincount().tolist() == [500] * 10
    assert not torch.equal(data.train_images, utils.make_synthetic(seed=1).train_images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": torch.zeros(5, 3, 32, 32)}, "expected uint8"),
        ({"test_images": torch.zeros(5, 32, 32, 3, dtype=torch.uint8)}, "expected uint8"),
        ({"train_labels": torch.zeros(4, dtype=torch.int64)}, "one label an image"),
        ({"train_labels": torch.full((5,), 10)}, "expected 0 to 9"),
        ({"test_labels": torch.full((5,), -1)}, "expected 0 to 9"),
    ],
)
def test_data_of_ones_own_is_checked(change, message):
    images, labels = torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5)
    good = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    utils.Data("mine", utils.CLASSES, **good)
    with pytest.raises(ValueError, match=message):
        utils.Data("mine", utils.CLASSES, **(good | change))


# --------------------------------------------------------------------------------- loaders


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
    loader = utils.Loader(data.train_images, torch.arange(330), 64, shuffle=True, device=device)
    images, labels = (torch.cat(parts).cpu() for parts in zip(*loader, strict=True))
    assert sorted(labels.tolist()) == list(range(330)) and labels.tolist() != list(range(330))
    torch.testing.assert_close(images, reference(data.train_images[labels]), atol=1e-6, rtol=0)


def everything(loader):
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


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


def test_augmentation_equals_torchvisions(data, device):
    images = data.train_images[:3, :, :, :28]  # not square
    ways = itertools.product(range(-2, 3), (False, True), range(-2, 3))
    for pixels, (down, flip, right) in zip(utils.list_moves(32, 28), ways, strict=True):
        moved = utils.move(images.to(device), pixels.expand(3, -1).to(device)).cpu()
        padded = v2.functional.pad(images, [2, 2, 2, 2], padding_mode="reflect")
        flipped = v2.functional.horizontal_flip(padded) if flip else padded
        assert torch.equal(moved, v2.functional.crop(flipped, 2 - down, 2 - right, 32, 28))


def test_training_images_are_moved_in_every_way_and_test_images_in_none(data):
    few = utils.Data(
        "few", data.classes, data.train_images[:60], data.train_labels[:60], data.test_images, data.test_labels
    )
    train_loader, test_loader = utils.get_loaders(few, 32, augment=True, device="cpu")
    plain_loader, _ = utils.get_loaders(few, 32, device="cpu")
    ways = utils.list_moves(32, 32)
    seen = torch.zeros(len(ways), dtype=torch.bool)
    for _ in range(10):
        (moved, labels), (plain, plain_labels) = everything(train_loader), everything(plain_loader)
        assert torch.equal(labels, plain_labels)
        each = torch.stack([utils.move(plain, pixels.expand(len(plain), -1)) for pixels in ways], 1)
        found = (each == moved[:, None]).flatten(2).all(2)
        assert found.any(1).all()
        seen |= found.any(0)
    assert seen.all()  # by chance, all but surely
    torch.testing.assert_close(everything(test_loader)[0], reference(few.test_images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_batch_size_is_checked(data, batch_size):
    with pytest.raises(ValueError, match="batch_size=.*at least 1"):
        utils.get_loaders(data, batch_size)


def test_unknown_device(data):
    for device in ("tpu", "cuda:99" if not torch.cuda.is_available() else "mps"):
        with pytest.raises(ValueError, match=f"{device}.*choose .*cpu"):
            utils.get_loaders(data, device=device)


# ----------------------------------------------------------------------------------- the cache


@pytest.fixture
def reads(monkeypatch):
    """The list of readings of an image folder."""
    read, done = utils.read_image_folder, []
    monkeypatch.setattr(utils, "read_image_folder", lambda root: done.append(root) or read(root))
    return done


def same_data(a, b):
    tensors = ("train_images", "train_labels", "test_images", "test_labels")
    return a.name == b.name and a.classes == b.classes and all(getattr(a, n).equal(getattr(b, n)) for n in tensors)


def test_the_second_reading_comes_from_the_cache(tmp_path, monkeypatch, reads):
    write_image_folder(tmp_path)
    first = utils.load_data("cifar10", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert same_data(utils.load_data("cifar10", "."), first) and len(reads) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tensors.pt", "test", "train"]


def test_official_files_are_cached_too(official, monkeypatch):
    first = utils.load_data("cifar10", official.archive.parent)
    monkeypatch.setattr(utils, "read_official_files", None)
    assert same_data(utils.load_data("cifar10", official.archive.parent), first)


@pytest.mark.parametrize("change", ["another image", "one image less", "one image more"])
def test_a_changed_source_is_read_anew(tmp_path, reads, change):
    write_image_folder(tmp_path)
    first = utils.load_data("cifar10", tmp_path)
    image = tmp_path / "train" / "ship" / "00018.png"
    if change == "another image":
        Image.new("RGB", (32, 32), "red").save(image)
    elif change == "one image less":
        image.unlink()
    else:
        shutil.copy(image, image.with_name("00099.png"))
    assert not same_data(utils.load_data("cifar10", tmp_path), first) and len(reads) == 2


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "empty", "a hostile pickle", "another's tensors"])
def test_a_damaged_or_foreign_cache_is_made_anew(tmp_path, reads, damage, capfd):
    write_image_folder(tmp_path)
    first = utils.load_data("cifar10", tmp_path)
    cache = tmp_path / "tensors.pt"
    content = bytearray(cache.read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 1
    if damage in ("cut off", "empty"):
        content = content[: len(content) // 2 if damage == "cut off" else 0]
    cache.write_bytes(content)
    if damage == "a hostile pickle":
        torch.save(Hostile(), cache)
    if damage == "another's tensors":
        torch.save([torch.zeros(3)], cache)
    assert same_data(utils.load_data("cifar10", tmp_path), first) and len(reads) == 2
    assert same_data(utils.load_data("cifar10", tmp_path), first) and len(reads) == 2  # whole again
    assert "pwned" not in capfd.readouterr().out


class Hostile:
    def __reduce__(self):
        return print, ("pwned",)


def test_a_full_disk_costs_the_cache_not_the_data(tmp_path, monkeypatch, capsys):
    write_image_folder(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    assert len(utils.load_data("cifar10", tmp_path).train_labels) == 20
    assert "No cache of the data is kept" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


# --------------------------------------------------------------------------------- the set-up


def test_check_setup_says_where_the_data_is_or_what_its_download_takes(official, tmp_path, capsys):
    utils.check_setup(official.archive.parent)
    assert f"CIFAR-10: the official files, in {official.archive.parent}" in capsys.readouterr().out
    utils.check_setup(tmp_path / "not" / "there")
    said = capsys.readouterr().out
    assert f"not in {tmp_path / 'not' / 'there'} yet" in said and "170 MB" in said and "TO MEND" not in said
    assert f"torch {torch.__version__.split('+')[0]}" in said and "Device: " in said


def test_check_setup_names_what_to_mend(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e8))
    monkeypatch.setattr(utils.metadata, "version", lambda name: "2.9.1")
    utils.check_setup(tmp_path / "data")
    said = capsys.readouterr().out
    assert f"TO MEND: 0.2 GB are free at {tmp_path}" in said
    assert (
        "TO MEND: torch 2.10" in said and f'{sys.executable} -m pip install --upgrade "torch>=2.10" torchvision' in said
    )
