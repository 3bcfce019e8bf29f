"""The promises of the README: nothing is lost, and nothing changes by stopping or looking."""

import errno
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import model
import utils

NORMS = list(model.NORMS)
ROOT = Path(__file__).parents[1]


def run(data, checkpoint=None, epochs=4, norm="group", **options):
    options = {"augment": True, "dropout": 0.2, "step_size": 2, "device": "cpu", "progress": False} | options
    return utils.run(norm, data, epochs, checkpoint=checkpoint, **options)


def scramble():
    """What another notebook cell may do to the global generators."""
    random.seed(99), np.random.seed(99), torch.manual_seed(99)


def same(a, b):
    """Equality to the last bit of nested states; how long an epoch took does not count."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(path):
    return utils.read_state(path)


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
    assert same(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert same(whole.model.state_dict(), parts.model.state_dict()) and same(whole.history, parts.history)
    assert len(parts.history) == 4 and same(run(data, **options).history, whole.history)


@pytest.mark.parametrize("norm", NORMS)
def test_the_best_recipe_resumes_as_exactly(data, tmp_path, norm, device, deterministic):
    settings = utils.recipe("best", batch_size=64, dropout=0.3) | {"progress": False, "device": device}

    def stop(history):
        raise KeyboardInterrupt

    whole = utils.run(norm, data, 3, **settings)
    stopped = utils.run(norm, data, 3, checkpoint=tmp_path / "c", on_epoch=stop, **settings)
    assert len(stopped.history) == 1
    scramble()
    parts = utils.run(norm, data, 3, checkpoint=tmp_path / "c", **settings)
    assert same(whole.model.state_dict(), parts.model.state_dict()) and same(whole.history, parts.history)


@pytest.mark.parametrize("forgotten", ["random", "optimizer", "scheduler", "model"])
def test_a_resume_that_forgets_a_part_differs(data, tmp_path, monkeypatch, forgotten):
    whole = run(data)
    run(data, tmp_path / "parts", 1)
    if forgotten == "random":
        monkeypatch.setattr(utils.Checkpoint, "set_random_state", lambda *args: None)
    else:
        restore = utils.Checkpoint.restore
        monkeypatch.setattr(utils.Checkpoint, "restore", lambda self: self.parts.pop(forgotten) and restore(self))
    scramble()
    assert not same(run(data, tmp_path / "parts").history, whole.history)


def test_a_plain_dataloader_with_its_own_generator_resumes_too(data, tmp_path):
    images, labels = (torch.cat(parts) for parts in zip(*utils.get_loaders(data, 64, device="cpu")[0], strict=True))

    def fit(path, epochs):
        torch.manual_seed(0)
        net = model.Net("batch", dropout=0.3)
        loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True, generator=torch.Generator().manual_seed(5))
        optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
        scheduler = OneCycleLR(optimizer, 0.05, total_steps=18)
        options = {"scheduler_step": "batch", "progress": False, "checkpoint": path}
        return utils.fit(net, loader, loader, optimizer, scheduler, epochs, **options)

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "parts", 1)
    assert same(fit(tmp_path / "parts", 3), whole) and same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_finished_run_returns_at_once_and_a_shorter_one_is_refused(data, tmp_path):
    done = run(data, tmp_path / "file", 2)
    again = run(data, tmp_path / "file", 2)
    assert again.history == done.history and same(again.model.state_dict(), done.model.state_dict())
    with pytest.raises(ValueError, match="holds 2 epochs, more than epochs=1"):
        run(data, tmp_path / "file", 1)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import utils
    moment, path = sys.argv[1:]
    die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    calls = iter(range(1000))
    if moment == "batch":  # in the middle of the first epoch that this process starts
        step = utils.check_labels
        utils.check_labels = lambda *args: die() if next(calls) == 9 else step(*args)
    if moment == "write":  # the new file is written, not yet renamed
        utils.os.fsync = die
    if moment == "rename":  # the last file is out of the way, the new one not yet in place
        replace = os.replace
        utils.os.replace = lambda *args: die() if next(calls) % 2 else replace(*args)
    data = utils.make_synthetic(330, 101)
    utils.run("batch", data, 4, device="cpu", augment=True, dropout=0.2, step_size=2, progress=False, checkpoint=path)
"""


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_never_killed(data, tmp_path):
    script = textwrap.dedent(KILLED).format(root=str(ROOT))
    reached = []
    for moment in ("batch", "write", "batch", "rename", "write", "none"):
        done = subprocess.run(
            [sys.executable, "-c", script, moment, tmp_path / "killed"], capture_output=True, text=True
        )
        assert done.returncode == (0 if moment == "none" else -signal.SIGKILL), done.stderr
        files = [path for path in (tmp_path / "killed", tmp_path / "killed.previous") if path.exists()]
        reached.append(max((len(state(path)["history"]) for path in files), default=0))
    assert reached[-1] == 4 and reached == sorted(reached)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "killed.previous"]
    run(data, tmp_path / "whole", norm="batch")
    assert same(state(tmp_path / "killed"), state(tmp_path / "whole"))


