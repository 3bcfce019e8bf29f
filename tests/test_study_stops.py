"""Studies that are cut short: by a full disk, a run that cannot be sent, a process that dies.

Each ends the processes that compute it: these tests come after all others of studies, which share theirs.
"""

import functools
import os
import threading
from pathlib import Path

import pandas as pd
import pytest
from test_study import FEW, ONE, names

from normkit.study import describe_error, run_many


def test_the_stop_button_in_the_last_epochs_callback_stops_the_study_and_the_note_is_made_later(small, tmp_path):
    calls = []

    def note(history):
        calls.append(len(history))
        if len(calls) == 2:
            raise KeyboardInterrupt
        history[-1]["note"] = len(history)

    runs = [FEW | {"norm": "layer", "seed": seed, "on_epoch": note} for seed in range(2)]
    with pytest.raises(KeyboardInterrupt):
        run_many(runs, small, tmp_path / "study.csv")
    rows = run_many(runs, small, tmp_path / "study.csv")
    assert calls == [1, 2, 2, 1, 2] and rows["note"].tolist() == [1, 2, 1, 2]


def test_a_temporary_folder_that_joblib_cannot_name_is_told_with_the_next_step():
    """As that of a user called Jürgen on Windows; Pythons of late can name it."""
    with pytest.raises(UnicodeEncodeError) as failed:
        "REGISTER:C:\\Users\\Jürgen\\joblib_memmapping_folder_1:folder".encode("ascii")
    assert "Set JOBLIB_TEMP_FOLDER to" in describe_error(failed.value)
    with pytest.raises(UnicodeEncodeError) as failed:
        "Jürgen".encode("ascii")
    assert "JOBLIB" not in describe_error(failed.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_the_study_and_what_is_finished_is_kept(small, tmp_path, processes):
    file = tmp_path / "study.csv"
    runs = [ONE | {"seed": seed} for seed in range(3)]
    run_many(runs[:1], small, file)
    content = file.read_text()
    (tmp_path / "study.csv.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match="study.csv cannot be written: .*No space.*holds the runs finished before"):
        run_many(runs, small, file, processes)
    assert file.read_text() == content
    rows = run_many(runs, small, file)
    assert rows["seed"].tolist() == [0, 1, 2] and names(tmp_path) == ["study.csv"]


def test_a_run_that_cannot_be_sent_is_told_with_the_next_step(small, tmp_path):
    run = ONE | {"seed": 1, "on_epoch": functools.partial(print, threading.Lock())}
    with pytest.raises(RuntimeError, match="seed=1 .*ickl.*thread.lock' object. Ask for processes=1"):
        run_many(run, small, tmp_path / "study.csv", processes=2)


def die(*_):
    os._exit(9)


def die_once(marker, _):
    """Kills the process that comes first."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    die()


@pytest.mark.slow
def test_a_worker_that_dies_costs_no_run_and_a_run_that_kills_each_worker_is_told(small, tmp_path, capsys):
    runs = [FEW | {"norm": "layer", "seed": seed} for seed in range(3)]
    runs[0]["on_epoch"] = functools.partial(die_once, tmp_path / "died")
    runs[2]["on_epoch"] = die
    with pytest.raises(RuntimeError) as told:
        run_many(runs, small, tmp_path / "study.csv", processes=2)
    first, line = str(told.value).splitlines()
    assert " seed=2 " in line and "TerminatedWorkerError" in line and (tmp_path / "died").exists()
    rows = pd.read_csv(tmp_path / "study.csv")
    assert sorted(zip(rows["seed"], rows["epoch"])) == [(seed, epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert "3/3" in capsys.readouterr().out
