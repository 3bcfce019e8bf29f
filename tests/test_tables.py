import dataclasses
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from helpers import NORMS, QUIET, THREE, drawn, stand_in, study

import model
import utils
from normkit import plots, tables
from normkit.data import train_val_split
from normkit.study import grid, run_many

FEW = {"epochs": 2, "batch_size": 50}


def test_results_table_reports_the_last_epoch(data):
    results = [utils.run(norm, data, 2, **QUIET) for norm in NORMS]
    results[0].history[0]["test_acc"] = 99.0  # a better epoch that was not the last
    results[0].history.insert(0, results[0].history[1] | {"seconds": 900.0})  # slow, as the first may be
    for row, seconds in zip(results[0].history[1:], (2.0, 3.0)):
        row["seconds"] = seconds
    table = utils.results_table(results)
    assert table.loc["batch", "seconds an epoch"] == 3.0  # the median
    assert list(table.index) == NORMS
    assert table.loc["batch", "test accuracy %"] == round(results[0].history[-1]["test_acc"], 2)
    assert table.loc["batch", "best test % (epoch)"] == "99.00 (1)"
    counts = [sum(p.numel() for p in result.model.parameters()) for result in results]
    assert table["total parameters"].tolist() == counts and (table.loc[THREE, "total parameters"] == 48_178).all()
    assert table["data"].str.contains("synthetic").all()


def test_results_table_needs_an_epoch(data):
    with pytest.raises(ValueError, match="batch run has no finished epoch"):
        utils.results_table([utils.Result("batch", 0, model.Net(), utils.History())])


def test_the_histories_of_the_stand_in_are_marked(results):
    table = tables.histories_table(results)
    rows = [row for result in results for row in result.history]
    assert list(table) == ["norm", "seed", "data", *rows[0]]
    assert len(table) == 2 * len(NORMS) and table["data"].str.contains("synthetic").all()
    assert table["norm"].tolist() == [norm for norm in NORMS for _ in range(2)] and (table["seed"] == 0).all()
    assert table[list(rows[0])].to_dict("records") == rows


def test_histories_of_a_sweep_have_the_settings_that_differ(results):
    rates = [dataclasses.replace(results[0], recipe=results[0].recipe.replace(lr=lr)) for lr in (0.1, 0.01)]
    table = tables.histories_table(rates)
    assert table["base_lr"].tolist() == [0.1, 0.1, 0.01, 0.01] and "momentum" not in table
    assert len(plots.plot_curves({name: rows for name, rows in table.groupby(["norm", "base_lr"])}).axes) == 2


