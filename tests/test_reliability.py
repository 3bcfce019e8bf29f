"""The promises of the README: nothing changes by looking, and what goes wrong is said."""

import math
import signal
import sys
import threading

import pytest
import torch
from helpers import NORMS, everything, run, same, write_image_folder
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import model
import utils
from normkit import anatomy, plots
from normkit.checks import first_non_finite, unsound_loss
from normkit.files import read_state
from normkit.meter import Meter
from normkit.randomness import check_seed, seed_everything
from normkit.study import grid, run_many

# ------------------------------------------------------------------------------- interrupt


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, also where the tests run in the background and inherit that it be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(loader, iterate=utils.Loader.__iter__):
    """Sends this process the signal of Ctrl-C, and of the notebook's stop button, in the loader's second epoch."""
    for i, batch in enumerate(iterate(loader)):
        if loader.epoch == 1 and i == 2:
            signal.raise_signal(signal.SIGINT)
        yield batch


def test_an_interrupt_keeps_the_history_and_the_same_call_goes_on(interruptible, data, tmp_path, monkeypatch, capsys):
    whole = run(data)
    with monkeypatch.context() as patch:
        patch.setattr(utils.Loader, "__iter__", interrupting)
        stopped = run(data, tmp_path / "file", progress=True)
    assert same(stopped.history, whole.history[:1]) and stopped.history.unfinished == 2
    assert "Interrupted in epoch 2" in capsys.readouterr().out
    assert same(read_state(tmp_path / "file")["history"], whole.history[:1])
    resumed = run(data, tmp_path / "file")
    assert same(resumed.history, whole.history) and resumed.history.unfinished is None
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_an_interrupt_without_a_checkpoint_returns_too(interruptible, data, monkeypatch):
    monkeypatch.setattr(utils.Loader, "__iter__", interrupting)
    history = run(data).history
    assert len(history) == 1 and history.unfinished == 2


# --------------------------------------------------------------------------------- looking


@pytest.mark.parametrize("norm", NORMS)
def test_looking_between_epochs_changes_no_weight(data, norm):
    class Looking(utils.Loader):
        def __iter__(self):
            for batch in super().__iter__():
                if self.look:
                    anatomy.summarize(self.net)
                    next(iter(utils.get_loaders(data)[0]))
                    logits, _ = utils.predict(self.net, loaders[1])
                    plots.plot_mistakes(data, logits), plots.plot_samples(data, 1)
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


def test_runs_in_threads_are_those_of_their_seeds(data):
    def run(seed):
        done[seed] = utils.run("group", data, 1 + seed, 50, seed, "cpu", dropout=0.3, progress=False).history[-1][
            "test_loss"
        ]

    done = {}
    threads = [threading.Thread(target=run, args=[seed]) for seed in (0, 1)]
    before = torch.get_rng_state()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(done)
    assert torch.equal(torch.get_rng_state(), before)
    for seed in (0, 1):
        run(seed)
    assert done == together


