import copy
import importlib.util
import math
import random
from dataclasses import FrozenInstanceError, asdict, dataclass, fields

import numpy as np
import pytest
import pytorch_optimizer
import torch
from helpers import QUIET, same, scramble
from torch.overrides import TorchFunctionMode

import model
import utils
from normkit import muon, study
from normkit.data import Data
from normkit.randomness import generators_preserved
from normkit.synthetic import make_synthetic

CLASSIC = {"batch_size": 64, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
CLASSIC |= {"schedule": "step", "step_size": 7, "gamma": 0.1, "dropout": 0.01, "augment": False, "head_gain": 3.0}
CLASSIC |= {"num_groups": 4, "skip": True}


def test_the_classic_recipe_is_what_run_does_by_itself(small):
    by_itself, spelt_out = utils.run("group", small, 1, **QUIET), utils.run("group", small, 1, **CLASSIC, **QUIET)
    assert by_itself.recipe == spelt_out.recipe == utils.get_recipe("classic") == utils.get_recipe() == utils.Recipe()
    assert same(by_itself.history, spelt_out.history)
    assert CLASSIC.items() <= asdict(utils.Recipe()).items()


@pytest.mark.parametrize("name", utils.RECIPES)
def test_a_recipe_is_given_by_name_or_itself_or_as_keywords(name, small):
    recipe, tiny = utils.get_recipe(name), small.first(9, 5)
    ways = ({"recipe": name}, {"recipe": recipe}, asdict(recipe))
    results = [utils.run("batch", tiny, 1, **way, **QUIET) for way in ways]
    assert all(result.recipe == recipe and same(result.history, results[0].history) for result in results)


def test_changes_replace_what_a_recipe_says_unless_none(small):
    best = utils.get_recipe("best")
    changed = utils.get_recipe("best", lr=3.0, dropout=None)
    assert changed == utils.get_recipe(best, lr=3.0) == best.replace(lr=3.0, dropout=None) != best
    assert asdict(changed) == asdict(best) | {"lr": 3.0}
    result = utils.run("batch", small.first(9, 5), 1, 4, recipe="best", lr=0.02, dropout=None, **QUIET)
    assert result.recipe == best.replace(batch_size=4, lr=0.02)
    with pytest.raises(ValueError, match="'bets'.*classic or best"):
        utils.get_recipe("bets")
    with pytest.raises(ValueError, match="setting 'learning_rate'.*lr"):
        utils.get_recipe("best", learning_rate=1)


@pytest.mark.parametrize("groups", [3, 0, -4, 32, 4.0, True, "4", None, [4], np.array([4, 4])])
def test_a_recipe_knows_which_numbers_of_groups_there_are(groups):
    with pytest.raises(ValueError, match="^num_groups=.*: choose 1, 2, 4, 8, 16 or 'channels'$"):
        utils.Recipe(num_groups=groups)


@pytest.mark.parametrize("groups", [np.int64(4), torch.tensor(4), np.str_("channels")])
def test_a_number_of_groups_of_anothers_is_a_plain_one(groups):
    assert type(utils.Recipe(num_groups=groups).num_groups) in (int, str)


def test_a_recipe_of_another_loading_of_utils_is_one_too(small, tmp_path):
    """As after importlib.reload(utils): the notebook has one of the classes, and study the other."""
    spec = importlib.util.spec_from_file_location("utils_anew", utils.__file__)
    spec.loader.exec_module(anew := importlib.util.module_from_spec(spec))
    recipe = anew.get_recipe("best", lr=0.02)
    assert utils.get_recipe(recipe) == utils.get_recipe("best", lr=0.02)
    runs = [{"norm": "batch", "epochs": 1, "recipe": each} for each in (recipe, utils.get_recipe("best", lr=0.02))]
    assert len(study.run_many(runs, small.first(9, 5), tmp_path / "study.csv")) == 1  # they are the same


def test_a_kind_of_recipe_of_ones_own_stays_one_whatever_its_name():
    @dataclass(frozen=True)
    class Recipe(utils.Recipe):
        note: str = ""

    Recipe.__qualname__ = "Recipe"  # as in a notebook
    assert utils.get_recipe(Recipe(note="mine"), lr=0.1) == Recipe(note="mine", lr=0.1)


def test_a_recipe_cannot_be_changed_and_shows_its_settings_in_one_line():
    recipe = utils.get_recipe("best")
    with pytest.raises(FrozenInstanceError):
        recipe.lr = 1
    assert str(recipe).split() == [f"{each.name}={getattr(recipe, each.name)}" for each in fields(recipe)]


@pytest.mark.parametrize("batch_size", [1, 7, 128])
@pytest.mark.parametrize("norm", model.NORMS)
def test_the_best_recipe_at_any_batch_size(norm, batch_size, small, device):
    tiny = Data("tiny", small.classes, *(part[:9] for part in vars(small).values() if torch.is_tensor(part)))
    result = utils.run(norm, tiny, 2, device=device, recipe="best", batch_size=batch_size, progress=False)
    assert len(result.history) == 2 and all(math.isfinite(row["train_loss"]) for row in result.history)


def test_the_best_recipe_learns_faster():
    data = make_synthetic(198, 40)
    losses = [
        utils.run("group", data, 4, progress=False, recipe=name, batch_size=32).history[-1]
        for name in ("best", "classic")
    ]
    assert losses[0]["train_loss"] < losses[1]["train_loss"] - 0.2


def test_a_misspelt_optimizer_or_schedule(small):
    with pytest.raises(ValueError, match="'adam'.*sgd or muon"):
        utils.run("batch", small, optimizer="adam")
    with pytest.raises(ValueError, match="'cosine'.*step or onecycle"):
        utils.run("batch", small, schedule="cosine")


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_every_parameter_is_trained_once_and_only_weights_decay(name):
    net = model.Net("group")
    recipe = utils.Recipe(optimizer=name, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5, adamw_lr=0.01)
    optimizer = utils.build_optimizer(net, recipe)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, net.parameters()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] == 0.5) == (p.dim() > 1)


