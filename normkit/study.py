"""Many runs into one file."""

import contextlib
import importlib
import itertools
import os
import pickle
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

import model
from normkit.backend import choose_backend
from normkit.checkpoint import CheckpointRefused, files_of
from normkit.checks import check_epochs, check_notes, describe, in_words, shown, whole_number
from normkit.device import choose_precision
from normkit.engine import ByValue, compute, is_user_module
from normkit.files import once_free
from normkit.network import mark_of_network, marks_of
from normkit.placement import choose_device
from normkit.progress import progress_bar
from normkit.randomness import check_seed, generators_preserved
from normkit.rows import NUMBERS, TEXTS, add_rows, cells_of, check_place, find_done, number, read_rows, table_of
from utils import Recipe, get_recipe, run

# Keywords of utils.run that say how a run is computed, and not what. Of these a choice that was made counts.
CHOICES = ("precision", "memory_format", "backend")
HOW = {"device", "progress", "checkpoint", "on_epoch", "self_check", *CHOICES}
NO_TEXT = {".gz", ".bz2", ".zip", ".xz", ".zst", ".tar", ".xlsx", ".xls", ".parquet", ".feather"}


def grid(**choices):
    """Returns every combination of the choices, as keywords: grid(norm=NORMS, seed=range(5)) has 15 dicts.

    A single value, such as epochs=2, is the same for all.
    """
    values = [[each] if is_single(each) else each for each in choices.values()]
    return [dict(zip(choices, each)) for each in itertools.product(*values)]


def is_single(choice):
    return isinstance(choice, str) or not hasattr(choice, "__iter__") or getattr(choice, "shape", None) == ()


class Planned(NamedTuple):
    """A run that keywords of utils.run ask for. Another process may know other recipes by name, so it has its own.

    marks: of the norm and the network that are meant, in case that process has read others.
    """

    norm: str
    epochs: int
    seed: int
    recipe: Recipe
    keywords: dict
    marks: tuple[str, str]


def plan(keywords):
    """Returns what keywords ask for, checked."""
    settings = {name: value for name, value in keywords.items() if name not in HOW}
    norm, epochs, seed = settings.pop("norm", None), settings.pop("epochs", 20), settings.pop("seed", 0)
    if not isinstance(norm, str):
        given = "a run needs a norm" if norm is None else f"norm={shown(norm)} is not the name of one"
        raise ValueError(f"{given}: {', '.join(map(str, model.NORMS))}. Of several, grid makes a run each")
    if seed is None:
        raise ValueError("seed=None: a study finds its runs again by their seeds; grid(seed=range(5), ...) has five")
    recipe = get_recipe(settings.pop("recipe", None) or "classic", **settings)
    return Planned(norm, check_epochs(epochs), check_seed(seed), recipe, keywords, marks_of(norm))


def plan_all(runs, data):
    """Returns the runs that can be, by their keys, and of the others a text each that says why not."""
    planned, failures = {}, []
    data_line = f"{data.name}, {len(data.train_labels)} images, CRC-32 {data.crc32()}"
    for keywords in runs:
        if not isinstance(keywords, dict):
            raise TypeError(f"runs holds a {type(keywords).__name__}: expected dicts of keywords for run, as of grid")
        try:
            asked = plan(keywords)
        except (KeyError, TypeError, ValueError) as error:
            given = " ".join(f"{name}={value!s:.60}" for name, value in keywords.items())
            failures.append(f"{given}: {describe_error(error)}")
        else:
            planned[run_key(asked, data_line)] = asked
    return planned, failures


def run_key(planned, data_line):
    """Returns the settings of a run in one line; two runs with the same line are the same."""
    norm, epochs, seed, recipe, keywords, marks = planned
    chosen = [f" {name}={keywords[name]}" for name in CHOICES if keywords.get(name, "auto") != "auto"]
    return f"{data_line}: norm={norm}{''.join(marks)} epochs={epochs} seed={seed} {recipe}{''.join(chosen)}"


