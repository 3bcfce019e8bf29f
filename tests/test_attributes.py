"""What moves in loaders, criteria and other user-defined objects goes on in a resumed run, or is said."""

import collections
import dataclasses
import enum
import functools
import itertools
import types

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import fit, linear, same
from torch import nn
from torch.utils.data import DataLoader, Dataset

import utils
from normkit.attributes import MAX_BYTES, MovingAttributes, fingerprint
from normkit.stateful import CheckpointParts, objects_of


class Turning:
    """A loader that takes the batches in an order of its own, which it changes from pass to pass."""

    def __init__(self, batches, order, turn, **held):
        self.batches, self.order, self.turn = list(batches), order, turn
        vars(self).update(held)

    def __len__(self):
        return 4

    def __iter__(self):
        self.turn(self)
        return (self.batches[int(i) % len(self.batches)] for i in list(self.order)[:4])


def add_one(loader):
    loader.count += 1
    loader.order = [int(loader.count) + i for i in range(4)]


def count_up(loader):
    loader.order["first"] += 1
    loader.order = {loader.order["first"] + i: 0 for i in range(4)} | loader.order


class Phase(enum.IntEnum):
    FIRST, SECOND = 1, 2


Step = collections.namedtuple("Step", "number")
MOVES = {
    "array": lambda: (np.arange(4), lambda loader: np.random.default_rng(int(loader.order[0])).shuffle(loader.order)),
    "tensor": lambda: (torch.arange(4), lambda loader: loader.order.add_(1)),
    "list": lambda: ([0, 1, 2, 3], lambda loader: loader.order.append(loader.order.pop(0))),
    "deque": lambda: (collections.deque(range(4)), lambda loader: loader.order.rotate(1)),
    "set": lambda: (set(range(4)), lambda loader: loader.order.add(min(loader.order) + 4) or loader.order.pop()),
    "NumPy's number": lambda: ([], add_one, {"count": np.int64(0)}),
    "number of another kind": lambda: (
        [], lambda loader: add_one(vars(loader).update(count=loader.count + 0.5) or loader), {"count": 0}
    ),
    "enum": lambda: (range(4), lambda loader: setattr(loader, "order", range(loader.phase, 9)) or
                     setattr(loader, "phase", Phase.SECOND), {"phase": Phase.FIRST}),
    "namedtuple": lambda: (range(4), lambda loader: setattr(loader, "order", range(loader.step.number, 9)) or
                           setattr(loader, "step", Step(loader.step.number + 1)), {"step": Step(0)}),
    "dict with defaults": lambda: (collections.defaultdict(int), count_up),
}  # fmt: skip


def fit_turning(pairs, moves, epochs, **options):
    order, turn, *held = MOVES[moves]()
    loader = Turning(DataLoader(pairs, 16), order, turn, **(held[0] if held else {}))
    net = linear()
    fit(net, (loader, DataLoader(pairs, 64)), epochs=epochs, **options)
    return net.state_dict(), type(loader.order), vars(loader)


MOVES |= {
    f"{kind} made at the first pass": lambda make=make, turn=turn: (
        None, lambda loader: (loader.order is None and setattr(loader, "order", make())) or turn(loader)
    )
    for kind, make, turn in (
        ("array", lambda: np.arange(4), lambda loader: np.random.default_rng(0).shuffle(loader.order)),
        ("set", lambda: {1, 2, 3, 4}, lambda loader: loader.order.add(min(loader.order) + 4) or loader.order.pop()),
        ("frozenset", lambda: frozenset(range(4)), lambda loader: setattr(loader, "order", loader.order | {5}) or
                      setattr(loader, "order", loader.order - {min(loader.order)})),
        ("deque", lambda: collections.deque(range(4), 4), lambda loader: loader.order.append(sum(loader.order))),
        ("tuple", lambda: (0, 1, 2, 3), lambda loader: setattr(loader, "order", loader.order[1:] + loader.order[:1])),
    )
}  # fmt: skip