def test_muon_steps_along_a_nearly_orthogonal_matrix():
    utils.seed_everything(0)
    net = model.Net("layer")
    before = net.C4.conv.weight.detach().clone()
    recipe = utils.Recipe(optimizer="muon", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0, adamw_lr=0.01)
    optimizer = utils.build_optimizer(net, recipe)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * torch.linspace(1, 10, len(p)).view(-1, *[1] * (p.dim() - 1))
    optimizer.step()
    step = (net.C4.conv.weight.detach() - before).flatten(1)  # 32, 288
    gradient, moved = (torch.linalg.svdvals(t) for t in (net.C4.conv.weight.grad.flatten(1), step))
    assert gradient.max() > 8 * gradient.min()
    assert moved.max() < 1.8 * moved.min()


COEFFICIENTS = 3.4445, -4.775, 2.0315


def iterate(matrix, steps=5):
    """Newton-Schulz as it is defined, in float64."""
    X = matrix.double() / matrix.double().norm()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def test_no_product_is_written_into_a_part_of_a_tensor():
    """On Apple's GPU, up to torch 2.13, that left the part as it was, or was an error (pytorch pull 193385, 187255)."""

    class Refusing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert "out" not in (kwargs or {}), function
            return function(*args, **(kwargs or {}))

    with Refusing():
        muon.orthogonalise([torch.randn(4, 9), torch.randn(8, 3)], [COEFFICIENTS], [1.0, 1.0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-11)])
def test_muon_orthogonalises_matrices_of_all_shapes_together(dtype, tolerance):
    """Directions a thousandth as strong as others, too: of these the squares keep some digits, bfloat16 two."""
    shapes = (16, 27), (8, 16), (32, 288), (32, 32), (40, 7), (1, 5), (5, 1), (10, 32)
    matrices = [torch.randn(shape, dtype=dtype) * torch.logspace(0, -3, shape[1], dtype=dtype) for shape in shapes]
    scales = list(range(1, len(shapes) + 1))
    found = muon.orthogonalise([*matrices, torch.zeros(4, 9, dtype=dtype)], [COEFFICIENTS] * 5, [*scales, 3.0])
    assert torch.equal(found.pop(), torch.zeros(4, 9, dtype=dtype))
    for matrix, scale, actual in zip(matrices, scales, found, strict=True):
        assert actual.dtype == dtype and actual.is_contiguous()
        torch.testing.assert_close(actual.double() / scale, iterate(matrix), rtol=0, atol=tolerance)


