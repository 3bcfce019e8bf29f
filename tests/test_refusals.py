"""What is no model, optimizer, scheduler, criterion, data or setting is told so before training."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import fit, linear
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import model
import utils

pytestmark = pytest.mark.usefixtures("float32_by_default")


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.01)


class Needy:
    """A schedule whose step takes the epoch, as timm's do."""

    def step(self, epoch):
        pass


NO_PARTS = {
    "no optimizer": (lambda net: (net, None), "the optimizer is None: expected an object such as torch.optim.SGD"),
    "a list": (lambda net: (net, [1]), r"the optimizer is \[1\]: expected an object"),
    "a class": (lambda net: (net, torch.optim.SGD), "the optimizer is the class SGD: expected an object"),
    "a scheduler's class": (lambda net: (net, sgd(net), torch.optim.lr_scheduler.StepLR), "the class StepLR"),
    "epochs": (lambda net: (net, sgd(net), 5), "the scheduler is 5: expected .* epochs come after it"),
    "a step with an epoch": (lambda net: (net, sgd(net), Needy()), "Needy.step takes epoch, and is called without"),
    "no model": (lambda net: (None, sgd(net)), "the model is a NoneType: expected a torch.nn.Module"),
    "a model's class": (lambda net: (nn.Linear, sgd(net)), "the model is the class Linear"),
}


@pytest.mark.parametrize("case", NO_PARTS)
def test_what_is_no_part_is_told_before_training(loaders, case):
    build, message = NO_PARTS[case]
    net, optimizer, *scheduler = build(linear())
    with pytest.raises(TypeError, match=message):
        utils.fit(net, *loaders, optimizer, *scheduler, epochs=1, progress=False)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, "cross_entropy", None])
def test_what_is_no_criterion_is_told(loaders, criterion):
    for call in (
        lambda: fit(linear(), loaders, criterion=criterion),
        lambda: utils.test(linear(), loaders[1], criterion=criterion),
    ):
        with pytest.raises(TypeError, match="the criterion is .*: expected a function or module"):
            call()


@pytest.mark.parametrize("criterion", [{"weight": torch.tensor([1.0, 0] + [1] * 8)}, {"ignore_index": 1}])
def test_a_criterion_that_counts_no_image_of_a_batch_is_told(loaders, criterion):
    """torch's mean over nothing is NaN: in a test set in the order of its classes, a whole batch may be of one."""
    images, labels = next(iter(loaders[1]))
    by_class = [(images[labels == label], labels[labels == label]) for label in range(10)]
    options = {"criterion": nn.CrossEntropyLoss(**criterion)}
    with pytest.raises(FloatingPointError, match="test loss is not finite: .* criterion may count no image of a batch"):
        fit(linear(), (loaders[0], by_class), **options)
    with pytest.raises(FloatingPointError, match="batch 1 on.*first seen in the criterion, which may count no image"):
        fit(linear(), (by_class, loaders[1]), **options)


def test_train_alone_checks_its_parts_too(loaders):
    net = linear()
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        utils.train(net, loaders[0], sgd(linear(1)), progress=False)
    optimizer = sgd(net)
    with pytest.raises(ValueError, match="ReduceLROnPlateau waits for an epoch's metrics"):
        utils.train(net, loaders[0], optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), progress=False)
    with pytest.raises(TypeError, match="the scheduler is 5: expected"):
        utils.train(net, loaders[0], optimizer, 5, progress=False)


def test_an_iterator_is_refused_before_it_is_used_up(loaders):
    with pytest.raises(TypeError, match="used up after one pass: give the DataLoader itself"):
        fit(linear(), (iter(DataLoader(loaders[0].dataset, 32)), loaders[1]), epochs=2)


def test_a_loader_may_be_its_own_iterator(loaders):
    class Prefetcher:
        def __len__(self):
            return len(loaders[1])

        def __iter__(self):
            self.batches = iter(loaders[1])
            return self

        def __next__(self):
            return next(self.batches)

    nets = linear(), linear()
    for net, loader in zip(nets, (loaders[1], Prefetcher())):
        fit(net, (loader, loader), epochs=2)
    assert all(map(torch.equal, *(net.state_dict().values() for net in nets)))


