"""The same call goes on exactly, whatever its parts are made of; another call is told apart."""

import dataclasses
import datetime
import itertools
import re
from functools import partial

import numpy as np
import pytest
import torch
from helpers import fit, linear, run, same
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from normkit.checksum import crc32_of
from normkit.files import read_state

# ------------------------------------------------------------- what identifies a run: its settings


def changed_data(data, **changes):
    return dataclasses.replace(data, **{name: change(getattr(data, name).clone()) for name, change in changes.items()})


RUNS = {
    "head_gain": lambda data: {"head_gain": 1.0},
    "training labels": lambda data: {"data": changed_data(data, train_labels=lambda labels: labels.roll(1))},
    "test images": lambda data: {"data": changed_data(data, test_images=lambda images: 255 - images)},
    "test labels": lambda data: {"data": changed_data(data, test_labels=lambda labels: labels.roll(1))},
}


@pytest.mark.parametrize("changed", RUNS)
def test_a_changed_run_is_told_apart(data, tmp_path, changed):
    run(data, tmp_path / "c", 1)
    with pytest.raises(ValueError, match="is of another run"):
        run(**({"data": data, "checkpoint": tmp_path / "c", "epochs": 2} | RUNS[changed](data)))


def test_a_changed_warmup_is_told_apart(data, tmp_path):
    run(data, tmp_path / "c", 2, recipe="best")
    with pytest.raises(ValueError, match="is of another run: its scheduler"):
        run(data, tmp_path / "c", 2, recipe="best", warmup=0.7)


FITS = {
    "criterion": lambda pairs: {"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "weights of the criterion": lambda pairs: {"criterion": nn.CrossEntropyLoss(torch.arange(10.0))},
    "scheduler_step": lambda pairs: {"scheduler_step": "batch"},
    "tensor as a rate": lambda pairs: {"lr": torch.tensor(0.02)},
    "fold": lambda pairs: {"train": Subset(pairs, range(50, 100)), "test": Subset(pairs, range(50))},
    "data set": lambda pairs: {"train": TensorDataset(pairs.tensors[0].flip(0), pairs.tensors[1])},
}


@pytest.mark.parametrize("changed", FITS)
def test_a_changed_fit_is_told_apart(pairs, tmp_path, changed):
    def fit_with(train=None, test=None, lr=None, **options):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), torch.tensor(0.01) if lr is None else lr)
        parts = (
            DataLoader(train or Subset(pairs, list(range(50))), 25),
            DataLoader(test or Subset(pairs, list(range(50, 100))), 50),
        )
        options = {"criterion": nn.CrossEntropyLoss(), "checkpoint": tmp_path / "c"} | options
        return fit(net, parts, optimizer, StepLR(optimizer, 3), 2, **options)

    first = fit_with()
    assert same(fit_with(), first)
    changes = FITS[changed](pairs)
    changes = {
        name: Subset(pairs, list(value.indices)) if isinstance(value, Subset) else value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match="is of another run"):
        fit_with(**changes)


# ------------------------------------------------------------------------- it goes on where it was


@pytest.mark.parametrize("schedule", ["none", "epoch", "batch"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_stopped_in_an_epoch_the_same_call_with_the_same_objects_goes_on(pairs, tmp_path, epoch, schedule):
    """The stop button in mid-epoch, then the same cell; the first epoch begins anew from where the first call began."""

    passes = itertools.count(1)

    class Stopping(DataLoader):
        def __iter__(self):
            stops = next(passes) == epoch
            for number, batch in enumerate(super().__iter__()):
                if stops and number == 2:
                    raise KeyboardInterrupt
                yield batch

    def parts(kind):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Dropout(0.3), linear())
        optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
        scheduler = {"none": None, "epoch": StepLR(optimizer, 1), "batch": OneCycleLR(optimizer, 0.02, total_steps=12)}
        options = {"scheduler_step": "batch" if schedule == "batch" else "epoch", "epochs": 3}
        loader = kind(pairs, 32, shuffle=True, generator=torch.Generator().manual_seed(1))
        return (net, (loader, DataLoader(pairs, 64)), optimizer, scheduler[schedule]), options

    args, options = parts(DataLoader)
    whole = fit(*args, **options)
    args, options = parts(Stopping)
    before = {name: value.clone() for name, value in args[0].state_dict().items()}
    stopped = fit(*args, **options, checkpoint=tmp_path / "c")
    assert stopped.unfinished == epoch and len(stopped) == epoch - 1
    assert epoch > 1 or same(args[0].state_dict(), before)  # the weights are those of the history
    resumed = fit(*args, **options, checkpoint=tmp_path / "c")
    assert same(list(resumed), list(whole))


class Counted:
    """A user-defined schedule, without state_dict."""

    def __init__(self, optimizer):
        self.optimizer, self.epoch = optimizer, 0

    def step(self):
        self.epoch += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + self.epoch)


