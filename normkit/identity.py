"""Identifies a run by text: its settings, code and data."""

import collections
import enum
import functools
import itertools
import math
import os
import re
import stat
import sys
import types
import zlib

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from normkit.attributes import is_trained, own_attributes
from normkit.checksum import ADDRESS, crc32_of, crc32_of_file
from normkit.code import functions_of, is_from_library, used_by
from normkit.files import is_plain, plain
from normkit.network import code_of
from normkit.objects import LIBRARIES, is_user_code
from normkit.packing import CONTAINERS
from normkit.randomness import GENERATORS

MAX_OBJECTS = 50_000  # that are looked at
MAX_ENTRIES = 100  # of a list, that are told one by one
MAX_CHARACTERS = 100  # of a text
SAMPLES = 1000  # arrays, files and objects of a longer list that are read: all of them would take too long
MAX_BYTES = 2**30  # of an array that is read as a whole
NUMBERS = (type(None), bool, int, float, complex, np.generic, enum.Enum, slice, range, torch.dtype, np.dtype)
NAMES = (str, bytes, bytearray, os.PathLike)
PLAIN = (*NUMBERS, *NAMES)
CLOSED = LIBRARIES | sys.stdlib_module_names  # what their objects hold is their own affair, but for these:
OPEN = ("torch.nn.", "torch.optim.", "torch.utils.data.", "torchvision.", "normkit.", "utils.", "types.", "argparse.")
BUILDING = {"__init__", "__new__", "__post_init__"}  # what these look up has gone into the object
# How a loader of a library's works, or where it stands, and not what it yields.
HOW = {"num_workers", "prefetch_factor", "pin_memory", "pin_memory_device", "persistent_workers", "timeout", "epoch"}


def settings_of(model, optimizer, scheduler, loaders, criterion, scheduler_step, compute_dtype):
    """Returns what identifies a run in its checkpoint, as text by name. loaders: by name."""
    settings = {"model": ADDRESS.sub("", str(model)), "optimizer": plain_lines(optimizer, *optimizer.param_groups)}
    settings["parameter list"] = "\n".join(parameter_lines(model, optimizer))
    if scheduler is not None:
        settings["scheduler"] = plain_lines(scheduler, getattr(scheduler, "state_dict", dict)())
        settings["scheduler_step"] = scheduler_step
    for name, loader in loaders.items():
        has_text = type(loader).__repr__ is not object.__repr__ and not isinstance(loader, list | tuple)
        text = repr(loader) if has_text else type(loader).__name__
        settings[name] = f"{ADDRESS.sub('', text)}, {len(loader)} batches"
    settings["precision"] = str(compute_dtype)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "criterion": criterion} | loaders
    return settings | {f"code of {where}" if where in parts else where: text for where, text in lines_of(parts, {})}


def seed_in(settings):
    """Returns the seed of the kit's loader that such settings are of, or None."""
    found = re.search(r" seed=(-?\d+)", str(settings.get("loader")))
    return int(found.group(1)) if found else None


def plain_lines(part, *states):
    """Returns the part's type and the plain values of its states, a line each."""
    items = [item for state in states for item in plain(state).items()]
    items = [(key, value.item() if torch.is_tensor(value) and value.numel() == 1 else value) for key, value in items]
    lines = [f"{key}: {value}" for key, value in items if is_plain(value)]
    return "\n".join([type(part).__name__, *lines])