def test_gradients_that_are_switched_off_are_told(loaders):
    for off, network in itertools.product((torch.no_grad, torch.inference_mode), (linear, model.Net)):
        with off(), pytest.raises(RuntimeError, match="gradients are switched off here: call this outside"):
            fit(network(), loaders)


def test_what_a_callback_switches_off_or_replaces_is_told_in_the_next_epoch(loaders):
    net = linear()

    def replace(history):
        net[1].weight, net[1].bias = (nn.Parameter(each.detach().clone()) for each in net[1].parameters())

    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        fit(net, loaders, epochs=2, on_epoch=replace)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="gradients are switched off here"):
        fit(linear(), loaders, epochs=2, on_epoch=lambda history: torch.set_grad_enabled(False))


@pytest.mark.parametrize("network", [linear, model.Net])
def test_a_network_made_in_inference_mode_is_told_and_predicts(loaders, network):
    with torch.inference_mode():
        made = network()
    with pytest.raises(RuntimeError, match="made inside of torch.inference_mode.*build the model outside"):
        fit(made, loaders)
    assert utils.predict(made, loaders[1])[0].shape[1] == 10


def test_what_yields_no_batches_is_told(data):
    for call in (lambda: utils.test(linear(), data), lambda: fit(linear(), (data, data))):
        with pytest.raises(TypeError, match="the loader is a Data, which yields no batches: give a DataLoader"):
            call()


def test_a_data_set_in_place_of_data_or_of_a_loader_is_told(data):
    pairs = TensorDataset(data.test_images.float(), data.test_labels)
    with pytest.raises(TypeError, match="data is a TensorDataset: expected what utils.load_data returns, or a normkit"):
        utils.get_loaders(pairs)
    with pytest.raises(ValueError, match=r"images of torch.float32 \(3, 16, 16\): expected a batch of normalised"):
        fit(linear(), (pairs, pairs))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_epoch": [print]}, "on_epoch is .*: expected a function, or None; for several, one that calls them all"),
        ({"checkpoint": True}, "checkpoint is True: expected a file's name"),
        ({"checkpoint": b"c"}, "checkpoint is b'c': expected a file's name"),
    ],
)
def test_what_is_of_another_kind_is_told_before_training(loaders, options, message):
    with pytest.raises(TypeError, match=message):
        fit(linear(), loaders, **options)


def test_where_no_seed_is_given_the_checkpoint_is_a_file_too(data):
    with pytest.raises(TypeError, match="checkpoint is 5: expected a file's name, as text or Path"):
        utils.run("batch", data, 1, seed=None, checkpoint=5, progress=False)


def test_a_lazy_network_has_nothing_for_a_checkpoint(loaders, tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ValueError, match="1.weight has no shape before the first batch: call the model once"):
        fit(net, loaders, checkpoint=tmp_path / "c")
    net(next(iter(loaders[0]))[0])
    assert len(fit(net, loaders, checkpoint=tmp_path / "c")) == 1


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"settings": {"loader": 3}}])
def test_a_file_of_somebody_elses_is_no_checkpoint(data, tmp_path, content):
    torch.save(content, tmp_path / "c")
    with pytest.raises(ValueError, match="is no checkpoint of this version of the kit"):
        utils.run("batch", data, 1, seed=None, device="cpu", checkpoint=tmp_path / "c", progress=False)


def test_a_whole_network_that_was_saved_is_not_to_be_deleted(data, tmp_path):
    torch.save(linear(), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="mine.pt holds more than tensors and plain values.*: name another file, or"):
        utils.run("batch", data, 1, device="cpu", checkpoint=tmp_path / "mine.pt", progress=False)