class Merging(nn.Linear):
    """Adds its second factor to the weight in evaluation, and takes it out in training, as low-rank adapters do."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.added, self.merged = nn.Parameter(torch.ones(outputs, 1)), False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight += self.added * (-1 if mode else 1)  # an error unless gradients are off
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) if self.merged else super().forward(x) + x @ self.added.expand_as(self.weight).T


def test_evaluation_ends_with_what_train_of_a_module_does(data):
    _, loader = utils.get_loaders(data, 64, device="cpu")
    net = nn.Sequential(nn.Flatten(), Merging(3 * 16 * 16, 10), nn.BatchNorm1d(10).eval())
    before = net[1].weight.clone()
    utils.test(net, loader)
    assert net[1].training and not net[1].merged and not net[2].training
    assert torch.allclose(net[1].weight, before, atol=1e-6)


def test_the_order_of_runs_does_not_matter(data):
    one_way = {norm: run(data, norm=norm, epochs=1).history for norm in NORMS}
    other_way = {norm: run(data, norm=norm, epochs=1).history for norm in reversed(NORMS)}
    assert same(one_way, other_way)


# -------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_loss_that_is_not_finite_names_the_place_and_keeps_the_weights(data, backend):
    class Poisoned(utils.Loader):
        def __iter__(self):
            for i, (images, labels) in enumerate(super().__iter__()):
                if self.epoch == 1 and i >= 2:
                    with torch.no_grad():
                        self.net.C4.conv.weight[0, 0, 0, 0] = self.value
                yield images, labels

    for value in (float("nan"), float("inf")):
        Poisoned.value = value
        utils.seed_everything(0)
        Poisoned.net = net = model.Net("group")
        train_loader = Poisoned(data.train_images, data.train_labels, 64, True, False, "cpu")
        test_loader = utils.get_loaders(data, device="cpu")[1]
        optimizer = torch.optim.SGD(net.parameters(), 0.01, fused=True)
        how = {"backend": backend, "progress": False}
        with pytest.raises(FloatingPointError, match=r"epoch 2.*batch 2 on.*rate 0.01;.*module C4.conv.*epoch 1 left"):
            utils.fit(net, train_loader, test_loader, optimizer, epochs=3, **how)
        plain = {"dropout": 0.01, "augment": False, "momentum": 0, "memory_format": "contiguous", "backend": backend}
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
    images, labels = everything(utils.get_loaders(data, 64, device="cpu")[0])
    images[100, 0, 0, 0] = float("nan")
    net = model.Net("layer")
    with pytest.raises(FloatingPointError, match="batch 1 on.*images themselves"):
        utils.train(
            net, DataLoader(TensorDataset(images, labels), 64), torch.optim.SGD(net.parameters(), 0.01), progress=False
        )


# ---------------------------------------------------------------------------------- memory


def test_of_a_network_that_fails_with_such_weights_the_place_is_told_as_far_as_it_can_be():
    class Failing(nn.Module):
        def forward(self, x):
            raise ArithmeticError("not with such numbers")

    spoilt = nn.Linear(2, 2)
    nn.init.constant_(spoilt.weight, torch.nan)
    assert first_non_finite(nn.Sequential(spoilt, Failing()), torch.zeros(3, 2)) == "module 0"
    assert first_non_finite(nn.Sequential(Failing()), torch.zeros(3, 2)) == "the network"
    assert first_non_finite(nn.Sequential(spoilt, nn.ReLU()), torch.zeros(3, 2)) == "module 0"
    assert not spoilt._forward_hooks


def test_a_loss_that_is_huge_or_not_finite_is_followed_into_the_network():
    """The kernel's may be huge, in bfloat16, where a module's output in float32 is no number at all."""
    sound, spoilt = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.constant_(spoilt.weight, torch.nan)
    for loss, kind, otherwise in ((1e20, "huge", "the loss"), (math.nan, "not finite", "the criterion, which may")):
        meter = Meter()
        meter.count(loss, 0, 3)
        for layer, place in ((spoilt, "module 0"), (sound, otherwise)):
            said = unsound_loss(meter, 0, 0.1, nn.Sequential(layer), torch.zeros(3, 2))
            assert f"the loss is {kind} from batch 0 on, at learning rate 0.1; first seen in {place}" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes. Error code 12"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1024 bytes."),  # on Windows
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 1 GB on private pool."),
        MemoryError(),
    ],
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


def test_seeds_are_those_that_torch_takes():
    for seed in (-(2**63), 2**64 - 1):
        assert check_seed(seed) == seed == seed_everything(seed)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match="expected a whole number from"):
            check_seed(seed)


def test_a_process_without_output_trains_and_reads_as_any(data, tmp_path, monkeypatch):
    """As pythonw starts it, and many a service."""
    write_image_folder(tmp_path)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert len(utils.run("batch", data, 1, device="cpu").history) == 1
    assert len(run_many(grid(norm=["batch"], epochs=[1]), data, tmp_path / "study.csv")) == 1
    assert len(utils.load_data("cifar10", tmp_path).train_labels) == 20
