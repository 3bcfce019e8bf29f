import dataclasses
import functools
import os
import re
import threading

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config
from joblib.parallel import ThreadingBackend

import model
import utils
from normkit import study
from normkit.data import train_val_split
from normkit.engine import compute
from normkit.study import grid, run_many
from normkit.synthetic import make_synthetic
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
    train_epoch = utils.train_epoch

    def stopping(*args, **options):
        epochs_trained.append(None)
        if len(epochs_trained) == 4:  # the second epoch of the second run
            raise KeyboardInterrupt
        return train_epoch(*args, **options)

    monkeypatch.setattr(utils, "train_epoch", stopping)
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
    changes = [{}, {"seed": 1}, {"lr": 0.02}, {"recipe": "best"}, {"precision": "bfloat16"}, {"backend": "eager"}]
    for change in changes:
        assert len(run_many([run | change], small, file)) == 1
    other = dataclasses.replace(small, train_labels=small.train_labels.roll(1))
    for data in (train_val_split(small, 21), other):
        run_many([run], data, file)
    assert pd.read_csv(file)["settings"].nunique() == 8
    assert len(run_many([run | change for change in changes], small, file)) == 6


def test_a_run_that_diverges_may_be_a_finding(small, tmp_path):
    run = FEW | {"norm": "layer", "momentum": 0.99, "lr": 1e30}
    rows = run_many([run], small, tmp_path / "study.csv", keep_diverged=True)
    assert list(rows["epoch"]) == [1] and "not finite" in rows["diverged"].item() and rows["base_lr"].item() == 1e30
    again = run_many([run, run | {"lr": 0.01}], small, tmp_path / "study.csv", keep_diverged=True)
    assert list(again["epoch"]) == [1, 1, 2] and again["test_acc"].isna().tolist() == [True, False, False]


@pytest.mark.parametrize(
    "runs, options, error, message",
    [
        (["batch"], {}, TypeError, "runs holds a str: expected dicts of keywords for run, as of grid"),
        ([{"norm": "batch"}], {"processes": "2"}, ValueError, "processes='2': expected a whole number"),
        ([{"norm": "batch"}], {"file": "study.csv.gz"}, ValueError, "study.csv.gz: .* is text, .*: name it .csv"),
        ([{"lr": 0.1}], {}, RuntimeError, "lr=0.1: ValueError: a run needs a norm: batch, group, layer"),
    ],
)
def test_what_no_study_can_be_made_of_is_told(small, tmp_path, runs, options, error, message):
    options = {"file": "study.csv"} | options
    with pytest.raises(error, match=message):
        run_many(runs, small, **(options | {"file": tmp_path / options["file"]}))


def test_scalars_of_numpy_and_torch_are_numbers_in_the_rows(small, tmp_path):
    runs = grid(norm="layer", epochs=np.int64(1), batch_size=torch.tensor(50), lr=[np.float64(0.01)], on_epoch=len)
    rows = run_many(runs, small, tmp_path / "study.csv")
    assert (rows["batch_size"].item(), rows["base_lr"].item(), rows["epochs"].item()) == (50, 0.01, 1)
    assert "on_epoch" not in rows and "tensor" not in (tmp_path / "study.csv").read_text()


def test_a_norm_that_no_run_asks_for_is_not_sent(small, tmp_path, monkeypatch):
    lock = threading.Lock()  # which cannot be pickled
    monkeypatch.setitem(model.NORMS, "locked", lambda channels, num_groups: lock)
    assert len(run_many(grid(norm=["layer", "batch"], epochs=1, batch_size=50), small, tmp_path / "study.csv", 2)) == 2


