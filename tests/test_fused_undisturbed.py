"""What is kept from batch to batch where nobody has a word between them, and that it is not where somebody has."""

import copy
import functools
from unittest.mock import Mock

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from helpers import QUIET, count_backward, everything, stand_in
from torch.optim import lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

import model
import utils
from normkit import optim
from normkit.fused import FusedLoss, loss
from normkit.fused.build import library
from normkit.stepper import Stepper

pytestmark = pytest.mark.skipif(library().reason is not None, reason=f"no kernel: {library().reason}")
IMAGES, LABELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)


@pytest.fixture
def by_kernel(monkeypatch):
    return count_backward(FusedLoss, monkeypatch)


@pytest.fixture
def loader():
    return utils.get_loaders(stand_in(48, 10), 8, device="cpu")[0]


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.01, 0.9)


OPTIMIZERS = {
    "sgd": sgd,
    "muon": lambda net: utils.build_optimizer(net, utils.RECIPES["best"]),
    "lbfgs": lambda net: torch.optim.LBFGS(net.parameters()),
}


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_optimizers_and_schedules_of_torch_and_the_kit_are_plain(build, loader):
    optimizer = OPTIMIZERS[build](model.Net())
    assert optim.run_no_user_code(loader, optimizer)
    for schedule in (lr_scheduler.StepLR(optimizer, 1), lr_scheduler.CosineAnnealingLR(optimizer, 3)):
        assert optim.run_no_user_code(loader, optimizer, schedule)
    assert not optim.run_no_user_code(loader, optimizer, lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch))


class OwnLoader(utils.Loader):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            self.act()


class OwnBatches(list):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            self.act()


class OwnSchedule:
    def __init__(self, act):
        self.step = act


def with_own(method):
    """Returns what replaces a method of an optimizer by one that calls act, and looks like the one before."""

    def change(loader, net, act, patch):
        optimizer = sgd(net)
        original = getattr(optimizer, method)

        @functools.wraps(original)
        def own(*args, **options):
            act()
            return original(*args, **options)

        setattr(optimizer, method, own)
        return loader, optimizer, lr_scheduler.OneCycleLR(optimizer, 0.01, 6) if method == "zero_grad" else None

    return change


def with_hook(register):
    """Returns what registers act as an optimizer's hook, below a schedule, which wraps the step."""

    def change(loader, net, act, patch):
        optimizer = sgd(net)
        getattr(optimizer, register)(lambda *_: act())
        return loader, optimizer, lr_scheduler.OneCycleLR(optimizer, 0.01, 6)

    return change


def own_optimizer(loader, net, act, patch):
    class OwnOptimizer(torch.optim.SGD):
        def _init_group(self, *lists):  # called by SGD.step
            act()
            return super()._init_group(*lists)

    return loader, OwnOptimizer(net.parameters(), 0.01), None


def own_loader(loader, net, act, patch):
    loader.__class__, loader.act = OwnLoader, act
    return loader, sgd(net), None


def own_sampler(loader, net, act, patch):
    images, labels = everything(loader)
    batches = OwnBatches(torch.arange(48).view(6, 8).tolist())
    batches.act = act
    return DataLoader(TensorDataset(images, labels), batch_sampler=batches), sgd(net), None


def hook_of_all(hooks):
    def change(loader, net, act, patch):
        patch.setitem(hooks, "own", lambda *_: act())
        return loader, sgd(net), None

    return change


def around_another(loader, net, act, patch):
    inner = sgd(net)
    inner.register_step_post_hook(lambda *_: act())
    return loader, pytorch_optimizer.Lookahead(inner), None


def for_all(kind, method):
    """Returns what replaces a method of a class by one that calls act first."""

    def change(loader, net, act, patch):
        optimizer = sgd(net)
        parts = loader, optimizer, lr_scheduler.StepLR(optimizer, 10)
        original = getattr(kind, method)
        patch.setattr(kind, method, lambda *args, **options: act() or original(*args, **options))
        return parts

    return change


def mock_of_all(loader, net, act, patch):
    optimizer = sgd(net)
    patch.setattr(torch.optim.SGD, "step", Mock(side_effect=act))
    return loader, optimizer, None


