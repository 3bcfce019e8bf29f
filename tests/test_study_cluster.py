"""Studies on a real dask.distributed cluster: two worker processes on this machine."""

import functools
import os

import pandas as pd
import pytest
import torch
from joblib import parallel_config
from test_study import ONE
from test_study_stops import die, die_once

import model
from normkit.data import Data
from normkit.study import grid, run_many
from normkit.synthetic import make_synthetic

dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


@pytest.fixture
def client():
    """A client of two worker processes; a task is given up after two of them have died of it, rather than four."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(host="127.0.0.1", silence_logs="CRITICAL", **options) as cluster,
        distributed.Client(cluster) as client,
        parallel_config(backend="dask"),
    ):
        yield client


class Counted(Data):
    """A data set that leaves a file behind in each process that receives it; name ends with the folder."""

    def __setstate__(self, state):
        self.__dict__.update(state)
        folder = self.name.split()[-1]
        open(os.path.join(folder, f"{os.getpid()} {len(os.listdir(folder))}"), "x").close()


def test_one_of_two_workers_dies_and_no_row_is_lost(client, tmp_path, monkeypatch):
    """Nor is the data sent with each run; and the workers know a norm of the notebook."""
    monkeypatch.setattr(model, "NORMS", model.NORMS)  # given back
    monkeypatch.setitem(model.NORMS, "none", lambda channels, num_groups: torch.nn.Identity())
    received, seen = tmp_path / "received", tmp_path / "seen"
    received.mkdir(), seen.mkdir()
    small = make_synthetic(101, 40)
    data = Counted(**vars(small) | {"name": f"images {received}"})

    def follow(seed, history):
        (seen / f"{os.getpid()} {seed} {len(history)}").touch()
        if seed == 2 and len(history) == 2:
            die_once(tmp_path / "died", history)

    runs = grid(norm=["layer", "none"], seed=range(4), epochs=3, batch_size=50)
    runs = [run | {"on_epoch": functools.partial(follow, run["seed"])} for run in runs]
    rows = run_many(runs, data, tmp_path / "study.csv")
    assert [tuple(row) for row in rows[["norm", "seed", "epoch"]].values] == [
        (norm, seed, epoch) for norm in ("layer", "none") for seed in range(4) for epoch in (1, 2, 3)
    ]
    assert len(pd.read_csv(tmp_path / "study.csv")) == 24
    workers = {path.name.split()[0] for path in seen.iterdir()}
    assert (tmp_path / "died").exists() and str(os.getpid()) not in workers and len(workers) >= 2
    assert 2 <= len(list(received.iterdir())) < len(runs)  # once a worker, and again where the one that held it died


def test_a_run_that_kills_each_worker_is_told_and_costs_no_other(client, tmp_path):
    runs = [ONE | {"seed": seed} for seed in range(6)]
    runs[1]["on_epoch"] = die
    with pytest.raises(RuntimeError) as told:
        run_many(runs, make_synthetic(101, 40), tmp_path / "study.csv")
    first, line = str(told.value).splitlines()
    assert " seed=1 " in line and "KilledWorker" in line
    assert sorted(pd.read_csv(tmp_path / "study.csv")["seed"]) == [0, 2, 3, 4, 5]


def test_a_cluster_of_one_worker_is_not_this_process(client, tmp_path):
    client.cluster.scale(1)
    run_many(
        ONE | {"on_epoch": lambda history: (tmp_path / str(os.getpid())).touch()},
        make_synthetic(101, 40),
        tmp_path / "study.csv",
    )
    assert not (tmp_path / str(os.getpid())).exists()
