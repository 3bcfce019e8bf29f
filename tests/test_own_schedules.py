"""Optimizers, schedules and criteria of one's own in the kit's loops, and where they stand in a checkpoint."""

import functools
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import everything, fit, linear, same
from pytorch_optimizer import ScheduleFreeSGD
from torch import nn
from torch.optim import lr_scheduler

import utils
from normkit.optim import check_schedule

pytestmark = pytest.mark.usefixtures("float32_by_default")

# ---------------------------------------------------------------------- optimizers, schedules


def test_several_parameter_groups_are_logged_each(loaders, capsys):
    net = linear()
    optimizer = torch.optim.SGD([{"params": [net[1].weight], "lr": 0.1}, {"params": [net[1].bias]}], 0.01)
    utils.fit(net, *loaders, optimizer, epochs=1)
    said = capsys.readouterr().out
    assert "group 0 to 1.0000e-01" in said and "group 1 to 1.0000e-02" in said


def test_a_schedule_free_optimizer_is_tested_with_its_averages(loaders):
    net = linear()
    optimizer = ScheduleFreeSGD(net.parameters(), lr=0.05)
    row = fit(net, loaders, optimizer, epochs=2)[-1]
    plain = linear()
    by_hand = ScheduleFreeSGD(plain.parameters(), lr=0.05)
    for epoch in range(2):
        by_hand.train()
        loaders[0].set_epoch(epoch)
        for images, labels in loaders[0]:
            by_hand.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            by_hand.step()
        by_hand.eval()
    torch.testing.assert_close(net.state_dict(), plain.state_dict())
    optimizer.eval()
    assert utils.test(net, loaders[1]).loss == pytest.approx(row["test_loss"])
    optimizer.train()
    assert utils.test(net, loaders[1]).loss != pytest.approx(row["test_loss"])


def test_the_optimizer_has_to_be_the_models_and_the_scheduler_the_optimizers(loaders):
    net, other = linear(), linear()
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        fit(net, loaders, torch.optim.SGD(other.parameters(), 0.1))
    assert len(fit(net, loaders, torch.optim.SGD([net[1].bias], 0.1))) == 1  # some of them will do
    scheduler = lr_scheduler.StepLR(torch.optim.SGD(other.parameters(), 0.1), 1)
    with pytest.raises(ValueError, match="another optimizer"):
        fit(net, loaders, None, scheduler)


FAILING = {
    "StepLR(step_size=0)": lambda o: lr_scheduler.StepLR(o, 0),
    "CosineAnnealingLR(T_max=0)": lambda o: lr_scheduler.CosineAnnealingLR(o, 0),
    "OneCycleLR, too short": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=2),
    "in a sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.CosineAnnealingLR(o, 0)], [1]
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_schedule_that_would_fail_on_the_way_is_refused_before_training(loaders, name, capsys):
    net = linear()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduler = FAILING[name](optimizer)
    rate = optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="fails at step .* of the 3 it is to take, one after each epoch"):
        utils.fit(net, *loaders, optimizer, scheduler, 3)
    assert "Epoch" not in capsys.readouterr().out and same(before, net.state_dict())
    assert optimizer.param_groups[0]["lr"] == rate


AROUND = {
    "alone": lambda o, own: own,
    "in a sequence": lambda o, own: lr_scheduler.SequentialLR(o, [own, lr_scheduler.ExponentialLR(o, 0.9)], [9]),
    "in a chain": lambda o, own: lr_scheduler.ChainedScheduler([own, lr_scheduler.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("around", AROUND)
def test_functions_of_ones_own_are_not_tried_in_advance(around):
    optimizer, seen = torch.optim.SGD(linear().parameters(), 0.1), []
    own = lr_scheduler.LambdaLR(optimizer, lambda epoch: seen.append(epoch) or 1.0)
    scheduler = AROUND[around](optimizer, own)
    seen.clear()
    check_schedule(scheduler, optimizer, "epoch", epochs=5, batches=3)
    assert not seen


SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: np.interp(epoch, [0, 1, 3], [0.2, 1, 0.1])),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("same_objects", [True, False])
def test_every_schedule_goes_on_from_its_checkpoint_as_if_never_stopped(loaders, tmp_path, name, same_objects):
    def build():
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        return net, optimizer, SCHEDULES[name](optimizer)

    def run(parts, checkpoint=None, stop_after=None):
        def stop(history):
            if len(history) == stop_after:
                raise KeyboardInterrupt

        net, optimizer, scheduler = parts
        options = {"checkpoint": checkpoint, "on_epoch": stop}
        return fit(net, loaders, optimizer, scheduler, epochs=4, **options), net.state_dict()

    plain = build()
    rates = []
    for _ in range(4):  # what torch itself gives
        rates.append(plain[1].param_groups[0]["lr"])
        plain[1].step()
        plain[2].step(*[1.0] * (name == "ReduceLROnPlateau"))
    history, weights = run(build())
    if name != "ReduceLROnPlateau":
        assert [row["lr"] for row in history] == pytest.approx(rates)
    parts = build()
    assert len(run(parts, tmp_path / "c", stop_after=2)[0]) == 2
    again, resumed = run(parts if same_objects else build(), tmp_path / "c")
    assert same(list(again), list(history)) and same(weights, resumed)


def test_settings_identify_a_run_and_where_its_schedule_stands_does_not(loaders, tmp_path):
    def run(lr, gamma, epochs):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), lr)
        return fit(net, loaders, optimizer, lr_scheduler.StepLR(optimizer, 1, gamma), epochs, checkpoint=tmp_path / "c")

    run(0.1, 0.5, 2)
    for lr, gamma in ((0.05, 0.5), (0.025, 0.5), (0.1, 0.1)):  # 0.025: where the first run's rate stands now
        with pytest.raises(ValueError, match="of another run"):
            run(lr, gamma, 3)
    assert len(run(0.1, 0.5, 3)) == 3


