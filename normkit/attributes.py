"""What moves, while training goes on, in objects of somebody's own: counters, orders, weights."""

import collections
import dataclasses
import enum
import itertools
import zlib

import numpy as np
import torch

from normkit.checksum import crc32_of

LARGEST = 2**24  # bytes of a value that a checkpoint keeps: a data set's images are not to be written each epoch
CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
# Of these a state_dict has what is to be kept.
COMMON = {torch.nn.Module: set(vars(torch.nn.Module())), torch.optim.Optimizer: {"defaults", "state", "param_groups"}}


class MovingAttributes:
    """The attributes of objects that change after they were first looked at, as state_dict and load_state_dict.

    owners: objects by name. lost: names of what moved and no file can hold, as of the state that was loaded.
    """

    def __init__(self, owners):
        self.owners, self.moved, self.lost = owners, set(), []
        self.start = {place: mark_of(value) for place, value in self.found().items()}

    def found(self):
        """Returns the attributes by (owner's name, name)."""
        items = ((where, own_attributes(owner)) for where, owner in self.owners.items())
        return {(where, name): value for where, attributes in items for name, value in attributes.items()}

    def state_dict(self):
        found = self.found()
        self.moved |= {place for place, value in found.items() if mark_of(value) != self.start.get(place)}
        packed, lost, opened = {}, [], set()
        for place in sorted(self.moved & set(found)):
            try:
                packed[place] = pack(found[place])
            except TypeError:
                if self.start.get(place) in (None, mark_of(None), mark_of(False)):
                    opened.add(place[0])
                elif isinstance(found[place], (torch.Tensor, np.ndarray, *CONTAINERS)):
                    lost.append(".".join(place))
        # What was opened on the way, a file say, is opened again, if the object is as it was before.
        return {"lost": lost} | {" ".join(place): each for place, each in packed.items() if place[0] not in opened}

    def load_state_dict(self, state):
        self.lost, found = state["lost"], self.found()
        for place, packed in state.items():
            where, _, name = place.rpartition(" ")
            if where in self.owners:
                self.moved.add((where, name))
                put(self.owners[where], name, unpack(packed, found.get((where, name))))


def attributes_of(owner):
    """Returns an object's attributes by name, those in slots too."""
    slots = [name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(owner, name) for name in slots if hasattr(owner, name)} | getattr(owner, "__dict__", {})


def own_attributes(owner):
    """Returns the attributes by name that no state_dict has."""
    found = attributes_of(owner)
    for kind, common in COMMON.items():
        if isinstance(owner, kind):
            found = {name: value for name, value in found.items() if name not in common}
    unsaved = getattr(owner, "_non_persistent_buffers_set", ())
    found |= {name: owner._buffers[name] for name in unsaved}
    return {name: value for name, value in found.items() if not is_trained(value)}


def is_trained(value):
    """Whether a value is, or holds, what an optimizer changes: the model's state_dict has that."""
    return any(
        torch.is_tensor(each) and (each.requires_grad or isinstance(each, torch.nn.Parameter))
        for each in itertools.islice(leaves_of(value), 1000)
    )


def leaves_of(value, depth=8):
    """Yields what containers hold, and those in them, or the value itself."""
    if not isinstance(value, CONTAINERS):
        yield value
    elif depth:  # it may hold itself
        for each in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            yield from leaves_of(each, depth - 1)


def mark_of(value):
    """Returns what tells a value from what it was or will be, without a copy of it."""
    if isinstance(value, CONTAINERS):
        text = " ".join(str(mark_of_leaf(each)) for each in leaves_of(value))
        return len(value), zlib.crc32(text.encode(errors="replace"))
    if isinstance(value, torch.Tensor | np.ndarray) and size_of(value) <= LARGEST:
        return value.dtype, crc32_of(value)
    return mark_of_leaf(value)


def mark_of_leaf(value):
    """Returns the text of a number, else which object it is: to read all arrays of a list would take too long."""
    if value is None or isinstance(value, bool | int | float | str | np.generic | enum.Enum):
        return repr(value)
    changes = value._version if torch.is_tensor(value) and not value.is_inference() else 0
    return id(value), changes


def size_of(value):
    """Returns about how many bytes a value takes in a file."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    return value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, str) else 8


def pack(value):
    """Returns a copy of a value of which a file can be made; raises TypeError where none can.

    Its own kind is told by what stands in its place when it is read, so it may be one of somebody's own.
    """
    if sum(map(size_of, leaves_of(value))) > LARGEST:
        raise TypeError("it is too large to be kept")
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, dict):
        return pack_inner(dict(value))
    if isinstance(value, list | set | frozenset | collections.deque):
        return pack_inner(list(value))
    base = next((kind for kind in (tuple, int, float, str) if isinstance(value, kind)), None)
    return pack_inner(value if base is None or isinstance(value, bool) else base(value))


def pack_inner(value, depth=8):
    """Packs a value of which the file has to tell all, its kind too."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if not depth:
        raise TypeError("it holds itself")
    if kind is dict:
        return {pack_inner(key, depth - 1): pack_inner(each, depth - 1) for key, each in value.items()}
    if kind in (list, tuple):
        return kind(pack_inner(each, depth - 1) for each in value)
    if isinstance(value, np.generic):
        return pack_inner(value.item(), depth - 1)
    if kind is np.ndarray:
        value = torch.from_numpy(value)  # raises TypeError for objects and text
    if not torch.is_tensor(value) or value.layout != torch.strided or value.is_meta:
        raise TypeError(f"a {kind.__name__} cannot be kept")
    return value.detach().clone()


def unpack(packed, now):
    """Returns what was packed, as what stands in its place now: in it, where that can be changed."""
    if isinstance(now, np.ndarray) and torch.is_tensor(packed):
        packed = packed.numpy()
        if now.shape != packed.shape or now.dtype != packed.dtype or not now.flags.writeable:
            return packed
        now[...] = packed
    elif torch.is_tensor(packed):
        if not torch.is_tensor(now) or now.shape != packed.shape:
            return packed
        with torch.no_grad():
            now.copy_(packed)
    elif isinstance(now, list | set | dict | collections.deque) and isinstance(packed, list | dict):
        now.clear()
        (now.extend if isinstance(now, list | collections.deque) else now.update)(packed)
    elif isinstance(now, tuple) and hasattr(now, "_fields"):
        return type(now)(*packed)
    elif isinstance(now, np.generic | enum.Enum | frozenset) and packed is not None:
        return type(now)(packed)
    else:
        return packed
    return now


def put(owner, name, value):
    """Sets an attribute, of a frozen dataclass too."""
    if getattr(owner, name, None) is not value:
        try:
            setattr(owner, name, value)
        except dataclasses.FrozenInstanceError:
            object.__setattr__(owner, name, value)
