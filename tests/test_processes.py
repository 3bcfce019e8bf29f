"""Another process: importing the kit there is silent and brings nothing slow; marks of code are those of this one."""

import ast
import functools
import os
import subprocess
import sys

import pytest
import torch
from test_code import Slotted, parser_of, reads_a_global, scaled_by, twice
from test_structure import LATE
from torch import nn

from normkit.code import mark_of
from normkit.identity import lines_of


class Builder:
    def __call__(self, channels, num_groups):
        return nn.Identity()


def marks():
    """Marks of user-defined norms, each written in another way, of functions with sets, and of a criterion."""
    with_eps = functools.partial(lambda eps, channels, num_groups: nn.BatchNorm2d(channels, eps), 1e-3)
    nested = (lambda inner: lambda channels, num_groups: inner(channels))(lambda channels: nn.Identity())
    norms = [reads_a_global, twice(0)[1], twice(1)[1], scaled_by(1.0), with_eps, nested, Builder()]
    others = [lambda x: x in {"a", "b", "c", "d", "e", "f", "g", "h"}, nn.CrossEntropyLoss(torch.arange(3.0))]
    others += [parser_of({"eps": 1e-5}), Slotted({"eps": 1e-5}), scaled_by({reads_a_global})]
    parts = {
        "loader": [Builder(), {"a", "b", "c"}, dict.fromkeys(norms), lambda x: x in {"a", "b", "c"}],
        "model": norms,
    }
    return [*(mark_of(each) for each in norms + others), str(list(lines_of(parts, {})))]


@pytest.fixture(scope="module")
def fresh():
    """A process with another order of sets and no bars, which imports the kit, then tells the marks and draws a bar."""
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import model, utils
print("imported", *{LATE} & set(sys.modules))
import test_processes
from normkit.progress import progress_bar
print(test_processes.marks())
for _ in progress_bar("ab", desc="a bar", disable=False):
    pass
"""
    environment = os.environ | {"PYTHONHASHSEED": "1", "TQDM_DISABLE": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_importing_prints_nothing_and_brings_nothing_slow(fresh):
    assert (fresh.returncode, fresh.stdout.splitlines()[0], fresh.stderr) == (0, "imported", "")


def test_marks_are_the_same_in_every_process(fresh):
    said = ast.literal_eval(fresh.stdout.splitlines()[1])
    assert said == marks() and len(set(said)) == len(said)


def test_bars_that_the_environment_switches_off_are_not_drawn(fresh):
    assert "a bar" not in fresh.stdout
