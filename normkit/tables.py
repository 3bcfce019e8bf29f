"""Tables of one run and of many."""

import itertools
import math
import re

import numpy as np
import pandas as pd

from normkit.checks import by_name, check_choice, check_notes, describe
from normkit.text import counted

METRICS = ("train_loss", "train_acc", "test_loss", "test_acc")
WHOLE = ("epoch", "seed", "batch_size", "num_groups")  # columns of whole numbers
BY_RUN = "{name: rows for name, rows in table.groupby(['norm', 'seed'])}"  # a table of histories taken apart
UNNAMED = "not named"  # the recipe of rows that lack its name, beside others that have it

# ---------------------------------------------------------------------------------- of results


def results_of(results):
    """Returns a list of results of utils.run, which may be given one alone, in a dict, or in anything iterable."""
    if hasattr(results, "history") or not hasattr(results, "__iter__"):
        results = [results]
    listed = list(results.values() if isinstance(results, dict) else results)
    for each in listed:
        if not hasattr(each, "history"):
            raise TypeError(
                f"a {describe(each)} is no result: give what utils.run returns, one or several; what utils.fit returns "
                "is a table as pd.DataFrame(history)"
            )
    if not listed:
        raise ValueError("there are no results: give what utils.run returns, one or several")
    return listed


def settings_of_results(results):
    """Returns a DataFrame of the settings of results, one row each."""
    rows = [{"norm": each.norm, **vars(each.recipe), "data": each.data, "seed": each.seed} for each in results]
    return pd.DataFrame(rows, columns=None if rows else ["norm"], dtype=object)  # numbers and names as they are


def differing_settings(results):
    """Returns the names of the settings in which the recipes of results differ."""
    settings = settings_of_results(results).drop(columns=["norm", "data", "seed"])
    return settings.columns[settings.astype(str).nunique() > 1]


def results_table(results):
    """Returns a DataFrame, one row a result: last-epoch metrics, the best epoch's, cost, and settings that differ."""
    rows = []
    results = results_of(results)
    differing = differing_settings(results)
    for result in results:
        if not result.history:
            raise ValueError(f"the {result.norm} run has no finished epoch: train it before you tabulate it")
        last = result.history[-1]
        best = max(result.history, key=lambda row: (not math.isnan(row["test_acc"]), row["test_acc"]))
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
                **{name: getattr(result.recipe, name) for name in differing},
                "data": result.data,
            }
        )
    return pd.DataFrame(rows).set_index("variant")


def histories_table(results):
    """Returns a DataFrame of every epoch of every result, one row each, with the settings that differ."""
    rows, results = [], results_of(results)
    differing = differing_settings(results)
    for result in results:
        about = {"norm": result.norm, "seed": result.seed, "data": result.data}
        about |= {"base_lr" if name == "lr" else name: getattr(result.recipe, name) for name in differing}
        for row in result.history:
            check_notes(row, about)
            rows.append(about | row)
    return pd.DataFrame(rows)


def label_results(results):
    """Returns a label for each result: its norm and, where that is another's too, the settings that tell them apart."""
    labels = [""] * len(results)
    settings = settings_of_results(results).astype(str)
    for norm, alike in settings.groupby("norm", sort=False):
        names = telling_apart(alike, ["norm"])
        for i, values in alike[names].iterrows():
            texts = [f"{name} {value}".removesuffix(".0") for name, value in values.items()]
            labels[i] = ", ".join([norm, *texts])
    return [f"{label}, run {i}" if labels.count(label) > 1 else label for i, label in enumerate(labels, 1)]


def histories_of(given):
    """Returns a dict from a label to a history, rows as dicts, and the data's name, of what plot_curves is given."""
    if hasattr(given, "columns"):
        raise TypeError(
            "plot_curves draws histories, not a table: give results of utils.run, or what utils.fit returns, or of a "
            f"table {BY_RUN}"
        )
    if hasattr(given, "history") or isinstance(given, str) or not hasattr(given, "__iter__"):
        given = [given]
    elif isinstance(given, dict) and "epoch" in given:
        given = {"run": [given]}
    elif not isinstance(given, dict) and (given := list(given)) and isinstance(given[0], dict):
        given = {"run": given}
    if isinstance(given, dict):
        runs = given
    else:
        results = [each for each in given if hasattr(each, "history")]
        labels = iter(label_results(results))
        runs = {next(labels) if hasattr(each, "history") else f"run {i}": each for i, each in enumerate(given, 1)}
    if not runs:
        raise ValueError("there is nothing to draw: give at least one history of at least one epoch")
    data = sorted({each.data for each in runs.values() if hasattr(each, "history")})
    runs = {name: getattr(each, "history", each) for name, each in by_name(runs).items()}
    return {name: check_history(name, each) for name, each in runs.items()}, ", ".join(data)


