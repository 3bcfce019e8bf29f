"""Which run the rows of a study are of, where they are kept, and what no study can be made of."""

import csv
import dataclasses
import importlib
import os
import sys
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config
from torch import nn

import model
import utils
from normkit import checkpoint, device, plots, study, tables
from normkit.data import Data
from normkit.rows import read_rows
from normkit.study import grid, run_many

ONE = {"epochs": 1, "batch_size": 50}


@pytest.fixture
def norms(monkeypatch):
    """model.NORMS, to be changed; given back afterwards."""
    monkeypatch.setattr(model, "NORMS", dict(model.NORMS))
    return model.NORMS


def losses(rows):
    return rows["train_loss"].tolist()


# ---------------------------------------------------------------------- the run that was asked for


def test_recipes_that_are_user_defined_reach_other_processes(small, tmp_path, monkeypatch):
    classic = utils.RECIPES["classic"]
    recipes = {"classic": classic.replace(lr=0.1), "mine": classic.replace(lr=0.2)}
    monkeypatch.setattr(utils, "RECIPES", utils.RECIPES | recipes)
    runs = grid(norm="layer", recipe=list(recipes), **ONE)
    rows = run_many(runs, small, tmp_path / "s.csv", processes=2)
    assert rows["lr"].tolist() == rows["base_lr"].tolist() == [0.1, 0.2]
    assert rows["recipe"].tolist() == ["classic", "mine"]


NORM = """
from torch import nn
FLAG = True
def build(channels, num_groups):
    return nn.BatchNorm2d(channels) if FLAG else nn.Identity()
"""


def test_a_norm_of_a_module_that_was_changed_is_the_changed_one_in_other_processes(small, tmp_path, norms, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "norms_of_mine.py").write_text(NORM)
    module = importlib.import_module("norms_of_mine")
    runs, found = grid(norm="mine", seed=range(2), **ONE), []
    for change in (None, "value", "file"):
        if change == "value":
            module.FLAG = False
        elif change == "file":
            (tmp_path / "norms_of_mine.py").write_text(
                NORM.replace("Identity()", "BatchNorm2d(channels, affine=False)")
            )
            module = importlib.reload(module)
            module.FLAG = False
        norms["mine"] = module.build
        found.append(losses(run_many(runs, small, tmp_path / "s.csv", processes=2)))
    assert len({tuple(each) for each in found}) == 3
    alone = losses(run_many(runs, small, tmp_path / "alone.csv"))
    assert found[-1] == pytest.approx(alone, rel=1e-3) != pytest.approx(found[0], rel=1e-3)
    del sys.modules["norms_of_mine"]


def test_a_norm_that_is_named_through_its_module_is_marked_and_sent_as_it_is_now(
    small, tmp_path, norms, importable, monkeypatch
):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file, runs, found = importable / "norms_by_module.py", grid(norm="mine", seed=range(2), **ONE), []
    file.write_text("from torch import nn\nEPS = 1e-5\nNorm = nn.BatchNorm2d\n")
    module = importlib.import_module("norms_by_module")
    norms["mine"] = lambda channels, num_groups: module.Norm(channels, module.EPS)
    for eps in ("1e-5", "10.0"):
        file.write_text(f"from torch import nn\nEPS = {eps}\nNorm = nn.BatchNorm2d\n")
        importlib.reload(module)
        found.append(losses(run_many(runs, small, tmp_path / "s.csv", processes=2)))
        alone = run_many(runs, small, tmp_path / f"{eps}.csv")
        assert losses(alone) == pytest.approx(found[-1], rel=1e-3)
    there = run_many(grid(norm="layer", seed=range(2), **ONE), small, tmp_path / "s.csv", processes=2)
    here = run_many(grid(norm="layer", seed=range(2), **ONE), small, tmp_path / "here.csv")
    # The kernel knows the network of model.py's first loading, and the workers have not loaded it again.
    assert there["backend"].tolist() == here["backend"].tolist()
    assert found[0] != pytest.approx(found[1], rel=1e-2)
    del sys.modules["norms_by_module"]


def test_a_run_without_a_metric_is_done_anew(small, tmp_path, capsys):
    whole, file = run_many(grid(norm="batch", **ONE), small, tmp_path / "s.csv"), tmp_path / "s.csv"
    for emptied in (whole.assign(test_acc=np.nan), whole.drop(columns="test_acc")):
        emptied.to_csv(file, index=False)
        again = run_many(grid(norm="batch", **ONE), small, file)
        assert again["test_acc"].tolist() == whole["test_acc"].tolist()
        assert "1 of the runs lack epochs" in capsys.readouterr().out


