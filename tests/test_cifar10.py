import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import write_image_folder
from PIL import Image
from torchvision import datasets

import utils
from normkit import cifar10, files
from normkit.data import train_val_split


def same(tensor, pixels):
    return torch.equal(tensor, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_image_folder(tmp_path):
    pixels = write_image_folder(tmp_path)
    data = utils.load_data("cifar10", tmp_path)
    assert data.name == "CIFAR-10, PNG copy" and data.classes == cifar10.CLASSES and not data.synthetic
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
    monkeypatch.setattr(cifar10, "fetch_archive", lambda root: pytest.fail("fetched what is on disk"))
    (tmp_path / "files").mkdir()
    shutil.unpack_archive(official.archive, tmp_path / "files")
    (tmp_path / "archive").mkdir()
    shutil.copy(official.archive, tmp_path / "archive" / cifar10.ARCHIVE)
    for root in (tmp_path / "files", tmp_path / "archive", tmp_path / "archive"):
        data = utils.load_data("cifar10", root)
        assert data.name == "CIFAR-10" and same(data.train_images, official.pixels["train"])
        assert data.train_labels.tolist() == official.labels["train"]
        assert data.test_labels.tolist() == official.labels["test"]


@pytest.mark.parametrize("form", ["images", "official files"])
def test_data_is_read_and_split_on_the_cpu_whatever_the_default_device(tmp_path, official, form):
    if form == "images":
        write_image_folder(tmp_path)
    else:
        shutil.unpack_archive(official.archive, tmp_path)
    with torch.device("meta"):
        first, cached = (train_val_split(utils.load_data("cifar10", tmp_path), 10) for _ in range(2))
    assert first == cached == train_val_split(utils.load_data("cifar10", tmp_path), 10)
    assert {part.device.type for part in vars(first).values() if torch.is_tensor(part)} == {"cpu"}


def test_the_official_files_come_before_a_folder_of_images_and_that_before_the_archive(tmp_path, official):
    shutil.copy(official.archive, tmp_path / cifar10.ARCHIVE)
    pixels = write_image_folder(tmp_path)
    assert same(utils.load_data("cifar10", tmp_path).train_images, pixels["train"])
    shutil.unpack_archive(official.archive, tmp_path)
    assert same(utils.load_data("cifar10", tmp_path).train_images, official.pixels["train"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_half_a_folder_of_images_is_an_error_but_where_there_is_an_archive(tmp_path, official, split):
    write_image_folder(tmp_path)
    shutil.rmtree(tmp_path / split)
    with pytest.raises(ValueError, match=f"no folder {split}: expected"):
        utils.load_data("auto", tmp_path)
    shutil.copy(official.archive, tmp_path / cifar10.ARCHIVE)
    assert same(utils.load_data("auto", tmp_path).train_images, official.pixels["train"])


@pytest.mark.parametrize("name", [datasets.CIFAR10.base_folder, cifar10.ARCHIVE])
def test_a_root_that_names_what_lies_in_it_will_do(tmp_path, official, monkeypatch, name):
    shutil.copy(official.archive, tmp_path / cifar10.ARCHIVE)
    shutil.unpack_archive(official.archive, tmp_path)
    assert same(utils.load_data("cifar10", tmp_path / name).train_images, official.pixels["train"])
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / name))
    assert same(utils.load_data("cifar10").train_images, official.pixels["train"])


def test_what_file_managers_leave_behind_is_passed_over(tmp_path):
    pixels = write_image_folder(tmp_path)
    for litter in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        shutil.copytree(tmp_path / "train" / "cat", tmp_path / "train" / litter)
        shutil.copytree(tmp_path / "train" / "cat", tmp_path / "train" / "dog" / litter)
    (tmp_path / "test" / "cat" / "._00003.png").write_bytes(b"no image")
    data = utils.load_data("cifar10", tmp_path)
    assert same(data.train_images, pixels["train"]) and same(data.test_images, pixels["test"])


@pytest.mark.parametrize(
    "litter",
    [
        *("#recycle", "@Recycle", "~snapshot", "$Recycle.Bin", "$RECYCLE.BIN", "@__thumb"),
        *("Network Trash Folder", "Temporary Items"),
    ],
)
def test_what_storage_systems_leave_behind_is_passed_over(tmp_path, litter):
    pixels = write_image_folder(tmp_path, each=1)
    shutil.copytree(tmp_path / "train" / "cat", tmp_path / "train" / litter)
    shutil.copytree(tmp_path / "train" / "cat", tmp_path / "train" / "dog" / litter)
    assert same(utils.load_data("cifar10", tmp_path).train_images, pixels["train"])


@pytest.mark.parametrize("beside", ["a folder of images", "the archive", "nothing"])
def test_an_empty_folder_of_the_official_name_hides_nothing(tmp_path, official, monkeypatch, beside):
    (tmp_path / cifar10.FOLDER).mkdir()
    (tmp_path / cifar10.FOLDER / ".DS_Store" if beside == "a folder of images" else tmp_path / "x").touch()
    expected = official.pixels["train"]
    if beside == "a folder of images":
        expected = write_image_folder(tmp_path)["train"]
    elif beside == "the archive":
        shutil.copy(official.archive, tmp_path / cifar10.ARCHIVE)
    else:
        monkeypatch.setattr(cifar10, "fetch_archive", lambda root: official.archive)
    assert same(utils.load_data("cifar10", tmp_path).train_images, expected)


def test_a_folder_in_the_archives_place_is_said(tmp_path):
    (tmp_path / cifar10.ARCHIVE).mkdir()
    with pytest.raises(ValueError, match=f"{cifar10.ARCHIVE} is a folder: expected the archive as one file; move it"):
        utils.load_data("auto", tmp_path)


@pytest.mark.parametrize("root", [None, b"data", 5])
def test_a_root_is_a_path(root):
    with pytest.raises(TypeError, match=f"root is {root!r}: expected a folder, as text or Path, such as 'data'"):
        utils.load_data("auto", root)


def test_a_root_written_in_another_way_will_do(tmp_path, monkeypatch):
    root = tmp_path / "a folder"
    pixels = write_image_folder(root)
    for given in (root / "train", str(root / "test"), root.as_uri(), (root / "train").as_uri()):
        assert same(utils.load_data("cifar10", given).train_images, pixels["train"])
    for given in (f'"{root}"', f"'{root}' ", root.as_uri()):
        monkeypatch.setenv("CIFAR10_ROOT", given)
        assert same(utils.load_data("cifar10").train_images, pixels["train"])
    monkeypatch.delenv("CIFAR10_ROOT")
    root.rename(tmp_path / "train")  # and a root may be called train
    assert same(utils.load_data("cifar10", tmp_path / "train").train_images, pixels["train"])


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_images_of_more_than_8_bits_are_refused(tmp_path, dtype):
    write_image_folder(tmp_path, each=1, suffix="tiff")
    image = tmp_path / "train" / "cat" / "00003.tiff"
    Image.fromarray(np.full((32, 32), 300, dtype)).save(image)
    with pytest.raises(ValueError, match="00003.tiff has more than 8 bits a pixel .mode .*: save it in 8 bits"):
        utils.load_data("auto", tmp_path)


def test_what_another_tool_fetched_is_used_if_it_is_the_official_archive(tmp_path, official, monkeypatch, capsys):
    keras = tmp_path / "keras" / "cifar-10-batches-py.tar.gz"
    keras.parent.mkdir()
    keras.write_bytes(official.archive.read_bytes()[:-1])
    other = tmp_path / "other.tar.gz"
    shutil.copy(official.archive, other)
    monkeypatch.setattr(cifar10, "ELSEWHERE", (str(tmp_path / "none"), str(keras), str(other)))
    monkeypatch.setattr(cifar10, "fetch_archive", lambda root: pytest.fail("fetched what is on disk"))
    data = utils.load_data("cifar10", tmp_path / "root")
    assert same(data.train_images, official.pixels["train"])
    assert f"official archive that was fetched before, {other}" in capsys.readouterr().out
    assert utils.load_data("cifar10", tmp_path / "root").name == "CIFAR-10" and capsys.readouterr().out == ""


def test_an_archive_where_nothing_can_be_written_is_read_all_the_same(tmp_path, official, monkeypatch, capsys):
    shutil.copy(official.archive, tmp_path / cifar10.ARCHIVE)
    unpack = cifar10.unpack

    def refuse(archive, root):
        if root == tmp_path:
            raise PermissionError(13, "Permission denied")
        unpack(archive, root)

    monkeypatch.setattr(cifar10, "unpack", refuse)
    assert same(utils.load_data("auto", tmp_path).train_images, official.pixels["train"])
    assert "cannot be unpacked into" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_a_place_that_cannot_be_written_is_said(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cifar10, "MIRRORS", ())
    root = tmp_path / "file" / "data"  # a folder in a file: nobody can make it
    if name == "auto":
        assert utils.load_data(name, root).synthetic
        assert "cannot be put there" in capsys.readouterr().out
    else:
        with pytest.raises(cifar10.DataUnavailable, match="cannot be put there.*(?s:.*)By hand"):
            utils.load_data(name, root)


def test_what_lies_beside_the_official_files_does_not_hide_them(tmp_path, official):
    shutil.unpack_archive(official.archive, tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / cifar10.ARCHIVE).write_bytes(b"half a download")
    assert same(utils.load_data("cifar10", tmp_path).train_images, official.pixels["train"])


def test_damaged_archive_is_refused_and_kept(tmp_path, official):
    archive = tmp_path / cifar10.ARCHIVE
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


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    with pytest.raises(FileNotFoundError, match="data is a link to .*disk, which is not there"):
        cifar10.load_cifar10(tmp_path / "data")


def test_empty_root_without_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "MIRRORS", ("http://127.0.0.1:9/none",))
    with pytest.raises(cifar10.DataUnavailable, match="By hand"):
        utils.load_data("cifar10", tmp_path)
    assert utils.load_data("auto", tmp_path).synthetic
    assert "THIS IS NOT CIFAR-10" in capsys.readouterr().out


