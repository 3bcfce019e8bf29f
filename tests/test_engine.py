"""Tasks in other processes. These import no PyTorch, so that they start at once."""

import os

import numpy as np
import pytest
from joblib import parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend import queues

from normkit.engine import compute


@pytest.fixture(scope="module", autouse=True)
def own_processes():
    """Ends them, or PyTorch, which studies import in theirs, would pass for a leak of memory: each would start anew."""
    yield
    get_reusable_executor().shutdown(kill_workers=True)


def test_a_task_whose_process_dies_is_tried_again_and_one_that_kills_each_costs_no_other(tmp_path):
    def task(data, number, dies):  # within the test, so that it is sent with its code
        marker = tmp_path / str(number)
        if dies == "always" or (dies == "once" and not marker.exists()):
            marker.touch()
            os._exit(9)
        return int(data[number]), os.getpid()

    data = np.arange(8) ** 2
    dies = ["once", "never", "always", "never", "once", "always"]
    computed = list(compute(task, {f"task {i}": (i, dies[i]) for i in range(6)}, data, processes=2))
    errors = {key: type(error).__name__ for key, _, error in computed if error is not None}
    assert errors == dict.fromkeys(["task 2", "task 5"], "TerminatedWorkerError"), computed
    done = {key: result for key, result, error in computed if error is None}
    assert {key: value for key, (value, _) in done.items()} == {f"task {i}": i**2 for i in (0, 1, 3, 4)}
    assert os.getpid() not in {process for _, process in done.values()}


def test_a_task_that_cannot_be_sent_costs_no_other():
    def task(data, number, _):
        return data * number

    tasks = {"first": (1, None), "second": (2, (each for each in ())), "third": (3, None)}
    computed = {key: result if error is None else error for key, result, error in compute(task, tasks, 10, processes=2)}
    assert "ickle" in str(computed.pop("second")) and computed == {"first": 10, "third": 30}


@pytest.mark.parametrize("mapped", [True, False])
def test_the_data_is_not_sent_with_each_task(monkeypatch, mapped):
    data, sizes = np.arange(2_000_000, dtype=np.uint8), []

    def measure(*args, **options):
        sizes.append(len(content := dumps(*args, **options)))
        return content

    dumps = queues.dumps
    monkeypatch.setattr(queues, "dumps", measure)
    with parallel_config("loky", n_jobs=2, **({} if mapped else {"max_nbytes": None})):
        computed = list(compute(lambda data, number: int(data[-number]), {i: (i,) for i in range(1, 5)}, data))
    assert sorted(computed) == [(i, int(data[-i]), None) for i in range(1, 5)] and len(sizes) >= 4
    assert (max(sizes) < 50_000) == mapped


@pytest.mark.parametrize("processes", [1, 2])
def test_whoever_stops_early_may_ask_again(processes):
    tasks = {number: (number,) for number in range(4)}
    results = compute(lambda data, number: data + number, tasks, 10, processes)
    key, result, error = next(results)
    assert (result, error) == (10 + key, None)
    results.close()
    again = {key: result for key, result, _ in compute(lambda data, number: data + number, tasks, 10, processes)}
    assert again == {0: 10, 1: 11, 2: 12, 3: 13}