FAILURES = {
    "lr": ({"lr": 1e30}, "lr=1e\\+30.*FloatingPointError: .*not finite"),
    "norm": ({"norm": "batchnorm"}, "norm=batchnorm.*ValueError: .*batch, group, layer"),
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
    others += [run(with_momentum(0.9)), run(with_momentum(0.5)), run(torch.nn.Identity)]
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


@pytest.mark.parametrize("content", ["", "a;b\n1;2\n", 'a,b\n"1', '"a,b\n1,2', "norm,seed\nbatch,0\n"])
def test_a_file_that_is_no_studys_is_named_and_kept(small, tmp_path, content):
    file = tmp_path / "study.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match="study.csv cannot be read as a study's file: .*Name another, or mend it"):
        run_many([{"norm": "layer", "epochs": 1, "batch_size": 50}], small, file)
    assert file.read_text() == content


# ----------------------------------------------------------------------------- engines

ONE = {"norm": "layer", "epochs": 1, "batch_size": 50}


class WithoutGenerators(ThreadingBackend):
    """Has all results of a call at once, as Ray's and multiprocessing's."""

    supports_return_generator = False


@pytest.mark.parametrize("engine", ["loky", "threading", WithoutGenerators()])
def test_the_callers_engine_computes_the_same(small, tmp_path, engine):
    runs = [FEW | {"norm": "layer", "seed": seed, "augment": True, "dropout": 0.2} for seed in range(3)]
    expected = run_many(runs, small, tmp_path / "one by one.csv")
    seen = tmp_path / "seen"
    seen.mkdir()
    runs = [
        run | {"on_epoch": lambda history: (seen / f"{os.getpid()} {threading.get_ident()}").touch()} for run in runs
    ]
    with parallel_config(engine, n_jobs=2):
        rows = run_many(runs, small, tmp_path / "study.csv")
    processes, threads = zip(*(path.name.split() for path in seen.iterdir()))
    assert (str(os.getpid()) in processes) == (engine != "loky")
    assert str(threading.get_ident()) not in threads or engine == "loky"
    assert rows["train_loss"].tolist() == pytest.approx(expected["train_loss"].tolist(), rel=1e-3)


def test_the_folder_of_checkpoints_stays_until_the_last_run_is_done(small, tmp_path, monkeypatch):
    """Else a run that has found it there, and is about to write, fails, as another one's end removes it."""
    file, folder, found = tmp_path / "study.csv", tmp_path / "study.csv.unfinished", []

    def looking(**keywords):
        found.append(folder.exists())
        return utils.run(**keywords)

    monkeypatch.setattr(study, "run", looking)
    run_many([FEW | {"norm": "layer", "seed": seed} for seed in range(3)], small, file)
    assert found == [False, True, True] and not folder.exists()


def test_the_data_is_no_part_of_a_task(tmp_path, monkeypatch):
    """So that what an engine sends with each is small: test_engine.py has the rest."""
    data, sizes = make_synthetic(train_size=600, test_size=20), []

    def measuring(function, tasks, *others):
        sizes.extend(len(cloudpickle.dumps(arguments)) for arguments in tasks.values())
        return compute(function, tasks, *others)

    monkeypatch.setattr(study, "compute", measuring)
    run_many([ONE | {"seed": seed} for seed in range(2)], data, tmp_path / "study.csv")
    assert len(sizes) == 2 and max(sizes) < 50_000 < data.train_images.nbytes


def test_runs_take_turns_over_the_gpus(small, tmp_path, monkeypatch):
    devices = []

    def run(data, device, **_):
        devices.append(device)
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(study, "run", run)
    runs = [ONE | {"seed": seed} for seed in range(4)] + [ONE | {"seed": 4, "device": "cpu"}]
    with pytest.raises(RuntimeError, match="these failed"):
        run_many(runs, small, tmp_path / "study.csv")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="these failed"):
        run_many(runs[:1], small, tmp_path / "study.csv")
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cpu", None]


def test_where_the_studys_folder_cannot_be_seen_a_run_has_no_checkpoint(small, tmp_path):
    checkpoint = tmp_path / "of another machine" / "study.csv.unfinished" / "run"
    rows, failure = study.run_one(small, "key", study.plan(ONE), None, 0, checkpoint, False)
    assert len(rows) == 1 and failure is None and not list(tmp_path.iterdir())


def test_progress_counts_runs_that_fail_and_tells_the_time_left(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "progress_bar", functools.partial(study.progress_bar, mininterval=0, miniters=1))
    run_many(ONE | {"seed": 3}, small, tmp_path / "study.csv")
    capsys.readouterr()
    runs = [ONE | {"seed": seed} for seed in range(4)]
    with pytest.raises(RuntimeError, match="these failed"):
        run_many([runs[3], runs[0] | {"momentum": 0.99, "lr": 1e30}, *runs[1:3]], small, tmp_path / "study.csv")
    told = capsys.readouterr().out
    assert list(dict.fromkeys(re.findall(r"study: .*?(\d/4) ", told))) == ["1/4", "2/4", "3/4", "4/4"]
    assert re.search(r"3/4 \[\d\d:\d\d<\d\d:\d\d", told)


