"""The file of a study: rows read and checked, and added so that none is lost."""

import contextlib
import csv
import io
import math
import os
import re

import pandas as pd
import torch
from filelock import FileLock

from normkit.files import make_folder, write_whole
from normkit.tables import METRICS

TEXTS = ["data", "norm", "recipe", "settings", "where", "backend", "diverged"]  # a norm may be called 007
NUMBERS = ["epoch", "lr", *METRICS, "seconds"]


def check_place(file):
    """Raises OSError where a study's file could not be written: now, rather than after the first run."""
    try:
        make_folder(file.parent)
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(f"{file.name} is read-only")
        with lock_of(file):
            pass
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        raise OSError(f"no study can be kept as {file}: {error}. Name a file in a folder of your own") from error


def lock_of(file):
    """Returns the lock that whoever writes to a study's file holds."""
    return FileLock(file.with_name(f".{file.name}.lock"))


def find_done(file, epochs):
    """Returns those keys of runs, given with their epochs, of which the file holds all rows; says which have gaps."""
    found = {}
    for row in read_rows(file):
        found.setdefault(row["settings"], []).append(row)
    found = {key: rows for key, rows in found.items() if key in epochs}
    done = {key for key, rows in found.items() if is_whole(rows, epochs[key])}
    if len(found) > len(done):
        print(f"{file}: {len(found) - len(done)} of the runs lack epochs, or have them twice, and are done anew")
    return done


def is_whole(rows, epochs):
    """Returns whether a run's rows are one an epoch, with metrics, or the one of the epoch in which it diverged."""
    if rows[0].get("diverged"):
        return True
    measured = not any(math.isnan(number(row.get(name))) for row in rows for name in METRICS)
    return measured and sorted(number(row["epoch"]) for row in rows) == list(range(1, epochs + 1))


def number(cell):
    """Returns the number in a cell, NaN where it is empty or missing."""
    return float(cell or "nan")


def read_rows(file):
    """Returns the rows of a study's file, each cell the text that it is: what was written stays so, come what may.

    The lines of commas alone that a spreadsheet leaves are passed over.
    """
    if not file.exists():
        return []
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:  # ends of lines that are in cells stay, too
            text = opened.read()
        with cells_up_to(len(text)):
            check_lines(text)
        table = pd.read_csv(io.StringIO(text, newline=""), dtype=str, keep_default_na=False)
    except (ValueError, OSError, csv.Error) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{file} cannot be read as a study's file: {error}. Name another, or mend it") from error
    return table[(table != "").any(axis=1)].to_dict("records")


@contextlib.contextmanager
def cells_up_to(length):
    """Lets the csv module read cells as long as a note may be: its own limit, which is the whole process's, is less."""
    limit = csv.field_size_limit(length)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def check_lines(text):
    """Raises ValueError at the first damaged line: pandas would fill it up, or take a column of numbers for text."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = next(lines, [])
    if len(columns) == 1 and (other := next((sign for sign in ";\t" if sign in columns[0]), None)):
        raise ValueError(f"its columns are separated by {other!r}: save it with commas")
    if not {"settings", "epoch"} <= {*columns}:
        first = f"{','.join(columns)!r:.90}"
        raise ValueError(f"its first line is {first}, where a study names its columns, settings and epoch among them")
    try:
        for cells in lines:
            if cells and len(cells) != len(columns):
                raise ValueError(f"{len(cells)} cells in place of {len(columns)}")
            for name, cell in zip(columns, cells):
                if name in NUMBERS and cell:
                    float(cell)
        if not text.endswith(("\n", "\r")):
            raise ValueError("cut off, or without an end of line")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"line {lines.line_num}: {error}; delete the line, and its run is done anew") from error


def add_rows(file, rows):
    """Adds a run's rows, in place of any that it has, to a study's file that others may be writing to as well."""
    with lock_of(file):
        kept = [row for row in read_rows(file) if row["settings"] != rows[0]["settings"]]
        try:
            write_whole(file, csv_of(kept + rows).encode())
        except OSError as error:
            message = f"{file} cannot be written: {error}. It holds the runs finished before; the same call goes on"
            raise OSError(error.errno, message) from error


def cells_of(row):
    """Returns a row as the file has it: all text, also the names, which of a user's notes may be numbers.

    Raises ValueError where UTF-8 has no code for it, as of a file's name that was in another.
    """
    cells = {str(name): cell_of(name, value) for name, value in row.items()}
    for name, text in cells.items():
        if re.search("[\ud800-\udfff]", name + text):
            raise ValueError(f"on_epoch notes {name!a}: {text!a:.60}, which no file of text can hold: note its repr")
    return cells


def cell_of(name, value):
    """Returns the text that the file has of a value: of a metric six digits, of a note all, of what is missing none."""
    value = value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    return str(float(f"{value:.6g}") if name in NUMBERS and isinstance(value, float) else value)


def csv_of(rows, columns=()):
    """Returns rows of text as a CSV file has them, with a column for each name in any, and for these."""
    columns = dict.fromkeys([*(name for row in rows for name in row), *columns])
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    return "".join(",".join(map(quoted, cells)) + "\n" for cells in lines)


def quoted(cell):
    """Returns a cell in quotes where it needs them; the csv module, and so pandas, may leave a lone \\r without."""
    return '"' + cell.replace('"', '""') + '"' if re.search(r'[",\r\n]', cell) else cell


def table_of(rows):
    """Returns rows of text as a DataFrame, with the types that pandas finds in their columns.

    Only an empty cell is missing, as a norm may be called None. Whole numbers stay whole beside empty cells.
    """
    options = {"keep_default_na": False, "na_values": [""], "dtype": dict.fromkeys(TEXTS, str)}
    text = csv_of(rows, NUMBERS)  # also where all diverged
    table = pd.read_csv(io.StringIO(text, newline=""), **options)
    nullable = pd.read_csv(io.StringIO(text, newline=""), dtype_backend="numpy_nullable", **options)
    whole = {name: each for name, each in nullable.items() if each.dtype == "Int64" and 0 < each.count() < len(each)}
    return table.assign(**whole)  # where pandas by itself makes decimals, and loses digits
