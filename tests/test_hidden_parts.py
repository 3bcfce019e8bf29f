"""What is trained along in places that no part's state_dict shows goes on, and back, with the weights."""

import copy
import functools
from unittest import mock

import pytest
import pytorch_optimizer
import torch
from helpers import fit, linear, same
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from normkit.objects import is_stateful, put
from normkit.stateful import states_in


class Stopping(DataLoader):
    """Stops the run after the first batch of the third epoch."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for batch in super().__iter__():
            yield batch
            if self.passes == 3:
                raise KeyboardInterrupt


def scale_in_a_criterion(net):
    scale = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*net.parameters(), scale], 0.1, 0.9)
    return optimizer, lambda logits, labels: cross_entropy(logits * scale, labels), lambda: scale.detach()


def scale_in_a_hook(net):
    scale = torch.ones(1, requires_grad=True)
    net[1].register_forward_hook(lambda module, args, logits: logits * scale)
    return torch.optim.SGD([*net.parameters(), scale], 0.1, 0.9), cross_entropy, lambda: scale.detach()


def scale_with_an_optimizer_of_its_own(net):
    scale = torch.ones(1, requires_grad=True)
    optimizer, own = torch.optim.SGD(net.parameters(), 0.1, 0.9), torch.optim.SGD([scale], 0.1, 0.9)

    def criterion(logits, labels):
        if torch.is_grad_enabled():
            (scale.grad,) = torch.autograd.grad(cross_entropy(logits.detach() * scale, labels), scale)
            own.step()
        return cross_entropy(logits * scale.detach(), labels)

    return optimizer, criterion, lambda: scale.detach()


class Sharp(torch.optim.Optimizer):
    """SAM as many projects copy it: the momentum is in an optimizer that shares the groups."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base_optimizer = torch.optim.SGD(self.param_groups, 0.1, 0.9)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure):
        parameters = [each for group in self.param_groups for each in group["params"]]
        before = [each.detach().clone() for each in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, [each.grad for each in parameters], alpha=0.05)
        self.zero_grad()
        closure()
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
        self.base_optimizer.step()

    first_step = second_step = None


class SharpAgain(Sharp):
    """SAM that ties the groups again after they were replaced."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base_optimizer.param_groups = self.param_groups


class Two(torch.optim.Optimizer):
    """Two optimizers as one."""

    def __init__(self, parameters):
        weight, bias = parameters
        self.optimizers = torch.optim.SGD([weight], 0.1, 0.9), torch.optim.Adam([bias], 0.01)
        super().__init__([group for each in self.optimizers for group in each.param_groups], {})

    def step(self, closure=None):
        for each in self.optimizers:
            each.step()


class Averaging(torch.optim.SGD):
    """SGD that keeps an average of the weights."""

    def __init__(self, net):
        super().__init__(net.parameters(), 0.1, 0.9)
        self.net, self.average = net, AveragedModel(net)

    def step(self, closure=None):
        super().step(closure)
        self.average.update_parameters(self.net)


class Anchored(torch.optim.SGD):
    """SGD that pulls each weight to where it began, which it knows by the weight, and its states by number."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.1, 0.9)
        self.anchors = {}

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for each in self.param_groups[0]["params"]:
                each.lerp_(self.anchors.setdefault(id(each), each.clone()), 0.1)

    def state_dict(self):
        return super().state_dict() | {"anchors": [each.clone() for each in self.anchors.values()]}

    def load_state_dict(self, state):
        super().load_state_dict({name: state[name] for name in ("state", "param_groups")})
        self.anchors = dict(zip(map(id, self.param_groups[0]["params"]), state["anchors"]))


