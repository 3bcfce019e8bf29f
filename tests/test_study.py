import inspect
import math

import pandas as pd
import pytest
import torch

import model
import utils

FEW = {"epochs": 2, "batch_size": 50}


@pytest.fixture
def small():
    return utils.make_synthetic(train_size=101, test_size=40)


# ------------------------------------------------------------------------------------- recipes


def test_the_classic_recipe_is_what_run_does_by_itself():
    defaults = {name: value.default for name, value in inspect.signature(utils.run).parameters.items()}
    assert utils.recipe("classic").items() <= defaults.items()


@pytest.mark.parametrize("name", utils.RECIPES)
def test_a_recipe_is_made_of_keywords_of_run(name):
    inspect.signature(utils.run).bind("batch", None, **utils.recipe(name))


def test_changes_replace_what_a_recipe_says_unless_none():
    changed = utils.recipe("best", lr=3.0, dropout=None)
    assert changed == utils.recipe("best") | {"lr": 3.0}
    with pytest.raises(ValueError, match="'bets'.*classic or best"):
        utils.recipe("bets")


@pytest.mark.parametrize("batch_size", [1, 7, 128])
@pytest.mark.parametrize("norm", model.NORMS)
def test_the_best_recipe_at_any_batch_size(norm, batch_size, small, device):
    tiny = utils.Data("tiny", small.classes, *(part[:9] for part in vars(small).values() if torch.is_tensor(part)))
    result = utils.run(norm, tiny, 2, device=device, **utils.recipe("best", batch_size=batch_size), progress=False)
    assert len(result.history) == 2 and all(math.isfinite(row["train_loss"]) for row in result.history)


def test_the_best_recipe_learns_faster(data):
    losses = [
        utils.run("group", data, 4, progress=False, **utils.recipe(name, batch_size=32)).history[-1]
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
    optimizer = utils.build_optimizer(net, name, 0.1, 0.9, True, 0.5, 0.01)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, net.parameters()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] == 0.5) == (p.dim() > 1)


def test_muon_steps_along_a_nearly_orthogonal_matrix():
    utils.seed_everything(0)
    net = model.Net("layer")
    before = net.C4.conv.weight.detach().clone()
    optimizer = utils.build_optimizer(net, "muon", 0.1, 0.9, True, 0.0, 0.01)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * torch.linspace(1, 10, len(p)).view(-1, *[1] * (p.dim() - 1))
    optimizer.step()
    step = (net.C4.conv.weight.detach() - before).flatten(1)  # 32, 288
    gradient, moved = (torch.linalg.svdvals(t) for t in (net.C4.conv.weight.grad.flatten(1), step))
    assert gradient.max() > 8 * gradient.min()
    assert moved.max() < 1.8 * moved.min()


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


# ------------------------------------------------------------------------------------ many runs


def test_grid_and_hold_out(small):
    assert utils.grid(a=[1, 2], b="xy") == [{"a": a, "b": b} for a in (1, 2) for b in "xy"]
    held = utils.hold_out(small, 21)
    assert torch.equal(torch.cat([held.train_images, held.test_images]), small.train_images)
    assert torch.equal(torch.cat([held.train_labels, held.test_labels]), small.train_labels)
    assert len(held.test_labels) == 21 and "21 training images held out" in held.name
    for size in (0, 101, -1):
        with pytest.raises(ValueError, match="expected 1 to 100"):
            utils.hold_out(small, size)


@pytest.mark.parametrize("processes", [1, 2])
def test_many_runs_are_those_that_one_by_one_give(small, tmp_path, processes):
    runs = [FEW | run for run in utils.grid(recipe=["best", "classic"], norm=["layer", "batch"])]
    rows = utils.run_many(runs, small, tmp_path / "new" / "study.csv", processes)
    saved = pd.read_csv(tmp_path / "new" / "study.csv")
    assert len(rows) == len(saved) == 8 and [path.name for path in (tmp_path / "new").iterdir()] == ["study.csv"]
    for run, (_, own) in zip(runs, rows.groupby("settings", sort=False), strict=True):
        alone = utils.run(data=small, progress=False, **utils.expand(run)).history
        # Workers have a thread each: their sums run in another order, which decides close calls another way.
        for column in ["epoch", "lr", "train_loss"] + ["test_acc"] * (processes == 1):
            assert own[column].tolist() == pytest.approx(
                [row[column] for row in alone], rel=0.1 * (processes - 1) + 1e-9
            )
        assert set(own["recipe"]) == {run["recipe"]} and set(own["data"]) == {"synthetic stand-in"}


