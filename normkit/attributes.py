"""Saves the attributes of user-defined objects that change during training: counters, orders, weights."""

import enum
import io
import itertools
import secrets
import types
import zlib

import numpy as np
import torch

from normkit.checksum import crc32_of
from normkit.objects import attributes_of, has, is_stateful, is_user_code, put
from normkit.packing import CONTAINERS, MAX_BYTES, leaves_of, pack, put_into, size_of, unpack

# class -> attributes that are not saved here: its state_dict has them, or they need no saving.
COMMON = {
    torch.nn.Module: {*vars(torch.nn.Module()), "_is_torch_compile"},  # which torch.compile sets in passing
    torch.optim.Optimizer: {"defaults", "state", "param_groups"},
    torch.utils.data.DataLoader: {"_iterator"},  # its persistent workers
}
PROCESS = secrets.token_hex(8)  # tells this process
SHARED = (type, types.FunctionType)  # their variables are shared with other code of the process
LEARNING = "requires_grad"  # as an attribute of a module: that of each of its own parameters
OPENED = ("opened",)  # stands for a file or connection that was opened during training


class MovingAttributes:
    """Saves those attributes of objects that changed since this was made, by state_dict and load_state_dict.

    owners: objects by name. known: objects by name to which attributes may refer.
    A place is (owner's name, attribute's name), in files too. moved: places that have changed.
    lost: places that changed and could not be saved or restored, as of the loaded state.
    """

    def __init__(self, owners, known):
        self.owners, self.moved, self.lost = owners, set(), set()
        self.known = {where: each for where, each in known.items() if not isinstance(each, CONTAINERS)}
        self.first = self.found()  # the objects themselves
        self.start = {place: fingerprint(value) for place, value in self.first.items()}

    def found(self):
        """Returns the attributes by place."""
        items = ((where, own_attributes(owner) | learning_in(owner)) for where, owner in self.owners.items())
        return {(where, name): value for where, attributes in items for name, value in attributes.items()}

    def state_dict(self):
        found, names = self.found(), {id(each): where for where, each in self.known.items()}
        self.moved |= {place for place, value in found.items() if fingerprint(value) != self.start.get(place)}
        packed, lost, incomplete = {}, set(self.lost), set()
        for place in sorted(self.moved & found.keys()):
            value = found[place]
            try:
                packed[place] = pack(value, names)
                names.setdefault(id(value), place)  # another place may hold it too
            except TypeError:
                if opened := self.was_opened(place, value):
                    packed[place] = OPENED
                own = is_user_code(self.owners[place[0]])
                held = is_stateful(value) or is_array(value) or isinstance(value, CONTAINERS)
                iterates = has(value, "__next__") and not isinstance(value, io.IOBase)
                if iterates or not opened and (own or held):
                    lost.add(place)
                    if not own:
                        incomplete.add(place[0])  # a library's attributes hang together
        packed = {place: value for place, value in packed.items() if place[0] not in incomplete}
        replaced = [place for place in packed if found[place] is not self.first.get(place)]
        return {"started": self.shared_at_start(found), "lost": sorted(lost), "replaced": replaced, "moved": packed}

    def was_opened(self, place, value):
        """Returns whether a value that pack refuses replaced None, False or nothing, as an opened file does."""
        was_unset = self.start.get(place) in (None, fingerprint(None), fingerprint(False))
        return was_unset and not (is_stateful(value) or is_array(value) or isinstance(value, SHARED))

    def shared_at_start(self, found):
        """Returns {PROCESS: {place: repr of its first fingerprint}} for moved places of SHARED owners, or {}."""
        shared = [place for place in self.moved if isinstance(self.owners.get(place[0]), SHARED)]
        shared = [place for place in shared if not holds(found.get(place), is_array)]  # weights are a run's own
        return {PROCESS: {place: repr(self.start.get(place)) for place in shared}} if shared else {}

    def load_state_dict(self, state):
        found, known, values, lost = self.found(), dict(self.known), {}, set(state["lost"])
        # In the process that saved them, shared variables keep their present values, unless initialised anew.
        started = state["started"].get(PROCESS, {})
        is_kept = {place: mark != repr(fingerprint(found.get(place))) for place, mark in started.items()}
        moved = [place for place in state["moved"] if place[0] in self.owners and not is_kept.get(place)]
        for place in moved:
            packed = state["moved"][place]
            try:
                value = unpack(packed, found.get(place), known)
            except LookupError:
                if packed != OPENED:
                    lost.add(place)
                continue
            if place not in state["replaced"]:  # others may hold the object of the start: as it was, if it was
                value = put_into(self.first.get(place), value)
            values[place] = known[place] = value
        # What was opened during training is opened again, if what was made along with it is made again too.
        unset = {place for place in moved if is_unset(found.get(place))}
        opening = {where for where, _ in unset - values.keys()}
        for place, value in values.items():
            if place not in unset or place[0] not in opening:
                self.put(*place, value)
            elif not isinstance(value, bool):
                lost.add(place)
        self.moved.update(moved)
        self.lost = lost

    def put(self, where, name, value):
        """Sets what was found under these names."""
        owner = self.owners[where]
        if name != LEARNING:
            put(owner, name, value)
            return
        for each in value.keys() & learning_in(owner).get(LEARNING, {}).keys():
            owner._parameters[each].requires_grad_(value[each])


def is_unset(value):
    return value is None or value is False


def own_attributes(owner):
    """Returns the attributes by name that no state_dict has."""
    found = attributes_of(owner)
    for kind, common in COMMON.items():
        if isinstance(owner, kind):
            found = {name: value for name, value in found.items() if name not in common}
    unsaved = owner._non_persistent_buffers_set if isinstance(owner, torch.nn.Module) else ()
    found |= {name: owner._buffers[name] for name in unsaved}
    return {name: value for name, value in found.items() if not holds(value, is_trained)}


def learning_in(owner):
    """Returns {LEARNING: {name: requires_grad}} for a module's own parameters, or {}."""
    own = owner._parameters if isinstance(owner, torch.nn.Module) else {}
    learning = {name: each.requires_grad for name, each in own.items() if each is not None}
    return {LEARNING: learning} if learning else {}


def holds(value, is_sought):
    """Returns whether a value is, or among the first in it is, something of which is_sought(it) is true."""
    return any(map(is_sought, itertools.islice(leaves_of(value), 1000)))


def is_array(value):
    return isinstance(value, torch.Tensor | np.ndarray)


def is_trained(value):
    """Returns whether a value is what an optimizer changes: the model's state_dict has that."""
    return torch.is_tensor(value) and (value.requires_grad or isinstance(value, torch.nn.Parameter))


def fingerprint(value):
    """Returns a fingerprint that changes with the value, without copying it."""
    leaves = list(leaves_of(value))
    are_read = sum(map(size_of, leaves)) <= MAX_BYTES  # more would take too long
    marks = [mark_of(each, are_read) for each in leaves]
    if isinstance(value, CONTAINERS):
        return len(value), zlib.crc32(" ".join(map(str, marks)).encode(errors="replace"))
    return marks[0]


def mark_of(value, is_read):
    """Returns what tells a value: of an array its content, if that is read; of a plain value its repr; else its id."""
    if is_read and is_array(value):
        return value.dtype, tuple(value.shape), crc32_of(value)
    if value is None or isinstance(value, bool | int | float | str | np.generic | enum.Enum):
        return repr(value)
    changes = value._version if torch.is_tensor(value) and not value.is_inference() else 0
    return id(value), changes
