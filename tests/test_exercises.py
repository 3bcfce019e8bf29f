"""The notebook's exercises: their answers, wrong ones, and none."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from normkit import exercises

NOTEBOOK = json.loads((Path(__file__).parents[1] / "S8.ipynb").read_text(encoding="utf-8"))
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
ANSWERS = {
    number.group(1): re.search(r"<details>.*?```python\n(.*?)```.*?</details>", source, re.S).group(1)
    for _, source in CELLS
    if (number := re.search(r"^### (\d)\.", source, re.M)) and "<details>" in source
}
QUESTIONS = {
    number.group(1): source
    for kind, source in CELLS
    if kind == "code" and (number := re.search(r"^exercises\.\w+\(\w+_(\d)\)$", source, re.M))
}


def ask(*blocks):
    """Runs an answer and the check of its cell, as the notebook does."""
    by_hand = next(source for _, source in CELLS if "def normalize" in source)
    namespace = {"torch": torch, "copy": copy, "exercises": exercises}
    for block in (by_hand, *blocks):
        exec(block, namespace)


def check_of(question):
    return question.splitlines()[-1]


def test_exercises_are_checked_on_the_cpu_whatever_the_default_device(capsys):
    with torch.device("meta"):
        exercises.instance_norm(torch.nn.InstanceNorm2d(16))
    assert capsys.readouterr().out == "Right.\n"


def test_every_exercise_has_a_cell_and_an_answer():
    assert list(QUESTIONS) == list(ANSWERS) == [str(number) for number in range(1, 8)]
    assert {check_of(question).split("(")[0] for question in QUESTIONS.values()} == {
        f"exercises.{name}" for name, each in vars(exercises).items() if hasattr(each, "__wrapped__")
    }


@pytest.mark.parametrize("number", QUESTIONS)
def test_the_answer_is_right_and_nothing_is_nothing(number, capsys):
    ask(QUESTIONS[number])
    assert capsys.readouterr().out == "Nothing filled in yet.\n"
    ask(ANSWERS[number], check_of(QUESTIONS[number]))
    assert capsys.readouterr().out == "Right.\n"


WRONG = {
    "batch norm stays": (exercises.batch_of_one, "batch", "the very same"),
    "layer": (exercises.batch_of_one, "Layer norm", "batch norm and layer norm differ: the largest difference is"),
    "no norm": (exercises.batch_of_one, "spectral", "'spectral' is none of batch, group, layer, instance"),
    "fresh": (exercises.fresh_statistics, lambda x: x - x.mean(), "the largest difference is"),
    "no tensor": (exercises.fresh_statistics, lambda x: 3, "a tensor is expected, this is a int"),
    "one batch": (exercises.running_mean, 0.5, "0.5 is too low; that is after one batch"),
    "all of it": (exercises.running_mean, 5, "5 is too high"),
    "bias": (exercises.bias_before_the_norm, 1.0, "PyTorch says"),
    "layer for instance": (
        exercises.instance_norm,
        lambda x: x - x.mean((1, 2, 3), keepdim=True),
        "largest difference",
    ),
    "shape": (exercises.instance_norm, lambda x: x.mean((2, 3)), "the shape is (8, 16), expected (8, 16, 6, 6)"),
    "mean": (exercises.rms_norm, lambda x: x / x.std(), "largest difference"),
    "its own error": (exercises.rms_norm, lambda x: x / y, "NameError: name 'y' is not defined"),  # noqa: F821
    "unchanged": (exercises.fold, lambda conv, norm: copy.deepcopy(conv), "largest difference"),
    "in place": (exercises.fold, lambda conv, norm: conv, "return a new one"),
    "no convolution": (exercises.fold, lambda conv, norm: norm, "a Conv2d is expected, this is a BatchNorm2d"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_told_what_is_off(case, capsys):
    check, answer, message = WRONG[case]
    check(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not yet: ") and message in out


def test_an_answer_that_changes_what_it_is_given_is_judged_by_what_it_returns(capsys):
    def layer_norm(x):
        x -= x.mean((1, 2, 3), keepdim=True)
        return x.div_(x.std((1, 2, 3), keepdim=True))

    def fold(conv, norm):
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        conv.weight.data *= scale[:, None, None, None]
        conv.bias.data = (conv.bias - norm.running_mean) * scale + norm.bias
        return copy.deepcopy(conv)

    for check, answer in (
        (exercises.rms_norm, layer_norm),
        (exercises.fresh_statistics, layer_norm),
        (exercises.fold, fold),
    ):
        check(answer)
        assert capsys.readouterr().out.startswith("Not yet: "), check.__name__


def test_pytorchs_own_folding_is_an_answer(capsys):
    exercises.fold(torch.nn.utils.fusion.fuse_conv_bn_eval)  # which takes layers in evaluation mode alone
    assert capsys.readouterr().out == "Right.\n"


def test_looking_changes_no_seed():
    before = torch.get_rng_state()
    for check, answer, _ in WRONG.values():
        check(answer)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_counts_in_any_dtype(capsys):
    for number, block in ANSWERS.items():
        name = check_of(QUESTIONS[number]).split("(")[1].rstrip(")")
        if f"def {name}" in block:
            double = f"in_float32 = {name}\ndef {name}(*given):\n    return in_float32(*given).double()\n"
            ask(block, double, check_of(QUESTIONS[number]))
            assert capsys.readouterr().out == "Right.\n", number


def test_an_ellipsis_is_no_answer_to_any_exercise(capsys):
    for check in {check for check, *_ in WRONG.values()}:
        for nothing in (..., None):
            check(nothing)
            assert capsys.readouterr().out == "Nothing filled in yet.\n", check.__name__
