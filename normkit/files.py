"""Files written atomically, and those of tensors, arrays and plain values."""

import collections
import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
import time
import zipfile

import numpy as np
import torch

ARRAY = "numpy.ndarray"  # marks a tensor that was an array
JSON = {dict: "dict in JSON", tuple: "tuple in JSON"}  # marks of a text that was one; lists, as optimizers have, stay
KINDS = {mark: kind for kind, mark in JSON.items()}
MANY = 100  # values: torch.load takes some microseconds for each that is not in such a text


def plain(value):
    """Returns nested state with NumPy's scalars as Python's, which is what torch.load reads without running code."""
    if isinstance(value, np.generic):
        return value.item()
    return rebuilt(value, plain)


def rebuilt(value, function):
    """Returns a dict, list or tuple of what a function makes of the values in it, else the value."""
    if type(value) in (dict, collections.OrderedDict):
        return type(value)((function(key), function(each)) for key, each in value.items())
    return type(value)(map(function, value)) if type(value) in (list, tuple) else value


def encoded(value):
    """Returns nested state with tensors for NumPy's arrays, and one text for many numbers or names."""
    if type(value) is np.ndarray and value.dtype.kind in "biufc":
        return ARRAY, torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    if type(value) in JSON and len(value) > MANY and is_flat(value):
        return JSON[type(value)], json.dumps(value)
    return rebuilt(value, encoded)


def decoded(value):
    """Returns nested state as it was before it was encoded."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        mark, content = value
        if mark == ARRAY:
            return content.numpy()
        if mark in KINDS:
            return KINDS[mark](json.loads(content))
    return rebuilt(value, decoded)


def is_flat(value):
    """Returns whether a dict holds text alone, as settings do, or a tuple ints and text, as random.getstate()'s."""
    if isinstance(value, dict):
        return {*map(type, value), *map(type, value.values())} == {str}
    return {*map(type, value)} <= {int, str}


def is_plain(value):
    """Returns whether a value is a number, text, None, or lists, tuples and dicts of these."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def to_bytes(state):
    """Returns the contents of a file of that state."""
    buffer = io.BytesIO()
    torch.save(encoded(plain(state)), buffer)
    return buffer.getbuffer()


def make_folder(folder):
    """Makes a folder where there is none; raises OSError where no file can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_state(path, state):
    """Writes a file of tensors, arrays and plain values; see write_whole."""
    write_whole(path, to_bytes(state))


def once_free(action, *arguments):
    """Renames or deletes a file; on Windows retries for three seconds while another program has it open."""
    for pause in (0.1, 0.2, 0.4, 0.8, 1.6):
        try:
            return action(*arguments)
        except PermissionError as error:
            if not hasattr(error, "winerror"):  # elsewhere it is not open files that are refused
                raise
            time.sleep(pause)
    return action(*arguments)


def write_whole(path, content, previous=None):
    """Writes bytes beside path, then renames: path is never a partial file. The old one moves to previous, if given.

    Raises OSError if that fails: the old contents are then still in the file, or in previous.
    """
    written = path.with_name(f"{path.name}.writing")  # a fixed name: a killed process's leftover is overwritten
    try:
        with open(written, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            with contextlib.suppress(OSError):  # refused on shares and sticks mounted as another user's
                shutil.copymode(path, written)
            if previous is not None:
                once_free(os.replace, path, previous)
        once_free(os.replace, written, path)
    except OSError:
        written.unlink(missing_ok=True)
        raise


def is_whole(file):
    """Returns whether a file is an archive of torch.save in which each entry has the right checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except PermissionError:
        raise
    except Exception:  # each damaged byte has an error of its own in zipfile
        return False


def read_state(file):
    """Returns what write_state wrote, or None where it is damaged; refuses anything but tensors and plain values.

    file: a path, or an open file.
    """
    if not is_whole(file):
        return None
    if hasattr(file, "seek"):
        file.seek(0)
    try:
        return decoded(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and plain values, and is not read: name another file, or delete it"
        ) from error
    except Exception:  # what is in such an archive may be no state at all
        return None