def check_history(label, history):
    """Returns a history as a list of dicts in the order of the epochs, if it is one run's, of at least one epoch."""
    rows = history.to_dict("records") if hasattr(history, "to_dict") else history
    if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"{label} is a {describe(history)}: expected a result of utils.run, or what utils.fit returns")
    missing = [name for name in ("epoch", "lr", *METRICS) if not all(name in row for row in rows)]
    if missing:
        raise ValueError(f"{label} is no history: its rows lack {', '.join(missing)}, which those of utils.fit have")
    if not rows:
        raise ValueError(f"there is nothing to draw: {label} needs at least one epoch")
    rows = [row | {name: number_of(label, name, row[name]) for name in ("epoch", "lr", *METRICS)} for row in rows]
    epochs = [row["epoch"] for row in rows]
    if len(set(epochs)) < len(epochs):
        twice = max(epochs, key=epochs.count)
        raise ValueError(
            f"{label} has epoch {twice:g} more than once: give each run by itself, of a table {BY_RUN}, "
            "with all columns between these two in which runs differ"
        )
    return sorted(rows, key=lambda row: row["epoch"])


def number_of(label, name, value):
    """Returns a value of a history as a number: files have text in place of it, or nothing in place of a NaN."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return math.nan if value is None or value is pd.NA else float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{label} has {name}={value!r} in a row: expected a number") from None


# ---------------------------------------------------------------------------------- of a study


def check_rows(rows, *columns):
    """Returns rows of study.run_many, if they are some and have these columns, with plain numbers.

    A spreadsheet leaves empty lines in a CSV file, which make each 25 a 25.0, and convert_dtypes() makes a NaN a pd.NA.
    A file may have been read as text.
    """
    if not hasattr(rows, "columns"):
        raise TypeError(f"rows is a {describe(rows)}: give the DataFrame that study.run_many returns")
    text = [name for name in rows if pd.api.types.is_string_dtype(rows[name].dtype)]  # of objects, too
    rows = rows.assign(**{name: rows[name].where(rows[name] != "") for name in text}).dropna(how="all")
    numbers = {*METRICS, *WHOLE, "lr", "base_lr"}.intersection(text)
    rows = rows.assign(**{name: as_numbers(rows[name]) for name in numbers})
    if rows.empty:
        raise ValueError("there are no rows: the study has no finished run, or none that was selected")
    if "diverged" in rows:  # such a run has no metrics, so there is no column of them where all did
        rows = rows.reindex(columns=rows.columns.union(METRICS, sort=False))
    missing = [name for name in ("settings", "epoch", "test_acc", *columns) if name not in rows]
    if missing:
        raise ValueError(
            f"these are no rows of a study: they lack {', '.join(missing)}. Give what study.run_many returns, or "
            "pd.read_csv of its file; for results of utils.run there is results_table"
        )
    decimal = [name for name in rows if name in METRICS or pd.api.types.is_float_dtype(rows[name])]
    rows = rows.astype(dict.fromkeys(decimal, float))
    whole = [name for name in WHOLE if name in decimal and (rows[name] % 1 == 0).all()]
    return rows.astype(dict.fromkeys(whole, int))


def last_epochs(rows, *columns):
    """Returns the rows of each run's last epoch, each run once. rows: of study.run_many, with these columns too."""
    rows = check_rows(rows, *columns).drop_duplicates(ignore_index=True)
    if "norm" in rows and rows["norm"].isna().any():
        raise ValueError("a norm is missing, or called None: read the file with keep_default_na=False, na_values=['']")
    rows = with_recipes_named(rows)
    if "recipe" in rows and (rows["recipe"] == UNNAMED).all():
        rows = rows.drop(columns="recipe")
    twice = rows[rows.duplicated(["settings", "epoch"], keep=False)]
    if len(twice):
        several = twice.groupby(["settings", "epoch"]).nunique(dropna=False).gt(1).any()
        raise ValueError(
            f"{twice['settings'].nunique()} runs are there more than once, with other results; they differ in "
            f"{', '.join(several.index[several])}: select the rows of one of each"
        )
    last = rows[rows["epoch"] == rows.groupby("settings")["epoch"].transform("max")]
    check_ends(last)
    return last


def check_ends(last):
    """Raises ValueError where of runs with equally many epochs some lack the last ones, or the last row a metric."""
    finished = last[last["diverged"].isna()] if "diverged" in last else last
    empty = finished.loc[finished["test_acc"].isna(), "settings"]
    if len(empty):
        raise ValueError(
            f"the last row of {len(empty)} runs has no test_acc, and nothing in the column diverged, as of "
            f"{empty.iloc[0]!r}: leave these out, or call study.run_many again"
        )
    planned = finished["settings"].str.extract(r" epochs=(\d+) ", expand=False)
    short = finished[finished["epoch"] < finished.groupby(planned)["epoch"].transform("max")]
    if len(short):
        raise ValueError(
            f"{len(short)} runs end before others that were to have as many epochs, as in epoch "
            f"{short['epoch'].iloc[0]} of {short['settings'].iloc[0]!r}: leave these out, or call study.run_many again"
        )


