"""Loaders of one's own in the kit's loops."""

import functools
import itertools
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import fit, linear, same
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, default_collate
from torchvision.transforms import v2

import utils
from normkit.randomness import GENERATORS
from normkit.stateful import objects_of

pytestmark = pytest.mark.usefixtures("float32_by_default")


def test_the_kits_loaders_have_what_a_loop_of_ones_own_asks_for(data):
    train_loader, test_loader = utils.get_loaders(
        data, np.int64(64), device="cpu", seed=torch.tensor(3), drop_last=True
    )
    assert (len(train_loader.dataset), len(test_loader.dataset)) == (198, 101)
    assert train_loader.batch_size == 64 and train_loader.drop_last and not test_loader.drop_last
    assert train_loader.generator is None
    assert [len(labels) for _, labels in train_loader] == [64] * 3 == [64] * len(train_loader)
    assert sum(len(labels) for _, labels in test_loader) == 101
    with pytest.raises(ValueError, match="drops all of the 198 images"):
        utils.get_loaders(data, 199, device="cpu", drop_last=True)


@pytest.mark.parametrize("mix", [v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])
def test_labels_may_be_shares_of_classes(pairs, mix):
    mixed = DataLoader(pairs, 32, collate_fn=lambda samples: mix(*default_collate(samples)))
    net = linear()
    assert len(fit(net, (mixed, DataLoader(pairs, 32)))) == 1
    images, shares = (torch.cat(parts) for parts in zip(*mixed))
    metrics = utils.test(net, [(images, shares)])
    logits = net(images)
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, shares).item(), rel=1e-5)
    assert metrics.correct == int((logits.argmax(1) == shares.argmax(1)).sum())


@pytest.mark.parametrize("shares", [(1.5, -0.5), (0.6, 0.6), (torch.nan, 1.0)])
def test_shares_of_classes_add_up_to_one_and_none_is_negative(shares):
    labels = torch.tensor([[*shares, *[0.0] * 8]])
    with pytest.raises(ValueError, match="labels as shares run from .* to .*: each row has to add up to 1"):
        utils.test(linear(), [(torch.zeros(1, 3, 16, 16), labels)])


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"image": 1, "label": 2}, "a dict of image, label: expected a pair"),
        ((1, 2, 3), "a tuple of 3: expected a pair"),
        (torch.zeros(2), "a Tensor: expected a pair"),
    ],
)
def test_what_is_no_pair_is_told(batch, message):
    with pytest.raises(TypeError, match=message):
        utils.test(linear(), [batch])


def test_uint8_images_are_told_how_to_be_normalised():
    with pytest.raises(ValueError, match=r"uint8.*v2.ToDtype\(torch.float32, scale=True\) and v2.Normalize"):
        utils.test(linear(), [(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))])


def test_a_loader_and_a_network_may_write_each_batch_into_the_same_tensors(pairs):
    class Reusing:
        # Sevens, as the classes lie in turn: each ten would have the same labels.
        images, labels = torch.empty(7, 3, 16, 16), torch.empty(7, dtype=torch.int64)

        def __iter__(self):
            for images, labels in DataLoader(pairs, 7, drop_last=True):
                yield self.images.copy_(images), self.labels.copy_(labels)

    class Keeping(nn.Module):
        logits = torch.empty(7, 10)

        def forward(self, images):
            return self.logits.copy_(net(images))

    net = linear()
    expected = utils.test(net, DataLoader(pairs, 7, drop_last=True))
    assert expected == utils.test(net, Reusing()) == utils.test(Keeping(), Reusing())


def test_a_loader_may_take_gradients(pairs):
    class Attacked:
        def __init__(self, net):
            self.net = net

        def __len__(self):
            return 4

        def __iter__(self):
            for images, labels in DataLoader(pairs, 30):
                images.requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(self.net(images), labels), images)
                yield images + 0.1 * gradient.sign(), labels

    net = linear()
    expected = list(Attacked(net))
    logits, labels = utils.predict(net, Attacked(net))
    assert torch.equal(logits, torch.cat([net(images) for images, _ in expected])) and not logits.requires_grad
    assert utils.test(net, Attacked(net)) == utils.test(net, expected)
    assert fit(net, (Attacked(net), Attacked(net)))[-1]["test_loss"] == utils.test(net, list(Attacked(net))).loss