# ----------------------------------------------------------------------------- damaged files


DAMAGE = {
    "cut off in mid-row": (5, lambda line: line[:30], "[0-9]+ cells in place of"),
    "cut off in its last cell": (5, lambda line: line[:-9], "unexpected end"),
    "cut off before its end of line": (5, lambda line: line[:-1], "cut off"),
    "a cell too few": (3, lambda line: line.replace(",layer,", ","), "[0-9]+ cells in place of"),
    "a cell too many": (3, lambda line: "x," + line, "[0-9]+ cells in place of"),
    "no number": (3, lambda line: line.replace(",0.01,", ",0.0\x001,"), ".*NUL|.*float"),
    "an open quote": (4, lambda line: '"' + line, "',' expected"),
}


@pytest.fixture(scope="module")
def two_runs(small, tmp_path_factory):
    """Runs, their rows and the lines of their file."""
    file, runs = tmp_path_factory.mktemp("study") / "study.csv", [FEW | {"norm": "layer", "seed": s} for s in range(2)]
    return runs, run_many(runs, small, file), file.read_text().splitlines(keepends=True)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_named_and_kept_and_once_it_is_deleted_its_run_is_done_anew(small, tmp_path, two_runs, damage):
    file, (number, change, message) = tmp_path / "study.csv", DAMAGE[damage]
    runs, whole, lines = two_runs
    content = "".join([*lines[: number - 1], change(lines[number - 1]), *lines[number:]])
    file.write_text(content)
    with pytest.raises(ValueError, match=f"study.csv cannot be read.*line {number}: ({message}).*delete the line"):
        run_many([*runs, ONE], small, file)
    assert file.read_text() == content != "".join(lines)
    file.write_text("".join([*lines[: number - 1], *lines[number:]]))
    mended = run_many(runs, small, file)
    pd.testing.assert_frame_equal(mended.drop(columns="seconds"), whole.drop(columns="seconds"), rtol=1e-4)
    assert len(file.read_text().splitlines()) == 5


@pytest.mark.parametrize("above", ["", "my study", "my study,,"])
def test_what_stands_above_the_names_of_the_columns_is_named_and_no_row_said_to_be_damaged(
    small, tmp_path, two_runs, above
):
    file, (runs, _, lines) = tmp_path / "study.csv", two_runs
    file.write_text("".join([f"{above}\n", *lines]))
    with pytest.raises(ValueError, match=f"its first line is '{above}', where a study names its columns") as told:
        run_many(runs, small, file)
    assert "delete" not in str(told.value)


def test_a_run_with_gaps_or_twice_in_the_file_is_told_and_done_anew(small, tmp_path, capsys):
    file = tmp_path / "study.csv"
    runs = [FEW | {"norm": "layer", "seed": seed} for seed in range(3)]
    whole = run_many(runs, small, file)
    header, *rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([header, *rows[1:], *rows[2:4]]))  # without the first row, and with the second run twice
    capsys.readouterr()
    mended = run_many(runs[:2], small, file)
    assert "2 of the runs lack epochs, or have them twice" in capsys.readouterr().out
    expected = whole[whole["seed"] < 2].drop(columns="seconds")
    pd.testing.assert_frame_equal(mended.drop(columns="seconds"), expected, rtol=1e-4)
    assert len(pd.read_csv(file)) == 6 and rows[5] in file.read_text()


def test_a_diverged_run_is_whole(small, tmp_path, capsys):
    run = FEW | {"norm": "layer", "momentum": 0.99, "lr": 1e30}
    first = run_many(run, small, tmp_path / "study.csv", keep_diverged=True)
    again = run_many(run, small, tmp_path / "study.csv", keep_diverged=True)
    assert len(first) == 1 and "lack" not in capsys.readouterr().out
    pd.testing.assert_frame_equal(first, again)
