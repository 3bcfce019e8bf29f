"""What README and notebook say in figures, held against the measured rows."""

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_rel

from normkit.tables import compare_norms, last_epochs, seeds_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
CELLS = json.loads((ROOT / "S8.ipynb").read_text(encoding="utf-8"))["cells"]


def rows_of(name):
    return pd.read_csv(ROOT / "results" / f"{name}.csv")


def table_in(text, heading):
    """The cells of the first table under a line that starts with heading, without its two head lines."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i, line in enumerate(lines) if i > start and not line.startswith("|")), len(lines))
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def text_between(start, end):
    """The notebook's text from one heading to the next."""
    text = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    return text[text.index(start) : text.index(end)]


# -------------------------------------------------------------------------------------- README.md


def test_the_table_of_results():
    histories, seeds = rows_of("histories"), seeds_table(rows_of("seeds"))
    for line, norm in zip(table_in(README, "| variant"), ("batch", "group", "layer"), strict=True):
        last = histories[histories["norm"] == norm].iloc[-1]
        expected = [f"{last['train_acc']:.2f} %", f"{last['test_acc']:.2f} %", "48,178"]
        expected += [f"{seeds.loc[(recipe, norm), 'test accuracy %']} %" for recipe in ("classic", "best")]
        assert line[0].startswith(norm) and line[1:] == expected
    assert last["epoch"] == 20 and set(rows_of("seeds")["seed"]) == set(range(10))


def test_the_sample_of_the_log_is_of_the_measured_run():
    first = rows_of("histories").iloc[0]
    log = README[README.index("Adjusting learning rate") :]
    loss, correct, accuracy = re.search(r"Average loss: ([\d.]+), Accuracy: (\d+)/10000 \(([\d.]+)%\)", log).groups()
    assert float(loss) == pytest.approx(first["test_loss"], abs=1e-4)
    assert float(accuracy) == int(correct) / 100 == pytest.approx(first["test_acc"])
    assert float(re.search(r"Accuracy=([\d.]+):", log).group(1)) == pytest.approx(first["train_acc"], abs=0.01)
    minutes, seconds = re.search(r"782/782 \[(\d+):(\d+)<", log).groups()
    assert 60 * int(minutes) + int(seconds) <= first["seconds"]


def test_how_long_it_takes():
    low, high = map(int, re.search(r"An epoch takes (\d+) to (\d+) seconds", README).groups())
    assert low <= rows_of("histories")["seconds"].median() <= high


def test_how_much_faster_the_kernels_are():
    said = " ".join(README.split())
    times = [float(line[-1]) for line in table_in(RESULTS, "| processor, precision of the kit")]
    assert "five to eight times as fast as usual" in said and (round(min(times)), round(max(times))) == (5, 8)
    steps = [line for line in table_in(RESULTS, "| batch size | norm | PyTorch's modules") if line[2] != "–"]
    times = [float(modules) / float(kernels) for _, _, modules, _, kernels in steps]
    assert "two to four times as fast as PyTorch's modules" in said and (round(min(times)), round(max(times))) == (2, 4)


def test_the_readme_is_short_and_its_first_command_near():
    assert len(README.split()) <= 900
    assert README.splitlines().index("```sh") < 25


# ------------------------------------------------------------------------------ results/README.md


def test_the_differences_between_norms():
    found = compare_norms(rows_of("seeds"))
    assert (found.loc["best", "seeds"] == 10).all() and (found.loc["best", "significant"] == "no").all()
    assert "With the tuned recipe ten seeds show no lead" in text_between("## What can be concluded", "## Your own")
    for difference, *cells in table_in(RESULTS, "Differences in test accuracy"):
        for recipe, cell in zip(("classic", "best"), cells, strict=True):
            row = found.loc[(recipe, difference)]
            assert cell == f"{row['points']} ({row['95 % interval']})".replace("-0.00", "+0.00"), difference