class ExactMuon(pytorch_optimizer.Muon):
    """The library's, but for the number type of the iteration."""

    @staticmethod
    def _orthogonalize(group, updates):
        return [iterate(update.flatten(1)) for update in updates]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muons_steps_are_the_librarys(nesterov, channels_last):
    net = model.Net("batch").double()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    twin, recipe = copy.deepcopy(net), utils.get_recipe("best", weight_decay=0.3, nesterov=nesterov)
    ours = utils.build_optimizer(net, recipe)
    settings = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in ours.param_groups]
    theirs = ExactMuon([
        s | {"params": [p for p in twin.parameters() if (p.dim() > 1) == s["use_muon"]]} for s in settings
    ])  # fmt: skip
    for step in range(3):
        for p, q in zip(net.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 1:  # a layer that no gradient reaches is left as it is
            net.C4.conv.weight.grad = twin.C4.conv.weight.grad = None
        ours.step()
        theirs.step()
        for p, q in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    states = [optimizer.state_dict()["state"] for optimizer in (ours, theirs)]
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"use_adjusted_lr": True}, {"ns_method": "gram_newton_schulz"}, {"cautious": True}, {"weight_decouple": False},
     {"maximize": True}, {"dtype": torch.bfloat16}],
    ids=str,
)  # fmt: skip
def test_the_librarys_other_ways_stay(options):
    """Matrices of several shapes, and vectors."""
    options = dict(options)
    dtype, maximize = options.pop("dtype", torch.float32), options.pop("maximize", False)
    shapes = (40, 10), (10, 40), (7,)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    twins = copy.deepcopy(parameters)
    for kind, each in ((muon.Muon, parameters), (pytorch_optimizer.Muon, twins)):
        for p in each:
            p.grad = torch.ones_like(p) * torch.arange(p.shape[-1])
        groups = [{"params": each[:2], "use_muon": True}, {"params": each[2:], "use_muon": False}]
        kind([group | {"weight_decay": 0.1} | options for group in groups], 0.1, maximize=maximize).step()
    differ = options.get("weight_decouple", True) and dtype == torch.float32 and not maximize  # the fused AdamW rounds
    torch.testing.assert_close(parameters[:2], twins[:2], rtol=0, atol=0.0)
    torch.testing.assert_close(parameters[2], twins[2], rtol=0, atol=1e-6 * differ)


LAYOUTS = {
    "a gradient's": lambda p: setattr(p, "grad", p.grad.T.contiguous().T),
    "one number for all": lambda p: setattr(p, "grad", p.grad[:1, :1].expand_as(p)),
    "the parameter's": lambda p: setattr(p, "data", p.data.T.contiguous().T),
}


