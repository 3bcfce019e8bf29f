import math

import pandas as pd
import pytest
from helpers import NORMS, QUIET

import model
import utils
from normkit import tables
from normkit.data import train_val_split
from normkit.study import run_many

FEW = {"epochs": 2, "batch_size": 50}


def test_results_table_reports_the_last_epoch(data):
    results = [utils.run(norm, data, 2, **QUIET) for norm in NORMS]
    results[0].history[0]["test_acc"] = 99.0  # a better epoch that was not the last
    table = utils.results_table(results)
    assert list(table.index) == NORMS
    assert table.loc["batch", "test accuracy %"] == round(results[0].history[-1]["test_acc"], 2)
    assert table.loc["batch", "best test % (epoch)"] == "99.00 (1)"
    assert (table["total parameters"] == 48_178).all() and table["data"].str.contains("synthetic").all()


def test_results_table_needs_an_epoch(data):
    with pytest.raises(ValueError, match="batch run has no finished epoch"):
        utils.results_table([utils.Result("batch", 0, model.Net(), utils.History())])


def test_the_histories_of_the_stand_in_are_marked(results):
    table = tables.histories_table(results)
    rows = [row for result in results for row in result.history]
    assert list(table) == ["norm", "seed", "data", *rows[0]]
    assert len(table) == 6 and table["data"].str.contains("synthetic").all()
    assert table["norm"].tolist() == [norm for norm in NORMS for _ in range(2)] and (table["seed"] == 0).all()
    assert table[list(rows[0])].to_dict("records") == rows


# ----------------------------------------------------------------------------------- of a study


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
    table = tables.seeds_table(rows)
    assert table.loc[("best", "batch"), "test accuracy %"] == "82.00 ± 1.58"
    assert table.loc[("classic", "layer"), "lowest test %"] == "79.00"


def test_trials_table_shows_the_settings_that_differ(small, tmp_path):
    tried = [{"norm": "layer"}, {"norm": "batch", "lr": 0.02}, {"norm": "batch", "lr": 0.02, "augment": True}]
    rows = run_many([FEW | run | {"epochs": 2} for run in tried], train_val_split(small, 21), tmp_path / "t.csv")
    table = tables.trials_table(rows)
    assert list(table) == ["lr", "augment", "training accuracy %", "held-out accuracy %", "held-out loss"]
    assert list(table.index) == ["layer", "batch", "batch"]
    assert list(table["augment"]) == ["False", "False", "True"]
    last = rows[rows["epoch"] == 2]
    assert list(table["held-out accuracy %"]) == [f"{accuracy:.2f}" for accuracy in last["test_acc"]]
    assert list(table["held-out loss"]) == [f"{loss:.3f}" for loss in last["test_loss"]]


def test_norms_are_compared_seed_by_seed(rows):
    table = tables.compare_norms(rows)
    # Differences 1, 2, 1, 2, 1: mean 1.4, deviation 0.5477; Student's t for four degrees of freedom is 2.776.
    half = 2.776 * 0.5477 / math.sqrt(5)
    assert table.loc[("best", "batch - layer"), "points"] == "+1.40"
    assert table.loc[("best", "batch - layer"), "95 % interval"] == f"{1.4 - half:+.2f} to {1.4 + half:+.2f}"
    assert (table["real"] == "yes").all()
    rows.loc[(rows["norm"] == "layer") & (rows["seed"] == 0), "test_acc"] = 90.0
    assert (tables.compare_norms(rows)["real"] == "not shown").all()