@pytest.mark.parametrize("moves", MOVES)
def test_what_moves_in_a_loader_goes_on(pairs, tmp_path, moves, capsys):
    whole, kind, attributes = fit_turning(pairs, moves, 3)
    assert not same(whole, fit_turning(pairs, moves, 1)[0])
    fit_turning(pairs, moves, 1, checkpoint=tmp_path / "c")
    resumed, kind_now, attributes_now = fit_turning(pairs, moves, 3, checkpoint=tmp_path / "c")
    assert same(resumed, whole) and kind_now is kind and "NO CHECKPOINT" not in capsys.readouterr().out
    for name in ("count", "phase", "step"):
        assert type(attributes_now.get(name)) is type(attributes.get(name))


class Sampler(torch.utils.data.Sampler):
    """A sampler with state of its own, of which next_seed(sampler) makes the seed of a pass."""

    passes = 0

    def __init__(self, next_seed, **state):
        self.next_seed = next_seed
        vars(self).update(state)

    def __len__(self):
        return 64

    def __iter__(self):
        return iter(np.random.default_rng(int(self.next_seed(self))).permutation(64).tolist())


@dataclasses.dataclass(frozen=True)
class State:
    number: int = 0
    phase: Phase = Phase.FIRST
    sums: np.ndarray | None = None


class Stage:
    def __init__(self, number):
        self.number, self.passes = number, 0


def with_state(sampler):
    sums = np.arange(3) + (0 if sampler.state.sums is None else sampler.state.sums)
    sampler.state = dataclasses.replace(sampler.state, number=sampler.state.number + 1, phase=Phase.SECOND, sums=sums)
    return sampler.state.number + 10 * sampler.state.phase + sums.sum()


def with_stages(sampler):
    sampler.stage = sampler.stages[(sampler.stage.number + 1) % 3]
    sampler.stage.passes += 1
    return 10 * sampler.stage.number + sampler.stage.passes


def with_generator(sampler):
    sampler.rng = torch.Generator().manual_seed(int(torch.randint(1000, (), generator=sampler.rng)))
    return torch.randint(1000, (), generator=sampler.rng)


def with_lazy_generators(sampler):
    if sampler.rng is None:
        sampler.rng = sampler.same = np.random.Generator(np.random.SFC64(0))
    return sampler.rng.integers(1000) + sampler.same.integers(1000)


def with_array_in_a_dict(sampler):
    np.random.default_rng(0).shuffle(sampler.state["order"])
    return sampler.state["order"][0]


def with_class(sampler):
    Sampler.passes += 1
    return Sampler.passes


def with_cell():
    number, numbers = 0, []

    def next_seed(sampler):
        nonlocal number
        number += 1
        numbers.append(number)
        return number + sum(numbers)

    return Sampler(next_seed)


NUMBER, NUMBERS = 0, {"all": 0}


def with_global(sampler):
    global NUMBER
    NUMBER += 1
    NUMBERS["all"] += 1
    return NUMBER + NUMBERS["all"]


class Counting:
    @property
    def number(self):
        return with_global(self)


def with_default(sampler, numbers=(collections.Counter(),)):
    with_default.calls += 1
    numbers[0]["all"] += 1
    return with_default.calls + numbers[0]["all"]


def fresh_function():
    with_default.calls, with_default.__defaults__ = 0, ((collections.Counter(),),)
    return Sampler(with_default)


def fresh_globals():
    globals().update(NUMBER=0, NUMBERS={"all": 0})
    Sampler.passes = 0


def of_partial(numbers, sampler):
    numbers[0] += 1
    return numbers[0]


STATES = {
    "frozen dataclass": lambda: Sampler(with_state, state=State()),
    "one of several objects": lambda: Sampler(
        with_stages, stages=(stages := [Stage(i) for i in range(3)]), stage=stages[0]
    ),
    "generator made anew": lambda: Sampler(with_generator, rng=torch.Generator().manual_seed(0)),
    "generator made at the first pass": lambda: Sampler(with_lazy_generators, rng=None, same=None),
    "array in a dict": lambda: Sampler(with_array_in_a_dict, state={"order": np.arange(64)}),
    "class": lambda: Sampler(with_class),
    "cell": with_cell,
    "global": lambda: Sampler(with_global),
    "global that a property changes": lambda: Sampler(lambda sampler: sampler.counting.number, counting=Counting()),
    "default and attribute of a function": fresh_function,
    "argument of a partial": lambda: Sampler(functools.partial(of_partial, [0])),
}