def test_set_epoch_is_called_where_it_takes_an_epoch(pairs):
    seen = []

    class Epochs(TensorDataset):
        def set_epoch(self, epoch=None):
            seen.append(epoch)

        def __getitem__(self, i):
            return super().__getitem__(i)  # which refers to the class: of that, there is nothing to be called

    class Other(TensorDataset):
        def set_epoch(self, epoch, total):
            raise AssertionError

    for kind in (Epochs, Other):
        fit(linear(), (DataLoader(kind(*pairs.tensors), 32), DataLoader(pairs, 64)), epochs=2)
    assert seen == [0, 1]


def test_set_epoch_is_called_through_attributes_wrappers_and_proxies(pairs):
    class Epochs(RandomSampler):
        def set_epoch(self, epoch):
            seen.append(epoch)

    class Handing(RandomSampler):
        def __getattr__(self, name):
            return getattr(self.data_source, name)

    own, epochs = RandomSampler(pairs), Epochs(pairs)
    own.set_epoch = lambda epoch: seen.append(epoch)
    for sampler in (own, Handing(epochs), weakref.proxy(epochs)):
        seen = []
        fit(linear(), (DataLoader(pairs, 32, sampler=sampler), DataLoader(pairs, 64)), epochs=2)
        assert seen == [0, 1]


class Settings(dict):
    """Settings as attributes, as many write them: another name is a KeyError, or, of the next class, None."""

    __getattr__ = dict.__getitem__


class Lenient(dict):
    __getattr__ = dict.get


@pytest.mark.parametrize("kind", [Settings, Lenient])
def test_what_looks_up_any_name_is_not_asked(pairs, tmp_path, kind):
    class Own(TensorDataset):
        def __init__(self):
            super().__init__(*pairs.tensors)
            self.settings = kind(size=8, crop=kind(size=4))

    histories = [
        fit(linear(), (DataLoader(Own(), 32), DataLoader(pairs, 64)), epochs=epochs, checkpoint=tmp_path / "c")
        for epochs in (1, 2)
    ]
    assert [len(each) for each in histories] == [1, 2]


def test_a_pool_of_threads_is_no_state_of_a_loader(pairs, tmp_path):
    """Told that a thread of a run before is idle, a pool starts none, and what is waited for never comes."""

    class Threaded(TensorDataset):
        def __init__(self):
            super().__init__(*pairs.tensors)
            self.pool = ThreadPoolExecutor(2)

        def __getitems__(self, indices):
            return [each.result(timeout=20) for each in [self.pool.submit(self.__getitem__, i) for i in indices]]

    for epochs in (1, 2):
        loaders = DataLoader(Threaded(), 32), DataLoader(pairs, 64)
        assert len(fit(linear(), loaders, epochs=epochs, checkpoint=tmp_path / "c")) == epochs


def test_generators_are_found_wherever_a_loader_keeps_them(pairs):
    def found(loader):
        return [each for _, each in objects_of(loader=loader) if isinstance(each, GENERATORS)]

    own, other = torch.Generator(), np.random.default_rng(0)
    sampler = RandomSampler(pairs, generator=own)
    sampler.numpy = other
    assert found(DataLoader(pairs, 8, sampler=sampler)) == [own, other]
    batches = torch.utils.data.BatchSampler(RandomSampler(pairs, generator=own), 8, False)
    assert found(DataLoader(pairs, batch_sampler=batches)) == [own]
    module = nn.Identity()
    module.rng = own
    slots = type("Slots", (), {"__slots__": ("rng",), "collate": lambda self, samples: default_collate(samples)})()
    slots.rng = own
    partial = functools.partial(lambda samples, rng: default_collate(samples), rng=own)
    for collate in (slots.collate, partial, {"a": [own]}, module, lambda samples: RNG.random() and own):
        assert own in found(DataLoader(pairs, 8, collate_fn=collate)), collate


class Random:
    """A transform that draws from a generator of its own."""

    def __init__(self, rng):
        self.rng = rng

    def __call__(self, image):
        return image + 0.1 * float(self.rng.uniform())