def test_missing_and_unknown_class_folders(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "test" / "horse").rename(tmp_path / "test" / "zebra")
    with pytest.raises(ValueError, match="missing: horse; not a class: zebra"):
        utils.load_data("auto", tmp_path)
    (tmp_path / "test" / "horse").mkdir()
    with pytest.raises(ValueError, match="missing: none; not a class: zebra. Other classes need a normkit.data.Data"):
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


def test_whatever_is_wrong_with_an_image_its_file_is_named(tmp_path):
    Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    start = whole.index(b"IDAT")
    short = (int.from_bytes(whole[start - 4 : start], "big") - 8).to_bytes(4, "big")  # bytes that the chunk says it has
    (tmp_path / "chunk.png").write_bytes(whole[: start - 4] + short + whole[start:])
    (tmp_path / "header.ppm").write_bytes(b"P6 3X 32 255\n" + bytes(3072))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    for name in ("chunk.png", "header.ppm", "huge.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: "):
            cifar10.read_image(tmp_path / name)


# ----------------------------------------------------------------------------------- the cache


@pytest.fixture
def reads(monkeypatch):
    """The list of readings of an image folder."""
    read, done = cifar10.read_image_folder, []
    monkeypatch.setattr(cifar10, "read_image_folder", lambda root: done.append(root) or read(root))
    return done