def test_complex_logits_are_told(loaders):
    class Complex(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x.flatten(1)[:, :10])

    with pytest.raises(TypeError, match=r"the model returns torch.complex64 \(\d+, 10\): expected logits"):
        utils.test(Complex(), loaders[1])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021), with the interface that its public versions share."""

    def __init__(self, params, rho=0.05, lr=0.01):
        super().__init__(params, {"rho": rho, "lr": lr})

    def first_step(self):
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["at"] = p.data.clone()
                p.data.add_(p.grad, alpha=group["rho"] / float(norm))

    def step(self, closure=None):
        assert closure is not None
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.copy_(self.state[p]["at"]).sub_(p.grad, alpha=group["lr"])


def test_sharpness_aware_minimisation_by_hand(loaders):
    net, own = linear(), linear()
    utils.train(net, loaders[0], SAM(net.parameters()), progress=False)
    loaders[0].set_epoch(loaders[0].epoch - 1)  # the same batches
    optimizer = SAM(own.parameters())
    for images, labels in loaders[0]:
        F.cross_entropy(own(images), labels).backward()

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            F.cross_entropy(own(images), labels).backward()

        optimizer.step(closure)
        optimizer.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters(), own.parameters()))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"data": "cifar10"}, TypeError, "data is a str: expected what utils.load_data returns"),
        ({"norm": ["batch", "group"]}, ValueError, r"unknown norm \['batch', 'group'\]: choose one of batch"),
        ({"dropout": "0.1"}, ValueError, "dropout='0.1': expected a number of at least 0"),
        ({"head_gain": float("inf")}, ValueError, "head_gain=inf: expected a number above 0"),
        ({"skip": "no"}, ValueError, "unknown skip 'no': choose False or True"),
        ({"augment": "yes"}, ValueError, "unknown augment 'yes': choose False or True"),
        ({"lr": np.array([0.1, 0.2])}, ValueError, "lr=array"),
    ],
)
def test_what_a_run_cannot_take_is_told(data, options, error, message):
    options = {"norm": "batch", "data": data, "epochs": 1} | options
    with pytest.raises(error, match=message):
        utils.run(**options, progress=False)


def test_more_classes_than_the_network_has_are_told(data):
    many = dataclasses.replace(data, name="CIFAR-100", classes=tuple(map(str, range(100))))
    with pytest.raises(ValueError, match="CIFAR-100 has 100 classes, and the network tells 10 apart: train a network"):
        utils.run("batch", many, 1, progress=False)


def test_a_network_in_another_default_dtype(data):
    torch.set_default_dtype(torch.bfloat16)
    try:
        net = model.Net("group")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    flat = net.C4.conv.weight.float().flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(32) / 3, atol=0.01)


@pytest.mark.parametrize("given", [torch.zeros(1000), np.zeros(1000), [0] * 1000])
def test_many_numbers_in_place_of_a_setting_are_named_in_a_line(loaders, data, given):
    calls = {
        "batch_size": lambda: utils.get_recipe(batch_size=given),
        "lr": lambda: utils.get_recipe(lr=given),
        "nesterov": lambda: utils.get_recipe(nesterov=given),
        "optimizer": lambda: utils.get_recipe(optimizer=given),
        "recipe": lambda: utils.get_recipe(given),
        "precision": lambda: utils.predict(linear(), loaders[1], precision=given),
        "shuffle": lambda: utils.Loader(data.train_images, data.train_labels, 64, given),
        "seed": lambda: utils.run("batch", data, seed=given),
        "data set": lambda: utils.load_data(given),
        "root": lambda: utils.load_data(root=given),
        "on_epoch": lambda: fit(linear(), loaders, on_epoch=given),
        "criterion": lambda: fit(linear(), loaders, criterion=given),
    }
    kind = {list: "list", np.ndarray: r"ndarray \(1000,\)", torch.Tensor: r"torch.float32 \(1000,\)"}[type(given)]
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=f"^[^\n]*{name}[^\n]*{kind}[^\n]*$") as raised:
            call()
        assert len(str(raised.value)) < 200