def fit_sampled(pairs, make, epochs, **options):
    fresh_globals()
    net = linear()
    utils.fit(
        net, DataLoader(pairs, 16, sampler=make()), DataLoader(pairs, 64), torch.optim.SGD(net.parameters(), 0.01),
        epochs=epochs, **options,
    )  # fmt: skip
    return net.state_dict()


@pytest.mark.parametrize("state", STATES)
def test_state_that_is_replaced_or_kept_elsewhere_goes_on(pairs, tmp_path, state, capsys):
    whole = fit_sampled(pairs, STATES[state], 4)
    fit_sampled(pairs, STATES[state], 2, checkpoint=tmp_path / "c")
    assert same(fit_sampled(pairs, STATES[state], 4, checkpoint=tmp_path / "c"), whole)
    assert "may differ" not in capsys.readouterr().out


def lazily(name, make, moved):
    """Returns a sampler that makes something at its first pass, and something else beside it."""

    def next_seed(sampler):
        if getattr(sampler, name) is None:
            setattr(sampler, name, make())
        sampler.count += 1
        return moved(sampler)

    return lambda: Sampler(next_seed, count=0, **{name: None})


def shuffled(sampler):
    sampler.frame = sampler.frame.sample(frac=1, random_state=1)
    return sampler.frame.i.iloc[0]


