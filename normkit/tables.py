"""Tables of one run and of many."""

import itertools
import re

import numpy as np
import pandas as pd


def results_table(results):
    """A DataFrame, one row a result: last-epoch metrics, the best epoch beside them, cost."""
    rows = []
    results = [results] if hasattr(results, "history") else results
    for result in results.values() if isinstance(results, dict) else results:
        if not result.history:
            raise ValueError(f"the {result.norm} run has no finished epoch: train it before you tabulate it")
        last, best = result.history[-1], max(result.history, key=lambda row: row["test_acc"])
        rows.append(
            {
                "variant": result.norm,
                "training accuracy %": round(last["train_acc"], 2),
                "test accuracy %": round(last["test_acc"], 2),
                "total parameters": sum(p.numel() for p in result.model.parameters()),
                "epochs": last["epoch"],
                "best test % (epoch)": f"{best['test_acc']:.2f} ({best['epoch']})",
                "seconds an epoch": round(float(np.median([row["seconds"] for row in result.history])), 1),
                "seed": result.seed,
                "data": result.data,
            }
        )
    return pd.DataFrame(rows).set_index("variant")


def histories_table(results):
    """Returns a DataFrame of every epoch of every result, one row each."""
    return pd.DataFrame(
        {"norm": result.norm, "seed": result.seed, "data": result.data} | row
        for result in results
        for row in result.history
    )


def last_epochs(rows):
    """The rows of each run's last epoch."""
    return rows[rows["epoch"] == rows.groupby("settings")["epoch"].transform("max")]


def seeds_table(rows):
    """Last-epoch accuracies of many seeds, mean ± standard deviation, by recipe and norm. rows: of study.run_many."""
    last = last_epochs(rows)
    cells = []
    for (recipe, norm), each in last.groupby(["recipe", "norm"], sort=False):
        cell = {"recipe": recipe, "variant": norm}
        for column, name in (("train_acc", "training accuracy %"), ("test_acc", "test accuracy %")):
            deviation = f" ± {each[column].std():.2f}" if len(each) > 1 else ""
            cell[name] = f"{each[column].mean():.2f}{deviation}"
        cells.append(cell | {"lowest test %": f"{each['test_acc'].min():.2f}", "seeds": len(each)})
    return pd.DataFrame(cells).set_index(["recipe", "variant"])


def trials_table(rows):
    """What was tried, a line a run: the settings in which the runs differ, and the last epoch's metrics.

    rows: of study.run_many, with data.train_val_split: its "test" images are the training images held out.
    """
    last = last_epochs(rows)
    table = pd.DataFrame(dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", line)) for line in last["settings"])
    table = table.loc[:, (table.nunique() > 1) | (table.columns == "norm")]
    for column, name in (("train_acc", "training accuracy %"), ("test_acc", "held-out accuracy %")):
        table[name] = [f"{accuracy:.2f}" for accuracy in last[column]]
    table["held-out loss"] = [f"{loss:.3f}" for loss in last["test_loss"]]
    return table.set_index("norm")


def compare_norms(rows):
    """Differences in last-epoch test accuracy between norms, in points, paired by seed, with 95 % confidence intervals.

    rows: of study.run_many. A difference is real, by this measure, where its interval leaves out zero (Student's t).
    """
    from scipy import stats  # takes longer to import than all else here

    lines = []
    for recipe, each in last_epochs(rows).groupby("recipe", sort=False):
        accuracies = each.pivot(index="seed", columns="norm", values="test_acc")
        for a, b in itertools.combinations(dict.fromkeys(each["norm"]), 2):
            both = accuracies[[a, b]].dropna()
            low, high = stats.ttest_rel(both[a], both[b]).confidence_interval(0.95)
            line = {"recipe": recipe, "difference": f"{a} - {b}", "points": f"{(both[a] - both[b]).mean():+.2f}"}
            line |= {"95 % interval": f"{low:+.2f} to {high:+.2f}", "real": "yes" if low * high > 0 else "not shown"}
            lines.append(line | {"seeds": len(both)})
    columns = ["recipe", "difference", "points", "95 % interval", "real", "seeds"]
    return pd.DataFrame(lines, columns=columns).set_index(["recipe", "difference"])


def count_seeds(rows):
    """How many seeds lie behind each point of a picture, in words."""
    settings = last_epochs(rows)["settings"].str.replace(r" seed=-?\d+", "", regex=True)
    fewest, most = settings.value_counts().agg(["min", "max"])
    return f"{fewest} to {most} seeds each" if fewest < most else f"{most} seed{'s' * (most > 1)} each"
