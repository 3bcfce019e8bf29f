"""The loss and its gradients without autograd: the numbers of a plain loop, or else the plain loop itself."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET, THREE, count_backward, stand_in
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.optim.lr_scheduler import OneCycleLR

import model
import utils
from normkit.device import autocast
from normkit.fused import FusedLoss, fuse
from normkit.fused.build import library

pytestmark = [
    pytest.mark.skipif(library().reason is not None, reason=f"no kernel: {library().reason}"),
    pytest.mark.usefixtures("float32_by_default"),
]


@pytest.fixture
def by_kernel(monkeypatch):
    return count_backward(FusedLoss, monkeypatch)


def plain_loop(net, loader, optimizer, scheduler=None, criterion=F.cross_entropy):
    """An epoch by PyTorch's modules and autograd; returns the images' mean loss."""
    total = 0
    net.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(net(images), labels)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        total += loss.item() * len(labels)
    return total / len(loader.dataset)


def loader_of(size, batch_size):
    return utils.get_loaders(stand_in(size, 10), batch_size, device="cpu")[0]


def muon(parameters):
    return utils.build_optimizer(nn.ParameterList(parameters), utils.RECIPES["best"])


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.01),
    "fused SGD with momentum": functools.partial(
        torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True
    ),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-3),
    "Muon": muon,
}


@pytest.mark.parametrize("norm", THREE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_epoch_is_the_plain_loops(norm, name, by_kernel):
    torch.manual_seed(0)
    nets = [model.Net(norm, dropout=0)]
    nets.append(copy.deepcopy(nets[0]))
    losses = []
    for net, epoch in zip(nets, (functools.partial(utils.train, **QUIET), plain_loop)):
        optimizer = OPTIMIZERS[name](net.parameters())
        loss = epoch(net, loader_of(37, 8), optimizer, OneCycleLR(optimizer, 0.01, 6, cycle_momentum=False))
        losses.append(getattr(loss, "loss", loss))
    assert by_kernel == {True: 5}  # the last one of five images
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for (name, actual), expected in zip(nets[0].state_dict().items(), nets[1].state_dict().values()):
        if norm == "batch" and name.endswith(("conv.bias", "c3.bias", "c6.bias", "running_mean")):
            continue  # batch norm subtracts what a bias adds: its gradient is little but rounding errors
        torch.testing.assert_close(
            actual, expected, rtol=1e-2, atol=5e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_are_those_of_autograd_with_dropout_and_one_image(precision, by_kernel):
    """Both by the kernel, in the same precision, so to the last digits."""
    gradients = []
    for own in (False, True):
        torch.manual_seed(0)
        net = model.Net("batch", dropout=0.3)
        criterion = F.cross_entropy if own else lambda logits, labels: F.cross_entropy(logits, labels)
        utils.train(net, loader_of(17, 8), torch.optim.SGD(net.parameters(), 0.0), criterion=criterion,
                    precision=precision, **QUIET)  # fmt: skip
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert by_kernel == {False: 3, True: 3}
    largest = max(float(each.abs().max()) for each in gradients[0])
    for actual, expected in zip(*gradients):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * largest)


class Remembering(torch.optim.SGD):
    """An optimizer of one's own, that keeps the gradients of the step before."""

    kept = ()

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        for parameter, before in zip(parameters, self.kept):
            parameter.data.add_(before, alpha=-0.01)
        self.kept = [parameter.grad for parameter in parameters]
        return super().step(closure)


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.2)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, 0.9)


def after(change):
    """Returns what changes a network, builds an optimizer, and lets change(net, optimizer) do its part."""

    def build(net):
        optimizer = sgd(net)
        change(net, optimizer)
        return optimizer

    return build


def halve_gradient(parameter):
    parameter.grad.mul_(0.5)


def clip(optimizer, args, kwargs):
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)