class Wrapped:
    """A user-defined optimizer, without state_dict, around one of torch's."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


class Stateful(torch.utils.data.Sampler):
    """A sampler with a state_dict, as torchdata's have."""

    def __init__(self, size):
        self.size, self.__dict__["hidden"] = size, {"drawn": np.int64(0)}

    def __len__(self):
        return self.size

    def __iter__(self):
        self.hidden["drawn"] += 1
        return iter(np.random.default_rng(int(self.hidden["drawn"])).permutation(self.size).tolist())

    def state_dict(self):
        return {"drawn": int(self.hidden["drawn"]), "drawn in an array": [np.array(self.hidden["drawn"])]}

    def load_state_dict(self, state):
        assert type(state["drawn in an array"][0]) is np.ndarray
        self.hidden["drawn"] = state["drawn in an array"][0][()]


def test_a_state_that_no_file_can_hold_is_told_by_name(pairs, tmp_path):
    class Unsaved(Stateful):
        def state_dict(self):
            return {"drawn": object()}

    loader = DataLoader(pairs, 32, sampler=Unsaved(len(pairs)))
    with pytest.raises(TypeError, match="the state of the samplers.* in loader.sampler, so no checkpoint"):
        fit(linear(), (loader, DataLoader(pairs, 64)), checkpoint=tmp_path / "c")