# ------------------------------------------------------------------------------- interrupt


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, also where the tests run in the background and inherit that it be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(utils.Loader):
    """Sends this process the signal of Ctrl-C, and of the notebook's stop button, in its second epoch."""

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if self.epoch == 1 and i == 2:
                signal.raise_signal(signal.SIGINT)
            yield batch


def test_an_interrupt_keeps_the_history_and_the_same_call_goes_on(interruptible, data, tmp_path, monkeypatch, capsys):
    whole = run(data)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "Loader", Interrupting)
        stopped = run(data, tmp_path / "file", progress=True)
    assert same(stopped.history, whole.history[:1]) and stopped.history.unfinished == 2
    assert "Interrupted in epoch 2" in capsys.readouterr().out
    assert same(state(tmp_path / "file")["history"], whole.history[:1])
    resumed = run(data, tmp_path / "file")
    assert same(resumed.history, whole.history) and resumed.history.unfinished is None
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_an_interrupt_without_a_checkpoint_returns_too(interruptible, data, monkeypatch):
    monkeypatch.setattr(utils, "Loader", Interrupting)
    history = run(data).history
    assert len(history) == 1 and history.unfinished == 2


# --------------------------------------------------------------------------------- looking


@pytest.mark.parametrize("norm", NORMS)
def test_looking_between_epochs_changes_no_weight(data, norm):
    class Looking(utils.Loader):
        def __iter__(self):
            for batch in super().__iter__():
                if self.look:
                    utils.summarize(self.net)
                    next(iter(utils.get_loaders(data)[0]))
                    logits, _ = utils.predict(self.net, loaders[1])
                    utils.plot_mistakes(data, logits), utils.plot_samples(data, 1)
                yield batch

    weights = []
    for look in (False, True):
        utils.seed_everything(0)
        net = model.Net(norm, dropout=0.3)
        Looking.net, Looking.look = net, look
        loaders = utils.get_loaders(data, 200, device="cpu")
        train_loader = Looking(data.train_images, data.train_labels, 200, True, True, "cpu")
        utils.fit(net, train_loader, loaders[1], torch.optim.SGD(net.parameters(), 0.01), epochs=2, progress=False)
        weights.append(net.state_dict())
    assert same(*weights)


def test_the_order_of_runs_does_not_matter(data):
    one_way = {norm: run(data, norm=norm, epochs=1).history for norm in NORMS}
    other_way = {norm: run(data, norm=norm, epochs=1).history for norm in reversed(NORMS)}
    assert same(one_way, other_way)


# ----------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def two_epochs(data, tmp_path_factory):
    """A checkpoint's file of two epochs and, beside it, that of one, as bytes."""
    path = tmp_path_factory.mktemp("checkpoint") / "file"
    run(data, path, 2)
    return path.read_bytes(), path.with_name("file.previous").read_bytes()


@pytest.fixture
def file(two_epochs, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(two_epochs[0])
    path.with_name("file.previous").write_bytes(two_epochs[1])
    return path


def test_the_one_before_is_kept(file):
    assert len(state(file)["history"]) == 2 and len(state(file.with_name("file.previous"))["history"]) == 1
    assert sorted(path.name for path in file.parent.iterdir()) == ["file", "file.previous"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 999])
def test_a_damaged_file_gives_way_to_the_one_before(data, file, damage, capsys):
    file.write_bytes(damage(file.read_bytes()))
    assert same(run(data, file).history, run(data).history)
    assert "damaged: going back" in capsys.readouterr().out
    assert [len(state(path)["history"]) for path in (file, file.with_name("file.previous"))] == [4, 3]


def test_no_flipped_bit_goes_unnoticed(file):
    content, good, rng = file.read_bytes(), state(file), random.Random(0)
    noticed = 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        read = state(file)
        assert read is None or same(read, good)
        noticed += read is None
    assert noticed > 75  # the others hit padding


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
        ({"data": utils.make_synthetic(330, 101, seed=1)}, "CRC-32", "CRC-32"),
    ],
)
def test_another_runs_checkpoint_is_refused_with_both_values(data, file, two_epochs, option, saved, own):
    with pytest.raises(ValueError, match=f"of another run.*{saved}.*this one's.*{own}"):
        run(**({"data": data, "checkpoint": file} | option))
    assert file.read_bytes() == two_epochs[0]


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