def test_the_precisions():
    table = rows_of("precision")
    for norm, *cells in table_in(RESULTS, "Classic recipe, test accuracy after 20 epochs"):
        each = table[table["norm"] == norm]
        means = [f"{each[name].mean():.2f} ± {each[name].std():.2f}" for name in ("bfloat16", "float32")]
        assert cells == [*means, f"{each['difference'].mean():+.2f} ± {each['difference'].std():.2f}"]


def test_the_trials_are_in_their_file():
    """Every accuracy with two decimals, and every loss with three, but for the two trials that no setting makes."""
    last = last_epochs(rows_of("trials"))
    accuracies = {f"{value:.2f}" for value in last["test_acc"]}
    losses = {f"{value:.3f}" for value in last["test_loss"]}
    text = RESULTS[RESULTS.index("## The trials") : RESULTS.index("The last is as accurate")]
    tables = [line for line in text.splitlines() if line.startswith("|") and "no setting" not in line]
    tables = [line for line in tables if "nor is this" not in line]
    cells = " ".join(" ".join(line.split("|")[2:]) for line in tables)
    said = re.findall(r"\b(\d\d\.\d\d)\b", cells)
    assert len(said) > 30 and set(said) <= accuracies
    assert set(re.findall(r"\b(0\.\d{3})\b", cells)) <= losses


# ---------------------------------------------------------------------------------------- S8.ipynb


def test_what_is_said_of_chance():
    found = compare_norms(rows_of("seeds"))
    said = text_between("## What can be concluded", "## Your own model")
    lead = found.loc[("classic", ["batch - group", "batch - layer"]), :]
    assert "leads by four points" in said and all(3.5 < float(points) < 4.5 for points in lead["points"])
    assert list(lead["significant"]) == ["yes"] * 2 and set(found.loc["best", "significant"]) == {"no"}
    training = last_epochs(rows_of("seeds")).query("recipe == 'classic'").groupby("norm")["train_acc"].mean()
    assert training["batch"] - training[["group", "layer"]].max() > 3  # "by as much in training accuracy"


def test_which_differences_hold_when_corrected_for_all_six():
    accuracies = last_epochs(rows_of("seeds")).pivot(index="seed", columns=["recipe", "norm"], values="test_acc")
    held = {
        (recipe, f"{a} - {b}")
        for recipe in ("classic", "best")
        for a, b in itertools.combinations(("batch", "group", "layer"), 2)
        if ttest_rel(accuracies[recipe, a], accuracies[recipe, b]).pvalue < 0.05 / 6
    }
    assert held == {("classic", "batch - group"), ("classic", "batch - layer")}
    assert "with the classic recipe hold, group norm's over layer norm does not" in " ".join(RESULTS.split())
    said = text_between("## Is it chance?", "## Learning rate")
    assert "corrected for six comparisons, group norm's lead over layer norm may be chance" in said


def test_what_is_said_of_learning_rates():
    last = last_epochs(rows_of("learning_rates")).fillna({"test_acc": 10})
    means = last.groupby(["norm", "base_lr"])["test_acc"].mean()
    said = text_between("## Learning rate", "## Why")
    for norm in ("batch", "group", "layer", "none"):
        assert f"{means[norm].max():.1f}" in said
    assert means["group"].idxmax() == means["layer"].idxmax() == 0.01  # the classic recipe's own
    assert f"Without a norm, at {means['none'].idxmax():g}, the network reaches {means['none'].max():.1f} %" in said
    batch = means["batch"].loc[0.01:0.3]
    assert batch.max() == means["batch"].max() and batch.max() - batch.min() < 4  # "hardly minds"
    best = means.groupby("norm").max()
    assert best["batch"] - best.drop("batch").max() > 5 and best[["group", "layer"]].max() - best["none"] < 3
    start = [f"{means[norm, 0.001]:.0f}" for norm in ("group", "layer", "none")]
    assert "({} and {} in place of {} % at 0.001)".format(*start) in said
    assert last["epoch"].max() == 4


