"""What is kept from batch to batch where nobody has a word between them, and that it is not where somebody has."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET, THREE, count_backward, stand_in
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import model
import utils
from normkit import optim
from normkit.fused import FusedLoss, fuse, loss
from normkit.fused.build import library

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
def test_optimizers_and_schedules_of_torch_and_the_kit_are_plain(build):
    optimizer = OPTIMIZERS[build](model.Net())
    assert optim.is_plain(optimizer)
    for schedule in (lr_scheduler.StepLR(optimizer, 1), lr_scheduler.CosineAnnealingLR(optimizer, 3)):
        assert optim.is_plain(optimizer, schedule)
    assert not optim.is_plain(optimizer, lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch))


class OwnLoader(utils.Loader):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            self.act()


class OwnSchedule:
    def __init__(self, act):
        self.step = act


def with_own(method):
    """Returns what replaces a method of an optimizer by one that calls act, and looks like the one before."""

    def change(loader, net, act):
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

    def change(loader, net, act):
        optimizer = sgd(net)
        getattr(optimizer, register)(lambda *_: act())
        return loader, optimizer, lr_scheduler.OneCycleLR(optimizer, 0.01, 6)

    return change


def own_optimizer(loader, net, act):
    class OwnOptimizer(torch.optim.SGD):
        def _init_group(self, *lists):  # called by SGD.step
            act()
            return super()._init_group(*lists)

    return loader, OwnOptimizer(net.parameters(), 0.01), None


def own_loader(loader, net, act):
    loader.__class__, loader.act = OwnLoader, act
    return loader, sgd(net), None


def hook_of_all(register):
    def change(loader, net, act):
        act.handle = register(lambda *_: act())
        return loader, sgd(net), None

    return change


OTHERS = {  # who has a word between two batches
    "a hook before the step": with_hook("register_step_pre_hook"),
    "a hook after the step": with_hook("register_step_post_hook"),
    "a hook before all steps": hook_of_all(register_optimizer_step_pre_hook),
    "a hook after all steps": hook_of_all(register_optimizer_step_post_hook),
    "a step of one's own": with_own("step"),
    "a zero_grad of one's own": with_own("zero_grad"),
    "an optimizer of one's own": own_optimizer,
    "a loader of one's own": own_loader,
    "a schedule of one's own": lambda loader, net, act: (loader, sgd(net), OwnSchedule(act)),
}


@pytest.mark.parametrize("who", OTHERS)
def test_what_somebody_changes_between_two_batches_counts_from_the_next(who, loader, by_kernel):
    """Every one acts once a batch; with the second the network gets a hook, which the kernel would not call."""
    net, calls, seen = model.Net("group"), [], []

    def act():
        calls.append(None)
        if len(calls) == 2:
            net.C4.conv.weight.register_hook(seen.append)

    batches, optimizer, schedule = OTHERS[who](loader, net, act)
    try:
        utils.train(net, batches, optimizer, schedule, **QUIET)
    finally:
        if hasattr(act, "handle"):
            act.handle.remove()
    assert by_kernel == {True: 2, False: 4} and len(seen) == 4


def step(fast, net, images=IMAGES, labels=LABELS):
    """Returns the loss of a batch and the gradients, as they are; None for the loss where the kernel stood back."""
    value, _ = fast.forward(images, labels)
    net.zero_grad()
    fast.backward()
    return value, [each.grad for each in net.parameters()]


def test_what_a_thread_changes_is_seen_after_some_batches():
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    step(fast, net)
    net.C4.conv.weight.register_hook(print)
    losses = [step(fast, net)[0] for _ in range(loss.SOME + 1)]
    assert losses[-1] is None and None not in losses[:-1]


def test_gradients_follow_weights_that_a_thread_has_laid_out_anew():
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    for _ in range(3):
        step(fast, net)
    for each in net.parameters():
        each.data = each.data.contiguous(memory_format=torch.channels_last) if each.dim() == 4 else each.data
    for _ in range(loss.SOME):
        _, gradients = step(fast, net)
    assert [each.stride() for each in gradients] == [each.stride() for each in net.parameters()]


@pytest.mark.parametrize("norm", THREE)
def test_gradients_are_written_to_two_places_in_turn_and_are_those_of_new_ones(norm):
    net = model.Net(norm, dropout=0.2)
    places = set()
    reusing, new = (FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=each) for each in (True, False))
    for i in range(5):
        images = IMAGES * (i + 1)
        torch.manual_seed(i)
        expected = [each.clone() for each in step(new, net, images)[1]]
        torch.manual_seed(i)
        gradients = step(reusing, net, images)[1]
        assert all(map(torch.equal, gradients, expected))
        places.add(gradients[0].data_ptr())
        del gradients
    assert len(places) == 2


def test_gradients_that_somebody_has_are_not_written_over():
    """A signal handler, say, which Python calls between any two lines."""
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    step(fast, net)
    held = net.C10.bias.grad
    before = held.clone()
    for i in range(4):
        step(fast, net, IMAGES * i)
    assert torch.equal(held, before)


def test_gradients_that_add_up_are_not_written_over(monkeypatch):
    monkeypatch.setattr(loss, "are_held", lambda tensors: False)  # as older versions of PyTorch say of a .grad
    net = model.Net("group", dropout=0)
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    total = torch.zeros(10)
    for i in range(6):
        fast.forward(IMAGES * i, LABELS)
        for name, parameter in net.named_parameters():
            if name != "C10.bias":
                parameter.grad = None
        fast.backward()
        total += torch.autograd.grad(F.cross_entropy(net(IMAGES * i), LABELS), net.C10.bias)[0]
    torch.testing.assert_close(net.C10.bias.grad, total)


def test_labels_are_looked_at_in_each_batch():
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    assert step(fast, net)[0] is not None
    assert step(fast, net, labels=LABELS + 7)[0] is None
