"""What several files of tests share."""

import collections
import dataclasses
import functools
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import model
import utils
from normkit.cifar10 import CLASSES
from normkit.fused.build import COMPILE, library
from normkit.study import grid
from normkit.synthetic import make_synthetic

NORMS = list(model.NORMS)
THREE = ["batch", "group", "layer"]  # that the kit compares, whatever else is in NORMS
PICTURES = 19  # that the notebook shows, beside one for each norm
QUIET = {"progress": False}
AUTO_LINE = "fused: one kernel for the whole network"  # of a network in float32 on the CPU
if library().reason is not None:
    AUTO_LINE = f"eager: PyTorch's modules (no fused kernel: {library().reason})"


@functools.cache
def stand_in(train_size, test_size, seed=0):
    """Every second pixel of the stand-in: networks learn from it in a quarter of the time. Not to be changed."""
    data = make_synthetic(train_size, test_size, seed)
    images = {f"{split}_images": getattr(data, f"{split}_images")[..., ::2, ::2] for split in ("train", "test")}
    return dataclasses.replace(data, **{name: each.contiguous() for name, each in images.items()})


def linear(seed=0):
    torch.default_generator.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))


def fit(net, loaders, optimizer=None, scheduler=None, epochs=1, **options):
    """utils.fit with plain SGD and in silence, unless told otherwise."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.01)
    return utils.fit(net, *loaders, optimizer, scheduler, epochs, **QUIET | options)


def count_backward(kind, monkeypatch):
    """Counts, of the batches, those that kind, FusedLoss or GraphedLoss, computed (True) and those it left (False)."""
    counts, backward = collections.Counter(), kind.backward

    def counting(self):
        done = backward(self)
        counts[done] += 1
        return done

    monkeypatch.setattr(kind, "backward", counting)
    return counts


def everything(loader):
    """A pass over a loader as one batch: images, labels."""
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images, labels


def run(data, checkpoint=None, epochs=4, norm="group", **options):
    """A run in which all that is random takes part."""
    options = {"augment": True, "dropout": 0.2, "step_size": 2, "device": "cpu", "progress": False} | options
    return utils.run(norm, data, epochs, checkpoint=checkpoint, **options)


def scramble():
    """What another notebook cell may do to the global generators."""
    random.seed(99), np.random.seed(99), torch.manual_seed(99)


def same(a, b):
    """Equality to the last bit of nested states; how long an epoch took does not count."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def texts_of(figure):
    """The texts of a figure that was drawn, but for those of axes that are off."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.texts)]
    for ax in figure.axes:
        texts += [ax.title, *ax.texts, *(ax.get_legend().texts if ax.get_legend() else ())]
        if ax.axison:
            texts += [ax.xaxis.label, ax.yaxis.label]
            for axis in (ax.xaxis, ax.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_ticklocs(), axis.get_ticklabels())
                texts += [label for place, label in ticks if low <= place <= high]
    return texts


def drawn(figure):
    """All text of a figure."""
    figure.canvas.draw()
    return " ".join(text.get_text() for text in texts_of(figure))


def study(**columns):
    """One row a combination, with an accuracy and a last epoch of 2 of which the first says nothing."""
    rows = [run | {"data": "CIFAR-10"} for run in grid(**columns)]
    rows = [row | {"settings": " ".join(f"{name}={value}" for name, value in row.items())} for row in rows]
    noise = np.random.default_rng(0).normal(0, 1, len(rows))
    return pd.DataFrame(
        row | {"epoch": epoch, "test_acc": 70 + noise[i] if epoch == 2 else 0.0}
        for i, row in enumerate(rows)
        for epoch in (1, 2)
    )


def write_image_folder(root, each=2, size=(32, 32), suffix="png", each_test=None):
    """So many images of each class, numbered across the classes; returns the pixels in the order of their numbers."""
    rng = np.random.default_rng(0)
    pixels = {}
    for split, count in (("train", each), ("test", each_test or each)):
        pixels[split] = rng.integers(0, 256, (count * 10, size[1], size[0], 3), dtype=np.uint8)
        for i, image in enumerate(pixels[split]):
            folder = root / split / CLASSES[i % 10]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:05d}.{suffix}")
    return pixels


def notebook_on_few_images(folder):
    """Returns S8.ipynb with parameters for one epoch on few images, which are written into the folder."""
    from papermill.iorw import load_notebook_node  # takes as long to import as PyTorch
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(Path(__file__).parents[1] / "S8.ipynb"))
    trial = next(cell for cell in notebook.cells if "data.first(2000)" in cell.source)
    trial.source = trial.source.replace("data.first(2000)", "data.first(200)")
    write_image_folder(folder, each=20, each_test=10)
    return parameterize_notebook(notebook, {"EPOCHS": 1, "DATA": "cifar10", "DATA_ROOT": str(folder)})


def build_driver(folder, compiler, *flags):
    """Builds csrc/driver.cpp, which holds the kernel, as a program; skips the test where a tool is missing."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    source, program = Path(__file__).with_name("csrc") / "driver.cpp", folder / "driver"
    command = [compiler, *COMPILE, "-Wall", "-Wextra", *flags, source, "-o", program, "-lgomp"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lgomp" in done.stderr or "unable to find library -lgomp" in done.stderr:
        pytest.skip("no libgomp to link with")
    if "libclang_rt" in done.stderr or "cannot find -lasan" in done.stderr:
        pytest.skip(f"{compiler} has no sanitizers here")
    assert done.returncode == 0 and "csrc" not in done.stderr, done.stderr  # no warnings but the linker's
    return program
