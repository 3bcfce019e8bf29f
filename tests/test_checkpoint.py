"""The promises of the README: nothing is lost by stopping, and no file is taken for what it is not."""

import errno
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import NORMS, everything, run, same, scramble, stand_in
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import model
import utils
from normkit import files
from normkit.checkpoint import Checkpoint, settings_in
from normkit.files import read_state
from normkit.identity import seed_in

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def never_stopped(data):
    """The history of a run of four epochs."""
    return run(data).history


@pytest.fixture(scope="module")
def two_epochs(data, tmp_path_factory):
    """A checkpoint's file of two epochs and, beside it, that of one, as bytes."""
    path = tmp_path_factory.mktemp("checkpoint") / "file"
    run(data, path, 2)
    return path.read_bytes(), path.with_name("file.previous").read_bytes()


# ---------------------------------------------------------------------------- exact resume


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("norm", NORMS)
def test_a_resumed_run_equals_one_never_stopped(data, tmp_path, norm, device, deterministic):
    options = {"norm": norm, "device": device}
    whole = run(data, tmp_path / "whole", **options)
    for epochs in (1, 3):
        scramble()
        run(data, tmp_path / "parts", epochs, **options)
    scramble()
    parts = run(data, tmp_path / "parts", **options)
    assert same(read_state(tmp_path / "whole"), read_state(tmp_path / "parts"))
    assert same(whole.model.state_dict(), parts.model.state_dict()) and same(whole.history, parts.history)
    assert len(parts.history) == 4 and same(run(data, **options).history, whole.history)


PLAIN = {"backend": "eager", "memory_format": "contiguous"}
WAYS = {  # of computing one run: where it stopped, and where it goes on
    "from channels_last": (PLAIN | {"memory_format": "channels_last"}, PLAIN),
    "to channels_last": (PLAIN, PLAIN | {"memory_format": "channels_last"}),
    "where the kernel cannot be built": ({}, {"backend": "eager"}),
    "where the kernel can be built": ({"backend": "eager"}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_computed_in_another_way_differs_in_rounding_alone(data, tmp_path, way):
    """Fused SGD takes the momenta as they lie in memory, and so not as they were left."""
    first, then = WAYS[way]
    options = {"batch_size": 198, "precision": "float32", "lr": 0.1}
    whole = run(data, epochs=2, **options, **first).model
    run(data, tmp_path / "parts", 1, **options, **first)
    parts = run(data, tmp_path / "parts", 2, **options, **then).model
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_the_best_recipe_resumes_as_exactly(data, tmp_path, norm, device, deterministic):
    settings = {"recipe": "best", "batch_size": 64, "dropout": 0.3, "progress": False, "device": device}

    def stop(history):
        raise KeyboardInterrupt

    whole = utils.run(norm, data, 3, **settings)
    stopped = utils.run(norm, data, 3, checkpoint=tmp_path / "c", on_epoch=stop, **settings)
    assert len(stopped.history) == 1
    scramble()
    parts = utils.run(norm, data, 3, checkpoint=tmp_path / "c", **settings)
    assert same(whole.model.state_dict(), parts.model.state_dict()) and same(whole.history, parts.history)


@pytest.mark.parametrize("forgotten", ["random", "optimizer", "scheduler", "model"])
def test_a_resume_that_forgets_a_part_differs(data, tmp_path, monkeypatch, never_stopped, two_epochs, forgotten):
    (tmp_path / "parts").write_bytes(two_epochs[1])
    restore = Checkpoint.restore
    monkeypatch.setattr(Checkpoint, "restore", lambda self, *args: self.parts.pop(forgotten) and restore(self, *args))
    scramble()
    assert not same(run(data, tmp_path / "parts").history, never_stopped)


def test_a_plain_dataloader_with_its_own_generator_resumes_too(data, tmp_path):
    images, labels = everything(utils.get_loaders(data, 64, device="cpu")[0])

    def fit(path, epochs):
        torch.manual_seed(0)
        net = model.Net("batch", dropout=0.3)
        loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True, generator=torch.Generator().manual_seed(5))
        optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
        scheduler = OneCycleLR(optimizer, 0.05, total_steps=12)
        options = {"scheduler_step": "batch", "progress": False, "checkpoint": path}
        return utils.fit(net, loader, loader, optimizer, scheduler, epochs, **options)

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "parts", 1)
    assert same(fit(tmp_path / "parts", 3), whole)
    assert same(read_state(tmp_path / "parts"), read_state(tmp_path / "whole"))