class Copying(torch.optim.SGD):
    """SGD that moves copies of the weights, as in half precision, which it takes anew when it is loaded."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.1, 0.9)
        self.copies = self.copied()

    def copied(self):
        return [each.detach().clone() for each in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        torch._foreach_copy_(self.param_groups[0]["params"], self.copies)
        super().step()
        torch._foreach_copy_(self.copies, self.param_groups[0]["params"])

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.copies = self.copied()


class Accumulating(torch.optim.SGD):
    """SGD that steps after each third batch, with the gradients of all three, wherever an epoch ends."""

    batches = 0

    def zero_grad(self, set_to_none=True):
        if self.batches % 3 == 0:
            super().zero_grad(set_to_none)

    def step(self, closure=None):
        self.batches += 1
        if self.batches % 3 == 0:
            super().step(closure)

    def state_dict(self):
        return super().state_dict() | {"batches": self.batches}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.batches = state["batches"]


def sharp(net):
    optimizer = Sharp(net.parameters())
    return optimizer, cross_entropy, lambda: momenta(optimizer.base_optimizer)


def sharp_again(net):
    optimizer = SharpAgain(net.parameters())
    return optimizer, cross_entropy, lambda: momenta(optimizer.base_optimizer)


def sharp_of_a_library(net):
    optimizer = pytorch_optimizer.SAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    return optimizer, cross_entropy, lambda: momenta(optimizer.base_optimizer)


def lookahead_of_a_library(net):
    optimizer = pytorch_optimizer.Lookahead(torch.optim.SGD(net.parameters(), 0.1, 0.9))
    return optimizer, cross_entropy, lambda: momenta(optimizer.optimizer)


def tuner_of_a_library(net):
    optimizer = pytorch_optimizer.TRAC(torch.optim.SGD(net.parameters(), 0.1, 0.9))
    return optimizer, cross_entropy, list


def anchored(net):
    optimizer = Anchored(net.parameters())
    return optimizer, cross_entropy, lambda: list(optimizer.anchors.values())


def copying(net):
    optimizer = Copying(net.parameters())
    return optimizer, cross_entropy, lambda: optimizer.copies


def accumulating(net):
    optimizer = Accumulating(net.parameters(), 0.1, 0.9)
    return optimizer, cross_entropy, lambda: [each.grad.clone() for each in net.parameters()]


def two(net):
    optimizer = Two(net.parameters())
    return optimizer, cross_entropy, lambda: [momenta(each) for each in optimizer.optimizers]


def averaging(net):
    optimizer = Averaging(net)
    return optimizer, cross_entropy, lambda: optimizer.average.state_dict()


def momenta(optimizer):
    return list(copy.deepcopy(optimizer.state).values())


def teacher_in_a_list(net):
    layer = net[1]
    layer.teachers = [copy.deepcopy(layer).requires_grad_(False)]  # so that the state_dict is without it

    def follow(layer, args, logits):
        (teacher,) = layer.teachers
        if layer.training:
            for old, new in zip(teacher.parameters(), layer.parameters()):
                old.lerp_(new.detach(), 0.1)
        return logits + teacher(*args)

    layer.register_forward_hook(follow)
    return torch.optim.SGD(net.parameters(), 0.1, 0.9), cross_entropy, lambda: layer.teachers[0].state_dict()


class Resting(torch.optim.SGD):
    """Leaves all to others, and the gradients to who takes them."""

    def step(self, closure=None):
        pass


def an_optimizer_for_each_parameter(net):
    own = {each: torch.optim.SGD([each], 0.1, 0.9) for each in net.parameters()}

    def step(parameter):
        own[parameter].step()
        own[parameter].zero_grad()

    for each in net.parameters():
        each.register_post_accumulate_grad_hook(step)
    return Resting(net.parameters(), 0.1), cross_entropy, lambda: [momenta(each) for each in own.values()]


KINDS = [
    scale_in_a_criterion, scale_in_a_hook, scale_with_an_optimizer_of_its_own, sharp, sharp_again, sharp_of_a_library,
    lookahead_of_a_library, tuner_of_a_library, anchored, copying, accumulating, two,
    averaging, teacher_in_a_list, an_optimizer_for_each_parameter,
]  # fmt: skip


def trained(build, pairs, epochs, loader=DataLoader, **options):
    """Trains with what a function builds for a network, at falling rates; returns all that has moved."""
    net = linear()
    optimizer, criterion, hidden = build(net)
    loaders, scheduler = (loader(pairs, 32), DataLoader(pairs, 64)), StepLR(optimizer, 1, 0.5)
    history = fit(net, loaders, optimizer, scheduler, epochs, criterion=criterion, **options)
    return list(history), net.state_dict(), optimizer.state_dict(), hidden()


@pytest.mark.parametrize("build", KINDS)
def test_what_is_hidden_goes_on_as_if_never_stopped(pairs, tmp_path, build):
    trained(build, pairs, 2, checkpoint=tmp_path / "c")
    assert same(trained(build, pairs, 4, checkpoint=tmp_path / "c"), trained(build, pairs, 4))


@pytest.mark.parametrize("build", KINDS)
def test_what_is_hidden_is_set_back_with_the_weights(pairs, build):
    assert same(trained(build, pairs, 3, Stopping), trained(build, pairs, 2))


HOOKS = {
    "of a module": lambda layer, damp: layer.register_forward_hook(damp),
    "of a parameter": lambda layer, damp: layer.weight.register_hook(damp),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_keeps_goes_on(pairs, tmp_path, hook):
    def build(net):
        calls = []

        def damp(*args):
            calls.append(None)
            return args[-1] / len(calls)

        HOOKS[hook](net[1], damp)
        return torch.optim.SGD(net.parameters(), 0.1), cross_entropy, lambda: len(calls)

    trained(build, pairs, 2, checkpoint=tmp_path / "c")
    assert same(trained(build, pairs, 4, checkpoint=tmp_path / "c"), trained(build, pairs, 4))


class Growing:
    """Keeps a network that it makes anew to load it, as what has a state may, and that draws random numbers."""

    def __init__(self):
        self.net = nn.Linear(5, 5)

    def state_dict(self):
        return self.net.state_dict()

    def load_state_dict(self, state):
        self.net = nn.Linear(5, 5)
        self.net.load_state_dict(state)

    def __call__(self, history):
        pass


class Drawing(RandomSampler, Growing):
    def __init__(self, data, generator):
        RandomSampler.__init__(self, data, generator=generator)
        Growing.__init__(self)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        torch.rand(1, generator=self.generator)


@pytest.mark.parametrize("drawing", ["callback", "sampler", "sampler with a generator"])
def test_what_draws_random_numbers_while_it_is_loaded_changes_none_of_the_run(pairs, tmp_path, drawing):
    def train(path, epochs):
        net, generator = linear(), torch.Generator().manual_seed(0) if drawing.endswith("generator") else None
        sampler = RandomSampler(pairs) if drawing == "callback" else Drawing(pairs, generator)
        batches = BatchSampler(sampler, 32, False)
        loaders = DataLoader(pairs, batch_sampler=batches, generator=generator), DataLoader(pairs, 64)
        on_epoch = Growing() if drawing == "callback" else None
        torch.manual_seed(0)
        return list(fit(net, loaders, epochs=epochs, checkpoint=path, on_epoch=on_epoch))

    train(tmp_path / "parts", 1)
    assert same(train(tmp_path / "parts", 3), train(tmp_path / "whole", 3))


@pytest.mark.parametrize("kind", [Sharp, SharpAgain])
def test_groups_that_optimizers_share_stay_shared(pairs, kind):
    net = linear()
    optimizer = kind(net.parameters())
    groups, (group,) = optimizer.param_groups, optimizer.param_groups
    assert fit(net, (Stopping(pairs, 32), DataLoader(pairs, 64)), optimizer, epochs=3).unfinished == 3
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups is groups and groups[0] is group


def test_what_a_state_dict_has_is_kept_once():
    net = nn.Sequential(linear(), nn.ReLU(), nn.Dropout())
    net.others = [net[0], nn.Identity(), nn.DataParallel(net)]
    kept = states_in({}, model=net, optimizer=Sharp(net.parameters()))
    assert list(kept) == ["model", "optimizer.base_optimizer", "optimizer"]  # as they are loaded


def test_what_has_a_state_is_an_object_with_both_methods_of_its_class():
    net = nn.Identity()
    assert is_stateful(net) and not is_stateful(type(net)) and not is_stateful(mock.MagicMock())


def test_a_partial_is_given_another_function_as_well_as_other_arguments():
    part = functools.partial(round, 2.345, ndigits=1)
    for name, value in {"func": max, "args": (1, 3), "keywords": {"key": abs}}.items():
        put(part, name, value)
    assert (part.func, part.args, part.keywords) == (max, (1, 3), {"key": abs})