def test_what_is_done_is_not_done_again_and_what_was_stopped_goes_on(small, tmp_path, monkeypatch):
    file = tmp_path / "study.csv"
    runs = [FEW | run for run in utils.grid(norm=["layer", "group", "batch"])]
    whole = utils.run_many(runs, small, tmp_path / "whole.csv")

    epochs_trained = []
    train = utils.train

    def stopping(*args, **options):
        epochs_trained.append(None)
        if len(epochs_trained) == 4:  # the second epoch of the second run
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(utils, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        utils.run_many(runs, small, file)
    assert len(pd.read_csv(file)) == 2
    utils.run_many(runs, small, file)
    assert len(epochs_trained) == 4 + 3
    again = utils.run_many(runs, small, file)
    assert len(epochs_trained) == 7
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), pd.read_csv(tmp_path / "whole.csv").drop(columns="seconds"), rtol=1e-5
    )
    assert len(whole) == len(again)


def test_other_settings_or_data_are_another_run(small, tmp_path):
    file = tmp_path / "study.csv"
    run = FEW | {"norm": "layer", "epochs": 1}
    for given in (run, run | {"seed": 1}, run | {"lr": 0.02}, run | {"recipe": "best"}):
        assert len(utils.run_many([given], small, file)) == 1
    utils.run_many([run], utils.hold_out(small, 21), file)
    assert pd.read_csv(file)["settings"].nunique() == 5


def test_a_run_that_fails_does_not_cost_the_others(small, tmp_path):
    runs = [FEW | {"norm": "layer", "lr": lr, "momentum": 0.99} for lr in (1e30, 0.01)]
    with pytest.raises(RuntimeError, match="(?s)these failed.*lr=1e\\+30.*not finite"):
        utils.run_many(runs, small, tmp_path / "study.csv")
    assert len(pd.read_csv(tmp_path / "study.csv")) == 2


# --------------------------------------------------------------------------------------- tables


@pytest.fixture
def rows():
    """Two recipes, two norms, five seeds, two epochs, with accuracies known beforehand."""
    accuracies = {"batch": [80.0, 81.0, 82.0, 83.0, 84.0], "layer": [79.0, 79.0, 81.0, 81.0, 83.0]}
    return pd.DataFrame(
        {"recipe": recipe, "norm": norm, "seed": seed, "epoch": epoch, "settings": f"{recipe} {norm} {seed}"}
        | {"train_acc": 70.0, "test_acc": values[seed] if epoch == 2 else 99.0}
        for recipe in ("best", "classic")
        for norm, values in accuracies.items()
        for seed in range(5)
        for epoch in (1, 2)
    )


def test_seeds_table_has_mean_and_deviation_of_the_last_epoch(rows):
    table = utils.seeds_table(rows)
    assert table.loc[("best", "batch"), "test accuracy %"] == "82.00 ± 1.58"
    assert table.loc[("classic", "layer"), "lowest test %"] == "79.00"


def test_trials_table_shows_the_settings_that_differ(small, tmp_path):
    tried = [{"norm": "layer"}, {"norm": "batch", "lr": 0.02}, {"norm": "batch", "lr": 0.02, "augment": True}]
    rows = utils.run_many([FEW | run | {"epochs": 2} for run in tried], utils.hold_out(small, 21), tmp_path / "t.csv")
    table = utils.trials_table(rows)
    assert list(table) == ["lr", "augment", "training accuracy %", "held-out accuracy %", "held-out loss"]
    assert list(table.index) == ["layer", "batch", "batch"]
    assert list(table["augment"]) == ["False", "False", "True"]
    last = rows[rows["epoch"] == 2]
    assert list(table["held-out accuracy %"]) == [f"{accuracy:.2f}" for accuracy in last["test_acc"]]
    assert list(table["held-out loss"]) == [f"{loss:.3f}" for loss in last["test_loss"]]


def test_norms_are_compared_seed_by_seed(rows):
    table = utils.compare_norms(rows)
    # Differences 1, 2, 1, 2, 1: mean 1.4, deviation 0.5477; Student's t for four degrees of freedom is 2.776.
    half = 2.776 * 0.5477 / math.sqrt(5)
    assert table.loc[("best", "batch - layer"), "points"] == "+1.40"
    assert table.loc[("best", "batch - layer"), "95 % interval"] == f"{1.4 - half:+.2f} to {1.4 + half:+.2f}"
    assert (table["real"] == "yes").all()
    rows.loc[(rows["norm"] == "layer") & (rows["seed"] == 0), "test_acc"] = 90.0
    assert (utils.compare_norms(rows)["real"] == "not shown").all()