LOST = {
    "iterator": ("stream", lazily("stream", lambda: itertools.count(5), lambda sampler: next(sampler.stream))),
    "object": ("stage", lazily("stage", lambda: Stage(1), lambda sampler: sampler.count)),
    "namedtuple": ("step", lazily("step", lambda: Step(1), lambda sampler: sampler.count)),
    "frame": ("frame", lambda: Sampler(shuffled, frame=pd.DataFrame({"i": range(64)}))),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_cannot_be_kept_is_told(pairs, tmp_path, lost, capsys):
    name, make = LOST[lost]
    for epochs in (1, 2):
        fit_sampled(pairs, make, epochs, checkpoint=tmp_path / "c")
    assert f"may differ from an uninterrupted run: loader.sampler.{name} cannot be kept" in capsys.readouterr().out


def test_what_moves_beside_an_opened_file_goes_on(pairs, tmp_path, capsys):
    opening = lazily("file", lambda: open(__file__), lambda sampler: sampler.count + len(sampler.file.name))
    whole = fit_sampled(pairs, opening, 3)
    fit_sampled(pairs, opening, 1, checkpoint=tmp_path / "c")
    assert same(fit_sampled(pairs, opening, 3, checkpoint=tmp_path / "c"), whole)
    assert "may differ" not in capsys.readouterr().out


def test_an_order_that_data_set_and_sampler_share_stays_one(pairs, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Shared:
        order: list

        def __len__(self):
            return 64

        def __getitem__(self, i):
            return pairs[self.order[i]]

    class Turns(torch.utils.data.Sampler):
        def __init__(self, order):
            self.order = order

        def __iter__(self):
            self.order.append(self.order.pop(0))
            return iter(range(64))

        def __len__(self):
            return 64

    def fit_for(epochs, **options):
        order = list(range(len(pairs)))
        net, loader = linear(), DataLoader(Shared(order), 16, sampler=Turns(order))
        fit(net, (loader, DataLoader(pairs, 64)), epochs=epochs, **options)
        return net.state_dict()

    fit_for(1, checkpoint=tmp_path / "c")
    assert same(fit_for(3, checkpoint=tmp_path / "c"), fit_for(3))


class Annealed(nn.Module):
    """A criterion that counts, in an attribute and in a buffer that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("halved", torch.ones(()), persistent=False)

    def forward(self, logits, labels):
        self.calls += 1
        self.halved *= 0.5
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.5 / self.calls + float(self.halved) / 4)


class Noisy(nn.Module):
    """A layer that draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return x + torch.randn(x.shape, generator=self.generator) if self.training else x


class EveryOther(torch.optim.SGD):
    """An optimizer that counts its steps beside its state."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps % 3:
            super().step(closure)


@pytest.mark.parametrize("part", ["criterion", "model", "optimizer", "test loader"])
def test_what_no_state_dict_has_goes_on(pairs, tmp_path, part):
    def fit_for(epochs, **options):
        net = nn.Sequential(linear(), Noisy() if part == "model" else nn.Identity())
        drawn = torch.utils.data.RandomSampler(pairs, num_samples=20, generator=torch.Generator().manual_seed(5))
        test_loader = DataLoader(pairs, 20, sampler=drawn if part == "test loader" else None)
        optimizer = (EveryOther if part == "optimizer" else torch.optim.SGD)(net.parameters(), 0.01)
        criterion = Annealed() if part == "criterion" else nn.CrossEntropyLoss()
        loaders = (DataLoader(pairs, 32), test_loader)
        history = fit(net, loaders, optimizer, epochs=epochs, criterion=criterion, **options)
        return [(row["train_loss"], row["test_loss"]) for row in history]

    fit_for(1, checkpoint=tmp_path / "c")
    assert fit_for(4, checkpoint=tmp_path / "c") == fit_for(4)


def test_a_file_that_a_data_set_opens_on_the_way_is_opened_again(pairs, tmp_path):
    class Lazy(Dataset):
        def __init__(self):
            self.opened, self.file = False, None

        def __len__(self):
            return 32

        def __getitem__(self, i):
            if not self.opened:
                self.file, self.opened = iter(()), True
                self.file = pairs
            return self.file[i]

    for epochs in (1, 2):
        done = fit(linear(), (DataLoader(Lazy(), 8), DataLoader(pairs, 64)), epochs=epochs, checkpoint=tmp_path / "c")
        assert len(done) == epochs


def test_what_moves_and_is_too_large_to_keep_is_told(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("normkit.packing.MAX_BYTES", 8)
    for epochs in (1, 2):
        loader = Turning(DataLoader(pairs, 16), torch.arange(4), lambda loader: loader.order.add_(1))
        loaders, net = (loader, DataLoader(pairs, 64)), linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        utils.fit(net, *loaders, optimizer, epochs=epochs, checkpoint=tmp_path / "c")
    said = "It may differ from an uninterrupted run: loader.order cannot be kept; loader.order was '(4,) torch.int64"
    assert said in capsys.readouterr().out


def test_generators_are_found_among_many_objects(pairs, monkeypatch):
    rows = [[("a.png", i)] * 3 for i in range(100)]
    generator = np.random.default_rng(0)
    loader = Turning([], rows, None, more={str(i): list(rows) for i in range(30)}, last=[[[generator]]])
    assert generator in dict(objects_of(loader=loader)).values() and not CheckpointParts({}, loader=loader).lost()
    monkeypatch.setattr("normkit.stateful.MAX_OBJECTS", 50)
    assert "more than 50 objects" in CheckpointParts({}, loader=loader).lost()[0]


def test_whatever_an_attribute_holds_it_can_be_looked_at():
    class Holder:
        pass

    holder = Holder()
    holder.me, holder.images = [1], [np.zeros((512, 512)) for _ in range(9)]
    holder.me.append(holder.me)
    holder.steps = [Step(0)]
    with torch.inference_mode():
        holder.inferred = torch.zeros(MAX_BYTES)
    holder.trained = [torch.nn.Parameter(torch.zeros(2))]
    attributes = MovingAttributes({"holder": holder}, {"holder": holder})
    assert not any(attributes.state_dict().values())
    assert fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(2, dtype=torch.int32))
    assert fingerprint(torch.zeros(2, 2)) != fingerprint(torch.zeros(4))  # an attribute that was given another shape
    holder.steps = [Step(1)]
    holder.me[0], holder.images[:] = 2, holder.images[::-1]
    with torch.no_grad():
        holder.trained[0].add_(1)
    assert attributes.state_dict()["lost"] == [
        ("holder", "images"),
        ("holder", "me"),
        ("holder", "steps"),
    ]  # which would come back as tuples


def test_what_has_moved_is_kept_on_where_a_run_begins_with_that_value():
    state = None
    for start in (0, 5, 0):
        owner = types.SimpleNamespace(count=start)
        attributes = MovingAttributes({"own": owner}, {})
        attributes.load_state_dict(state) if state else setattr(owner, "count", 5)
        state = attributes.state_dict()
    assert owner.count == 5