def test_norms_may_be_another_dictionary(small, tmp_path, monkeypatch):
    found = []
    for builder in (nn.BatchNorm2d, lambda channels: nn.Identity()):
        monkeypatch.setattr(model, "NORMS", model.NORMS | {"mine": lambda channels, _, build=builder: build(channels)})
        found.append(losses(run_many(grid(norm="mine", **ONE), small, tmp_path / "s.csv")))
    assert found[0] != found[1]


def test_a_recipe_is_the_same_however_its_numbers_are_written(small, tmp_path):
    runs = grid(norm=["layer", "batch"], lr=[1, *np.linspace(0.5, 1, 2)], augment=[False, 0], seed=range(2), **ONE)
    rows = run_many(runs, small, tmp_path / "s.csv")
    assert len(rows) == 8 and set(rows["augment"]) == {False}
    assert tables.seeds_table(rows)["seeds"].tolist() == [2, 2, 2, 2]
    assert utils.get_recipe(dropout=0, nesterov=1) == utils.get_recipe(dropout=0.0, nesterov=True)


def test_what_is_left_to_the_recipe_is_in_the_rows(small, tmp_path):
    rows = run_many(grid(norm="layer", epochs=1, batch_size=None, num_groups=None), small, tmp_path / "s.csv")
    assert rows["batch_size"].tolist() == [64] and rows["num_groups"].tolist() == [4]


def test_names_that_look_like_numbers_stay_names(small, tmp_path, norms):
    norms |= {name: lambda channels, num_groups: nn.Identity() for name in ("007", "1e2")}
    data = dataclasses.replace(small, name="2024")
    rows = run_many(grid(norm=["007", "1e2"], **ONE), data, tmp_path / "s.csv")
    assert rows["norm"].tolist() == ["007", "1e2"] and set(rows["data"]) == {"2024"}
    assert len(tables.select(rows, norm="007")) == 1
    plots.plot_seeds(rows)


def test_data_may_lack_a_name(small, tmp_path):
    rows = run_many(grid(norm=["batch", "layer"], **ONE), dataclasses.replace(small, name=""), tmp_path / "s.csv")
    assert plots.plot_seeds(rows).axes[0].get_title() == "data without a name: classic recipe, 1 epoch, 1 seed each"
    plots.plot_batch_sizes(rows)


def test_empty_lines_of_a_spreadsheet_change_no_number(small, tmp_path):
    file, runs = tmp_path / "s.csv", grid(norm="layer", seed=[2**60 + 1, 3], **ONE)
    first = run_many(runs[0], small, file)
    with open(file, "a") as opened:
        opened.write("," * (len(first.columns) - 1) + "\n")
    rows = run_many(runs, small, file)
    assert rows["seed"].tolist() == [2**60 + 1, 3] and rows["seed"].dtype.kind == "i"
    assert len(file.read_text().splitlines()) == 3
    pd.testing.assert_frame_equal(rows[:1], first)


def test_what_on_epoch_adds_to_a_row_is_kept(small, tmp_path):
    notes = {"seen": 12345678, "stamp": 1764191581.25, "best": True, "step": np.int64(7654321)}
    notes |= {"mean": torch.tensor(0.123456789, dtype=torch.float64), "count": torch.tensor(7654321)}

    def note(history):
        history[-1].update(note="warm", nothing=None, **notes)

    rows = run_many(grid(norm="layer", on_epoch=note, **ONE), small, tmp_path / "s.csv")
    assert rows["note"].tolist() == ["warm"] and rows["test_acc"].notna().all()
    assert rows[list(notes)].iloc[0].tolist() == list(notes.values())
    assert "".join(rows[name].dtype.kind for name in notes) == "ifbifi"  # whole, float, bool
    assert all(loss == float(f"{loss:.6g}") for loss in rows[["train_loss", "test_loss"]].iloc[0])


@pytest.mark.parametrize("name", ["norm", "seed", "where", "diverged", "dropout"])
def test_a_note_that_would_hide_a_column_is_told_in_the_first_epoch(small, tmp_path, name):
    epochs = []

    def note(history):
        epochs.append(len(history))
        history[-1][name] = 0.5  # of the gradient, say

    runs = grid(norm="layer", dropout=0.1, on_epoch=[note, None], epochs=2, batch_size=50)
    runs[1]["seed"] = 1
    with pytest.raises(RuntimeError, match=f"on_epoch notes {name}, and the table has that of its own") as told:
        run_many(runs, small, tmp_path / "s.csv")
    assert len(str(told.value).splitlines()) == 2 and epochs == [1]