def with_recipes_named(rows):
    """Returns the rows with a name for each recipe: one that was given as an object is there as its settings."""
    if "recipe" not in rows:
        return rows
    recipes = rows["recipe"].astype(object)
    nameless = recipes.isna() | recipes.astype(str).str.match(r"\w+=\S+ \w+=")
    return rows.assign(recipe=recipes.mask(nameless, UNNAMED))


def settings_table(rows):
    """Returns the settings of each row's run as text, a column each, as its recipe and its line "settings" name them.

    "code" has the marks of a user-defined norm or model.py. What a line leaves out, such as the precision, was
    "auto"; what it says beyond all that is in the last column alone.
    """
    lines, rows = [], with_recipes_named(rows)
    for i, line in enumerate(rows["settings"]):
        found = {name: rows[name].iloc[i] for name in ("recipe", "norm") if name in rows}
        found = {name: UNNAMED if pd.isna(value) else str(value) for name, value in found.items()}
        data, _, said = line.rpartition(f": norm={found.get('norm')}")  # the name of a norm may look like a setting
        code = " ".join(re.findall(r"\S*#[0-9a-f]{8}", said)) or "as it came"
        found = {"data": data, "code": code} | dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", said)) | found
        lines.append(found | {"settings": re.sub(r" seed=\S+", "", line)})
    table = pd.DataFrame(lines, index=rows.index).fillna("auto")
    first = ["recipe"] if "recipe" in rows else []
    return table[[*first, *table.columns.drop([*first, "settings"]), "settings"]]


def select(rows, **settings):
    """Returns the rows of the runs with these settings, such as select(rows, lr=0.01, seed=range(3)).

    rows: of study.run_many.
    """
    rows = check_rows(rows)
    text = settings_table(rows)
    table = text.apply(as_numbers)
    chosen = np.ones(len(rows), dtype=bool)
    for name, value in settings.items():
        check_choice("setting", name, list(table))
        alike = np.zeros(len(rows), dtype=bool)
        for each in value if pd.api.types.is_list_like(value) else [value]:
            found = (table[name] == each) | (text[name] == str(each))  # a column with "channels" has its 4 as text
            if name == "recipe":  # given as an object
                found |= rows[name].astype(str) == str(each)
            if not found.any():
                check_choice(name, each, table[name].unique().tolist())
            alike |= found.to_numpy()
        chosen &= alike
    return rows[chosen]