OTHERS = {  # who has a word between two batches
    "a hook before the step": with_hook("register_step_pre_hook"),
    "a hook after the step": with_hook("register_step_post_hook"),
    "a hook before all steps": hook_of_all(_global_optimizer_pre_hooks),
    "a hook after all steps": hook_of_all(_global_optimizer_post_hooks),
    "a step of one's own": with_own("step"),
    "a zero_grad of one's own": with_own("zero_grad"),
    "an optimizer of one's own": own_optimizer,
    "a loader of one's own": own_loader,
    "a sampler of one's own": own_sampler,
    "a schedule of one's own": lambda loader, net, act, patch: (loader, sgd(net), OwnSchedule(act)),
    "an optimizer around another": around_another,
    "a method of all optimizers": for_all(torch.optim.SGD, "_init_group"),
    "a mock": mock_of_all,
    "a method of all schedules": for_all(lr_scheduler.StepLR, "get_lr"),
}


@pytest.mark.parametrize("who", OTHERS)
def test_what_somebody_changes_between_two_batches_counts_from_the_next(who, loader, by_kernel, monkeypatch):
    """Every one acts once a batch; with the second the network gets a hook, which the kernel would not call."""
    net, calls, seen = model.Net("group"), [], []

    def act():
        calls.append(None)
        if len(calls) == 2:
            net.C4.conv.weight.register_hook(seen.append)

    batches, optimizer, schedule = OTHERS[who](loader, net, act, monkeypatch)
    utils.train(net, batches, optimizer, schedule, **QUIET)
    assert by_kernel == {True: 2, False: 4} and len(seen) == 4


class Slots:
    """An optimizer that has no more than a loop asks of it, and no dict."""

    __slots__ = ("param_groups",)

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]

    def zero_grad(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter -= 0.01 * parameter.grad


def test_an_optimizer_of_few_attributes(loader):
    nets = []
    for optimizer_of in (Slots, lambda parameters: torch.optim.SGD(parameters, 0.01)):
        torch.manual_seed(0)
        nets.append(model.Net("group", dropout=0))
        loader.set_epoch(0)
        utils.train(nets[-1], loader, optimizer_of(nets[-1].parameters()), precision="float32", **QUIET)
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def momentum_cycle(optimizer):
    return lr_scheduler.CyclicLR(optimizer, 0.001, 0.1, 2, base_momentum=0.5, max_momentum=0.9)


def momentum_stops(optimizer):
    return lr_scheduler.CyclicLR(optimizer, 0.001, 0.1, 2, base_momentum=0.0, max_momentum=0.9)


SGDS = {  # settings of SGD, a schedule stepped after each batch, and how many of six steps go through SGD.step
    "momentum": ({"momentum": 0.9}, None, 1),
    "Nesterov": ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, None, 1),
    "dampening": ({"momentum": 0.9, "dampening": 0.5, "maximize": True}, None, 1),
    "a schedule": ({"momentum": 0.9, "lr": torch.tensor(0.05)}, lambda each: lr_scheduler.ExponentialLR(each, 0.5), 1),
    "momentum that moves": ({"momentum": 0.9}, momentum_cycle, 1),
    "momentum that stops": ({"momentum": 0.9, "dampening": 0.1}, momentum_stops, 2),
    "no momentum": ({}, None, 6),
    "not fused": ({"momentum": 0.9, "fused": False}, None, 6),
}


@pytest.mark.parametrize("name", SGDS)
def test_steps_of_sgd_are_those_of_its_step(name, loader, monkeypatch):
    """To the bit, with groups of two rates and one of nothing, and parameters of none."""
    settings, schedule_of, expected = SGDS[name]
    step_groups, at_once, results = Stepper.step_groups, [], []
    monkeypatch.setattr(Stepper, "step_groups", lambda self: at_once.append(step_groups(self)) or at_once[-1])
    for run_no_user_code in (optim.run_no_user_code, lambda *parts: False):
        monkeypatch.setattr(optim, "run_no_user_code", run_no_user_code)
        torch.manual_seed(0)
        net = model.Net("batch")
        net.C3.requires_grad_(False)
        trained = [each for each in net.parameters() if each.requires_grad]
        groups = [{"params": trained[:5], "lr": 0.02}, {"params": trained[5:]}, {"params": []}]
        optimizer = torch.optim.SGD(groups, **{"lr": 0.01, "fused": True} | copy.deepcopy(settings))
        loader.set_epoch(0)
        utils.train(net, loader, optimizer, schedule_of and schedule_of(optimizer), **QUIET)
        state = optimizer.state_dict()
        momenta = [each.get("momentum_buffer") for each in state["state"].values()]
        rates = [torch.as_tensor(group["lr"]) for group in state["param_groups"]]
        results.append([*net.state_dict().values(), *rates, *(each for each in momenta if each is not None)])
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
    assert (at_once.count(True), at_once.count(False)) == (6 - expected, expected + 6)