def test_rows_come_by_epoch_however_the_file_is_sorted(small, tmp_path):
    run = ONE | {"norm": "layer", "epochs": 10}
    run_many(run, small, tmp_path / "s.csv")
    pd.read_csv(tmp_path / "s.csv").sort_values("epoch", ascending=False).to_csv(tmp_path / "s.csv", index=False)
    assert run_many(run, small, tmp_path / "s.csv")["epoch"].tolist() == list(range(1, 11))


def test_a_study_in_which_all_diverged_has_its_columns(small, tmp_path):
    runs = grid(norm=["layer", "batch"], lr=[1e30, 1e31], momentum=0.99, **ONE)
    rows = run_many(runs, small, tmp_path / "s.csv", keep_diverged=True)
    assert rows["test_acc"].isna().all() and rows["test_acc"].dtype == float and len(rows) == 4
    plots.plot_learning_rates(rows)


def test_joblibs_own_processes_compute_a_study(small, tmp_path):
    with parallel_config("multiprocessing", n_jobs=2):
        assert len(run_many(grid(norm=["batch", "layer"], **ONE), small, tmp_path / "s.csv")) == 2


@pytest.mark.parametrize("useless", ["of another version", "of another precision", "damaged"])
def test_a_run_whose_checkpoint_is_of_no_use_is_begun_anew(small, tmp_path, monkeypatch, capsys, useless):
    def stop(history):
        raise KeyboardInterrupt

    file, run = tmp_path / "s.csv", ONE | {"norm": "layer", "epochs": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if useless == "of another version":
            patch.setattr(checkpoint, "VERSION", checkpoint.VERSION - 1)
        elif useless == "of another precision":  # which a machine with another device chooses
            own = device.choose_precision("auto", torch.device("cpu"))
            other = torch.float32 if own == torch.bfloat16 else torch.bfloat16
            patch.setattr(device, "choose_precision", lambda *_: other)
        run_many(run | {"on_epoch": stop}, small, file)
    for each in (tmp_path / "s.csv.unfinished").iterdir():
        each.write_bytes(each.read_bytes()[: 99 if useless == "damaged" else None])
    rows = run_many(run, small, file)
    assert "layer, seed 0, is begun anew" in capsys.readouterr().out
    assert losses(rows) == losses(run_many(run, small, tmp_path / "alone.csv"))
    assert not list(tmp_path.glob("*.unfinished"))


# ------------------------------------------------------------------------------------- the file


def cells(file):
    """The rows of a study's file as text."""
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_what_a_studys_file_holds_stays_to_the_letter_whatever_is_added(small, tmp_path):
    notes = {"python": "3.10", "commit": "0123456", "digest": "12e4567", "lines": 'a\n,,,\n"b"', "flag": "TRUE"}
    notes |= {"stamp": 1764352252123456789, "count": 7, "rate": 1e-05, "missing": float("nan"), "none": None}
    file, run = tmp_path / "s.csv", ONE | {"norm": "layer", "seed": 2**60 + 1}
    run_many(run | {"on_epoch": lambda history: history[-1].update(notes)}, small, file)
    first = cells(file)
    assert [first[0][name] for name in notes] == [
        "" if value in (None, notes["missing"]) else str(value) for value in notes.values()
    ]
    with open(file, "a", newline="") as opened:
        opened.write("of a spreadsheet" + "," * (len(first[0]) - 1) + "\n")
    rows = run_many([run, ONE | {"norm": "batch"}], small, file)
    assert cells(file)[:1] == first and len(cells(file)) == 3
    assert rows["seed"].tolist() == [2**60 + 1, 0] and rows["stamp"].dropna().tolist() == [notes["stamp"]]
    assert rows["count"].isna().tolist() == [False, True] and str(rows["count"][0]) == "7"


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_ends_of_lines_may_stand_in_notes_and_names(small, tmp_path, end):
    file, data = tmp_path / "s.csv", dataclasses.replace(small, name=f"mine{end}too")
    runs = grid(norm="layer", seed=range(2), on_epoch=lambda history: history[-1].update(log=f"1{end}2"), **ONE)
    rows = run_many(runs, data, file)
    assert {*rows["log"]} == {f"1{end}2"} and {*rows["data"]} == {data.name}
    again = run_many(grid(norm="layer", seed=range(2), **ONE), data, file)
    pd.testing.assert_frame_equal(again, rows)  # seconds too: nothing was done again


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r")])
def test_a_file_may_have_the_mark_and_the_ends_of_lines_that_a_spreadsheet_gives_it(small, tmp_path, change):
    file, run = tmp_path / "s.csv", ONE | {"norm": "layer"}
    rows = run_many(run, small, file)
    columns = ["settings", *(name for name in rows if name != "settings")]
    file.write_text(change(rows[columns].to_csv(index=False)), encoding="utf-8", newline="")
    pd.testing.assert_frame_equal(run_many(run, small, file)[rows.columns], rows)


def test_a_note_may_be_longer_than_the_csv_module_reads(small, tmp_path):
    limit = csv.field_size_limit()
    runs = grid(norm="layer", seed=range(2), on_epoch=lambda history: history[-1].update(log="x" * (limit + 1)), **ONE)
    rows = run_many(runs, small, tmp_path / "s.csv")
    assert rows["log"].str.len().tolist() == [limit + 1] * 2 and csv.field_size_limit() == limit


@pytest.mark.parametrize("note", [{"path": "caf\udce9"}, {"caf\udce9": 1}])
def test_a_note_that_no_file_can_hold_costs_no_other_run_and_is_told_in_the_first_epoch(small, tmp_path, note):
    epochs, runs = [], grid(norm="layer", seed=range(2), epochs=2, batch_size=50)
    runs[0]["on_epoch"] = lambda history: (epochs.append(len(history)), history[-1].update(note))
    with pytest.raises(RuntimeError, match=r"seed=0 .* on_epoch notes .*caf\\udce9.*: note its repr") as told:
        run_many(runs, small, tmp_path / "s.csv")
    assert len(str(told.value).splitlines()) == 2 and epochs == [1]
    assert [row["seed"] for row in cells(tmp_path / "s.csv")] == ["1", "1"]


def test_notes_may_be_named_by_numbers(small, tmp_path):
    runs = grid(norm="layer", seed=range(2), on_epoch=lambda history: history[-1].update({0: 0.5, 1: 1.5}), **ONE)
    for count in (1, 2):
        rows = run_many(runs[:count], small, tmp_path / "s.csv")
    assert rows[["0", "1"]].values.tolist() == [[0.5, 1.5]] * 2 and not {"0.1", "1.1"} & {*rows}


def test_a_link_to_a_studys_file_stays_one(small, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    file, link = tmp_path / "a" / "s.csv", tmp_path / "b" / "s.csv"
    link.symlink_to(file)
    run_many(grid(norm="layer", **ONE), small, file)
    file.chmod(0o600)
    mode = file.stat().st_mode  # on Windows not quite that
    run_many(grid(norm=["layer", "batch"], **ONE), small, link)
    assert link.is_symlink() and len(read_rows(file)) == 2 and file.stat().st_mode == mode


@pytest.mark.parametrize("refuse", ["folder", "lock", "locks", "file"])
def test_a_place_that_cannot_be_written_is_told_before_training(small, tmp_path, monkeypatch, refuse):
    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "s.csv"
    file.write_text("settings,epoch\n")
    if refuse == "folder":
        monkeypatch.setattr("tempfile.TemporaryFile", denied)
    elif refuse == "lock":
        monkeypatch.setattr("normkit.rows.FileLock", denied)
    elif refuse == "locks":  # as older versions of filelock say of a file system without
        monkeypatch.setattr("normkit.rows.FileLock", mock.Mock(side_effect=NotImplementedError("no flock")))
    else:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != file and access(path, mode))
    monkeypatch.setattr(study, "run", None)
    with pytest.raises(OSError, match=r"no study can be kept as .*s.csv: .*Name a file in a folder of your own"):
        run_many(grid(norm="layer", **ONE), small, file)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "run, message",
    [
        (
            {"norm": ["batch", "layer"]},
            "is not the name of one: batch, group, layer. Of several, grid makes a run each",
        ),
        ({"norm": "layer", "seed": None}, "seed=None: a study finds its runs again by their seeds"),
        ({"norm": "layer", "epochs": "1"}, "epochs='1': expected a whole number of at least 1"),
        ({"norm": "layer", "seed": 0.5}, "seed=0.5: expected a whole number"),
        ({"norm": "layer", "lr": torch.zeros(10_000)}, "lr=tensor.{0,60}: "),
    ],
)
def test_a_run_that_cannot_be_asked_for_costs_no_other(small, tmp_path, run, message):
    good = ONE | {"norm": "batch"}
    with pytest.raises(RuntimeError, match=message) as failed:
        run_many([ONE | run, good], small, tmp_path / "s.csv")
    assert len(str(failed.value)) < 1000 and len(read_rows(tmp_path / "s.csv")) == 1


@pytest.mark.parametrize("data, file", [("synthetic", "s.csv"), ("s.csv", Data), (Data, 3)])
def test_what_is_no_data_or_no_file_is_told(small, data, file):
    data, file = (small if each is Data else each for each in (data, file))
    with pytest.raises(TypeError, match=r"data a .* and file a .*: expected run_many\(runs, data, file\)"):
        run_many(grid(norm="layer", **ONE), data, file)