def as_numbers(column):
    """Returns a column of text as numbers where all of it is one, and else as text alone.

    Of files put together, of which only one has "channels" in a column, the others have numbers there.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    if not (numbers.isna() & column.notna()).any():
        return numbers
    return column.map(lambda cell: f"{cell:g}" if isinstance(cell, float) else str(cell), na_action="ignore")


def telling_apart(table, by):
    """Returns the columns that, one after the other, tell rows apart which are alike in the columns by."""
    found = []
    for name in table.columns.drop(by):
        alike = table.groupby([*by, *found] or (lambda row: "all"), sort=False, dropna=False, observed=True)
        if (alike[name].nunique(dropna=False) > 1).any():
            found.append(name)
    return found


def swept(last, by):
    """Returns the settings beside the seed, a column each, in which runs differ that are alike in the columns by."""
    settings = settings_table(last).drop(columns=["seed", *by], errors="ignore").join(last[by])
    return settings[telling_apart(settings, by)].apply(as_numbers)


def separated(last):
    """Returns the rows with a column for each setting that was swept beside norm, recipe and seed, and its names.

    Where norms differ in a further setting, each is named with its own: "batch, lr 0.1".
    """
    recipe = ["recipe"] if "recipe" in last else []
    further = swept(last, [*recipe, "norm"])
    names = [*recipe, *further]
    last = last.assign(**further)
    settings = settings_table(last).drop(columns=["norm", "code", "seed", "settings", *names], errors="ignore")
    for name in telling_apart(settings.join(last[names]), names):
        last = last.assign(norm=[f"{norm}, {name} {value}" for norm, value in zip(last["norm"], settings[name])])
    return last, names


def refuse_mix(last, by):
    """Raises ValueError where runs that are alike in the columns by differ in more than the seed."""
    further = swept(last, by)
    for name in further:
        values = further[name].unique().tolist()
        raise ValueError(
            f"runs of the same {' and '.join(by)} differ in {' and '.join(further)}, and a mean over them would say "
            f"nothing: draw one at a time, such as tables.select(rows, {name}={values[0]!r}); {name} is one of "
            + ", ".join(map(str, values))
        )


def groups_of(last, names):
    """Yields (a dict from each name to its value, the rows) for each combination of values, in order of appearance."""
    if not names:
        yield {}, last
        return
    for values, each in last.groupby(names, sort=False, observed=True):
        yield dict(zip(names, values)), each


def seeds_table(rows):
    """Returns last-epoch accuracies, mean ± standard deviation over the seeds, by recipe and norm.

    rows: of study.run_many. A setting that was swept as well has a level of the index of its own.
    """
    last, names = separated(last_epochs(rows, "norm", "train_acc"))
    cells = []
    for group, runs in groups_of(last, names):
        for norm, each in runs.groupby("norm", sort=False, observed=True):
            cell = group | {"variant": norm}
            for column, name in (("train_acc", "training accuracy %"), ("test_acc", "test accuracy %")):
                deviation = f" ± {each[column].std():.2f}" if each[column].count() > 1 else ""
                cell[name] = f"{each[column].mean():.2f}{deviation}"
            cell |= {"lowest test %": f"{each['test_acc'].min():.2f}", "seeds": len(each)}
            if last["test_acc"].isna().any():
                cell["diverged"] = int(each["test_acc"].isna().sum())
            cells.append(cell)
    return pd.DataFrame(cells).set_index([*names, "variant"])


def trials_table(rows):
    """Returns what was tried, a line a run: the settings in which the runs differ, and the last epoch's metrics.

    rows: of study.run_many, with data.train_val_split: its "test" images are the training images held out.
    """
    last = last_epochs(rows, "norm", "train_acc", "test_loss")
    table = settings_table(last).drop(columns="settings")
    table = table.loc[:, (table.nunique(dropna=False) > 1) | (table.columns == "norm")]
    for column, name in (("train_acc", "training accuracy %"), ("test_acc", "held-out accuracy %")):
        table[name] = [f"{accuracy:.2f}" for accuracy in last[column]]
    table["held-out loss"] = [f"{loss:.3f}" for loss in last["test_loss"]]
    return table.set_index("norm")


def compare_norms(rows):
    """Returns the differences between norms in last-epoch test accuracy, in points, with 95 % confidence intervals.

    rows: of study.run_many; runs are paired by seed. A difference is significant where its interval leaves out
    zero (Student's t), and no run diverged. Each interval is by itself: of twenty, one leaves out zero by chance.
    Norms are compared within a recipe, and within each value of a setting that was swept as well; one in which they
    differ is named beside them. Raises ValueError where no two can be.
    """
    from scipy import stats  # takes longer to import than all else here

    last, names = separated(last_epochs(rows, "norm", "seed"))
    columns = [*names, "difference", "points", "95 % interval", "significant", "seeds"]
    columns += ["diverged"] if last["test_acc"].isna().any() else []
    lines = []
    for group, each in groups_of(last, names):
        accuracies, ran = (each.pivot(index="seed", columns="norm", values=name) for name in ("test_acc", "epoch"))
        for a, b in itertools.combinations([norm for norm in last["norm"].unique() if norm in ran], 2):
            gaps = (accuracies[a] - accuracies[b]).dropna()
            diverged = len((ran[a] - ran[b]).dropna()) - len(gaps)
            line = group | {"difference": f"{a} - {b}", "points": f"{gaps.mean():+.2f}" if len(gaps) else ""}
            half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std() / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            low, high = gaps.mean() - half, gaps.mean() + half
            interval = f"{low:+.2f} to {high:+.2f}" if len(gaps) > 1 else "takes two seeds"
            line |= {"95 % interval": interval, "significant": "yes" if low * high > 0 and not diverged else "no"}
            lines.append(line | {"seeds": len(gaps), "diverged": diverged})
    if not lines:
        raise ValueError("no two norms have runs with the same settings: there is nothing to compare")
    return pd.DataFrame(lines, columns=columns).set_index([*names, "difference"])


def about(last):
    """Names the data of a picture, and says what its runs share: recipe, epochs, and the seeds behind each point."""
    table = settings_table(last)
    recipes, epochs = (table[name].unique() if name in table else [] for name in ("recipe", "epochs"))
    shared = [f"{recipes[0]} recipe"] if len(recipes) == 1 else []
    shared.append(counted(int(epochs[0]), "epoch") if len(epochs) == 1 else "last epoch")
    fewest, most = table["settings"].value_counts().agg(["min", "max"])
    seeds = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
    return data_of(last), ", ".join([*shared, f"{seeds} each"])


def data_of(rows):
    """Returns the names of the data in rows, joined by commas."""
    names = (name if isinstance(name, str) and name else "data without a name" for name in rows["data"])
    return ", ".join(dict.fromkeys(names))