def test_a_finished_run_returns_at_once_and_a_shorter_one_is_refused(data, tmp_path):
    done = run(data, tmp_path / "file", 2)
    again = run(data, tmp_path / "file", 2)
    assert again.history == done.history and same(again.model.state_dict(), done.model.state_dict())
    with pytest.raises(ValueError, match="holds 2 epochs, more than epochs=1"):
        run(data, tmp_path / "file", 1)


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    import torch._dynamo  # as the first step of an optimizer does: once for all
    from helpers import run, stand_in
    from normkit import checks, files
    path, *moments = sys.argv[1:]
    data = stand_in(198, 101)

    def train_until(moment):
        die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        calls = iter(range(1000))
        if moment == "batch":  # in the middle of the second epoch that this process trains
            step = checks.check_batch
            checks.check_batch = lambda batch: die() if next(calls) == 8 else step(batch)
        if moment == "write":  # the new file is written, not yet renamed
            files.os.fsync = die
        if moment == "rename":  # the last file is out of the way, the new one not yet in place
            replace = os.replace
            files.os.replace = lambda *args: die() if next(calls) % 2 else replace(*args)
        run(data, path, norm="batch")

    for moment in moments:
        if (child := os.fork()) == 0:
            train_until(moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        done = [len(files.read_state(each)["history"]) for each in (path, path + ".previous") if os.path.exists(each)]
        print("ended", os.waitstatus_to_exitcode(status), max(done, default=0))
"""


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_never_killed(data, tmp_path):
    script = textwrap.dedent(KILLED).format(root=str(ROOT))
    moments = ["batch", "write", "batch", "rename", "write"]
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "killed", *moments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends, reached = zip(*re.findall(r"ended (\S+) (\d+)", done.stdout))
    assert set(ends) == {str(-signal.SIGKILL)} and reached == tuple("11222"), done.stderr
    run(data, tmp_path / "killed", norm="batch")  # in this process, which hashes names in another way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "killed.previous"]
    run(data, tmp_path / "whole", norm="batch")
    assert same(read_state(tmp_path / "killed"), read_state(tmp_path / "whole"))


# ----------------------------------------------------------------------------- the file


@pytest.fixture
def file(two_epochs, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(two_epochs[0])
    path.with_name("file.previous").write_bytes(two_epochs[1])
    return path


def test_the_one_before_is_kept(file):
    assert len(read_state(file)["history"]) == 2 and len(read_state(file.with_name("file.previous"))["history"]) == 1
    assert sorted(path.name for path in file.parent.iterdir()) == ["file", "file.previous"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 999])
def test_a_damaged_file_gives_way_to_the_one_before(data, file, damage, never_stopped, capsys):
    file.write_bytes(damage(file.read_bytes()))
    assert same(run(data, file).history, never_stopped)
    assert "damaged: going back" in capsys.readouterr().out
    assert [len(read_state(path)["history"]) for path in (file, file.with_name("file.previous"))] == [4, 3]


def test_the_seed_of_a_run_is_read_from_the_file_before_a_damaged_one(file):
    file.write_bytes(b"damaged")
    assert seed_in(settings_in(file)) == 0


def test_no_flipped_bit_goes_unnoticed(file):
    content, good, rng = file.read_bytes(), read_state(file), random.Random(0)
    noticed = 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        read = read_state(file)
        assert read is None or same(read, good)
        noticed += read is None
    assert noticed > 75  # the others hit padding


@pytest.mark.parametrize(
    "numbers", [range(200), [2**200, -(2**70)] * 99, [True, 0] * 99, ["\ud800", "é", 1] * 99, [0.1] * 200]
)
@pytest.mark.parametrize("kind", [list, tuple, lambda each: {str(i): str(value) for i, value in enumerate(each)}])
def test_what_is_long_is_read_as_it_was_written(tmp_path, numbers, kind):
    """In the file it may be one text."""
    state = {"long": kind(numbers), "in a tuple": (1, kind(numbers), None), "short": kind(numbers[:3])}
    files.write_state(tmp_path / "state", state)
    assert repr(files.read_state(tmp_path / "state")) == repr(state)


def test_a_file_that_goes_missing_is_written_again_after_the_next_epoch(data, tmp_path):
    file, seen = tmp_path / "folder" / "file", []

    def lose(history):
        seen.append(sorted(path.name for path in file.parent.iterdir()))
        if len(history) == 2:
            file.unlink()
        if len(history) == 3:
            shutil.rmtree(file.parent)

    whole = run(data, file, on_epoch=lose)
    both = ["file", "file.previous"]  # the one before the first epoch's is that of the start
    assert seen == [both, both, both, both[:1]]
    assert len(read_state(file)["history"]) == 4 and same(run(data, file).history, whole.history)


def test_a_damaged_file_never_becomes_the_one_before(data, file):
    def damage(history):
        if len(history) == 3:
            file.write_bytes(b"ruined")

    run(data, file, on_epoch=damage)
    assert len(read_state(file)["history"]) == 4
    assert len(read_state(file.with_name("file.previous"))["history"]) == 2


def test_both_damaged_is_an_error_and_deletes_nothing(data, file):
    for path in (file, file.with_name("file.previous")):
        path.write_bytes(b"ruined")
    with pytest.raises(ValueError, match="delete to start"):
        run(data, file)
    assert file.read_bytes() == b"ruined"


@pytest.mark.parametrize(
    ("option", "saved", "own"),
    [
        ({"norm": "layer"}, "norm=group", "norm=layer"),
        ({"num_groups": 8}, r"GroupNorm\(4, 16", r"GroupNorm\(8, 16"),
        ({"skip": False}, "skip=True", "skip=False"),
        ({"dropout": 0.3}, "p=0.2", "p=0.3"),
        ({"seed": 1}, "seed=0", "seed=1"),
        ({"batch_size": 32}, "batch_size=64", "batch_size=32"),
        ({"augment": False}, "augment=True", "augment=False"),
        ({"lr": 0.02}, "0.01", "0.02"),
        ({"momentum": 0.5}, "momentum: 0.9", "momentum: 0.5"),
        ({"step_size": 3}, "step_size: 2", "step_size: 3"),
        ({"gamma": 0.5}, "gamma: 0.1", "gamma: 0.5"),
        ({"data": stand_in(198, 101, seed=1)}, "CRC-32", "CRC-32"),
    ],
)
def test_another_runs_checkpoint_is_refused_with_both_values(data, file, two_epochs, option, saved, own):
    with pytest.raises(ValueError, match=f"of another run.*{saved}.*this one's.*{own}"):
        run(**({"data": data, "checkpoint": file} | option))
    assert file.read_bytes() == two_epochs[0]


def test_what_on_epoch_sets_right_again_is_not_told(tmp_path):
    now = {"rate": "1"}
    checkpoint = Checkpoint(tmp_path / "file", {}, lambda: dict(now))
    checkpoint.save([{}])
    history, _ = checkpoint.restore(1)
    now["rate"] = "2"
    assert checkpoint.call_again(history, None) == ["rate was '1' and is '2'"]
    assert checkpoint.call_again(history, lambda history: now.update(rate="1")) == []


def test_a_setting_that_the_file_alone_has_makes_another_run(tmp_path):
    Checkpoint(tmp_path / "file", {}, lambda: {"one": "1", "other": "2"}).save([])
    with pytest.raises(ValueError, match="is of another run: its other has '2', this one's 'None'"):
        Checkpoint(tmp_path / "file", {}, lambda: {"one": "1"}).restore(1)


@pytest.mark.parametrize("change", [{"version": 1}, {"version": 2}, None])
def test_a_file_of_another_version_is_refused_by_name(data, tmp_path, file, change):
    contents = read_state(file)
    files.write_state(file, [1, 2, 3] if change is None else contents | change)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=f"{file} is no checkpoint of this version of the kit"):
        run(data, file)
    assert file.read_bytes() == content


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("dump", [lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_hostile_pickle_does_nothing(data, tmp_path, dump):
    dump({"history": Trap(tmp_path / "sprung")}, tmp_path / "file")
    with pytest.raises(ValueError, match="tensors and plain values|damaged"):
        run(data, tmp_path / "file")
    assert not (tmp_path / "sprung").exists()
    try:
        torch.load(tmp_path / "file", weights_only=False)
    except Exception:
        pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap does work


def test_a_place_that_cannot_be_written_is_an_error_before_training(data, tmp_path, capsys):
    (tmp_path / "occupied").write_text("")
    with pytest.raises(OSError, match="no checkpoints can be written"):
        run(data, tmp_path / "occupied" / "file", progress=True)
    with pytest.raises(IsADirectoryError, match="name a file"):
        run(data, tmp_path)
    assert "Epoch" not in capsys.readouterr().out


def test_a_checkpoint_stays_where_its_name_led_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(Path("disk", "file"))
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint("link", {}, dict)
    monkeypatch.chdir("disk")
    checkpoint.save([])
    assert (tmp_path / "link").is_symlink() and read_state(tmp_path / "disk" / "file")["history"] == []
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_full_disk_costs_the_checkpoint_not_the_run(data, file, two_epochs, never_stopped, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert same(run(data, file).history, never_stopped)
    assert "NO CHECKPOINT of epoch 3" in capsys.readouterr().out
    assert file.read_bytes() == two_epochs[0]
    assert sorted(path.name for path in file.parent.iterdir()) == ["file", "file.previous"]


def test_a_file_that_may_not_be_read_is_not_called_damaged(file, monkeypatch):
    def forbidden(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.zipfile, "ZipFile", forbidden)
    with pytest.raises(PermissionError):
        read_state(file)


@pytest.mark.slow
def test_a_real_limit_on_file_size(tmp_path):
    script = f"""
import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import utils
from normkit.synthetic import make_synthetic
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
result = utils.run("layer", make_synthetic(70, 10), 2, progress=False, checkpoint=sys.argv[1])
print(len(result.history), "epochs")
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "file"], capture_output=True, text=True)
    missed = re.findall(r"NO CHECKPOINT of epoch (\d)", done.stdout)
    assert missed == ["0", "1", "2"] and "2 epochs" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_after_the_test_leaves_all_as_the_last_whole_epoch_did(data):
    """The epoch whose scheduler was interrupted is no row, so the model is not to have it either."""

    class Interrupted(StepLR):
        def step(self, *args):
            if self.last_epoch == 1:
                raise KeyboardInterrupt
            super().step(*args)

    def fit_with(schedule, epochs):
        utils.seed_everything(0)
        net = model.Net("batch")
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        loaders = utils.get_loaders(data, 198, device="cpu")
        return utils.fit(net, *loaders, optimizer, schedule(optimizer, 1), epochs, progress=False), net.state_dict()

    history, state = fit_with(Interrupted, 3)
    assert len(history) == 1 and history.unfinished == 2
    assert same(state, fit_with(StepLR, 1)[1])