def same_data(a, b):
    tensors = ("train_images", "train_labels", "test_images", "test_labels")
    return a.name == b.name and a.classes == b.classes and all(getattr(a, n).equal(getattr(b, n)) for n in tensors)


def test_the_second_reading_comes_from_the_cache(tmp_path, monkeypatch, reads):
    write_image_folder(tmp_path)
    first = utils.load_data("cifar10", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert same_data(utils.load_data("cifar10", "."), first) and len(reads) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["normkit-cache.pt", "test", "train"]


def test_official_files_are_cached_too(official, monkeypatch):
    first = utils.load_data("cifar10", official.archive.parent)
    monkeypatch.setattr(cifar10, "read_official_files", None)
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


@pytest.mark.parametrize("linked", ["class folder", "image", "split"])
@pytest.mark.parametrize("change", ["another image", "one image more"])
def test_the_cache_sees_through_links(tmp_path, reads, linked, change):
    root, other = tmp_path / "root", tmp_path / "elsewhere"
    write_image_folder(root)
    image = root / "train" / "ship" / "00018.png"
    link = {"class folder": image.parent, "image": image, "split": root / "train"}[linked]
    shutil.move(link, other)
    link.symlink_to(other)
    first = utils.load_data("cifar10", root)
    assert same_data(utils.load_data("cifar10", root), first) and len(reads) == 1
    pixel = first.train_images[18].permute(1, 2, 0).numpy()
    if change == "another image":
        Image.fromarray(255 - pixel).save(image.resolve(), "png")
    else:
        Image.fromarray(pixel).save(image.parent.resolve() / "00099.png")
    again = utils.load_data("cifar10", root)
    assert len(reads) == 2 and len(again.train_labels) == 20 + (change == "one image more")
    assert torch.equal(again.train_images[18], first.train_images[18]) == (change == "one image more")


@pytest.mark.parametrize("target", [".", "..", "../..", "../../test/ship"])
def test_a_link_that_leads_back_brings_no_image_twice(tmp_path, target):
    pixels = write_image_folder(tmp_path)
    (tmp_path / "train" / "ship" / "link").symlink_to(target)
    data = utils.load_data("cifar10", tmp_path)
    more = 2 if target == "../../test/ship" else 0  # a link to other images brings them
    assert len(data.train_labels) == 20 + more and (more or same(data.train_images, pixels["train"]))
    assert same(data.test_images, pixels["test"])


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "train" / "ship" / "zzz.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="zzz.png cannot be read"):
        utils.load_data("auto", tmp_path)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "empty", "a hostile pickle", "another's tensors"])
def test_a_damaged_or_foreign_cache_is_made_anew(tmp_path, reads, damage, capfd):
    write_image_folder(tmp_path)
    first = utils.load_data("cifar10", tmp_path)
    cache = tmp_path / "normkit-cache.pt"
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

    monkeypatch.setattr(files.os, "fsync", full)
    assert len(utils.load_data("cifar10", tmp_path).train_labels) == 20
    assert "No cache of the data is kept" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]