def plain_step(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.data.add_(parameter.grad, alpha=-0.02)


def halve_where_they_arrive(net, optimizer):
    optimizer.kept = [get_gradient_edge(each).node for each in net.parameters()]
    for node in optimizer.kept:
        node.register_prehook(lambda gradients: (gradients[0] / 2,))


def round_gradients(net, optimizer):
    for parameter in net.parameters():
        parameter.grad_dtype = torch.bfloat16
    optimizer.step = functools.partial(plain_step, optimizer)


def tie(net):
    net.C9.conv.weight = net.C8.conv.weight
    return sgd(net)


LOOPS = {  # what a loop may bring -> its optimizer, its criterion, whether the kernel computes it
    "label smoothing": (sgd, nn.CrossEntropyLoss(label_smoothing=0.2), False),
    "weights of the classes": (sgd, nn.CrossEntropyLoss(torch.arange(10.0)), False),
    "a class that is ignored": (sgd, nn.CrossEntropyLoss(ignore_index=3), False),
    "a function": (sgd, smoothed, False),
    "another loss": (sgd, nn.MultiMarginLoss(), False),
    "the module": (sgd, nn.CrossEntropyLoss(), True),
    "a hook of a weight": (
        after(lambda net, _: net.C4.conv.weight.register_hook(lambda g: g / 2)), F.cross_entropy, False
    ),
    "a hook after a weight": (
        after(lambda net, _: net.C4.conv.weight.register_post_accumulate_grad_hook(halve_gradient)),
        F.cross_entropy,
        False,
    ),
    "a hook where gradients arrive": (after(halve_where_they_arrive), F.cross_entropy, False),
    "rounded gradients": (after(round_gradients), F.cross_entropy, not hasattr(torch.Tensor, "grad_dtype")),
    "an optimizer that keeps gradients": (lambda net: Remembering(net.parameters(), 0.05), F.cross_entropy, True),
    "an optimizer with a closure": (lambda net: torch.optim.LBFGS(net.parameters(), 0.1, 2), F.cross_entropy, True),
    "a frozen layer": (after(lambda net, _: net.C4.requires_grad_(False)), F.cross_entropy, True),
    "tied weights": (tie, F.cross_entropy, True),
    "the last layer alone": (lambda net: torch.optim.SGD(net.C10.parameters(), 0.1), F.cross_entropy, True),
    "a hook before the step": (after(lambda _, each: each.register_step_pre_hook(clip)), F.cross_entropy, True),
    "a step that is replaced": (
        after(lambda _, each: setattr(each, "step", functools.partial(plain_step, each))), F.cross_entropy, True
    ),
    "gradients that add up": (after(lambda _, each: setattr(each, "zero_grad", lambda: None)), F.cross_entropy, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_whatever_a_loop_brings_the_numbers_are_the_plain_loops(name, by_kernel):
    build, criterion, computed = LOOPS[name]
    torch.manual_seed(0)
    nets = [model.Net("group", dropout=0)]
    nets.append(copy.deepcopy(nets[0]))
    utils.train(nets[0], loader_of(24, 8), build(nets[0]), criterion=criterion, **QUIET)
    assert by_kernel[computed] == 3
    optimizer = build(nets[1])
    for images, labels in loader_of(24, 8):

        def closure(images=images, labels=labels, net=nets[1], optimizer=optimizer):
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            return loss

        closure()
        optimizer.step(*[closure] * isinstance(optimizer, torch.optim.LBFGS))
    for actual, expected in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=2e-3)
        assert getattr(actual.grad, "dtype", None) == getattr(expected.grad, "dtype", None)
        assert (actual.grad is None) == (expected.grad is None)
        if expected.grad is not None:  # as a whole: where a ReLU's input is zero but for rounding, values may differ
            assert (actual.grad - expected.grad).norm() < 0.1 * max(1, expected.grad.norm())


def at_step(number, change):
    """A schedule that does nothing but call change() after so many batches."""

    class Schedule:
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == number:
                change()

    return Schedule()


def test_what_changes_in_the_middle_of_an_epoch_counts_from_there(by_kernel):
    net, criterion, seen = model.Net("group", dropout=0), nn.CrossEntropyLoss(), []
    changes = {
        "a hook": lambda: net.C4.conv.weight.register_hook(seen.append),
        "a setting of the criterion": lambda: setattr(criterion, "label_smoothing", 0.1),
    }
    for change in changes.values():
        by_kernel.clear()
        utils.train(net, loader_of(48, 8), sgd(net), at_step(2, change), criterion=criterion, **QUIET)
        assert by_kernel == {True: 2, False: 4}
        net.C4.conv.weight._backward_hooks.clear()
    assert len(seen) == 4


@pytest.mark.parametrize(
    "owner, name", [(F, "cross_entropy"), (nn.CrossEntropyLoss, "forward"), (torch.Tensor, "backward")]
)
def test_what_is_replaced_for_all_is_called(owner, name, by_kernel, monkeypatch):
    original, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **how: calls.append(1) or original(*args, **how))
    net = model.Net("group")
    utils.train(net, loader_of(16, 8), sgd(net), criterion=nn.CrossEntropyLoss(), **QUIET)
    assert len(calls) == 2 and by_kernel == {False: 2}


def test_each_batch_has_gradients_of_its_own(by_kernel):
    net, kept = model.Net("group"), []
    schedule = at_step(0, None)
    schedule.step = lambda: kept.append(net.C10.weight.grad)
    utils.train(net, loader_of(24, 8), sgd(net), schedule, **QUIET)
    assert by_kernel == {True: 3} and len({each.data_ptr() for each in kept}) == 3


def test_a_gradient_is_a_tensor_of_its_own(by_kernel):
    net = model.Net("group")
    utils.train(net, loader_of(8, 8), sgd(net), **QUIET)
    for parameter in net.parameters():
        assert not parameter.grad._is_view() and parameter.grad.untyped_storage().nbytes() == 4 * parameter.numel()
    assert by_kernel == {True: 1}


def test_a_weight_that_is_computed_from_another(by_kernel):
    net, own = model.Net("group"), torch.randn(32, 32, 3, 3, requires_grad=True)
    with torch.nn.utils.stateless._reparametrize_module(net, {"C4.conv.weight": own * 0.1}):
        utils.train(net, loader_of(8, 8), sgd(net.C10), **QUIET)
    assert by_kernel == {False: 1} and own.grad.abs().sum() > 0


def test_labels_behind_a_minus_sign(by_kernel):
    images, labels = next(iter(loader_of(8, 8)))
    net = model.Net("group")
    batches = [(images, torch._neg_view(-labels)), (images, torch._efficientzerotensor(8, dtype=torch.int64))]
    utils.train(net, batches, sgd(net), **QUIET)
    assert by_kernel == {False: 2}


def test_labels_of_any_strides_and_others_beside_them(by_kernel):
    """A column of a table; and its copy lives as long as it is read."""
    results = []
    for strided in (False, True):
        torch.manual_seed(0)
        net = model.Net("batch", dropout=0.2)
        batches = [(x, torch.stack([y, y], 1)[:, 0] if strided else y) for x, y in loader_of(40, 8)]
        results.append(utils.train(net, batches, sgd(net), **QUIET))
        assert int(net.C1.norm.num_batches_tracked) == 5
    assert results[0] == results[1] and by_kernel == {True: 10}


def test_shares_of_classes_and_other_labels_are_pytorchs(by_kernel):
    images, labels = next(iter(loader_of(8, 8)))
    shares, net = F.one_hot(labels, 10).float(), model.Net("group")
    utils.train(net, [(images, shares)] * 3, sgd(net), **QUIET)
    assert by_kernel == {False: 3}
    for bad, message in (
        (labels + 5, "labels run from"),
        (labels[:5], "expected int64"),
        (labels.int(), "expected int6"),
    ):
        with pytest.raises(ValueError, match=message):
            utils.train(net, [(images, labels), (images, bad)], sgd(net), **QUIET)
    batch_norm = model.Net("batch")
    with pytest.raises(ValueError, match="labels run from -100"):
        utils.train(batch_norm, [(images, labels - 100)], sgd(batch_norm), **QUIET)
    assert int(batch_norm.C1.norm.num_batches_tracked) == 1  # as in any loop: the network ran once


def test_a_loss_that_is_huge_stops_before_the_weights_are_spoilt(by_kernel):
    net, images = model.Net("group", dropout=0), torch.randn(4, 3, 16, 16)
    optimizer, before = torch.optim.SGD(net.parameters(), 0.0), copy.deepcopy(net.state_dict())
    with pytest.raises(FloatingPointError, match="not finite from batch 2 on.*the images themselves"):
        utils.train(net, [(images, torch.arange(4))] * 2 + [(images * torch.nan, torch.arange(4))], optimizer, **QUIET)
    assert by_kernel == {True: 2}
    torch.testing.assert_close(net.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", THREE)
@pytest.mark.parametrize("N", [1, 2, 37, 64, 100])
def test_any_number_of_threads_takes_the_same_step(N, norm, dtype, monkeypatch):
    """One image after another, some at a time, or all, to the last digit: it depends on the number of threads."""
    net, images, labels = model.Net(norm, dropout=0.2), torch.randn(N, 3, 12, 20), torch.randint(10, (N,))
    fused, steps = fuse(net), []
    for threads in (1, 2, 3, 16, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.manual_seed(0)
        loss, correct = (fast := FusedLoss(fused, F.cross_entropy, dtype)).forward(images, labels)
        net.zero_grad()
        assert fast.backward() and not fast.backward()
        steps.append([correct, loss, *(parameter.grad for parameter in net.parameters())])
    for step in steps[1:]:
        assert all(map(torch.equal, steps[0], step))
    torch.manual_seed(0)
    with autocast(torch.device("cpu"), dtype):
        logits = fused(images).float()
    assert steps[0][0] == (logits.argmax(1) == labels).sum()
    loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    largest = max(float(each.abs().max()) for each in gradients)
    for actual, expected in zip(steps[0][1:], [loss, *gradients]):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("N, K", [(1, 10), (7, 10), (3, 1), (5, 33)])
def test_the_cross_entropy_is_the_definitions(N, K, scale):
    net, labels = model.Net("group", dropout=0), torch.randint(K, (N,))
    net.C10 = model.Conv2d(32, K, 1)
    for parameter in net.C10.parameters():
        parameter.data *= scale
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32)
    loss, correct = fast.forward(torch.randn(N, 3, 8, 8), labels)
    exact = fast.step.logits.flatten(1).double().requires_grad_()
    fast.backward()
    expected = F.cross_entropy(exact, labels)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert correct == (exact.argmax(1) == labels).sum()  # with scale 0 all are equal: the first counts
    torch.testing.assert_close(net.C10.bias.grad.double(), exact.grad.sum(0), rtol=1e-5, atol=1e-7)
