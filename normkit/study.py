"""Many runs into one file."""

import contextlib
import itertools
import sys
import tempfile
import zlib
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from model import NORMS, Net
from normkit.backend import choose_backend
from normkit.checks import whole_number
from normkit.device import choose_precision
from normkit.engine import compute
from normkit.identity import mark_of
from normkit.placement import choose_device
from normkit.randomness import generators_preserved
from normkit.rows import add_rows, find_done, read_rows
from utils import get_recipe, run

# Keywords of utils.run that say how a run is computed, and not what. Of these a choice that was made counts.
CHOICES = ("precision", "memory_format", "backend")
HOW = {"device", "progress", "checkpoint", "on_epoch", "self_check", *CHOICES}
COMPRESSED = {".gz", ".bz2", ".zip", ".xz", ".zst", ".tar"}


def grid(**choices):
    """Returns every combination of the choices, as keywords: grid(norm=NORMS, seed=range(5)) has 15 dicts.

    A single value, such as epochs=2, is the same for all.
    """
    values = [[each] if is_single(each) else each for each in choices.values()]
    return [dict(zip(choices, each)) for each in itertools.product(*values)]


def is_single(choice):
    return isinstance(choice, str) or not hasattr(choice, "__iter__") or getattr(choice, "shape", None) == ()


def run_key(keywords, data_line):
    """Returns the settings of a run in one line; two runs with the same line are the same."""
    if "norm" not in keywords:
        raise ValueError(f"a run needs a norm: {', '.join(map(str, NORMS))}")
    settings = {name: value for name, value in keywords.items() if name not in HOW}
    norm, epochs, seed = settings.pop("norm"), settings.pop("epochs", 20), settings.pop("seed", 0)
    recipe = get_recipe(settings.pop("recipe", "classic"), **settings)
    chosen = [f" {name}={keywords[name]}" for name in CHOICES if keywords.get(name, "auto") != "auto"]
    return f"{data_line}: norm={norm}{code_of(norm)} epochs={epochs} seed={seed} {recipe}{''.join(chosen)}"


def code_of(norm):
    """Returns a mark of what a norm of somebody's own is made of, so that another one of its name is another run."""
    builder = NORMS.get(norm)
    return "" if builder is None or getattr(builder, "__module__", None) == "model" else f"#{mark_of(builder)}"


