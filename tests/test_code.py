"""Marks of code, and of objects by what they are made of."""

import collections
import configparser
import functools
import logging
import types

import pytest
import torch
from torch import nn

from normkit.code import mark_of, words_of
from normkit.norms import MORE_NORMS
from normkit.objects import attributes_of, closed_over

SCALE = 1.0


def reads_a_global(channels, num_groups):
    return nn.BatchNorm2d(channels, eps=SCALE)


def class_with(eps):
    class Norm(nn.Module):
        def __init__(self, channels, num_groups=None):
            super().__init__()
            self.norm = nn.BatchNorm2d(channels, eps=1e-3) if eps else nn.Identity()

        def forward(self, x):
            return self.norm(x) if eps else x

    return Norm


def twice(eps):
    class Norm(nn.Module):
        def forward(self, x):
            return x * 2.0

    class Other(nn.Module):
        def forward(self, x):
            return x * 3.0

    chosen = Norm if eps else Other
    return chosen, lambda channels, num_groups: chosen()


def test_what_was_changed_behind_a_builder_changes_its_mark(monkeypatch):
    before = mark_of(reads_a_global)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert mark_of(reads_a_global) != before
    assert mark_of(class_with(0)) != mark_of(class_with(1))
    assert all(mark_of(a) != mark_of(b) for a, b in zip(twice(0), twice(1)))
    assert all(mark_of(a) == mark_of(b) for a, b in zip(twice(1), twice(1)))

    def keyword_only(eps):
        def build(channels, num_groups, *, eps=eps):
            return nn.BatchNorm2d(channels, eps)

        return build

    assert mark_of(keyword_only(1e-3)) == mark_of(keyword_only(1e-3)) != mark_of(keyword_only(1e-5))

    def recursive(channels, num_groups):
        return recursive(channels, num_groups - 1) if num_groups else nn.Identity()

    assert mark_of(recursive) == mark_of(recursive)


def scaled_by(factor):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * factor

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    return lambda channels, num_groups: Scale.apply


@pytest.mark.parametrize("kind", [staticmethod, classmethod, property, functools.cached_property])
def test_every_kind_of_method_counts(kind):
    marks = [mark_of(type("Norm", (nn.Module,), {"eps": kind(lambda _, eps=eps: eps)})) for eps in (0, 1, 1)]
    assert marks[0] != marks[1] == marks[2]
    assert mark_of(scaled_by(1.0)) != mark_of(scaled_by(3.0)) == mark_of(scaled_by(3.0))


def test_names_are_told_from_attributes(monkeypatch):
    """An attribute may be called as a variable is; a class within a function names variables, too."""
    monkeypatch.setitem(globals(), "SCALE", 1.0)

    class RMS(nn.Module):
        def forward(self, x):
            return x / x.square().mean((1, 2, 3), keepdim=True).sqrt()

    def build(channels, num_groups):
        class Scaled(RMS):
            scale = SCALE  # noqa: F821

        return Scaled()

    before = mark_of(build)
    monkeypatch.setitem(globals(), "mean", 0.5)
    assert mark_of(build) == before
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert mark_of(build) != before


def test_what_is_named_of_a_module_counts():
    module = types.ModuleType("of_mine")
    module.EPS, module.unused = 1e-5, 0

    def build(channels, num_groups):
        return nn.BatchNorm2d(channels, module.EPS)

    before = mark_of(build)
    module.unused = 1
    assert mark_of(build) == before
    module.EPS = 1e-3
    assert mark_of(build) != before


def test_what_is_named_of_a_module_in_a_module_counts():
    package, module = types.ModuleType("package_of_mine"), types.ModuleType("package_of_mine.norms")
    package.norms, module.package, module.EPS = module, package, 1e-5

    def build(channels, num_groups):
        return nn.BatchNorm2d(channels, package.norms.package.norms.EPS)

    before = mark_of(build)
    module.EPS = 1e-3
    assert mark_of(build) != before


def test_a_librarys_lambdas_are_told_apart():
    builders = [eval(f"lambda channels, num_groups: {text}", {"__name__": "torch.nn"}) for text in ("None", "channels")]
    assert builders[0].__module__ == "torch.nn" and mark_of(builders[0]) != mark_of(builders[1])
    assert len({mark_of(each) for each in MORE_NORMS.values()}) == len(MORE_NORMS)


class Slotted:
    __slots__ = ("settings",)

    def __init__(self, settings):
        self.settings = settings


def parser_of(settings):
    parser = configparser.ConfigParser()
    parser.read_dict({"norm": settings})
    return parser


def set_of_one(settings):
    return {lambda x: x * settings["eps"]}


HOLDERS = {"slots": Slotted, "a dict": collections.UserDict, "a parser": parser_of, "a set": set_of_one}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_settings_count_whatever_holds_them(holder):
    def builder(eps):
        held = holder({"eps": eps})
        return lambda channels, num_groups: held

    assert mark_of(builder(1e-3)) == mark_of(builder(1e-3)) != mark_of(builder(1e-5))


LOG = logging.getLogger("norms")


def logs(channels, num_groups):
    LOG.debug("%d channels", channels)
    return nn.BatchNorm2d(channels)


def test_a_logger_makes_no_other_builder():
    before = mark_of(logs)
    logging.getLogger("norms.another").setLevel(logging.ERROR)
    LOG.isEnabledFor(logging.DEBUG)  # which it remembers
    assert mark_of(logs) == before


@pytest.mark.parametrize("text", ['f"{x + 1}"', 'f"{{x}}"', 'f"""{x!r:>{width}}\n  {g("a")}"""', "f'{f\"{x}\"}'"])
def test_an_f_string_is_one_word_in_any_python(text):
    assert list(words_of(f"y = {text} + '' # says y")) == ["y", "=", text, "+", "''", "\n"]


def test_slots_are_attributes_private_ones_too():
    class Slotted:
        __slots__ = "__count", "size", "unset"

        def __init__(self):
            self.__count, self.size = 1, 2

    assert attributes_of(Slotted()) == {"_Slotted__count": 1, "size": 2}


def test_variables_that_are_not_there_yet_are_passed_over():
    def function():
        return late, there

    there = 1
    assert closed_over(function) == {"there": 1}
    late = 2
    assert closed_over(function) == {"late": 2, "there": 1}


def test_names_that_a_code_looks_up_are_part_of_its_mark():
    assert len({mark_of(each) for each in (lambda x: x.sum(), lambda x: x.mean(), lambda x: x.mean())}) == 2