def test_rows_that_were_read_as_text_are_numbers(tmp_path):
    rows = study(norm=["batch", "group"], seed=range(2), base_lr=[0.1, 0.2], recipe=["classic"])
    rows = pd.concat([rows.assign(epoch=rows["epoch"] + 8, train_acc=50.0, diverged=None)])  # of 9 and 10
    rows.to_csv(tmp_path / "s.csv", index=False)
    text = pd.read_csv(tmp_path / "s.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(tables.seeds_table(text), tables.seeds_table(rows))
    expected, found = (plots.plot_learning_rates(each).axes[0].lines[0].get_data() for each in (rows, text))
    assert all(np.array_equal(*pair) for pair in zip(expected, found))


def test_a_note_that_would_hide_a_column_is_told(results):
    noted = dataclasses.replace(results[0], history=[row | {"norm": 0.5, "note": 1} for row in results[0].history])
    with pytest.raises(ValueError, match="on_epoch notes norm, and the table has that of its own: take another name"):
        tables.histories_table([noted])


def test_a_table_of_results_takes_what_run_returns_and_nothing_else(results):
    rows = [row for result in results for row in result.history]
    for given in (results, {result.norm: result for result in results}, iter(results)):
        assert tables.histories_table(given)[list(rows[0])].to_dict("records") == rows
    assert len(tables.histories_table(results[0])) == 2
    for table in (tables.results_table, tables.histories_table):
        for wrong in (results[0].history, [results[0].history], None, "batch"):
            with pytest.raises(TypeError, match="is no result: give what utils.run returns.*DataFrame"):
                table(wrong)
        with pytest.raises(ValueError, match="there are no results: give what utils.run returns"):
            table([])


def test_the_table_of_results_names_the_settings_that_differ(data):
    results = [utils.run("batch", data, 1, lr=lr, **QUIET) for lr in (0.1, 0.001)]
    table = utils.results_table(results)
    assert table["lr"].tolist() == [0.1, 0.001] and "momentum" not in table
    assert "lr" not in utils.results_table(results[:1])


# ----------------------------------------------------------------------------------- of a study


@pytest.fixture
def rows():
    """Two recipes, two norms, five seeds, two epochs, with accuracies known beforehand."""
    accuracies = {"batch": [80.0, 81.0, 82.0, 83.0, 84.0], "layer": [79.0, 79.0, 81.0, 81.0, 83.0]}
    lr = {"best": 0.05, "classic": 0.01}
    return pd.DataFrame(
        {"recipe": recipe, "norm": norm, "seed": seed, "epoch": epoch, "data": "CIFAR-10"}
        | {"settings": f"CIFAR-10, 9 images, CRC-32 0x1: norm={norm} epochs=2 seed={seed} lr={lr[recipe]}"}
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
    assert (table["significant"] == "yes").all()
    rows.loc[(rows["norm"] == "layer") & (rows["seed"] == 0), "test_acc"] = 90.0
    assert (tables.compare_norms(rows)["significant"] == "no").all()


def test_where_a_run_diverged_no_difference_is_called_significant(rows):
    one = (rows["norm"] == "batch") & (rows["seed"] == 3)
    rows = rows.assign(diverged=np.where(one, "boom", None), test_acc=rows["test_acc"].mask(one))
    table = tables.compare_norms(rows)
    assert table.loc[("best", "batch - layer"), ["significant", "seeds", "diverged"]].tolist() == ["no", 4, 1]
    table = tables.compare_norms(rows[~one])
    assert table.loc[("best", "batch - layer"), ["significant", "seeds"]].tolist() == ["yes", 4]


# ------------------------------------------------------------------- settings swept beside the seed


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Rows of a study in which the learning rate was swept beside norm and seed."""
    runs = grid(norm=["layer", "batch"], lr=[0.01, 0.001], seed=range(2), epochs=1, batch_size=20)
    rows = run_many(runs, stand_in(40, 40), tmp_path_factory.mktemp("study") / "swept.csv")
    rows["test_acc"] = np.where(rows["base_lr"] == 0.01, 60.0, 20.0) + 2 * rows["seed"] + 10 * (rows["norm"] == "batch")
    return rows


def test_a_setting_swept_beside_the_seed_is_not_mixed_in(swept):
    table = tables.seeds_table(swept)
    assert table.index.names == ["recipe", "lr", "variant"] and (table["seeds"] == 2).all()
    assert table.loc[("classic", 0.01, "layer"), "test accuracy %"] == "61.00 ± 1.41"
    assert table.loc[("classic", 0.001, "batch"), "test accuracy %"] == "31.00 ± 1.41"
    differences = tables.compare_norms(swept)
    assert differences.index.names == ["recipe", "lr", "difference"] and (differences["seeds"] == 2).all()
    assert (differences["points"] == "-10.00").all() and (differences["significant"] == "yes").all()
    ax = plots.plot_seeds(swept).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "classic recipe\nlr 0.01",
        "classic recipe\nlr 0.001",
    ]
    assert "2 seeds each" in ax.get_title()


def test_norms_that_differ_in_another_setting_are_named_with_it(swept):
    rows = swept[(swept["norm"] == "batch") == (swept["base_lr"] == 0.01)]
    assert tables.compare_norms(rows).index.tolist() == [("classic", "layer, lr 0.001 - batch, lr 0.01")]
    assert tables.seeds_table(rows).index.tolist() == [("classic", "layer, lr 0.001"), ("classic", "batch, lr 0.01")]
    labels = [" ".join(text.get_text().split()) for text in plots.plot_seeds(rows).axes[0].texts]
    assert labels[0].startswith("layer, lr 0.001 ") and labels[1].startswith("batch, lr 0.01 ")


@pytest.mark.parametrize("order", [1, -1])
def test_what_some_lines_leave_out_was_auto(rows, order):
    runs = [rows, rows.assign(settings=rows["settings"] + " precision=float32", test_acc=rows["test_acc"] + 1)]
    both = pd.concat(runs[::order])
    table = tables.seeds_table(both)
    assert table.index.names == ["recipe", "precision", "variant"] and (table["seeds"] == 5).all()
    assert table.loc[("best", "auto", "batch"), "test accuracy %"] == "82.00 ± 1.58"
    assert table.loc[("best", "float32", "batch"), "test accuracy %"] == "83.00 ± 1.58"
    assert (tables.compare_norms(both)["seeds"] == 5).all() and len(tables.compare_norms(both)) == 4
    assert len(plots.plot_seeds(both).axes[0].get_xticks()) == len(plots.plot_league(both).axes) == 4
    assert set(tables.trials_table(both.assign(test_loss=1.0))["precision"]) == {"auto", "float32"}
    pd.testing.assert_frame_equal(tables.select(both, precision="auto"), rows)


def test_other_data_are_not_mixed_in(rows):
    other = rows.assign(settings=rows["settings"].str.replace("0x1", "0x2"), test_acc=50.0)
    table = tables.seeds_table(pd.concat([rows, other]))
    assert table.index.names == ["recipe", "data", "variant"] and (table["seeds"] == 5).all()
    assert table.loc[("best", "CIFAR-10, 9 images, CRC-32 0x1", "batch"), "test accuracy %"] == "82.00 ± 1.58"


def test_one_setting_stands_for_those_that_go_along_with_it(rows):
    along = rows.assign(settings=rows["settings"] + " batch_size=8 warmup=0.5")
    both = pd.concat([rows.assign(settings=rows["settings"] + " batch_size=4 warmup=0.2"), along])
    assert tables.seeds_table(both).index.names == ["recipe", "batch_size", "variant"]
    lr = both["norm"].map({"batch": " lr=1", "layer": " lr=2"})  # tuned for each norm: nothing is mixed by that
    assert tables.compare_norms(rows.assign(settings=rows["settings"] + lr[: len(rows)])).index.names == [
        "recipe",
        "difference",
    ]


def test_pictures_that_average_refuse_a_mix_and_say_how_to_choose(swept):
    with pytest.raises(ValueError, match=r"differ in lr,.*tables.select\(rows, lr=0.01\); lr is one of 0.01, 0.001"):
        plots.plot_batch_sizes(swept)
    chosen = tables.select(swept, lr=0.01)
    line = plots.plot_batch_sizes(chosen).axes[0].containers[0][0]
    assert line.get_ydata().tolist() == [61.0] and len(chosen) == 4
    assert plots.plot_learning_rates(swept).axes[0].containers[0][0].get_ydata().tolist() == [21.0, 61.0]
    for wrong, message in (({"lr": 0.5}, "unknown lr 0.5: choose 0.01 or 0.001"), ({"rate": 1}, "setting 'rate'.*lr")):
        with pytest.raises(ValueError, match=message):
            tables.select(swept, **wrong)


def test_rows_that_are_there_twice_count_once(rows):
    twice = pd.concat([rows, rows])
    for table in (tables.seeds_table, tables.compare_norms):
        pd.testing.assert_frame_equal(table(twice), table(rows))
    assert "5 seeds each" in plots.plot_seeds(twice).axes[0].get_title()
    other = rows.assign(test_acc=1.0, precision="float32")
    with pytest.raises(ValueError, match="20 runs are there more than once.*differ in test_acc, precision: select"):
        tables.seeds_table(pd.concat([rows.assign(precision="bfloat16"), other]))


def test_one_seed_has_no_interval_and_no_warning(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = tables.compare_norms(rows[rows["seed"] == 1])
        same = tables.compare_norms(rows.assign(test_acc=50.0))
        apart = tables.compare_norms(rows[(rows["norm"] == "batch") == (rows["seed"] < 2)])
    assert table.loc["best"].loc["batch - layer"].tolist() == ["+2.00", "takes two seeds", "no", 1]
    assert same.loc["best"].loc["batch - layer"].tolist() == ["+0.00", "+0.00 to +0.00", "no", 5]
    assert apart.loc["best"].loc["batch - layer"].tolist() == ["", "takes two seeds", "no", 0]


def test_a_comparison_takes_two_norms_that_were_run_alike(rows):
    batch = rows["norm"] == "batch"
    for lonely in (rows[batch], rows[batch == (rows["recipe"] == "best")]):
        with pytest.raises(ValueError, match="no two norms have runs with the same settings"):
            tables.compare_norms(lonely)


def test_rows_without_the_name_of_a_recipe(rows):
    nameless = rows.drop(columns="recipe")
    best = nameless[rows["recipe"] == "best"]
    assert tables.seeds_table(best).loc["batch", "test accuracy %"] == "82.00 ± 1.58"
    assert tables.compare_norms(best).loc["batch - layer", "points"] == "+1.40"
    assert len(plots.plot_seeds(best).axes[0].containers) == 2
    assert tables.seeds_table(nameless).index.names == ["lr", "variant"]  # what tells the two recipes apart
    some = pd.concat([rows[rows["recipe"] == "classic"], best])
    assert set(tables.seeds_table(some).index.get_level_values("recipe")) == {"classic", "not named"}
    assert len(tables.select(some, recipe="not named")) == len(best)


def test_recipes_given_as_objects_are_told_apart_by_what_differs(rows):
    objects = {name: str(utils.get_recipe(lr=lr)) for name, lr in (("best", 0.05), ("classic", 0.02))}
    given = rows.replace({"recipe": objects})
    given["settings"] = given["settings"].str.replace("lr=0.01", "lr=0.02")
    assert tables.seeds_table(given).index.names == ["lr", "variant"]
    assert list(tables.trials_table(given.assign(test_loss=1.0)))[:2] == ["seed", "lr"]
    assert tables.compare_norms(given).loc[(0.05, "batch - layer"), "points"] == "+1.40"
    ticks = plots.plot_seeds(given).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["lr 0.05", "lr 0.02"]
    assert [ax.get_title() for ax in plots.plot_league(given).axes] == ["lr 0.05", "lr 0.02"]
    assert len(tables.select(given, recipe=utils.get_recipe(lr=0.02))) == len(rows) / 2
    some = rows.replace({"recipe": objects | {"classic": "classic"}})
    assert set(tables.seeds_table(some).index.get_level_values("recipe")) == {"classic", "not named"}


def test_a_norms_name_may_look_like_a_setting(rows):
    other = rows.replace({"norm": {"layer": "gn lr=8"}})
    other["settings"] = other["settings"].str.replace("norm=layer", "norm=gn lr=8#0123abcd")
    assert set(tables.trials_table(other.assign(test_loss=1.0)).index) == {"batch", "gn lr=8"}
    assert tables.seeds_table(other).loc[("classic", "gn lr=8"), "lowest test %"] == "79.00"
    edited = other.assign(settings=other["settings"].str.replace("#0123abcd", "#4567cdef"))
    table = tables.seeds_table(pd.concat([other, edited]).drop_duplicates())
    assert table.index.names[1] == "code"
    assert {*table.index.get_level_values("code")} == {"as it came", "#0123abcd", "#4567cdef"}


def test_diverged_runs_are_counted(rows):
    rows.loc[(rows["norm"] == "layer") & (rows["seed"] > 0), ["test_acc", "diverged"]] = None, "the loss is nan"
    table = tables.seeds_table(rows)
    assert table["diverged"].tolist() == [0, 4, 0, 4]
    assert table.loc[("best", "layer"), "test accuracy %"] == "79.00"


def test_runs_that_are_not_whole_are_neither_compared_nor_drawn(rows):
    last = rows["epoch"] == 2
    cut = rows[~(last & (rows["seed"] == 4))]
    empty = rows.assign(test_acc=rows["test_acc"].where(~(last & (rows["seed"] == 4))))
    for call in (tables.compare_norms, tables.seeds_table, plots.plot_seeds, plots.plot_league):
        with pytest.raises(ValueError, match="4 runs end before others.*as in epoch 1.*call study.run_many again"):
            call(cut)
        for given in (empty, empty.assign(diverged=None)):
            with pytest.raises(ValueError, match="last row of 4 runs has no test_acc, .*call study.run_many again"):
                call(given)
    first = rows.query("epoch == 1")  # all of them, on purpose
    assert tables.seeds_table(first)["seeds"].eq(5).all()


def test_a_study_in_which_every_run_diverged(rows):
    metrics = ["train_acc", "test_acc"]
    for none in (rows.assign(**dict.fromkeys(metrics)), rows.drop(columns=metrics)):
        none = none.query("epoch == 2 and recipe == 'best'").assign(
            diverged="the loss is nan", base_lr=0.1, batch_size=8
        )
        for draw in (plots.plot_learning_rates, plots.plot_batch_sizes):
            ax = draw(none).axes[0]
            assert [line.get_ydata().tolist() for line in ax.lines if line.get_marker() == "o"] == [[10], [10]]
        assert [ax.get_xlim()[0] < 10 < ax.get_xlim()[1] for ax in plots.plot_league(none).axes] == [True]
        assert "10.0" in plots.plot_seeds(none).axes[0].texts[0].get_text()
        assert (tables.seeds_table(none)["diverged"] == 5).all() and len(tables.trials_table(none)) == 10
        assert (tables.compare_norms(none)["seeds"] == 0).all()


def test_rows_that_a_spreadsheet_or_pandas_changed(rows, tmp_path):
    rows["test_acc"] = rows["test_acc"].where(rows["seed"] > 0)
    rows = rows.query("recipe == 'best'").assign(base_lr=0.1, batch_size=25, num_groups=4, diverged="x")
    rows.to_csv(tmp_path / "s.csv", index=False)
    with open(tmp_path / "s.csv", "a") as file:
        file.write("," * (len(rows.columns) - 1) + "\n")
    for changed in (pd.read_csv(tmp_path / "s.csv"), rows.convert_dtypes()):
        for table in (tables.seeds_table, tables.compare_norms):
            pd.testing.assert_frame_equal(table(changed), table(rows), check_index_type=False)
        for draw in (plots.plot_batch_sizes, plots.plot_learning_rates, plots.plot_seeds, plots.plot_league):
            assert drawn(draw(changed)) == drawn(draw(rows))
        ticks = plots.plot_groups(changed.replace({"norm": {"batch": "group"}})).axes[0].get_xticklabels()
        assert [tick.get_text() for tick in ticks] == ["4"]
        assert tables.select(changed, seed=3)["epoch"].tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("kind", [int, float])
def test_files_put_together_have_one_place_for_each_number_of_groups(kind):
    """pandas reads a column as text where one of its cells is, and else as numbers."""
    rows = study(norm=["group"], num_groups=[4, 16, "channels"], seed=range(3))
    first = rows[(rows["seed"] == 0) & (rows["num_groups"] != "channels")].astype({"num_groups": kind})
    rows = pd.concat([first, rows[rows["seed"] > 0].astype({"num_groups": str})])
    ax = plots.plot_groups(rows).axes[0]
    assert [tick.get_text().split("\n")[0] for tick in ax.get_xticklabels()] == ["4", "16", "one a channel"]
    assert "2 to 3 seeds each" in ax.get_title() and len(ax.lines[0].get_xdata()) == 3


def test_settings_are_chosen_as_numbers_truth_values_or_text(rows):
    ways = [rows.assign(settings=rows["settings"] + f" num_groups={n} skip={n == 4}") for n in (4, "channels")]
    rows = pd.concat(ways)
    for chosen in ({"num_groups": 4}, {"num_groups": "4"}, {"skip": True}, {"skip": "True"}, {"skip": np.True_}):
        assert len(tables.select(rows, **chosen)) == len(ways[0]), chosen
    assert len(tables.select(rows, num_groups="channels", skip=False, lr=0.05)) == len(ways[0]) / 2
    for wrong in (8, [4, 8]):
        with pytest.raises(ValueError, match="unknown num_groups 8: choose 4 or channels"):
            tables.select(rows, num_groups=wrong)


def test_several_values_are_chosen_at_once(rows):
    for seeds in (range(3), (0, 1, 2), np.arange(3), {0, 1, 2}, pd.Series([0, 1, 2]), ["0", "1", "2"]):
        assert tables.select(rows, seed=seeds)["seed"].isin([0, 1, 2]).sum() == 24, seeds
        assert len(tables.select(rows, seed=seeds, norm=["batch"], recipe="best")) == 6
    assert len(tables.select(rows, norm=["batch", "layer"])) == len(rows)


def test_what_is_no_study_is_refused_with_the_next_step(results, rows):
    for call in (tables.seeds_table, tables.compare_norms, tables.trials_table, plots.plot_seeds, tables.select):
        with pytest.raises(ValueError, match="lack settings.*study.run_many.*results_table"):
            call(tables.histories_table(results))
        with pytest.raises(TypeError, match="rows is a list: give the DataFrame"):
            call(results)
    for nothing in (rows[:0], pd.DataFrame()):
        with pytest.raises(ValueError, match="there are no rows"):
            tables.seeds_table(nothing)
    with pytest.raises(ValueError, match="norm is missing.*keep_default_na"):
        tables.seeds_table(rows.replace({"norm": {"layer": np.nan}}))


def test_the_heading_of_a_study_says_what_its_runs_share():
    def heading(rows):
        return tables.about(tables.last_epochs(rows, "norm"))

    def runs(**settings):
        return study(norm=["batch"], seed=range(2), **settings)

    long, short = runs(epochs=[20]), runs(epochs=[1])
    assert heading(short.assign(recipe="best")) == ("CIFAR-10", "best recipe, 1 epoch, 2 seeds each")
    older = runs(num_groups=[4], epochs=[20]).drop(columns="epochs")  # as the line of settings says
    assert heading(pd.concat([long, older])) == ("CIFAR-10", "20 epochs, 2 seeds each")
    for several in (pd.concat([long, short]), pd.concat([long, runs()]), runs()):
        assert heading(several) == ("CIFAR-10", "last epoch, 2 seeds each")