class Transformed(torch.utils.data.Dataset):
    def __init__(self, pairs, transforms):
        self.pairs, self.transforms = pairs, transforms

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, label = self.pairs[i]
        for transform in self.transforms:
            image = transform(image)
        return image, label


class Wrapper:
    """A loader around a loader."""

    def __init__(self, loader):
        self.inner = loader

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        return iter(self.inner)


BITS = {
    f"{draws.__name__} of {bits}": lambda draws=draws, bits=bits: draws(getattr(np.random, bits)(0))
    for draws in (np.random.RandomState, np.random.Generator)
    for bits in ("MT19937", "PCG64", "Philox", "SFC64")
}


@pytest.mark.parametrize("kind", [*BITS, "the kit's loader", "a DataLoader's generator"])
def test_what_a_loader_holds_goes_on_where_it_was(data, pairs, tmp_path, kind):
    def loader():
        if kind == "the kit's loader":
            return Wrapper(utils.get_loaders(data, 64, True, "cpu")[0])
        if kind == "a DataLoader's generator":
            return Wrapper(DataLoader(pairs, 32, shuffle=True, generator=torch.Generator().manual_seed(0)))
        rng = BITS[kind]()
        parts = [Transformed(pairs, [Random(rng)]), Transformed(pairs, [])]
        return DataLoader(torch.utils.data.ConcatDataset(parts), 32)

    def run(epochs, checkpoint=None):
        net = linear()
        history = fit(net, (loader(), DataLoader(pairs, 64)), epochs=epochs, checkpoint=checkpoint)
        return list(history), net.state_dict()

    whole, _, resumed = run(3), run(1, tmp_path / "c"), run(3, tmp_path / "c")
    assert same(whole, resumed)


def test_a_loader_without_a_length_and_float_images_are_told(pairs, loaders):
    with pytest.raises(TypeError, match="the loader is a zip, used up after one pass: give the DataLoader itself"):
        fit(linear(), (zip(*pairs.tensors), loaders[1]))
    with pytest.raises(ValueError, match="torch.float32.*expected a tensor uint8"):
        utils.Loader(*pairs.tensors)


RNG = np.random.default_rng(0)  # of a notebook, drawn from by name


class Sampler(torch.utils.data.Sampler):
    """A user-defined sampler, whose order depends on something of its own."""

    def __init__(self, kind, size):
        self.kind, self.size, self.epoch, self.order = kind, size, 0, list(range(size))
        closed_over = np.random.default_rng(0)
        self.rng = {
            "torch": lambda: torch.Generator().manual_seed(0),
            "numpy": lambda: np.random.default_rng(0),
            "python": lambda: random.Random(0),
            "in a dict": lambda: {"train": np.random.default_rng(0)},
            "in a closure": lambda: lambda order: closed_over.shuffle(order),
        }.get(kind, lambda: None)()

    def __len__(self):
        return self.size

    def __iter__(self):
        order = list(range(self.size))
        if self.kind == "torch":
            return iter(torch.randperm(self.size, generator=self.rng).tolist())
        if self.kind == "a counter":
            random.Random(self.epoch).shuffle(order)
            self.epoch += 1
        elif self.kind == "an order shuffled on":
            random.Random(0).shuffle(self.order)
            order = self.order
        elif self.kind == "a global":
            RNG.shuffle(order)
        elif self.kind == "in a closure":
            self.rng(order)
        else:
            (self.rng["train"] if self.kind == "in a dict" else self.rng).shuffle(order)
        return iter(order)


SAMPLERS = ["torch", "numpy", "python", "in a dict", "in a closure", "a global", "a counter", "an order shuffled on"]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_samplers_order_goes_on_where_it_was(pairs, tmp_path, kind):
    def run(epochs, checkpoint=None):
        RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state
        net = linear()
        loader = DataLoader(pairs, 32, sampler=Sampler(kind, len(pairs)))
        fit(net, (loader, DataLoader(pairs, 64)), epochs=epochs, checkpoint=checkpoint)
        return net.state_dict()

    whole, _, resumed = run(3), run(1, tmp_path / "c"), run(3, tmp_path / "c")
    assert same(whole, resumed)


