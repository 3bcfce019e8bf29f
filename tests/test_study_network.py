"""Which network the rows of a study are of: model.py's as it came, as it was edited, or with parts replaced."""

import copy
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_study_rows import ONE, losses
from torch import nn

import model
import utils
from normkit import network
from normkit.study import run_many

ROOT = Path(__file__).parents[1]


def test_a_line_in_model_py_that_was_changed_is_another_run(small, tmp_path, monkeypatch):
    """The norms are then model's own, and come with the same names."""
    source = inspect.getsource(model)
    assert network.mark_of_norm("batch") == network.mark_of_norm("no such norm") == ""
    mine = eval("lambda channels, num_groups: nn.Identity()", vars(model))
    monkeypatch.setitem(model.NORMS, "mine", mine)
    assert mine.__module__ == "model" and network.mark_of_norm("mine").startswith("#")
    with monkeypatch.context() as patch:
        patch.setitem(model.NORMS, "batch", lambda channels, num_groups: nn.Identity())  # in the place of model's own
        assert network.mark_of_norm("batch").startswith("#")
    monkeypatch.setattr(network, "as_loaded", network.as_loaded.__wrapped__)  # reads the file each time
    edited = {
        "a further norm": source.replace("NORMS = {", 'NORMS = {"mine": lambda channels, num_groups: nn.Identity(),'),
        "a docstring": source.replace("Classifies RGB", "Sorts RGB"),
        "a comment": source.replace("    def forward(self, x", "    # mine\n    def forward(self, x"),
        "a norm": source.replace("nn.BatchNorm2d(channels)", "nn.BatchNorm2d(channels, momentum=0.2)"),
        "a width": source.replace("block(8, 32)", "block(8, 40)"),
    }
    for name, text in edited.items():
        assert text != source
        monkeypatch.setattr(inspect, "getsource", lambda module, text=text: text)
        assert (network.mark_of_network() == "") == (name in ("a further norm", "a docstring", "a comment")), name


def test_a_file_that_was_edited_counts_once_it_is_loaded_anew(monkeypatch):
    edited = inspect.getsource(model).replace("block(8, 32)", "block(8, 40)")
    monkeypatch.setattr(inspect, "getsource", lambda module: edited)
    assert network.mark_of_network() == ""
    monkeypatch.setattr(model, "__spec__", copy.copy(model.__spec__))  # another one, as importlib.reload gives it
    assert network.mark_of_network().startswith(" model#")


EDITED = """
import importlib, pathlib, sys
import model
from helpers import stand_in
from normkit.study import grid, run_many

def study(**choices):
    rows = run_many(grid(epochs=1, batch_size=50, **choices), data, "study.csv", int(sys.argv[1]))
    return rows["settings"].str.extract("norm=layer(.*) epochs=")[0].tolist(), rows["train_loss"].tolist()

def edit(old, new):
    file.write_text(file.read_text().replace(old, new))

def marks_unless_refused(**choices):
    try:
        return study(**choices)[0]
    except RuntimeError as error:  # of workers, which know what they have read
        assert "model.Net is another one where this was asked for" in str(error) and sys.argv[1] == "2"

data, file = stand_in(101, 40), pathlib.Path(model.__file__)
first = study(norm="layer", seed=range(2))
forward = model.ConvBlock.forward
model.ConvBlock.forward = lambda self, x, skip=None: 2 * forward(self, x, skip)
marks = marks_unless_refused(norm="layer", seed=range(2))
assert marks is None if sys.argv[1] == "2" else marks[0] == marks[1] != ""
model.ConvBlock.forward = forward
edit("x + skip", "x - skip")
assert study(norm="layer", seed=range(2)) == first  # nothing else was loaded
importlib.reload(model)
marks, losses = study(norm="layer", seed=range(2))
assert first[0] == ["", ""] and marks[0] == marks[1] != ""
assert all(abs(a - b) > 1e-3 for a, b in zip(losses, first[1]))
edit("x - skip", "2 * x - skip")
assert marks_unless_refused(norm="layer", seed=2) in (marks[:1], None)  # of a worker that has to read the file now
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_model_py_counts_as_it_was_loaded(tmp_path, processes):
    """Edited beneath a notebook, it says what the rows are not of; reloaded, it is what older workers do not know.

    A part that was replaced in the notebook, no worker knows.
    """
    shutil.copy(ROOT / "model.py", tmp_path)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", EDITED, processes]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class Maximum(nn.Module):
    def forward(self, x):
        return x.amax((2, 3), keepdim=True)


def bounded(self, x):
    return nn.functional.linear(x.flatten(1), self.weight.flatten(1)).clamp(-1, 1)


def doubled(self, x, skip=None):
    return 2 * self.forward(x, skip)


def test_a_part_of_the_network_that_was_replaced_is_another_run(small, tmp_path, monkeypatch):
    class Wide(model.Net):
        def forward(self, images):
            return 2 * super().forward(images)

    def rows_now():
        return run_many(ONE | {"norm": "layer"}, small, tmp_path / "s.csv")

    rows = [rows_now()]
    others = {"Net": Wide, "AvgPool2d": Maximum, "Conv2d.forward": bounded, "ConvBlock.__call__": doubled}
    for where, other in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"model.{where}", other, raising=False)
            rows.append(rows_now())
            alone = utils.run("layer", small, **ONE, progress=False).history[0]["train_loss"]
            assert losses(rows[-1]) == pytest.approx([alone], rel=1e-5)
            assert "norm=layer model#" in rows[-1]["settings"][0]
    assert len({each["settings"][0] for each in rows}) == len({*sum(map(losses, rows), [])}) == len(rows)
    assert rows_now()["settings"].tolist() == rows[0]["settings"].tolist()


def test_what_replaces_no_part_of_the_network_is_the_same_run(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model, "AvgPool2d", Maximum)
        patch.setattr(model.Net, "extra_repr", lambda self: f"one of {len(model.NORMS)}")
        before = network.mark_of_network()
        patch.setitem(model.NORMS, "mine", lambda channels, num_groups: nn.Identity())
        assert network.mark_of_network() == before != ""
    assert not model.Net.__annotations__  # which Python now notes in the class
    monkeypatch.setattr(model, "note_of_mine", 1, raising=False)
    assert network.mark_of_network() == ""