def test_a_scale_of_the_gradients_counts(loader):
    net = model.Net("group")
    optimizer = torch.optim.SGD(net.parameters(), 1.0, 0.5, fused=True)
    before = net.C10.bias.detach().clone()
    optimizer.grad_scale = torch.tensor(torch.inf)  # as of a GradScaler, which divides by it
    utils.train(net, loader, optimizer, **QUIET)
    assert torch.equal(net.C10.bias, before)


def test_what_a_thread_does_to_an_optimizer_is_seen_after_some_steps(monkeypatch):
    net, had_state, forward = model.Net("group"), [], FusedLoss.forward
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, fused=True)

    def forward_and_clear(self, images, labels):
        had_state.append(bool(optimizer.state))
        if len(had_state) == 2:
            optimizer.state.clear()
        return forward(self, images, labels)

    monkeypatch.setattr(FusedLoss, "forward", forward_and_clear)
    loader = utils.get_loaders(stand_in(loss.KEPT_FOR + 3, 10), 1, device="cpu")[0]
    utils.train(net, loader, optimizer, **QUIET)
    assert had_state == [False, True, *[False] * loss.KEPT_FOR, True]


def test_parameters_of_two_dtypes_in_a_group():
    parameters = [torch.zeros(2, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.float64)]
    stepper = Stepper(torch.optim.SGD(parameters, 1.0, 0.5, fused=True), undisturbed=True)
    for _ in range(3):
        for each in parameters:
            each.grad = torch.ones_like(each)
        stepper.step(None, None)
    assert [each.tolist() for each in parameters] == [[-4.25, -4.25]] * 2


def test_parameters_that_lose_their_gradients_stay_as_they_are():
    net = model.Net("group")
    stepper = Stepper(torch.optim.SGD(net.parameters(), 0.01, 0.9, fused=True), undisturbed=True)
    for _ in range(2):
        F.cross_entropy(net(IMAGES), LABELS).backward()
        stepper.step(None, None)
    net.C3.requires_grad_(False)
    stepper.zero_grad()
    assert all(each.grad is None for each in net.parameters())
    F.cross_entropy(net(IMAGES), LABELS).backward()
    before = copy.deepcopy(net.state_dict())
    stepper.step(None, None)
    moved = {name for name, each in net.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == {name for name, _ in net.named_parameters() if not name.startswith("C3")}


@pytest.mark.parametrize("change", ["a group more", "a layer less"])
def test_what_a_hook_of_the_network_does_to_the_optimizer_is_seen(change, loader, monkeypatch):
    """With a hook a network runs as its modules, between which and the step there is somebody."""
    results = []
    for run_no_user_code in (optim.run_no_user_code, lambda *parts: False):
        monkeypatch.setattr(optim, "run_no_user_code", run_no_user_code)
        torch.manual_seed(0)
        net, calls = model.Net("group"), []
        last = list(net.C10.parameters())
        optimizer = torch.optim.SGD(list(net.parameters())[:-2], 0.01, 0.9, fused=True)

        def act(*_, net=net, calls=calls, optimizer=optimizer, last=last):
            calls.append(None)
            if len(calls) == 3 and change == "a group more":
                optimizer.add_param_group({"params": last, "lr": 0.5})
            elif len(calls) == 3:
                net.C3.requires_grad_(False)

        net.C4.register_forward_hook(act)
        loader.set_epoch(0)
        utils.train(net, loader, optimizer, **QUIET)
        results.append(list(net.parameters()))
    assert all(map(torch.equal, *results))


def test_a_profile_shows_each_step(loader):
    net = model.Net("group")
    with torch.profiler.profile() as profile:
        utils.train(net, loader, torch.optim.SGD(net.parameters(), 0.01, 0.9, fused=True), **QUIET)
    counts = {each.key: each.count for each in profile.key_averages()}
    assert counts["Optimizer.step#SGD.step"] == counts["Optimizer.zero_grad#SGD.zero_grad"] == 6


def test_gradients_that_no_optimizer_lets_go_of_add_up(loader, monkeypatch):
    gradients = []
    for run_no_user_code in (optim.run_no_user_code, lambda *parts: False):
        monkeypatch.setattr(optim, "run_no_user_code", run_no_user_code)
        torch.manual_seed(0)
        net = model.Net("group")
        loader.set_epoch(0)
        utils.train(net, loader, torch.optim.SGD(list(net.parameters())[:-2], 0.01, 0.9, fused=True), **QUIET)
        gradients.append([each.grad for each in net.parameters()])
    assert all(map(torch.equal, *gradients))