def run_many(runs, data, file, processes=1, *, keep_diverged=False):
    """Does all the runs that the file does not hold yet; returns the rows of all as a DataFrame, one row an epoch.

    runs: dicts of keywords for utils.run; see grid. file: a CSV file, to which each finished run is added. After a stop
    at any moment, the same call goes on after the last whole epoch, or begins a run anew where its checkpoint cannot be
    used. A run that fails stops no other, and is reported at the end; so is one that kills a worker process.
    processes: runs at a time. More than one have one thread each, which gets more done on a CPU.
    Inside joblib.parallel_config(backend="dask"), or another engine of joblib's, the runs go there instead; a machine
    that cannot write into the file's folder keeps no checkpoints.
    keep_diverged: a run whose loss is huge or not finite is a finding. It has one row, of the epoch in which that
    happened, with the message in the column "diverged" and no metrics.
    Notes that on_epoch adds to a row are columns, too: the file has them as they were noted, and this table, as pandas
    reads it, has a number for a text such as "3.10".
    """
    if not (hasattr(runs, "__iter__") and hasattr(data, "train_images") and isinstance(file, str | os.PathLike)):
        raise TypeError(
            f"runs is a {describe(runs)}, data a {describe(data)} and file a {describe(file)}: expected "
            "run_many(runs, data, file) with what grid and load_data return, and the name of a CSV file"
        )
    processes, file = whole_number("processes", processes), Path(file).expanduser().resolve()
    if file.suffix.lower() in NO_TEXT:
        raise ValueError(f"{file.name}: a study's file is text, to which run by run is added: name it .csv")
    check_place(file)
    planned, failures = plan_all([runs] if isinstance(runs, dict) else runs, data)
    done = find_done(file, {key: each.epochs for key, each in planned.items()})
    todo = {key: each for key, each in planned.items() if key not in done}
    checkpoints = file.with_name(file.name + ".unfinished")
    paths = {key: checkpoints / f"{zlib.crc32(key.encode()):08x}" for key in todo}
    # A notebook may have added the norm, or changed its module since a worker read it.
    norms = {norm: ByValue(builder) for norm, builder in model.NORMS.items()}
    tasks = {
        key: (key, each, norms.get(each.norm), turn, paths[key], keep_diverged)
        for turn, (key, each) in enumerate(todo.items())
    }
    with (
        progress_bar(total=len(planned), initial=len(done), desc=file.stem, unit="run") as bar,
        contextlib.closing(compute(run_one, tasks, data, processes)) as outcomes,
    ):
        for key, outcome, error in outcomes:
            rows, failure = outcome or (None, describe_error(error))
            if failure:
                failures.append(f"{key}: {failure}")
            else:
                add_rows(file, rows)
                forget(paths[key])
            bar.update()
    with contextlib.suppress(OSError):  # there is none, or it holds what failed or others are at
        checkpoints.rmdir()  # not before: a run that was about to write its first would find no folder
    if failures:
        raise RuntimeError("of the runs, these failed; the others are in the file:\n" + "\n".join(failures))
    order = {key: place for place, key in enumerate(planned)}
    chosen = [row for row in read_rows(file) if row["settings"] in order]
    return table_of(sorted(chosen, key=lambda row: (order[row["settings"]], number(row["epoch"]))))


def forget(checkpoint):
    """Deletes a checkpoint, and the one before it."""
    for path in files_of(checkpoint):
        once_free(path.unlink, True)  # also where it is not there


def describe_error(error):
    """Returns an error in one line, with the next step where processes cannot be started or sent something."""
    text = in_words(error)
    if isinstance(error, pickle.PicklingError):
        cause = str(error.__cause__ or "").strip('\n"').splitlines()[-1:]  # the last line of a traceback
        text = ". ".join(part.rstrip(".") for part in [text, *cause, "Ask for processes=1, where nothing is sent"])
    if isinstance(error, UnicodeEncodeError) and "joblib" in error.object:  # in the name of the folder that it makes
        text += ". Set JOBLIB_TEMP_FOLDER to a folder whose name is in ASCII, or ask for processes=1"
    return text


def run_one(data, key, planned, builder, turn, checkpoint, keep_diverged):
    """Returns the rows of a run and None, or None and the error that ended it as text."""
    try:
        load_code(planned.norm, builder, planned.marks)
        with generators_preserved():  # an engine may have several threads a process
            return [row | {"settings": key} for row in rows_of(data, planned, turn, checkpoint, keep_diverged)], None
    except (Exception, SystemExit) as error:
        return None, describe_error(error)