@pytest.mark.parametrize("use_muon", [True, False])
@pytest.mark.parametrize("change", LAYOUTS)
def test_muon_heeds_how_gradients_and_parameters_lie(change, use_muon):
    """Beside a copy of which all lie in the same way."""
    parameters = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    twins = copy.deepcopy(parameters)
    optimizers = [muon.Muon([{"params": each, "use_muon": use_muon}], adamw_lr=0.1) for each in (parameters, twins)]
    for step in range(3):
        for p, twin in zip(parameters, twins):
            p.grad = torch.randn(4, 6)
            if step == 1:
                LAYOUTS[change](p)
            twin.grad = p.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(parameters, twins)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_muon_takes_any_default_dtype_and_vectors_among_the_matrices(default):
    shapes = (4, 6), (5,)
    results = []
    for kind, dtype in ((muon.Muon, default), (pytorch_optimizer.Muon, torch.float32)):
        torch.manual_seed(0)
        groups = [{"params": [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]} for _ in range(2)]
        results.append([p for group in groups for p in group["params"]])
        torch.set_default_dtype(dtype)
        try:
            optimizer = kind([group | {"use_muon": use} for group, use in zip(groups, (True, False))])
            for p in results[-1]:
                p.grad = torch.ones_like(p).cumsum(-1)
            for _ in range(3):
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*results, rtol=0, atol=5e-3)  # the library's iteration is in bfloat16


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 9, 10, 25, 100])
def test_one_cycle_rises_to_the_rate_and_falls_towards_zero(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = utils.one_cycle(optimizer, steps, warmup=0.2)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert all(rate > 0.001 for rate in rates)
    if steps >= 25:
        assert max(rates) == pytest.approx(2, rel=0.15) and peak == pytest.approx(0.2 * steps, abs=1.5)
        assert rates[-1] < 2 * 2 / (0.8 * steps)
    assert optimizer.param_groups[0]["lr"] < 1e-4 or steps == 1


# ------------------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batchnorm"}, "batch, group, layer"),
        ({"epochs": 0}, "epochs=0: expected"),
        ({"epochs": -3}, "epochs=-3: expected"),
        ({"epochs": 1.5}, "epochs=1.5: expected"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "abacus"}, "abacus.*choose"),
        ({"precision": "int4"}, "int4.*float32"),
        ({"memory_format": "blocked"}, "blocked.*choose auto, contiguous or channels_last"),
        ({"num_groups": 5}, "1, 2, 4, 8, 16 or 'channels'"),
        ({"dropout": 2}, "dropout=2.0: expected a number of at least 0 and of at most 1"),
        ({"head_gain": 0}, "head_gain=0.0: expected a number above 0"),
        ({"backend": "warp"}, "'warp'.*choose auto, eager, fused or compile"),
        ({"recipe": "bets"}, "'bets'.*choose classic or best"),
        ({"learning_rate": 0.1}, "setting 'learning_rate'.*lr"),
        ({"optimizer": "adam"}, "'adam'.*sgd or muon"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": "0"}, "seed='0'"),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
    ],
)
def test_bad_options_stop_a_run_before_it_prints(data, options, message, capsys):
    with pytest.raises(ValueError, match=message):
        utils.run(**({"norm": "group", "data": data} | options))
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------- the seed


@pytest.mark.parametrize("seed", [-1, np.int64(3), 2**64 - 1, -(2**63)])
def test_any_whole_number_is_a_seed(small, seed):
    tiny = small.first(9, 5)
    first, again, other = (utils.run("layer", tiny, 1, seed=each, **QUIET) for each in (seed, int(seed), 7))
    assert first.seed == seed and same(first.history, again.history) and not same(first.history, other.history)


def test_a_run_without_a_seed_draws_one_and_names_it(small):
    tiny = small.first(9, 5)
    first, other = (utils.run("layer", tiny, 1, seed=None, **QUIET) for _ in range(2))
    assert first.seed != other.seed
    assert same(first.history, utils.run("layer", tiny, 1, seed=first.seed, **QUIET).history)


def test_a_run_leaves_the_global_generators_as_they_were(small):
    scramble()
    states = [(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())]
    utils.run("layer", small.first(9, 5), 1, dropout=0.2, **QUIET)
    with pytest.raises(FloatingPointError):
        utils.run("group", small, 1, lr=1e30, **QUIET)
    states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()))
    assert same(*states)


def test_a_run_leaves_all_gpus_generators_as_they_were(small, monkeypatch):
    """Two GPUs that are none: what torch.manual_seed would seed, too, is a dict of states here."""
    states = {i: torch.full((4,), i, dtype=torch.uint8) for i in range(2)}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: states.update({device: state}))
    before = dict(states)
    with generators_preserved():
        states.update(dict.fromkeys(states, torch.zeros(4, dtype=torch.uint8)))
    assert same(states, before)


def test_the_history_is_loaded_as_weights_are(small, tmp_path):
    result = utils.run("layer", small.first(9, 5), 1, **QUIET)
    torch.save({"model": result.model.state_dict(), "history": result.history}, tmp_path / "run.pt")
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    assert loaded["history"] == result.history and same(loaded["model"], result.model.state_dict())