def run_many(runs, data, file, processes=1, *, keep_diverged=False):
    """Does all the runs that the file does not hold yet; returns the rows of all as a DataFrame, one row an epoch.

    runs: dicts of keywords for utils.run; see grid. file: a CSV file, to which each finished run is added. Stopped at
    any moment, the same call goes on after the last whole epoch. A run that fails costs no other, and is told at the
    end; so is one that kills its process, where that is not this one. processes: runs at a time. More than one have
    one thread each, which gets more done on a CPU. Inside joblib.parallel_config(backend="dask"), or another engine of
    joblib's, the runs go there instead; a machine that cannot write into the file's folder keeps no checkpoints.
    keep_diverged: a run whose loss is huge or not finite is a finding. It has one row, of the epoch in which that
    happened, with the message in the column "diverged" and no metrics.
    """
    processes, file = whole_number("processes", processes), Path(file).expanduser().absolute()
    if file.suffix in COMPRESSED:
        raise ValueError(f"{file.name}: a study is added to run by run, so its file is not compressed: name it .csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    planned, failures = {}, []
    data_line = f"{data.name}, {len(data.train_labels)} images, CRC-32 {data.crc32()}"
    for keywords in [runs] if isinstance(runs, dict) else runs:
        if not isinstance(keywords, dict):
            raise TypeError(f"runs holds a {type(keywords).__name__}: expected dicts of keywords for run, as of grid")
        try:
            planned[run_key(keywords, data_line)] = keywords
        except (KeyError, TypeError, ValueError) as error:
            asked = " ".join(f"{name}={value}" for name, value in keywords.items())
            failures.append(f"{asked}: {describe_error(error)}")
    done = find_done(file, {key: keywords.get("epochs", 20) for key, keywords in planned.items()})
    todo = {key: keywords for key, keywords in planned.items() if key not in done}
    checkpoints = file.with_name(file.name + ".unfinished")
    paths = {key: checkpoints / f"{zlib.crc32(key.encode()):08x}" for key in todo}
    asked = {keywords["norm"] for keywords in todo.values()}
    norms = {name: builder for name, builder in NORMS.items() if name in asked}  # a notebook may have added them
    tasks = {key: (key, todo[key], turn, paths[key], norms, keep_diverged) for turn, key in enumerate(todo)}
    with (
        tqdm(total=len(planned), initial=len(done), desc=file.stem, unit="run", file=sys.stdout) as bar,
        contextlib.closing(compute(run_one, tasks, data, processes)) as outcomes,
    ):
        for key, outcome, error in outcomes:
            rows, failure = outcome or (None, describe_error(error))
            if failure:
                failures.append(f"{key}: {failure}")
            else:
                add_rows(file, rows)
                for each in (paths[key], paths[key].with_name(paths[key].name + ".previous")):
                    each.unlink(missing_ok=True)
            bar.update()
    with contextlib.suppress(OSError):  # there is none, or it holds what failed or others are at
        checkpoints.rmdir()  # not before: a run that was about to write its first would find no folder
    if failures:
        raise RuntimeError("of the runs, these failed; the others are in the file:\n" + "\n".join(failures))
    order = {key: place for place, key in enumerate(planned)}
    chosen = [row for row in read_rows(file) if row["settings"] in order]
    return pd.DataFrame(sorted(chosen, key=lambda row: order[row["settings"]]))  # as asked, epochs in their order


def describe_error(error):
    """Returns an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_one(data, key, keywords, turn, checkpoint, norms, keep_diverged):
    """Returns the rows of a run and None, or None and the error that ended it as text."""
    NORMS.update(norms)
    finished = []

    def follow(history):
        finished[:] = history
        if keywords.get("on_epoch") is not None:
            keywords["on_epoch"](history)

    device = keywords.get("device")
    if device is None and torch.cuda.device_count() > 1:
        device = f"cuda:{turn % torch.cuda.device_count()}"
    options = {"device": device, "progress": False, "on_epoch": follow}
    options["checkpoint"] = checkpoint if can_write(checkpoint.parent.parent) else None
    with generators_preserved():  # an engine may have several threads a process
        try:
            result = run(data=data, **(keywords | options))
            if result.history.unfinished:
                raise KeyboardInterrupt
            measured = [{name: float(f"{value:.6g}") for name, value in row.items()} for row in result.history]
            measured = [row | {"epoch": int(row["epoch"])} for row in measured]
        except FloatingPointError as error:
            if not keep_diverged:
                return None, describe_error(error)
            measured = [{"epoch": len(finished) + 1, "diverged": str(error)}]
        except (Exception, SystemExit) as error:
            return None, describe_error(error)
        about = describe_run(keywords, data, device)
    return [about | row | {"settings": key} for row in measured], None


def can_write(folder):
    """Returns whether this machine can write into the folder, which may be another's."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def describe_run(keywords, data, device):
    """Returns the columns that the rows of a run have in common: what was asked, on what data and machine."""
    names = [name for name in keywords if name not in HOW | {"norm", "recipe", "epochs", "seed"}]
    recipe = get_recipe(keywords.get("recipe", "classic"), **{name: keywords[name] for name in names})
    asked = {"data": data.name, "recipe": "classic", "epochs": 20, "seed": 0}
    asked |= {"batch_size": recipe.batch_size, "num_groups": recipe.num_groups, "base_lr": recipe.lr}
    scalars = {name: value.item() for name, value in keywords.items() if getattr(value, "shape", None) == ()}
    asked |= keywords | scalars
    asked.pop("on_epoch", None)
    model, backend = Net(keywords["norm"], recipe.num_groups), keywords.get("backend", "auto")
    device, _ = choose_device(device, model, backend)
    precision = str(choose_precision(keywords.get("precision", "auto"), device)).removeprefix("torch.")
    backend = choose_backend(backend, model.to(device))[1].split(":")[0]
    where = f"{device}, {precision}, torch {torch.__version__}"
    return asked | {"data_crc32": data.crc32(), "where": where, "backend": backend}
