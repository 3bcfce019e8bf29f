import subprocess
import sys

import pandas as pd
import pytest
import torch

import model
import utils
from normkit.data import train_val_split
from normkit.study import grid, run_many
from normkit.tables import trials_table

FEW = {"epochs": 2, "batch_size": 50}


def test_grid_is_every_combination():
    assert grid(a=[1, 2], b=("x", "y")) == [{"a": a, "b": b} for a in (1, 2) for b in "xy"]
    assert grid(epochs=2, norm="batch", seed=range(2)) == [{"epochs": 2, "norm": "batch", "seed": s} for s in range(2)]


def names(folder):
    """The files of a folder but for the lock that a study leaves beside its file."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".study.csv.lock")


@pytest.mark.parametrize("processes", [1, 2])
def test_many_runs_are_those_that_one_by_one_give(small, tmp_path, processes):
    runs = [FEW | run for run in grid(recipe=["best", "classic"], norm=["layer", "batch"])]
    rows = run_many(runs, small, tmp_path / "new" / "study.csv", processes)
    saved = pd.read_csv(tmp_path / "new" / "study.csv")
    assert len(rows) == len(saved) == 8 and names(tmp_path / "new") == ["study.csv"]
    for run, (settings, own) in zip(runs, rows.groupby("settings", sort=False), strict=True):
        in_file = saved[saved["settings"] == settings].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.reset_index(drop=True), in_file)
        alone = utils.run(data=small, progress=False, **run).history
        # Workers have a thread each: their sums run in another order, which decides close calls another way.
        for column in ["epoch", "lr", "train_loss"] + ["test_acc"] * (processes == 1):
            assert own[column].tolist() == pytest.approx(
                [row[column] for row in alone], rel=0.1 * (processes - 1) + 1e-5
            )
        assert set(own["recipe"]) == {run["recipe"]} and set(own["data"]) == {"synthetic stand-in"}


def test_what_is_done_is_not_done_again_and_what_was_stopped_goes_on(small, tmp_path, monkeypatch):
    file = tmp_path / "study.csv"
    runs = [FEW | run for run in grid(norm=["layer", "group", "batch"])]
    whole = run_many(runs, small, tmp_path / "whole.csv")

    epochs_trained = []
    train = utils.train

    def stopping(*args, **options):
        epochs_trained.append(None)
        if len(epochs_trained) == 4:  # the second epoch of the second run
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(utils, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_many(runs, small, file)
    assert len(pd.read_csv(file)) == 2
    run_many(runs, small, file)
    assert len(epochs_trained) == 4 + 3
    again = run_many(runs, small, file)
    assert len(epochs_trained) == 7
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), pd.read_csv(tmp_path / "whole.csv").drop(columns="seconds"), rtol=1e-5
    )
    assert len(whole) == len(again)


def test_other_settings_or_data_are_another_run(small, tmp_path):
    file = tmp_path / "study.csv"
    run = FEW | {"norm": "layer", "epochs": 1}
    for given in (run, run | {"seed": 1}, run | {"lr": 0.02}, run | {"recipe": "best"}):
        assert len(run_many([given], small, file)) == 1
    run_many([run], train_val_split(small, 21), file)
    assert pd.read_csv(file)["settings"].nunique() == 5


FAILURES = {
    "lr": ({"lr": 1e30}, "lr=1e\\+30.*FloatingPointError: .*not finite"),
    "norm": ({"norm": "instance"}, "norm=instance.*ValueError: .*batch, group, layer"),
    "seed": ({"seed": 1.5}, "seed=1.5.*ValueError: seed=1.5"),
    "batch_size": ({"batch_size": 0}, "batch_size=0.*ValueError: batch_size=0"),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("failing", FAILURES)
def test_a_run_that_fails_does_not_cost_the_others(small, tmp_path, failing, processes):
    changes, message = FAILURES[failing]
    run = FEW | {"norm": "layer", "momentum": 0.99}
    with pytest.raises(RuntimeError, match=f"(?s)these failed.*{message}"):
        run_many([run | changes, run], small, tmp_path / "study.csv", processes)
    assert len(pd.read_csv(tmp_path / "study.csv")) == 2


def test_all_that_fails_is_told_at_the_end_at_once(small, tmp_path):
    run = FEW | {"norm": "layer", "epochs": 1}
    with pytest.raises(RuntimeError) as told:
        run_many([run | changes for changes, _ in FAILURES.values()] + [run], small, tmp_path / "study.csv")
    assert len(str(told.value).splitlines()) == 1 + len(FAILURES)
    assert len(pd.read_csv(tmp_path / "study.csv")) == 1


def test_every_row_names_its_recipe(small, tmp_path):
    run = FEW | {"norm": "layer", "epochs": 1}
    rows = run_many([run, run | {"recipe": "best"}], small, tmp_path / "study.csv")
    assert rows["recipe"].tolist() == pd.read_csv(tmp_path / "study.csv")["recipe"].tolist() == ["classic", "best"]


# ----------------------------------------------------------------------------- norms of one's own


def identity(channels, num_groups):
    return torch.nn.Identity()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_norm_of_the_notebook_is_known_to_the_workers(small, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(model, "NORMS", model.NORMS)  # given back
    monkeypatch.setitem(model.NORMS, "None", lambda channels, num_groups: torch.nn.Identity())
    runs = grid(norm=["None", "layer"], epochs=1, batch_size=50)
    rows = run_many(runs, small, tmp_path / "study.csv", processes)
    assert list(rows["norm"]) == ["None", "layer"]
    again = run_many(runs, small, tmp_path / "study.csv", processes)
    pd.testing.assert_frame_equal(rows, again)


def test_a_norm_that_was_changed_is_run_anew_and_one_that_was_moved_is_not(small, tmp_path, monkeypatch):
    def run(builder):
        monkeypatch.setitem(model.NORMS, "mine", builder)
        rows = run_many([{"norm": "mine", "epochs": 1, "batch_size": 50}], small, tmp_path / "study.csv")
        return rows["settings"].iloc[0]

    def with_momentum(momentum):
        return lambda channels, num_groups: torch.nn.BatchNorm2d(channels, momentum=momentum)

    first = run(lambda channels, num_groups: torch.nn.BatchNorm2d(channels, momentum=0.9))
    assert run(lambda channels, num_groups: torch.nn.BatchNorm2d(channels, momentum=0.9)) == first
    others = [run(lambda channels, num_groups: torch.nn.BatchNorm2d(channels, momentum=0.5)), run(identity)]
    others += [run(with_momentum(0.9)), run(with_momentum(0.5)), run(torch.nn.BatchNorm2d)]
    assert len({first, *others}) == 6
    monkeypatch.setitem(model.NORMS, "batch", lambda channels, num_groups: torch.nn.BatchNorm2d(channels, momentum=0.9))
    changed = run_many([{"norm": "batch", "epochs": 1, "batch_size": 50}], small, tmp_path / "study.csv")
    assert "norm=batch#" in changed["settings"].iloc[0]


def test_two_processes_that_write_to_one_file_lose_no_row(small, tmp_path):
    file, few = tmp_path / "study.csv", {"norm": "layer", "epochs": 1, "batch_size": 50}
    run_many([few | {"seed": 0, "on_epoch": lambda history: run_many([few | {"seed": 1}], small, file)}], small, file)
    assert sorted(pd.read_csv(file)["seed"]) == [0, 1]


def test_rows_hold_what_was_asked_and_large_seeds_exactly(small, tmp_path):
    runs = [
        {"norm": "layer", "epochs": 1, "batch_size": 50},
        {"norm": "layer", "epochs": 1, "seed": 20240101, "lr": 0.02},
    ]
    rows = run_many(runs, small, tmp_path / "study.csv")
    assert rows["seed"].tolist() == [0, 20240101] and rows["batch_size"].tolist() == [50, 64]
    assert rows["base_lr"].tolist() == [0.01, 0.02] and rows["num_groups"].tolist() == [4, 4]
    table = trials_table(rows)
    assert list(table.index) == ["layer", "layer"] and list(table["lr"]) == ["0.01", "0.02"]


@pytest.mark.parametrize("content", ["", "a;b\n1;2\n", 'a,b\n"1', "norm,seed\nbatch,0\n"])
def test_a_file_that_is_no_studys_is_named_and_kept(small, tmp_path, content):
    file = tmp_path / "study.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match="study.csv (is no study's file|cannot be read)"):
        run_many([{"norm": "layer", "epochs": 1, "batch_size": 50}], small, file)
    assert file.read_text() == content


class Builder:
    def __call__(self, channels, num_groups):
        return torch.nn.Identity()


def test_the_mark_of_a_norm_is_the_same_in_every_process():
    script = f"""
import functools, sys
sys.path[:0] = {sys.path!r}
import torch, model
from normkit.study import code_of
from test_study import Builder
model.NORMS["a"] = functools.partial(lambda eps, channels, num_groups: torch.nn.BatchNorm2d(channels, eps), 1e-3)
model.NORMS["b"] = Builder()
model.NORMS["c"] = (lambda inner: lambda channels, num_groups: inner(channels))(lambda channels: torch.nn.Identity())
print([code_of(name) for name in "abc"])
"""
    said = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(said) == 1 and len(set(eval(said.pop()))) == 3
