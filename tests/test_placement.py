"""Where a network trains on a Mac. No MPS is there: get_device is told that it is, and its speed is made up."""

import pytest
import torch
from helpers import AUTO_LINE, run

import model
from normkit import placement
from normkit.fused import build
from normkit.placement import choose_device, time_step
from normkit.study import run_many

pytestmark = pytest.mark.skipif(build.library().reason is not None, reason=f"no kernel: {build.library().reason}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has measured nothing yet."""
    monkeypatch.setattr(build.platformdirs, "user_cache_dir", lambda *args, **how: str(tmp_path / "cache"))
    placement.step_times.cache_clear()
    yield tmp_path / "cache"
    placement.step_times.cache_clear()


@pytest.fixture
def mps(monkeypatch):
    """A Mac, as get_device sees it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: None)


@pytest.fixture
def speed(monkeypatch):
    """Milliseconds a step by device; timed: the devices that were asked."""
    speed = {"cpu": 8.0, "mps": 12.5, "timed": []}

    def time_step(build_model, device):
        assert build_model is model.Net
        speed["timed"].append(device.type)
        return speed[device.type]

    monkeypatch.setattr(placement, "time_step", time_step)
    return speed


@pytest.mark.parametrize("milliseconds, faster", [(12.5, "cpu"), (5, "mps")])
def test_the_faster_of_mps_and_the_kernel_is_chosen(mps, speed, milliseconds, faster):
    speed["mps"] = milliseconds
    device, line = choose_device(None, model.Net("group"))
    assert device == torch.device(faster) and line.startswith(f"{faster} (")
    assert f"a step takes 8.0 ms on cpu, {milliseconds:.1f} ms on mps" in line


def test_it_is_measured_once_a_machine(mps, speed, cache):
    first = [choose_device(None, model.Net(norm)) for norm in model.NORMS]
    assert speed["timed"] == ["cpu", "mps"] and first == first[:1] * 3
    placement.step_times.cache_clear()  # as in another process, on a day when the CPU is slow
    speed["cpu"] = 20.0
    assert choose_device(None, model.Net()) == first[0] and speed["timed"] == ["cpu", "mps"]
    placement.step_times.cache_clear()
    next(cache.iterdir()).write_text("{")  # damaged
    assert choose_device(None, model.Net())[0].type == "mps" and len(speed["timed"]) == 4


def test_without_a_cache_it_is_measured_once_a_process(mps, speed, cache):
    cache.write_text("")  # a file in the folder's place
    lines = [choose_device(None, model.Net())[1] for _ in range(2)]
    assert speed["timed"] == ["cpu", "mps"] and lines[0] == lines[1]


def test_nothing_is_measured_where_there_is_nothing_to_choose(mps, speed, monkeypatch):
    own = torch.nn.Linear(2, 2)
    assert choose_device("mps", model.Net()) == (torch.device("mps"), "mps")
    assert choose_device("cpu", model.Net())[0].type == "cpu"
    for net, backend in ((own, "auto"), (model.Net(), "eager"), (model.Net(), "compile")):  # none has the kernel
        assert choose_device(None, net, backend) == (torch.device("mps"), "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    threads = torch.get_num_threads()
    assert choose_device(None, model.Net()) == (torch.device("cpu"), f"cpu ({threads} threads)")
    assert not speed["timed"]


def test_where_mps_fails_the_cpu_is_chosen_and_the_line_says_so(mps):
    """As it really does here."""
    device, line = choose_device(None, model.Net())
    assert device.type == "cpu" and "; mps fails: " in line


def test_a_run_and_a_study_go_where_it_is_faster(mps, speed, data, tmp_path, capsys):
    result = run(data, epochs=1, device=None, progress=True)
    said = capsys.readouterr().out
    assert ": cpu (" in said and "; a step takes 8.0 ms on cpu, 12.5 ms on mps), " in said
    assert f"Backend: {AUTO_LINE}" in said and next(result.model.parameters()).device.type == "cpu"
    rows = run_many({"norm": "group", "epochs": 1}, data, tmp_path / "study.csv")
    assert rows["where"].str.startswith("cpu, ").all() and speed["timed"] == ["cpu", "mps"]


def test_a_step_is_timed_and_leaves_the_generators_as_they_were():
    before = torch.get_rng_state()
    assert time_step(model.Net, torch.device("cpu"), steps=1, seconds=0.01) > 0
    assert torch.equal(before, torch.get_rng_state())
