"""Fixtures of several files of tests."""

# ruff: noqa: E402
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before torchvision imports Triton, which then needs no GPU

import hashlib
import pickle
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from helpers import stand_in
from joblib.externals.loky import get_reusable_executor
from torch.utils.data import TensorDataset
from torchvision import datasets

import model
import utils
from normkit import cifar10

matplotlib.use("agg")
torch.set_num_threads(1)

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(scope="session")
def data():
    """A small stand-in whose sizes no batch size of the tests divides."""
    return stand_in(train_size=198, test_size=101)


@pytest.fixture(scope="session")
def small():
    return stand_in(train_size=101, test_size=40)


@pytest.fixture(scope="module")
def results(data):
    """A short run of each norm, not to be changed."""
    return [utils.run(norm, data, 2, progress=False) for norm in model.NORMS]


@pytest.fixture(params=model.NORMS)
def norm(request):
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fresh_seed():
    """What a test draws depends on no test before it, and so not on which process ran those."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # else torch.manual_seed notes the call, with its stack, for a GPU to come
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session", autouse=True)
def importable(tmp_path_factory):
    """A folder for modules that a test writes. Processes that a study starts look there from their start on."""
    folder = tmp_path_factory.mktemp("importable")
    sys.path.insert(0, str(folder))
    yield folder
    get_reusable_executor().shutdown(kill_workers=True)  # to end by themselves takes them two seconds


@pytest.fixture
def kit_forgotten():
    """Within the test the kit is imported as if for the first time; after it, all is as before."""

    def forget():
        kit = ("model", "utils", "normkit")
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in kit}

    loaded = forget()
    yield
    forget()
    sys.modules.update(loaded)


@pytest.fixture
def float32_by_default(monkeypatch):
    """For tests that compare with PyTorch's own numbers: on processors with bfloat16 instructions "auto" takes that."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


@pytest.fixture(autouse=True)
def links_where_they_may_be_made(monkeypatch):
    """On Windows that takes administrators, or its developer mode: everybody else passes over tests that make some."""
    symlink_to = Path.symlink_to

    def try_it(*args, **options):
        try:
            symlink_to(*args, **options)
        except OSError as error:
            if getattr(error, "winerror", None) != 1314:  # a privilege that is not held
                raise
            pytest.skip("no links may be made here")

    monkeypatch.setattr(Path, "symlink_to", try_it)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """The user's own data and mirrors are not the tests'."""
    for name in ("CIFAR10_ROOT", "CIFAR10_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cifar10, "ELSEWHERE", ())


@pytest.fixture(scope="module")
def loaders(data):
    return utils.get_loaders(data, 64, device="cpu")


@pytest.fixture(scope="module")
def pairs(loaders):
    """The test loader's images, normalised, and labels as a data set of torch's."""
    return TensorDataset(*(torch.cat(parts) for parts in zip(*loaders[1])))


@pytest.fixture
def official(tmp_path_factory, monkeypatch):
    """An archive in the official layout with ten images a file, whose checksums stand in for CIFAR-10's."""
    folder = tmp_path_factory.mktemp("official")
    batches = folder / datasets.CIFAR10.base_folder
    batches.mkdir()
    rng = np.random.default_rng(0)
    pixels, labels = {"train": [], "test": []}, {"train": [], "test": []}

    def write(name, content):
        (batches / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((batches / name).read_bytes()).hexdigest()]

    def write_batch(name, split):
        pixels[split].append(rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8))
        labels[split] += rng.permutation(10).tolist()
        return write(
            name, {"data": pixels[split][-1].transpose(0, 3, 1, 2).reshape(10, -1), "labels": labels[split][-10:]}
        )

    train = [write_batch(name, "train") for name, _ in datasets.CIFAR10.train_list]
    test = [write_batch(name, "test") for name, _ in datasets.CIFAR10.test_list]
    _, meta = write("batches.meta", {"label_names": list(cifar10.CLASSES)})
    archive = folder / cifar10.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, datasets.CIFAR10.base_folder)

    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": meta})
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    pixels = {split: np.concatenate(parts) for split, parts in pixels.items()}
    return SimpleNamespace(archive=archive, pixels=pixels, labels=labels)