def test_what_is_said_of_why():
    rows = rows_of("why")
    first = rows[rows["step"] == 0].groupby(["quantity", "norm", "layer"])["value"].mean()
    said = text_between("## Why", "## Batch size")
    ratio = first["gradient norm", "batch", "C1"] / first["gradient norm", "none", "C1"]
    assert f"C1's is {round(ratio, -1):.0f} times smaller at the start" in said
    for norm in ("batch", "group", "layer", "none"):
        assert f"{first['similarity', norm, 'C9']:.2f}" in said
    last = rows[rows["step"] == rows["step"].max()].query("quantity == 'gradient norm' and layer == 'C1'")
    last = last.groupby("norm")["value"].mean()
    assert last.max() / last.min() < 5  # "of one size"
    losses = rows[rows["quantity"] == "loss"].groupby(["norm", "step", "rate"])["value"].mean().unstack("rate")
    rise = (losses[0.4] - losses[0.05]).groupby("norm").median()
    assert "a step eight times as long ends more than a nat higher" in said
    assert rise["batch"] < 0.3 and rise["group"] > 1 and rise["layer"] > 1


def test_the_table_of_rates_by_batch_size():
    last = last_epochs(rows_of("batch_rates"))
    for line, ascending in zip(table_in(RESULTS, "| batch size | power"), (False, True), strict=True):  # by power
        of_size = last[last["batch_size"] == int(line[0])].sort_values("base_lr", ascending=ascending)
        for cell, norm in zip(line[2:], ("batch", "group", "layer"), strict=True):
            said = [float(number) for number in cell.replace("*", "").split(",")]
            assert said == pytest.approx(of_size.loc[of_size["norm"] == norm, "test_acc"].tolist(), abs=0.051)


def test_the_further_trials():
    last = last_epochs(rows_of("trials_by_norm"))
    about = RESULTS[RESULTS.index("Further trials, each norm by itself") :]
    recipes = list(last.groupby(["batch_size", "base_lr", "warmup"], dropna=False, sort=False))
    means = []
    for line, (_, runs) in zip(table_in(about, "| settings"), recipes, strict=True):
        for cell, norm in zip(line[1:], ("batch", "group", "layer"), strict=True):
            own = runs[runs["norm"] == norm].sort_values("seed")
            accuracies, loss = ", ".join(f"{value:.2f}" for value in own["test_acc"]), own["test_loss"].mean()
            assert cell == f"{accuracies} / {loss:.3f}"
            assert own["test_acc"].max() - own["test_acc"].min() < 1.11
            means.append({"norm": norm, "mean": own["test_acc"].mean()})
    spread = pd.DataFrame(means).groupby("norm")["mean"].agg(lambda each: each.max() - each.min()).max()
    assert f"the means of settings by up to {spread:.1f}" in " ".join(about.split())


def test_how_long_the_studies_took():
    for name, _, _, hours in table_in(RESULTS, "| name | what | rows"):
        studies = [study for study in re.findall(r"`(\w+)`", name) if study not in ("notebook", "why")]
        for study, said in zip(studies, hours.split(", ")):
            runs = rows_of(study).groupby("settings")  # of some of trials' the last epoch alone is there
            seconds = runs["seconds"].mean() * runs["epoch"].max()
            assert float(said) == pytest.approx(seconds.sum() / 3600, abs=0.051)


