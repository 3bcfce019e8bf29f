"""What makes another run is told apart, by what differs; what makes none is not."""

import copy
import functools
import inspect
import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fit, stand_in
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, DataLoader, Dataset, WeightedRandomSampler, default_collate
from torchvision import datasets
from torchvision.transforms import v2

import model
import utils
from normkit.checksum import crc32_of
from normkit.identity import lines_of, seed_in, text_of_name

PAIRS = [(torch.full((3, 2, 2), i / 150), i % 10) for i in range(150)]  # more than are told one by one


def written(code, name, line=1, **names):
    """Returns what code makes, as if written in a notebook's cell, so many lines below its beginning."""
    names = {"nn": nn, "torch": torch, "__name__": "__main__"} | names
    exec(compile("\n" * line + code, f"cell {line}", "exec"), names)
    return names[name]


class Own(Dataset):
    """A user-defined data set around the pairs, with whatever else it has."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, i):
        return PAIRS[i]


class Odd:
    """Nothing that can be asked about it answers."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = __bool__ = __len__ = __iter__ = __repr__ = __eq__


def net(factor="1", line=1, factor_of_its_own=3):
    code = f"class Net(nn.Module):\n def forward(self, x): return self.linear(x.flatten(1)) * {factor}"
    made = written(code, "Net", line)()
    made.linear, made.factor = nn.Linear(12, 10), factor_of_its_own
    return made


def crop(size, line=1):
    return written(f"class Crop:\n size = {size}\n def __call__(self, x): return x[..., :self.size]", "Crop", line)()


def counting(batch):
    return lambda samples: default_collate(samples[:batch])


def images(folder, color):
    for i in range(120):
        path = folder / f"{i % 2}" / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (color, i, 0)).save(path)
    return datasets.ImageFolder(folder, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))


def weighted(first):
    return WeightedRandomSampler([first] + [1.0] * 149, 150)


def own(**attributes):
    return {"data": Own(**attributes)}


# What differs -> the parts of a run, and those of another.
OTHERS = {
    "code of model has 'Net, code": ({}, {"net": net("2")}),
    "model.factor has '3', this one's '4'": ({}, {"net": net(factor_of_its_own=4)}),
    "loader.batch_size has '32', this one's '31'": ({}, {"batch_size": 31}),
    "loader.sampler has 'SequentialSampler', this one's 'RandomSampler'": ({}, {"shuffle": True}),
    "loader.sampler.weights has '(150,)": ({"sampler": weighted(1.0)}, {"sampler": weighted(9.0)}),
    "loader.generator has 'seed 1', this one's 'seed 2'": tuple(
        {"shuffle": True, "generator": torch.Generator().manual_seed(seed)} for seed in (1, 2)
    ),
    "loader.collate_fn's batch has '30', this one's '20'": tuple({"collate_fn": counting(n)} for n in (30, 20)),
    "loader.collate_fn has '<lambda>, code": (
        {"collate_fn": lambda samples: default_collate(samples)},
        {"collate_fn": lambda samples: default_collate(samples[::-1])},
    ),
    "loader.dataset.crop.size has '1', this one's '2'": (own(crop=crop(1)), own(crop=crop(2))),
    "loader.dataset.crop.func has 'scaled, code": tuple(
        own(crop=functools.partial(written(f"def scaled(x): return x * {k}", "scaled"))) for k in (1, 2)
    ),
    "loader.dataset.crop's SCALE has '1', this one's '2'": tuple(
        own(crop=written("def scaled(x): return x * SCALE", "scaled", SCALE=k)) for k in (1, 2)
    ),
    "loader.dataset.crop.__class__ has 'Scale, code": tuple(
        own(crop=written(f"class Scale(tuple):\n def __call__(self, x): return x * {k}", "Scale")()) for k in (1, 2)
    ),
    "loader.dataset.crop.p has '0.5', this one's '0.6'": tuple(
        own(crop=v2.RandomHorizontalFlip(p)) for p in (0.5, 0.6)
    ),
    "loader.dataset has 'list of 150": ({}, {"data": [*PAIRS[:140], *((-x, y) for x, y in PAIRS[140:])]}),
    "loader.dataset has 'list of 150, ": ({}, {"data": [*PAIRS[:149], (PAIRS[149][0], 0)]}),
    "loader.dataset.datasets[1] has 'list of 150": tuple(
        {"data": ConcatDataset([PAIRS, [(x, y * k) for x, y in PAIRS]])} for k in (0, 1)
    ),
    "scheduler.lr_lambdas[0] has '<lambda>, code": tuple(
        {"schedule": written(f"f = lambda epoch: {rate} ** epoch", "f")} for rate in (0.9, 0.5)
    ),
}


def run(path, net=net, data=PAIRS, schedule=lambda epoch: 1.0, epochs=1, **options):
    torch.manual_seed(0)
    model = net() if not isinstance(net, nn.Module) else net
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loaders = (DataLoader(data, **({"batch_size": 32} | options)), DataLoader(PAIRS, 64))
    return fit(model, loaders, optimizer, LambdaLR(optimizer, schedule), epochs, checkpoint=path)


@pytest.mark.parametrize("differs", OTHERS)
def test_what_makes_another_run_is_refused(tmp_path, differs):
    one, other = OTHERS[differs]
    run(tmp_path / "c", **one)
    with pytest.raises(ValueError) as error:
        run(tmp_path / "c", **other)
    assert f"is of another run: its {differs}" in str(error.value)


