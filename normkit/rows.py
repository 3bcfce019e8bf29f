"""The file of a study: rows read and checked, and added so that none is lost."""

import csv
import io
import math
import os
import re
import tempfile

import pandas as pd
from filelock import FileLock

from normkit.files import write_whole
from normkit.tables import METRICS

TEXTS = ["data", "norm", "recipe", "settings", "where", "backend", "diverged"]  # a norm may be called 007
NUMBERS = ["epoch", "lr", *METRICS, "seconds"]


def check_place(file):
    """Raises OSError where a study's file could not be written: now, rather than after the first run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(f"{file.name} is read-only")
        with lock_of(file):
            pass
    except OSError as error:
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
    if isinstance(rows[0].get("diverged"), str):
        return True
    measured = all(row.get(name) is not None and not math.isnan(row[name]) for row in rows for name in METRICS)
    return measured and sorted(row["epoch"] for row in rows) == list(range(1, epochs + 1))


def read_rows(file):
    """Returns the rows of a study's file; only an empty cell is missing, as a norm may be called None.

    The lines of commas alone that a spreadsheet leaves are passed over: they would make each 25 a 25.0.
    """
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
        check_lines(text)
        text = re.sub(r"^,+\n", "", text, flags=re.MULTILINE)
        table = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""], dtype=dict.fromkeys(TEXTS, str))
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{file} cannot be read as a study's file: {error}. Name another, or mend it") from error
    if not {"settings", "epoch"} <= set(table):
        raise ValueError(
            f"{file} is no study's file: it has the columns {', '.join(map(str, table))}. Name another file"
        )
    return table.to_dict("records")


def check_lines(text):
    """Raises ValueError at the first damaged line: pandas would fill it up, or take a column of numbers for text."""
    lines = csv.reader(io.StringIO(text), strict=True)
    columns = next(lines, [])
    if len(columns) == 1 and (other := next((sign for sign in ";\t" if sign in columns[0]), None)):
        raise ValueError(f"its columns are separated by {other!r}: save it with commas")
    try:
        for cells in lines:
            if cells and len(cells) != len(columns):
                raise ValueError(f"{len(cells)} cells in place of {len(columns)}")
            for name, cell in zip(columns, cells):
                if name in NUMBERS and cell:
                    float(cell)
        if text and not text.endswith("\n"):
            raise ValueError("cut off, or without an end of line")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"line {lines.line_num}: {error}; delete the line, and its run is done anew") from error


def add_rows(file, rows):
    """Adds a run's rows, in place of any that it has, to a study's file that others may be writing to as well."""
    with lock_of(file):
        kept = [row for row in read_rows(file) if row["settings"] != rows[0]["settings"]]
        try:
            write_whole(file, pd.DataFrame(kept + rows).to_csv(index=False, lineterminator="\n").encode())
        except OSError as error:
            message = f"{file} cannot be written: {error}. It holds the runs finished before; the same call goes on"
            raise OSError(error.errno, message) from error
