"""Packs values into what a file can keep, and unpacks them: of the same kind, even where nothing is in their place."""

import collections
import copy
import enum

import numpy as np
import torch

from normkit.objects import attributes_of, is_foreign
from normkit.randomness import GENERATORS, get_state, new_generator

MAX_BYTES = 2**24  # of a value that a checkpoint keeps: a data set's images are not to be written each epoch
CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
MUTABLE = (list, dict, set, collections.deque)
GENERATOR_NAMES = ("torch", "numpy", "numpy's legacy", "python")  # of GENERATORS, in files
KINDS = {kind.__name__: kind for kind in (*CONTAINERS, collections.OrderedDict, collections.Counter)}


def size_of(value):
    """Returns about how many bytes a value takes in a file."""
    if torch.is_tensor(value):
        return 1024 + value.numel() * value.element_size()  # each is an entry of its own
    return 1024 + value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, str) else 8


def leaves_of(value, depth=8):
    """Yields what containers hold, and those in them, or the value itself."""
    if not isinstance(value, CONTAINERS):
        yield value
    elif depth:  # it may hold itself
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from leaves_of(each, depth - 1)


def pack(value, names, depth=8, own=True):
    """Returns a copy of a value that a file can keep; raises TypeError where there can be none.

    A tuple tells a kind, then what it is made of. names: by id, of objects that will be there when it is unpacked.
    own: whether it may be of a user-defined class; what is in its place then has to be of the same.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if id(value) in names:
        return "known", names[id(value)]
    if not depth:
        raise TypeError("it holds itself")
    if sum(map(size_of, leaves_of(value))) > MAX_BYTES:
        raise TypeError("it is too large to be kept")
    if kind in GENERATORS:
        return GENERATOR_NAMES[GENERATORS.index(kind)], get_state(value), str(getattr(value, "device", "cpu"))
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return pack_array(value)
    if kind is range:
        return "range", value.start, value.stop, value.step
    if KINDS.get(kind.__name__) is kind:
        lists = [list(value), list(value.values())] if isinstance(value, dict) else [list(value)]
        inner = [[pack(each, names, depth - 1, False) for each in part] for part in lists]
        return (kind.__name__, *inner, *([value.maxlen] if kind is collections.deque else []))
    if own and is_foreign(value):
        return "own", kind.__qualname__, pack_own(value, names, depth - 1)
    raise TypeError(f"a {kind.__name__} cannot be kept")


def pack_own(value, names, depth):
    """Packs what an object of a user-defined class is: an enum's value, a container or number, or attributes."""
    kind = type(value)
    base = next((each for each in (*CONTAINERS, int, float, str) if isinstance(value, each)), None)
    if isinstance(value, enum.Enum):
        return pack(value.value, names, depth, False)
    if base is not None:
        return pack(base(value), names, depth, False)
    object.__reduce_ex__(value, 2)  # raises TypeError where it has more than attributes
    if kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        raise TypeError(f"a {kind.__name__} has a way of its own to be kept")
    return {name: pack(each, names, depth) for name, each in attributes_of(value).items()}


def pack_array(value):
    """Packs a tensor, an array or a number of NumPy's."""
    if torch.is_tensor(value):
        if value.layout != torch.strided or value.is_meta or value.requires_grad:
            raise TypeError("it is no plain tensor")
        copy = value.clone()
        return copy if copy.device.type == "cpu" else ("Tensor", copy, str(copy.device))
    if value.dtype.kind not in "biufc" or isinstance(value, np.ndarray) and type(value) is not np.ndarray:
        raise TypeError("it is no array of numbers")
    return value.copy() if isinstance(value, np.ndarray) else ("number", np.array(value))


def unpack(packed, now, known):
    """Returns what was packed; raises LookupError where that takes more than what is there now.

    now: what is in its place. known: objects by name.
    """
    if type(packed) is not tuple:
        return packed
    kind, *parts = packed
    if kind == "known":
        return known[parts[0]]
    if kind == "own":
        return unpack_own(*parts, now, known)
    if kind == "number":
        return parts[0][()]
    if kind == "range":
        return range(*parts)
    if kind == "Tensor":
        device = torch.device(parts[1])
        return parts[0].to(device) if torch.get_device_module(device).is_available() else parts[0]
    if kind in GENERATOR_NAMES:
        return new_generator(GENERATORS[GENERATOR_NAMES.index(kind)], *parts)
    if kind not in KINDS:
        raise LookupError(f"a value of kind {kind!r} cannot be made")
    items = [[unpack(each, None, known) for each in part] for part in parts if isinstance(part, list)]
    if kind == "deque":
        return collections.deque(*items, parts[1])
    return KINDS[kind](dict(zip(*items)) if len(items) == 2 else items[0])


def unpack_own(name, content, now, known):
    kind = type(now)
    if kind.__qualname__ != name:
        raise LookupError(f"a {name} cannot be made")
    if type(content) is dict:
        value = object.__new__(kind)
        for each, part in content.items():
            object.__setattr__(value, each, unpack(part, getattr(now, each, None), known))
        return value
    content = unpack(content, None, known)
    if isinstance(now, MUTABLE):
        return filled(copy.copy(now), content)
    return kind(*content) if isinstance(now, tuple) else kind(content)


def filled(container, content):
    """Returns a container with another content."""
    container.clear()
    (container.extend if isinstance(container, list | collections.deque) else container.update)(content)
    return container


def put_into(now, value):
    """Changes what is in a value's place now to the value, and returns it; where it cannot, returns the value."""
    if type(now) is type(value):
        if isinstance(now, MUTABLE) and now is not value:
            return filled(now, value)
        alike = getattr(now, "shape", None) == getattr(value, "shape", 0) and now.dtype == value.dtype
        if alike and isinstance(now, np.ndarray) and now.flags.writeable:
            now[...] = value
            return now
        if alike and torch.is_tensor(now):
            with torch.no_grad():
                return now.copy_(value)
    return value