def test_a_state_that_no_checkpoint_can_hold_is_refused_before_training(loaders, tmp_path):
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.param_groups[0]["note"] = Focal  # a class
    with pytest.raises(TypeError, match=r"state of the optimizer \(SGD\).*train without checkpoint="):
        fit(net, loaders, optimizer, checkpoint=tmp_path / "c")


def test_after_an_explosion_weights_optimizer_and_schedule_are_those_of_the_last_epoch(loaders):
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    fit(net, loaders, optimizer, scheduler)
    before = [part.state_dict() for part in (net, optimizer, scheduler)]
    before = [{k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()} for state in before]
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    optimizer.param_groups[0]["lr"] = 1e20  # large, but no number overflows
    with pytest.raises(FloatingPointError, match="the loss is huge from batch 1 on, at learning rate 1e"):
        fit(net, loaders, optimizer, scheduler)
    assert same(before[0], net.state_dict()) and same(before[2], scheduler.state_dict())
    assert all(map(torch.equal, momenta, [state["momentum_buffer"] for state in optimizer.state.values()]))
    optimizer.param_groups[0]["lr"] = 0.001
    assert fit(net, loaders, optimizer)[-1]["train_loss"] < 10


# ------------------------------------------------------------------------------- criteria, wrappers


class Focal(nn.Module):
    def forward(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize(
    "criterion, message",
    [
        (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum': expected 'mean'"),
        (functools.partial(F.cross_entropy, reduction="sum"), "reduction='sum': expected 'mean'"),
        (Focal(), r"returns torch.float32 \(64,\): expected one number"),
        (lambda logits, labels: (logits.mean(), 0), "returns tuple: expected one number"),
        (lambda logits, labels: logits.mean().item(), "returns float: expected one number"),
    ],
)
def test_a_criterion_gives_the_mean_of_a_batch_or_is_refused(loaders, criterion, message):
    net = linear()
    for call in (
        lambda: fit(net, loaders, criterion=criterion),
        lambda: utils.test(net, [next(iter(loaders[1]))], criterion=criterion),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    with pytest.raises(ValueError, match="all of them frozen"):
        fit(linear().requires_grad_(False), loaders)


class OwnMean(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(reduction="none")

    def forward(self, logits, labels):
        return super().forward(logits, labels).square().mean()


@pytest.mark.parametrize("criterion", [nn.KLDivLoss(reduction="batchmean"), OwnMean()])
def test_a_mean_may_have_another_name(loaders, criterion):
    images, labels = everything(loaders[1])
    targets = F.one_hot(labels, 10).float() if isinstance(criterion, nn.KLDivLoss) else labels
    net = nn.Sequential(linear(), nn.LogSoftmax(1))
    expected = criterion(net(images), targets).item()
    assert utils.test(net, [(images, targets)], criterion=criterion).loss == pytest.approx(expected, rel=1e-5)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    trained = utils.train(net, [(images, targets)], optimizer, criterion=criterion, progress=False)
    assert trained.loss == pytest.approx(expected, rel=1e-5)


class GradualWarmup(lr_scheduler.LRScheduler):
    """Raises the rate over some epochs, and then lets another scheduler go on: a class that many projects copy."""

    def __init__(self, optimizer, epochs, after):
        self.epochs, self.after = epochs, after
        super().__init__(optimizer)

    def get_lr(self):
        if self.last_epoch <= self.epochs:
            return [rate * self.last_epoch / self.epochs for rate in self.base_lrs]
        return self.after.get_last_lr()

    def step(self, *args):
        if self.last_epoch >= self.epochs:
            self.after.step()
            self.last_epoch += 1
            self._last_lr = self.after.get_last_lr()
        else:
            super().step()


def test_a_scheduler_around_another_and_one_with_a_state_of_its_own_are_left_alone(loaders):
    def rates(fitted):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        scheduler = GradualWarmup(optimizer, 2, lr_scheduler.ExponentialLR(optimizer, 0.5))
        if fitted:
            return [row["lr"] for row in fit(net, loaders, optimizer, scheduler, 6)]
        found = []
        for _ in range(6):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step(), scheduler.step()
        return found

    assert rates(True) == pytest.approx(rates(False))
    net, given = linear(), iter([1, 0.5, 0.25, 0.125])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: next(given))
    assert [row["lr"] for row in fit(net, loaders, optimizer, scheduler, 3)] == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize("wrap", ["method", "partial"])
def test_a_scheduler_whose_step_was_replaced_steps(loaders, wrap):
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = types.MethodType(lambda self: lr_scheduler.ExponentialLR.step(self), scheduler)
    scheduler.step = step if wrap == "method" else functools.partial(scheduler.step)
    assert [row["lr"] for row in fit(net, loaders, optimizer, scheduler, 3)] == [0.1, 0.05, 0.025]


def test_a_scale_function_with_a_state_is_called_once_a_step(loaders):
    def schedule():
        optimizer, given = torch.optim.SGD(linear().parameters(), 0.1), iter([0, 0.5, 0.25, 1, 1])
        next_one = types.MethodType(lambda self, x: next(given), optimizer)
        options = {"scale_fn": next_one, "scale_mode": "iterations"}
        return optimizer, lr_scheduler.CyclicLR(optimizer, 0.01, 0.11, 1, cycle_momentum=False, **options)

    optimizer, scheduler = schedule()
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    optimizer, scheduler = schedule()
    net = linear()
    optimizer.param_groups[0]["params"] = list(net.parameters())
    assert [row["lr"] for row in fit(net, loaders, optimizer, scheduler, 4)] == rates


def test_a_rate_that_is_a_tensor_stays_the_one_that_was_given(loaders):
    net, lr = linear(), torch.tensor(0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr)
    fit(net, loaders, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5), 2)
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(0.025)


def test_lbfgs_evaluates_as_often_as_in_a_plain_loop(loaders):
    def built():
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm2d(3), linear())
        return net, torch.optim.LBFGS(net.parameters(), 0.1, max_iter=3)

    net, optimizer = built()
    utils.train(net, loaders[1], optimizer, progress=False)
    plain, optimizer = built()
    plain.train()
    for images, labels in loaders[1]:

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same(net.state_dict(), plain.state_dict())


def test_an_optimizer_may_have_no_rate(loaders):
    class Own(torch.optim.SGD):
        def __init__(self, parameters, scale, **rate):
            torch.optim.Optimizer.__init__(self, parameters, {"scale": scale} | rate)

        @torch.no_grad()
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad * self.param_groups[0]["scale"])

    for rate in ({}, {"lr": None}):
        net = linear()
        assert np.isnan(fit(net, loaders, Own(net.parameters(), 0.1, **rate))[0]["lr"])
        before = [parameter.clone() for parameter in net.parameters()]
        with pytest.raises(FloatingPointError, match="the loss is huge from batch 1 on, at learning rate nan"):
            fit(net, loaders, Own(net.parameters(), 1e20, **rate))
        assert all(map(torch.equal, before, net.parameters()))


class Halving:
    """A schedule with step() alone."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.param_groups[0]["lr"] /= 2


def test_a_schedule_that_can_only_step(loaders):
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    assert [row["lr"] for row in fit(net, loaders, optimizer, Halving(optimizer), 3)] == [0.1, 0.05, 0.025]


def test_a_checkpoint_follows_a_link_and_stays_where_it_was_named(loaders, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "c").symlink_to(tmp_path / "disk" / "file")
    monkeypatch.chdir(tmp_path / "here")
    net = linear()
    fit(net, loaders, epochs=2, checkpoint="c", on_epoch=lambda history: monkeypatch.chdir(tmp_path))
    assert (tmp_path / "here" / "c").is_symlink() and (tmp_path / "disk" / "file").exists()
    monkeypatch.chdir(tmp_path / "here")
    assert len(fit(linear(), loaders, epochs=2, checkpoint="c")) == 2


def test_an_interrupt_after_the_last_epoch_leaves_nothing_out(loaders):
    def stop(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    history = fit(linear(), loaders, epochs=2, on_epoch=stop)
    assert len(history) == 2 and history.unfinished is None