def test_the_league_of_norms():
    rows = rows_of("league")
    last, seconds = rows[rows["epoch"] == 4], rows.groupby("norm")["seconds"].min()
    for norm, *cells, time in table_in(RESULTS, "| norm | classic | best | seconds"):
        for recipe, cell in zip(("classic", "best"), cells, strict=True):
            of_norm = last[(last["norm"] == norm) & (last["recipe"] == recipe)].sort_values("seed")
            assert cell == " / ".join(f"{accuracy:.1f}" for accuracy in of_norm["test_acc"])
        kernel = (last.loc[last["norm"] == norm, "backend"] == "fused").all()
        assert time == f"{seconds[norm]:.0f}, {'kernel' if kernel else 'modules'}"
    assert len(last) == 54 and set(last.groupby(["norm", "recipe"]).size()) == {3}
    classic, best = (
        last[last["recipe"] == recipe].groupby("norm")["test_acc"].mean() for recipe in ("classic", "best")
    )
    lead, regained = classic["batch"] - classic["group"], classic["standardised"] - classic["group"]
    missing = classic["batch"] - classic["none"], best["batch"] - best["none"]
    said = " ".join(RESULTS.split())
    assert f"is {lead:.1f} points ahead of group norm, standardised filters make up for {regained:.1f} of them" in said
    assert f"costs {missing[0]:.1f} points with the classic recipe" in said and f"and {missing[1]:.1f} with" in said
    assert abs(classic["batch"] - classic["ghost"]) < 0.3  # "within 0.3 points"
    found = compare_norms(rows).loc["best"]
    for norm in ("group", "layer"):
        points, interval = found.loc[f"batch - {norm}", ["points", "95 % interval"]]
        assert points.lstrip("+") in said and interval in said
    assert "with the classic one pixel is level with layer norm" in said
    assert abs(classic["pixel"] - classic["layer"]) < 1
    near = ["ghost", "standardised", "group", "layer", "RMS"]
    assert (best["batch"] - best[near]).between(0, 1).all()  # "within a point"
    assert not (best["batch"] - best.drop(["batch", *near])).between(0, 1).any()
    assert abs(classic["RMS"] - classic["layer"]) < 1 > abs(best["RMS"] - best["layer"])  # "near it"
    cells = text_between("## More norms", "## Your own model")
    assert "group and layer norm by {:.1f} and {:.1f}".format(*(best["batch"] - best[["group", "layer"]])) in cells
    assert f"bring group norm {regained:.1f} of batch norm's {lead:.1f} points" in cells
    assert f"having none costs {missing[1]:.1f} points" in cells
    readme = " ".join(README.split())
    assert "with *classic*, weight standardisation closes most of group norm's gap" in readme and regained > lead / 2
    assert "omitting the norm costs seven points" in readme and round(missing[1]) == 7


def test_what_is_said_of_batch_sizes():
    last = last_epochs(rows_of("batch_sizes"))
    means = last.groupby(["batch_size", "norm"])["test_acc"].mean().unstack()
    seeds = last.groupby(["batch_size", "norm"]).size().unstack()
    assert means.shape == (8, 3) and (seeds == 3).all(axis=None)
    for text in (text_between("## Batch size", "## How many groups?"), RESULTS):
        said = " ".join(text.split())
        assert "by less than a point over the next" in said and "five points behind" in said and "eight" in said
    lead = means["batch"] - means[["group", "layer"]].max(axis=1)
    assert (lead[64:] > 0).all() and (lead[64:] < 1).all()
    found = compare_norms(rows_of("batch_sizes")).loc["best"]  # "its lead over group norm at 512 ... they do"
    significant = found.index[found["significant"] == "yes"]
    leads = [(size, pair) for size, pair in significant if size >= 64 and "batch" in pair]
    assert leads == [(512, "batch - group")] and means.loc[512].nlargest(2).index[1] == "layer"  # no lead over the next
    assert f"group norm at 512, {found.loc[leads[0], 'points'][1:]} points" in " ".join(RESULTS.split())
    middle = means.loc[8:32]
    assert (middle.max(axis=1) - middle.min(axis=1) < 1).all()  # "level"
    assert round(means[["group", "layer"]].mean(axis=1)[2] - means["batch"][2]) == 5
    assert "with two images, falls five points behind" in text_between("## What can be concluded", "## Your own model")
    assert [round(means[norm][128] - means[norm][2]) for norm in ("batch", "group", "layer")] == [8, 3, 3]


def test_what_is_said_of_groups():
    groups = last_epochs(rows_of("groups")).groupby("num_groups")["test_acc"].mean()
    assert groups.drop("channels").max() - groups.drop("channels").min() < 2.5  # "little to choose"
    assert groups["channels"] < groups.drop("channels").min() - 10


def test_the_outputs_are_of_the_run_that_the_readme_shows():
    text = "".join(line for cell in CELLS for o in cell.get("outputs", []) for line in o.get("text", []))
    last = rows_of("histories").groupby("norm", sort=False).last()
    for norm, row in last.iterrows():
        assert f"({row['test_acc']:.2f}%)" in text, norm