class Temperature(nn.Module):
    """A criterion that learns."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits, labels):
        return nn.functional.cross_entropy(self.scale * logits, labels)


@pytest.mark.parametrize("own", ["scheduler", "optimizer", "sampler", "criterion", "epochs of a sampler"])
def test_parts_that_are_user_defined_go_on(pairs, tmp_path, own):
    def fit_for(epochs, **options):
        net, criterion = linear(), Temperature() if own == "criterion" else nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD([*net.parameters(), *criterion.parameters()], 0.1, 0.9)
        scheduler = Counted(optimizer) if own == "scheduler" else None
        optimizer = Wrapped(optimizer) if own == "optimizer" else optimizer
        sampler = Stateful(len(pairs)) if own == "sampler" else None
        if own == "epochs of a sampler":
            sampler = torch.utils.data.DistributedSampler(pairs, num_replicas=1, rank=0)
        loader = DataLoader(pairs, 32, sampler=sampler)
        fit(net, (loader, DataLoader(pairs, 64)), optimizer, scheduler, epochs, criterion=criterion, **options)
        return net.state_dict() | criterion.state_dict()

    whole, _, resumed = fit_for(3), fit_for(2, checkpoint=tmp_path / "c"), fit_for(3, checkpoint=tmp_path / "c")
    assert same(whole, resumed)


# A part that has changed: what is in the file is named, and nothing is half loaded.
CHANGED = {
    "parameter list has 'scale": lambda: (Scaled("gain"), None),
    "parameter list has 'linear.weight": lambda: (Scaled("scale"), lambda net: [net.linear.weight]),
    "parameter list has 'scale (10,), in": lambda: (Scaled("scale"), lambda net: [*net.parameters()][::-1]),
    "parameter list has 'linear.bias (10,), in": lambda: (Scaled("scale").frozen("linear.bias"), None),
}


class Scaled(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.linear, self.name = nn.Linear(3 * 16 * 16, 10), name
        self.register_parameter(name, nn.Parameter(torch.ones(10)))

    def frozen(self, name):
        self.get_parameter(name).requires_grad_(False)
        return self

    def forward(self, x):
        return self.linear(x.flatten(1)) * getattr(self, self.name)


@pytest.mark.parametrize("said", CHANGED)
def test_a_checkpoint_of_other_parameters_is_refused(pairs, tmp_path, said):
    def fit_with(net, parameters):
        optimizer = torch.optim.SGD(parameters(net) if parameters else net.parameters(), 0.01, 0.9)
        return fit(net, (DataLoader(pairs, 32), DataLoader(pairs, 64)), optimizer, epochs=2, checkpoint=tmp_path / "c")

    fit_with(Scaled("scale"), None)
    net, parameters = CHANGED[said]()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="is of another run: its parameter list has"):
        fit_with(net, parameters)
    assert same(net.state_dict(), before)


def test_a_part_that_the_file_does_not_fit_leaves_all_as_they_were(pairs, tmp_path):
    def fit_with(net, later=None):
        optimizer = torch.optim.SGD([net[1].weight], 0.01, 0.9)
        options = {"checkpoint": tmp_path / "c", "on_epoch": lambda history: later and later(optimizer, net, history)}
        return fit(net, (DataLoader(pairs, 32), DataLoader(pairs, 64)), optimizer, epochs=2, **options)

    def unfreeze(optimizer, net, history):
        if len(history) == 1:
            optimizer.add_param_group({"params": [net[1].bias]})

    fit_with(linear(), unfreeze)
    net = linear(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    message = "c does not fit this run's optimizer: .* Build all as it was, with what on_epoch added; name"
    with pytest.raises(ValueError, match=message):
        fit_with(net)
    assert same(net.state_dict(), before)


HELD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "without data": lambda: torch.ones(2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "objects": lambda: np.array([object(), "a", np.ones(2)], dtype=object),
}


@pytest.mark.parametrize("held", HELD)
def test_a_data_set_may_hold_any_array(pairs, tmp_path, held):
    class Holding(TensorDataset):
        def __init__(self):
            super().__init__(*pairs.tensors)
            self.held = HELD[held]()

    for epochs in (1, 2):
        loaders = (DataLoader(Holding(), 32), DataLoader(pairs, 64))
        assert len(fit(linear(), loaders, epochs=epochs, checkpoint=tmp_path / "c")) == epochs


def test_the_checksum_of_an_array_is_that_of_its_values():
    images = [Image.new("RGB", (2, 2)) for _ in range(2)]
    assert crc32_of(np.array(images[:1], dtype=object)) == crc32_of(np.array(images[1:], dtype=object))
    assert crc32_of(torch.eye(3).to_sparse()) == crc32_of(torch.eye(3)) == crc32_of(np.eye(3, dtype=np.float32))
    assert crc32_of(np.array(["a", None])) != crc32_of(np.array(["b", None]))


def test_a_distributed_sampler_shuffles_each_epoch_anew(pairs):
    orders = []

    class Indices(Dataset):
        def __len__(self):
            return len(pairs)

        def __getitem__(self, i):
            orders.append(i)
            return pairs[i]

    sampler = torch.utils.data.DistributedSampler(Indices(), num_replicas=1, rank=0)
    fit(linear(), (DataLoader(Indices(), 32, sampler=sampler), DataLoader(pairs, 64)), epochs=2)
    first, second = orders[: len(pairs)], orders[len(pairs) :]
    assert sorted(first) == sorted(second) and first != second


def test_an_explosion_sets_a_schedule_with_a_function_back_too(pairs):
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1e-3 if step < 6 else 1e30)
    with pytest.raises(FloatingPointError, match="epoch 2"):
        fit(net, (DataLoader(pairs, 32), DataLoader(pairs, 64)), optimizer, scheduler, 3, scheduler_step="batch")
    assert scheduler.last_epoch == 4 and optimizer.param_groups[0]["lr"] == 1e-3


def test_a_seed_that_was_drawn_goes_on_too(data, tmp_path):
    options = {"seed": None, "checkpoint": tmp_path / "c"}
    first, whole = run(data, **options, epochs=1), run(data, **options, epochs=2)
    assert first.seed == whole.seed and whole.history[0] == first.history[0]
    assert run(data, epochs=2, seed=whole.seed).history[1]["train_loss"] == whole.history[1]["train_loss"]


def test_numpys_global_generator_may_be_of_any_kind(data, tmp_path):
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = np.random.get_state(legacy=False)
        whole = run(data, epochs=2)
        run(data, tmp_path / "c", 1)
        assert same(run(data, tmp_path / "c", 2).history, whole.history)
        assert same(np.random.get_state(legacy=False), state)
    finally:
        np.random.set_bit_generator(before)


# -------------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("value", [datetime.datetime(2026, 1, 1), object(), lambda: 1])
def test_a_row_that_no_file_can_hold_costs_the_checkpoint_and_not_the_run(data, tmp_path, capsys, value):
    def add(history):
        if len(history) == 2:
            history[-1]["mine"] = value

    file = tmp_path / "c"
    done = run(data, file, 4, on_epoch=add)
    assert len(done.history) == 4 and "NO CHECKPOINT of epoch 3: a row of the history" in capsys.readouterr().out
    assert len(read_state(file)["history"]) == 2


def test_what_is_to_be_deleted_to_start_again_is_named(data, tmp_path, capsys):
    run(data, tmp_path / "c", 2)
    with pytest.raises(ValueError, match="or delete c and c.previous to start from the first epoch"):
        run(data, tmp_path / "c", 3, lr=0.5)
    (tmp_path / "c").unlink()
    run(data, tmp_path / "c", 2, progress=True)
    assert re.search(r"Going on after epoch 1, from .*c\.previous\n", capsys.readouterr().out)


# ----------------------------------------------------- the same objects again, after whatever stopped them


class Caching(Dataset):
    """Fills a table on the way, and fails once where it is told to."""

    def __init__(self, pairs, fail_at=None):
        self.pairs, self.fail_at, self.sums = pairs, fail_at, torch.zeros(len(pairs))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        if self.fail_at == i:
            self.fail_at = None
            raise OSError("the disk is gone")
        self.sums[i] = self.pairs[i][0].sum()
        return self.pairs[i]


def halve(optimizer, net, history):
    optimizer.param_groups[0]["lr"] = 0.01 * 0.5 ** len(history)


def freeze_bias(optimizer, net, history):
    net[1].bias.requires_grad_(len(history) < 1)


@pytest.mark.parametrize("change", [halve, freeze_bias])
def test_what_on_epoch_changes_makes_no_other_run(pairs, tmp_path, change):
    """Stopped in the second epoch and run again with the same objects."""

    def train(stops, **options):
        net, stops = linear(), iter(stops)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)

        class Stopping(DataLoader):
            def __iter__(self):
                if next(stops, False):
                    raise KeyboardInterrupt
                return super().__iter__()

        loaders = Stopping(pairs, 16), DataLoader(pairs, 16)
        for _ in range(2 if options else 1):
            history = fit(net, loaders, optimizer, epochs=3, on_epoch=partial(change, optimizer, net), **options)
        return [row["train_loss"] for row in history], net.state_dict()

    assert same(train([]), train([False, True], checkpoint=tmp_path / "c"))


def test_a_data_set_that_failed_in_the_first_epoch_goes_on(pairs, tmp_path):
    data = Caching(pairs, fail_at=20)
    loaders, net = [DataLoader(each, 16) for each in (data, pairs)], linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    scheduler = OneCycleLR(optimizer, 0.1, 2 * len(loaders[0]))
    call = {"epochs": 2, "scheduler_step": "batch", "checkpoint": tmp_path / "c"}
    with pytest.raises(OSError, match="the disk is gone"):
        fit(net, loaders, optimizer, scheduler, **call)
    assert len(fit(net, loaders, optimizer, scheduler, **call)) == 2


def test_an_interrupt_while_the_held_epochs_are_told(data, tmp_path):
    def stop(history):
        raise KeyboardInterrupt

    run(data, tmp_path / "c", 1)
    assert len(run(data, tmp_path / "c", 2, on_epoch=stop).history) == 1


def test_a_lazy_network_that_is_stopped_in_its_first_epoch(pairs):
    class Stopping(DataLoader):
        def __iter__(self):
            yield next(super().__iter__())
            raise KeyboardInterrupt

    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    history = fit(net, (Stopping(pairs, 16), DataLoader(pairs, 16)), optimizer)
    assert history == [] and history.unfinished == 1