def test_a_full_disk_costs_the_checkpoint_not_the_run(data, file, two_epochs, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    assert same(run(data, file).history, run(data).history)
    assert "NO CHECKPOINT of epoch 3" in capsys.readouterr().out
    assert file.read_bytes() == two_epochs[0]
    assert sorted(path.name for path in file.parent.iterdir()) == ["file", "file.previous"]


@pytest.mark.slow
def test_a_real_limit_on_file_size(tmp_path):
    script = f"""
import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import utils
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
result = utils.run("layer", utils.make_synthetic(70, 10), 2, progress=False, checkpoint=sys.argv[1])
print(len(result.history), "epochs")
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "file"], capture_output=True, text=True)
    assert done.stdout.count("NO CHECKPOINT") == 2 and "2 epochs" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_not_finite_names_the_place_and_keeps_the_weights(data):
    class Poisoned(utils.Loader):
        def __iter__(self):
            for i, (images, labels) in enumerate(super().__iter__()):
                if self.epoch == 1 and i >= 3:
                    with torch.no_grad():
                        self.net.C4.conv.weight[0, 0, 0, 0] = self.value
                yield images, labels

    for value in (float("nan"), float("inf")):
        Poisoned.value = value
        utils.seed_everything(0)
        Poisoned.net = net = model.Net("group")
        train_loader = Poisoned(data.train_images, data.train_labels, 64, True, False, "cpu")
        test_loader = utils.get_loaders(data, device="cpu")[1]
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        with pytest.raises(FloatingPointError, match=r"epoch 2.*batch 3 on.*rate 0.01;.*module C4.conv.*epoch 1 left"):
            utils.fit(net, train_loader, test_loader, optimizer, epochs=3, progress=False)
        plain = {"dropout": 0.01, "augment": False, "momentum": 0, "memory_format": "contiguous", "fused": False}
        assert same(net.state_dict(), run(data, epochs=1, **plain).model.state_dict())


def test_a_test_loss_that_is_not_finite_is_no_figure(data):
    images, labels = torch.full((3, 3, 32, 32), float("nan")), torch.zeros(3, dtype=torch.int64)
    net = model.Net("layer")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    loaders = utils.get_loaders(data, 64, device="cpu")[0], DataLoader(TensorDataset(images, labels), 3)
    with pytest.raises(FloatingPointError, match="epoch 1: the test loss"):
        utils.fit(net, *loaders, torch.optim.SGD(net.parameters(), 0.01), epochs=2, progress=False)
    assert same(net.state_dict(), before)


def test_images_that_are_not_finite_are_named(data):
    images, labels = (torch.cat(parts) for parts in zip(*utils.get_loaders(data, 64, device="cpu")[0], strict=True))
    images[100, 0, 0, 0] = float("nan")
    net = model.Net("layer")
    with pytest.raises(FloatingPointError, match="batch 1 on.*images themselves"):
        utils.train(
            net, DataLoader(TensorDataset(images, labels), 64), torch.optim.SGD(net.parameters(), 0.01), progress=False
        )


# ------------------------------------------------------------------------ memory and device


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_names_the_batch_size_to_try(data, error):
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            raise error

    net, loader = Greedy(), utils.get_loaders(data, 64, device="cpu")[0]
    for call in (
        lambda: utils.train(net, loader, torch.optim.SGD(net.parameters(), 1), progress=False),
        lambda: utils.test(net, loader),
    ):
        with pytest.raises(MemoryError, match="batch size 64: try 32"):
            call()


@pytest.mark.parametrize("norm", NORMS)
def test_the_self_check_passes_right_norms(data, norm, device):
    net = model.Net(norm).to(device)
    before = torch.get_rng_state()
    utils.check_norms(net, (64, 10))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrong", ["forward", "gradient"])
def test_the_self_check_stops_at_a_wrong_norm(data, norm, wrong, monkeypatch):
    kind = type(model.NORMS[norm](16, 4))
    right, calls = kind.forward, iter(range(10**6))

    def forward(self, x):
        y = right(self, x)
        if next(calls) % 2:  # the second of each pair
            return y
        return y + 0.01 * y.mean() + 0.01 if wrong == "forward" else y + (x - x.detach()) * 0.05

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(RuntimeError, match="cpu computes .*Norm.* wrong at batch size 10.*device='cpu'"):
        run(data, norm=norm, self_check=True)