def parameter_lines(model, optimizer):
    """Yields a line for each parameter of the optimizer, in its order, then for those of the model that it lacks."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(f"group {i}", group["params"]) for i, group in enumerate(optimizer.param_groups)]
    held = {id(parameter) for _, parameters in groups for parameter in parameters}
    groups.append(("no group", [parameter for parameter in model.parameters() if id(parameter) not in held]))
    for group, parameters in groups:
        for parameter in parameters:
            name, frozen = names.get(id(parameter), "another's"), "" if parameter.requires_grad else ", frozen"
            shape = "lazy" if is_lazy(parameter) else tuple(parameter.shape)
            yield f"{name} {shape}{frozen}, in {group}"


def lines_of(parts, seen):
    """Yields (where, text) for all that parts, given by name, are made of: code, settings, arrays, files.

    What cannot be told, or is another in each process, is left out. seen: objects by id, so that each is told once.
    """
    waiting = collections.deque(parts.items())
    while waiting and len(seen) < MAX_OBJECTS:
        where, value = waiting.popleft()
        if id(value) in seen:
            continue
        if not isinstance(value, (*NUMBERS, str)):
            seen[id(value)] = value  # which keeps it there, and so its id
        with_tensors = where.startswith("criterion")  # weights of classes, say, and no result of the training
        try:
            text, inner = describe_value(value, with_tensors, seen)
        except Exception:  # whatever user-defined properties, texts and lengths raise
            continue
        if text is not None:
            yield where, text
        waiting.extend((where + step, each) for step, each in inner.items())


def describe_value(value, with_tensors, seen):
    """Returns the text that tells a value, or None, and what it holds, by step. with_tensors: a module's, too."""
    if isinstance(value, types.ModuleType | torch.device):
        return None, {}
    if isinstance(value, GENERATORS):
        return seed_of(value), {}
    if isinstance(value, NUMBERS):
        return short(repr(value)), {}
    if isinstance(value, NAMES):
        return text_of_name(value), {}
    if isinstance(value, torch.Tensor | np.ndarray) or type(value).__module__.partition(".")[0] in ("pandas", "PIL"):
        return None if is_trained(value) and not with_tensors else text_of_array(value), {}
    if isinstance(value, CONTAINERS):
        text, inner = describe_container(value, seen)
        own = attributes_in(value, with_tensors) | {".__class__": type(value)} if is_user_code(type(value)) else {}
        return text, inner | own
    if isinstance(value, functools.partial):
        return None, {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return None, {".__self__": value.__self__, "": value.__func__}
    if is_from_library(value):
        return f"{value.__module__}.{value.__qualname__}", {}
    if isinstance(value, types.FunctionType):
        return f"{value.__name__}, code {code_of([value])}", used_by([value])
    if isinstance(value, type):
        return describe_class(value, functions_of(value))
    return describe_object(value, with_tensors)


def describe_object(value, with_tensors):
    """Returns the same for an object: by its class's code if that is the user's, else by its repr or attributes."""
    kind = type(value)
    if is_user_code(kind):
        text, inner = describe_class(kind, [each for each in functions_of(kind) if each.__name__ not in BUILDING])
        return text, inner | attributes_in(value, with_tensors)
    if kind.__module__.partition(".")[0] in CLOSED and not f"{kind.__module__}.".startswith(OPEN):
        is_value = not repr(value).startswith("<") and not hasattr(kind, "__next__")  # where an iterator is moves
        wrapped = getattr(value, "__wrapped__", None)  # of a function with a cache
        return short(repr(value)) if is_value else kind.__name__, {} if wrapped is None else {"": wrapped}
    return kind.__name__, {step: each for step, each in attributes_in(value, with_tensors).items() if step[1] != "_"}


def describe_class(kind, functions):
    """Returns the text that tells a user-defined class, and its attributes and what these functions use."""
    owners = [each for each in reversed(kind.__mro__) if is_user_code(each)]
    items = [item for owner in owners for item in vars(owner).items() if not item[0].startswith(("__", "_abc_"))]
    settings = {f".{name}": each for name, each in items if not hasattr(type(each), "__get__")}
    return f"{kind.__name__}, code {code_of(functions_of(kind))}", settings | used_by(functions)


def attributes_in(owner, with_tensors):
    """Returns the attributes of an object by step, with the modules in a module; with_tensors: its tensors, too."""
    found = own_attributes(owner)
    if isinstance(owner, torch.nn.Module):
        found |= owner._modules | (owner._buffers | owner._parameters if with_tensors else {})
    own = is_user_code(type(owner)) and not isinstance(owner, torch.utils.data.DataLoader)
    return {f".{name}": each for name, each in found.items() if own or name not in HOW}


def describe_container(values, seen):
    """Returns the text that tells a list or the like, and its entries, unless there are many: then the text tells."""
    kind, entries = type(values).__name__, flat(values)
    is_set = isinstance(values, set | frozenset)
    if len(values) <= MAX_ENTRIES and all(isinstance(each, NUMBERS) or is_word(each) for each in entries):
        return short(f"{kind} {entries}" if is_set else repr(values)), {}
    if len(values) <= MAX_ENTRIES and not is_set:
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return f"{kind} of {len(values)}", {f"[{k!r}]": each for k, each in items if isinstance(k, str | int)}
    step = len(entries) // SAMPLES + 1
    texts = [
        repr(each) if isinstance(each, NUMBERS) else text_of_name(each, read=i % step == 0)
        for i, each in enumerate(entries)
        if isinstance(each, PLAIN)
    ]
    objects = [each for each in entries if not isinstance(each, PLAIN)]
    for each in objects[:: len(objects) // SAMPLES + 1]:
        texts += map(str, lines_of({"": each}, seen))
    return f"{kind} of {len(values)}, CRC-32 {zlib.crc32(' '.join(texts).encode(errors='replace')):08x}", {}


def flat(values, depth=8):
    """Returns what containers hold, and those in them, as one list; of sets what has an order."""
    if isinstance(values, dict):
        values = itertools.chain.from_iterable(values.items())
    elif isinstance(values, set | frozenset):
        values = sorted((each for each in values if isinstance(each, PLAIN)), key=repr)
    entries = []
    for each in values:
        entries += flat(each, depth - 1) if isinstance(each, CONTAINERS) and depth else [each]
    return entries


def is_word(value):
    """Returns whether a value is text, and no file's name."""
    return isinstance(value, str) and "/" not in value and os.sep not in value


def text_of_name(value, read=True):
    """Returns what tells a text: of a file's name what is in the file, wherever it is; of a folder's that it is one."""
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes, CRC-32 {zlib.crc32(value):08x}"
    if is_word(value):
        return short(repr(value))
    path = os.fspath(value)
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # it is no name, or of nothing that is there
        return short(repr(os.path.basename(path) if os.path.isabs(path) else path))
    if not stat.S_ISREG(found.st_mode):
        return "a folder"
    content = f", CRC-32 {crc32_of_file(path, found.st_size):08x}" if read else ""
    return f"{os.path.basename(path)} of {found.st_size} bytes{content}"


def text_of_array(array):
    """Returns the shape, type and checksum of an array, an image or a table; of a very large one of some rows."""
    array = array if isinstance(array, torch.Tensor | np.ndarray) else np.asarray(array)
    size = array.element_size() if torch.is_tensor(array) else 1000 if array.dtype.hasobject else array.itemsize
    rows = array[:: len(array) // SAMPLES + 1] if array.ndim and math.prod(array.shape) * size > MAX_BYTES else array
    return f"{tuple(array.shape)} {array.dtype}, CRC-32 {crc32_of(rows):08x}"


def seed_of(generator):
    """Returns "seed N" for a seed below 2**32, else the type's name: larger seeds count as drawn, not given."""
    seed = None
    if isinstance(generator, torch.Generator):
        seed = generator.initial_seed()
    elif isinstance(generator, np.random.Generator):
        seed = getattr(getattr(generator.bit_generator, "seed_seq", None), "entropy", None)
    return f"seed {seed}" if isinstance(seed, int) and seed < 2**32 else type(generator).__name__


def short(text):
    """Returns a text in one line, without addresses; of a long one the beginning, and a checksum."""
    text = " ".join(ADDRESS.sub("", text).split())
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:60]}..., CRC-32 {zlib.crc32(text.encode(errors='replace')):08x}"