def load_code(norm, builder, marks):
    """Registers a norm. A worker in which it or the network has other marks than were meant imports its modules anew.

    It may be older than what the notebook has loaded since. model.py is left alone where it is as was meant: the kernel
    computes the network of its first loading. Raises RuntimeError where the network is then still another.
    """
    if builder is not None:
        model.NORMS[norm] = builder.value
        if builder.content is not None and marks_of(norm) != marks:
            kept = {model} if mark_of_network() == marks[1] else set()
            stale = [each for each in sys.modules.values() if is_user_module(each) and each not in kept]
            for module in reversed(stale):  # importers come last
                with contextlib.suppress(Exception):  # a file that is gone, or fails: what was read before stays
                    importlib.reload(module)
            model.NORMS[norm] = builder.value
    if mark_of_network() != marks[1]:
        raise RuntimeError(
            "model.Net is another one where this was asked for: reload model there, if it was edited; "
            "if a part of it was replaced, ask for processes=1"
        )


def rows_of(data, planned, turn, checkpoint, keep_diverged):
    """Does a run and returns its rows, as text."""
    norm, epochs, seed, recipe, keywords, _ = planned
    asked, finished = describe_request(planned, data), []

    def follow(history):
        if keywords.get("on_epoch") is not None:
            keywords["on_epoch"](history)
            check_notes(cells_of(history[-1]), {*asked, *TEXTS} - {*NUMBERS})
        finished[:] = history

    device = keywords.get("device")
    if device is None and torch.cuda.device_count() > 1:
        device = f"cuda:{turn % torch.cuda.device_count()}"
    options = {name: keywords[name] for name in HOW if name in keywords}
    options |= {"device": device, "progress": False, "on_epoch": follow}
    options["checkpoint"] = checkpoint if can_write(checkpoint.parent.parent) else None
    try:
        result = run_or_begin_anew(norm=norm, data=data, epochs=epochs, seed=seed, recipe=recipe, **options)
        if result.history.unfinished or len(finished) < len(result.history):  # in the last epoch's on_epoch
            raise KeyboardInterrupt
        measured = [cells_of(row) for row in result.history]
    except FloatingPointError as error:
        if not keep_diverged:
            advice = "run_many(..., keep_diverged=True) would note it in the file"
            raise FloatingPointError(f"{error} {advice}") from error
        measured = [cells_of({"epoch": len(finished) + 1, "diverged": error})]
    about = cells_of(asked | describe_machine(planned, device))
    return [about | row for row in measured]


def run_or_begin_anew(checkpoint, **options):
    """Does a run: from its start where what is kept of it is damaged, or another version's or machine's."""
    try:
        return run(checkpoint=checkpoint, **options)
    except CheckpointRefused as error:
        print(f"{options['norm']}, seed {options['seed']}, is begun anew, as what is kept of it is refused: {error}")
        forget(checkpoint)
        return run(checkpoint=checkpoint, **options)


def can_write(folder):
    """Returns whether this machine can write into the folder, which may be another's."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def describe_request(planned, data):
    """Returns the columns that the rows of a run have in common: what was asked, on what data."""
    norm, epochs, seed, recipe, keywords, _ = planned
    asked = {"data": data.name, "recipe": keywords.get("recipe") or "classic", "epochs": epochs, "seed": seed}
    asked |= {"batch_size": recipe.batch_size, "num_groups": recipe.num_groups, "base_lr": recipe.lr, "norm": norm}
    further = {name: value for name, value in keywords.items() if name not in {*asked, "on_epoch"}}
    asked |= {name: getattr(recipe, name, value) for name, value in further.items()}  # where it is None, the recipe's
    return asked | {"data_crc32": data.crc32()}


def describe_machine(planned, device):
    """Returns the columns that say where and by what a run was computed."""
    net, backend = model.Net(planned.norm, planned.recipe.num_groups), planned.keywords.get("backend", "auto")
    device, _ = choose_device(device, net, backend)
    precision = str(choose_precision(planned.keywords.get("precision", "auto"), device)).removeprefix("torch.")
    backend = choose_backend(backend, net.to(device))[1].split(":")[0]
    return {"where": f"{device}, {precision}, torch {torch.__version__}", "backend": backend}