def test_other_files_are_refused_and_the_same_elsewhere_are_not(tmp_path):
    one, other = images(tmp_path / "one", 0), images(tmp_path / "other", 200)
    run(tmp_path / "c", data=one)
    with pytest.raises(ValueError, match="its loader.dataset.samples has 'list of 120"):
        run(tmp_path / "c", data=other)
    shutil.move(tmp_path / "one", tmp_path / "deeper" / "down")
    os.utime(tmp_path / "deeper" / "down" / "0" / "0.bmp", (0, 0))
    moved = datasets.ImageFolder(
        tmp_path / "deeper" / "down", v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    )
    assert len(run(tmp_path / "c", data=moved, epochs=2)) == 2
    gone, elsewhere, other = (tmp_path / "one" / "gone", tmp_path / "elsewhere" / "gone", tmp_path / "a" / "other")
    assert text_of_name(str(gone)) == text_of_name(str(elsewhere)) != text_of_name(str(other))


class Counting(Own):
    """What it counts moves on in training; its cache fills."""

    def __getitem__(self, i):
        self.drawn, self.cache[i] = self.drawn + 1, PAIRS[i]
        return self.cache[i]


# What is no other run: parts built anew, the first time (0) or the second (1).
SAME = {
    "the same anew": lambda k: own(crop=crop(1), names={"a", "b"}, steps=[crop(2), counting(3)], table={(1, 2): crop}),
    "another line": lambda k: {"net": net(line=1 + 9 * k), **own(crop=crop(1, line=1 + 9 * k))},
    "a docstring": lambda k: own(crop=written(f"def f(x):\n 'Of {k}.'\n return x", "f")),
    "how it is loaded": lambda k: {"num_workers": k, "timeout": k * 60, "pin_memory_device": ""},
    "what moves": lambda k: {"data": Counting(drawn=0, cache={})},
    "iterators, locks, files, loggers": lambda k: own(
        step=itertools.count(k),
        lock=threading.Lock(),
        file=open(os.devnull),
        log=logging.getLogger("kit"),
    ),
    "a generator without a seed": lambda k: own(rng=np.random.default_rng(), other=random.Random()),
    "an object that holds itself": lambda k: own(ring=ring(), rings=[ring() for _ in range(200)]),
    "a device": lambda k: own(device=torch.device("cpu", 0) if k else torch.device("cpu")),
    "a set of functions": lambda k: own(all={crop, counting, *(lambda x, i=i: i for i in range(200))}),
    "a global that is trained": lambda k: own(crop=written("def f(x): return net(x)", "f", net=nn.Linear(1, 1))),
}


def ring():
    held = []
    held.append(held)
    return held


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", SAME)
def test_what_makes_no_other_run_is_not_refused(tmp_path, kind):
    random.seed(0), run(tmp_path / "c", **SAME[kind](0))
    random.seed(1), run(tmp_path / "c", **SAME[kind](1))
    assert len(run(tmp_path / "c", **SAME[kind](0), epochs=2)) == 2


@pytest.mark.parametrize("view", [torch.conj, torch._neg_view, torch.Tensor.to_sparse, lambda x: x.T])
def test_the_checksum_of_a_view_is_that_of_its_values(view):
    one, other = (torch.tensor([[1 + 2j, 3j], [4.0, each]]) for each in (5, 6))
    values = view(one).to_dense().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    assert crc32_of(view(one)) == crc32_of(values) != crc32_of(view(other))


@pytest.mark.parametrize("seed", [0, 7, -7])
def test_the_seed_of_a_run_is_found_in_its_settings(seed):
    loader = utils.get_loaders(stand_in(30, 10), device="cpu", seed=seed)[0]
    assert seed_in({"loader": f"{loader}, 1 batches"}) == seed


def test_nothing_that_an_object_does_stops_the_others_from_being_told():
    lines = dict(lines_of({"loader": [Odd(), Own(odd=Odd(), size=3)]}, {}))
    assert lines["loader[1].size"] == "3" and lines["loader[1]"].startswith("Own, code")


def test_a_model_py_as_it_came_has_a_mark_that_every_python_computes(monkeypatch):
    before = dict(lines_of({"model": model.Net()}, {}))
    monkeypatch.setitem(model.NORMS, "further", lambda channels, num_groups: nn.Identity())
    assert dict(lines_of({"model": model.Net()}, {})) == before
    monkeypatch.setattr(model.ConvBlock, "forward", lambda self, x, skip=None: x)
    after = dict(lines_of({"model": model.Net()}, {}))
    assert {where for where in before if before[where] != after[where]} == {
        f"model.C{i}" for i in (1, 2, 3, 4, 5, 7, 8, 9)
    }


def test_a_model_py_that_is_edited_meanwhile_counts_once_it_is_loaded_anew(monkeypatch):
    """Else a run would note the new code as what it had become, and a later one go on from it with that."""
    before = dict(lines_of({"model": model.Net()}, {}))
    edited = inspect.getsource(model).replace("x + skip", "x - skip")
    monkeypatch.setattr(inspect, "getsource", lambda module: edited)
    assert dict(lines_of({"model": model.Net()}, {})) == before
    monkeypatch.setattr(model, "__spec__", copy.copy(model.__spec__))  # another one, as importlib.reload gives it
    assert dict(lines_of({"model": model.Net()}, {}))["model.C1"] != before["model.C1"]


def test_a_model_py_that_was_edited_before_a_processs_first_run_counts_as_it_was_loaded(tmp_path):
    (tmp_path / "model.py").write_text(inspect.getsource(model))
    script = f"""if True:
        import pathlib, sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(Path(utils.__file__).parent)!r}]
        import model, utils
        file = pathlib.Path(model.__file__)
        file.write_text(file.read_text().replace("x + skip", "x - skip"))
        from normkit.identity import lines_of
        print(dict(lines_of({{"model": model.Net()}}, {{}}))["model.C1"])
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == dict(lines_of({"model": model.Net()}, {}))["model.C1"], done.stderr
    assert "x - skip" in (tmp_path / "model.py").read_text()