class StatefulLoader:
    """A loader with a state_dict, in which the number of its passes is."""

    def __init__(self, pairs):
        self.pairs, self.passes = pairs, 0

    def __len__(self):
        return len(DataLoader(self.pairs, 32))

    def __iter__(self):
        self.passes += 1
        return iter(DataLoader(self.pairs, 32, shuffle=True, generator=torch.Generator().manual_seed(self.passes)))

    def state_dict(self):
        return {"passes": self.passes}

    def load_state_dict(self, state):
        self.passes = state["passes"]


def test_a_loaders_own_state_goes_on_too(pairs, tmp_path):
    def run(epochs, checkpoint=None):
        net = linear()
        fit(net, (StatefulLoader(pairs), DataLoader(pairs, 64)), epochs=epochs, checkpoint=checkpoint)
        return net.state_dict()

    whole, _, resumed = run(3), run(1, tmp_path / "c"), run(3, tmp_path / "c")
    assert same(whole, resumed)


def test_an_order_that_cannot_be_continued_is_told(pairs, tmp_path, capsys):
    def run(epochs, loader, name="c"):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        utils.fit(net, loader, DataLoader(pairs, 64), optimizer, epochs=epochs, checkpoint=tmp_path / name)
        return capsys.readouterr().out

    def streaming():
        sampler = Sampler("a counter", len(pairs))
        sampler.stream = itertools.cycle([1])
        return DataLoader(pairs, 32, sampler=sampler)

    assert "may differ" not in run(1, streaming())
    assert "may differ from an uninterrupted run: loader.sampler.stream is a cycle" in run(2, streaming())
    assert "may differ" not in run(1, DataLoader(pairs, 32), "d")
    persistent = DataLoader(pairs, 32, num_workers=1, persistent_workers=True)
    assert "persistent workers: what they draw begins anew" in run(2, persistent, "d")
    assert "may differ" not in run(3, DataLoader(pairs, 32), "d")


class CountingLast(Sampler):
    def __iter__(self):
        try:
            yield from random.Random(self.epoch).sample(range(self.size), self.size)
        finally:  # also where it is not gone through to its end
            self.epoch += 1


@pytest.mark.parametrize("order", ["global", "a generator's", "a counter's", "a counter's at the end"])
def test_the_order_goes_on_where_workers_that_last_begin_anew(pairs, order, tmp_path):
    def trained(epochs, file):
        net = linear()
        generator = torch.Generator().manual_seed(5) if order == "a generator's" else None
        own = {"a counter's": Sampler, "a counter's at the end": CountingLast}.get(order)
        sampler = own("a counter", len(pairs)) if own else RandomSampler(pairs, generator=generator)
        loader = DataLoader(pairs, 32, sampler=sampler, num_workers=1, persistent_workers=True, generator=generator)
        fit(net, (loader, loader), epochs=epochs, checkpoint=tmp_path / file)
        return net.state_dict()

    whole = trained(3, "whole")
    trained(2, "parts")
    assert same(trained(3, "parts"), whole)


@pytest.mark.parametrize("stopped", ["first", "second"])
def test_workers_that_last_begin_anew_with_the_same_loader(pairs, stopped, tmp_path):
    """The stop button reaches the workers, too, and they end."""
    batches, stop = len(DataLoader(pairs, 32)), []

    def criterion(logits, labels):
        stop[:] = stop[1:]
        if stop == ["now"]:
            for worker in loader._iterator._workers:
                worker.terminate()  # SIGINT would be ignored where a shell has started the tests in the background
                worker.join()
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(logits, labels)

    def trained(file):
        net, options = linear(), {"epochs": 3, "checkpoint": tmp_path / file, "criterion": criterion}
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        histories = [fit(net, (loader, test_loader), optimizer, **options) for _ in range(1 + bool(stop))]
        return net.state_dict(), histories[-1]

    test_loader = DataLoader(pairs, 64)
    results = []
    for file in ("whole", "parts"):
        torch.manual_seed(0)
        loader = DataLoader(pairs, 32, shuffle=True, num_workers=1, persistent_workers=True)
        if file == "parts":
            before = 2 if stopped == "first" else batches + len(test_loader) + 2
            stop[:] = ["later"] * before + ["now"]
        results.append(trained(file))
    assert same(*results)
