"""Finds and keeps what has a state in a user's training: in loaders, callbacks, and all that these hold or name."""

import argparse
import collections
import functools
import inspect
import itertools
import types

import numpy as np
import torch
from torch.utils.data import DataLoader

from normkit.attributes import MovingAttributes
from normkit.objects import attributes_of, globals_in, has, is_foreign, is_stateful, is_user_code
from normkit.packing import CONTAINERS
from normkit.randomness import GENERATORS, Generators


class CheckpointParts:
    """Finds all that a checkpoint keeps of training: parts, by name, in the order in which they are to be loaded.

    stateful: those that have a state_dict of their own. The others keep what else moves in these, in the roots and in
    all that they hold.
    """

    def __init__(self, stateful, device=None, **roots):
        self.owners = dict(objects_of(**roots | stateful))
        generators = {where: owner for where, owner in self.owners.items() if isinstance(owner, GENERATORS)}
        moving = {where: owner for where, owner in self.owners.items() if may_move(owner)}
        self.attributes = MovingAttributes(moving, self.owners)
        # Workers that are started move attributes, and what is loaded may draw random numbers.
        self.parts = {"workers": PersistentWorkers(self.owners), "attributes": self.attributes} | stateful
        self.parts |= {"samplers": Samplers(self.owners, stateful), "random": Generators(device, generators)}

    def lost(self):
        """Returns what a resumed run may have lost, in words."""
        places = sorted(map(".".join, self.attributes.lost))
        return [*lost_in(self.owners), *(f"{each} cannot be kept" for each in places)]


class Samplers:
    """The states of samplers and the like among owners, by name, as state_dict and load_state_dict.

    What lies in another, or in one of the parts, is in the state of that. Of modules the attributes are kept instead.
    """

    def __init__(self, owners, parts):
        found = {}
        for where, owner in owners.items():
            is_kept = is_stateful(owner) and not isinstance(owner, torch.nn.Module)
            if is_kept and not is_within(where, [*parts, *found]):
                found[where] = owner
        # Between epochs a library's loader is where its generators are; torchdata's would draw once more.
        self.found = {
            where: owner for where, owner in found.items() if is_user_code(owner) or not isinstance(owner, DataLoader)
        }

    def state_dict(self):
        return {where: owner.state_dict() for where, owner in self.found.items() if gives_state(owner)}

    def load_state_dict(self, state):
        for where, owner in self.found.items():
            if where in state and gives_state(owner):
                owner.load_state_dict(state[where])


class PersistentWorkers:
    """Which loaders' workers wait for the next epoch, as state_dict and load_state_dict.

    To start them begins a pass over the sampler, which may draw random numbers and count.
    """

    def __init__(self, owners):
        self.loaders = {
            where: owner
            for where, owner in owners.items()
            if isinstance(owner, DataLoader) and owner.persistent_workers
        }

    def state_dict(self):
        return {"started": [where for where, loader in self.loaders.items() if loader._iterator is not None]}

    def load_state_dict(self, state):
        for where, loader in self.loaders.items():
            loader._iterator = None  # ends them: an interrupt may have done so already, and a first pass draws more
            if where in state["started"]:
                # The pass that begins here ends here: a sampler may count at the end.
                DataLoader.__iter__(loader)._sampler_iter = iter(())


class LooseTensors:
    """Tensors that belong to no module, such as a temperature that is trained along, with a state_dict as modules."""

    def __init__(self, tensors):
        self.tensors = tensors

    def state_dict(self):
        return {f"tensor {i}": tensor.detach() for i, tensor in enumerate(self.tensors)}

    @torch.no_grad()
    def load_state_dict(self, state):
        for i, tensor in enumerate(self.tensors):
            tensor.copy_(state[f"tensor {i}"].reshape(tensor.shape))  # rather than stretched


def lost_in(owners):
    """Yields what the order or augmentation of loaders depends on and no file can hold, in words."""
    if len(owners) == MAX_OBJECTS:
        yield f"they hold more than {MAX_OBJECTS:,} objects, of which the rest was not looked at"
    for where, found in owners.items():
        if has(found, "__next__") and not has(found, "__dict__"):
            yield f"{where} is a {type(found).__name__}, and where it stood cannot be kept"
        if isinstance(found, DataLoader) and found.persistent_workers:
            yield f"{where} has persistent workers: what they draw begins anew"
        if is_stateful(found) and not gives_state(found):
            yield f"the state_dict of {where} fails"


# ---------------------------------------------------------------------- what has a state

SPARING = (torch.nn.Module, torch.optim.Optimizer)  # their state_dict has no attributes, nor what these hold
SET_UP = (torch.nn.Module, torch.utils.data.Dataset, torch.utils.data.Sampler, DataLoader)


def states_in(known, **roots):
    """Returns the objects with a state of their own among roots, and in what these hold or name, by name.

    So a callback's schedulers and averaged weights are found, too, and tensors that an optimizer changes and no module
    has. known: objects by name that are left out. So are modules that share all their tensors with one found before,
    such as a wrapper around the model. The order is one in which they can be loaded: modules, whose weights others
    may copy, and what lies in another before that, whose load_state_dict has the last word about what it holds.
    """
    tensors, found = set(), {}
    for where, owner in objects_of(saves_all, known.values(), **roots):
        is_module = isinstance(owner, torch.nn.Module)
        own = {id(tensor) for tensor in (*owner.parameters(), *owner.buffers())} if is_module else set()
        # Of a module without tensors, as most of those in others are, there is nothing to keep.
        is_new = own - tensors if own else where in roots or not is_module
        if is_new and is_stateful(owner) and (where in roots or gives_state(owner)):
            found[where] = owner
            tensors |= own
    optimizers = [roots["optimizer"], *(each for each in found.values() if isinstance(each, torch.optim.Optimizer))]
    trained = [tensor for each in optimizers for group in each.param_groups for tensor in group["params"]]
    loose = {id(tensor): tensor for tensor in trained if id(tensor) not in tensors}
    found |= {"tensors": LooseTensors([*loose.values()])} if loose else {}
    return dict(sorted(reversed(found.items()), key=lambda item: not isinstance(item[1], torch.nn.Module)))


def saves_all(owner):
    """Returns whether an object has a state_dict, in which is what its attributes hold, too."""
    return is_stateful(owner) and not isinstance(owner, SPARING)


def gives_state(owner):
    """Returns whether the state_dict of an object that is_stateful can be called as it is, and now."""
    try:
        owner.state_dict()
    except Exception:  # whatever user code raises
        return False
    return True


def may_move(owner):
    """Returns whether an object has attributes that training or a callback may change, and that no state_dict has."""
    # Of torch's and the kit's objects a callback may set some, like a dropout's p.
    is_set_up = isinstance(owner, SET_UP) or type(owner).__module__.startswith(("torchvision.transforms", "utils"))
    return (is_foreign(owner) or is_set_up) and not saves_all(owner)


def epoch_takers(loader):
    """Returns the parts of a loader, such as samplers, whose set_epoch(epoch) is to be called before each epoch."""
    objects = [each for _, each in objects_of(loader=loader) if not isinstance(each, type)]
    # Of a proxy, such as weakref's, __class__ is that of what it stands for.
    having = [each for each in objects if has(each, "set_epoch") or has(each.__class__, "set_epoch")]
    return [each for each in having if takes_one(each.set_epoch)]


def takes_one(method):
    """Returns whether a method can be called with one value."""
    try:
        inspect.signature(method).bind(0)
    except (TypeError, ValueError):  # it is none, takes others, or does not tell
        return False
    return True


# ---------------------------------------------------------------------- what holds what

MAX_OBJECTS = 10_000  # that are looked at, in a fifth of a second
PASSED_OVER = (torch.Tensor, np.ndarray, types.ModuleType, str, bytes, int, float, type(None))
OF_THREADS = ("threading", "concurrent")  # pools and locks, which tell of a process's own threads
HOLDERS = (*CONTAINERS, functools.partial, types.SimpleNamespace, argparse.Namespace)
CODE = (types.FunctionType, type, property, staticmethod, classmethod, functools.cached_property)
CALLBACKS = ("on_epoch", "hooks")  # roots


def objects_of(is_closed=lambda owner: False, left_out=(), **roots):
    """Yields (where, object) for the roots and whatever they hold: samplers, data sets, transforms, other loaders.

    is_closed(owner): whether what an object holds is passed over. left_out: objects that are passed over themselves,
    with what they alone hold.
    """
    waiting, seen = collections.deque(roots.items()), set(map(id, left_out))
    while waiting and len(seen) < MAX_OBJECTS:
        where, owner = waiting.popleft()
        if id(owner) in seen or is_passed_over(where, owner):
            continue
        seen.add(id(owner))
        yield where, owner
        if not isinstance(owner, GENERATORS) and not is_closed(owner):
            waiting.extend((where + step, part) for step, part in held_by(owner))


def is_passed_over(where, owner):
    """Returns whether an object, found where it was, and what it holds have no state that is to be kept."""
    if isinstance(owner, PASSED_OVER) or type(owner).__module__.partition(".")[0] in OF_THREADS:
        return True
    if isinstance(owner, type):
        return not is_user_code(owner)
    if isinstance(owner, list | tuple | dict):
        return not owner
    # What a callback has of other libraries are figures, files and loggers, unless it has a state or holds others.
    is_others = is_within(where, CALLBACKS) and is_foreign(owner) and not is_user_code(owner)
    return is_others and not (is_stateful(owner) or isinstance(owner, (*HOLDERS, *GENERATORS)))


def is_within(where, names):
    """Returns whether an object was found under one of these names."""
    return any(where == name or where.startswith((f"{name}.", f"{name}[", f"{name} ")) for name in names)


def held_by(owner):
    """Yields (step, object) for what an object holds, and for what its code names."""
    if isinstance(owner, types.MethodType):
        yield ".__self__", owner.__self__
    elif isinstance(owner, list | tuple):
        yield from ((f"[{i}]", each) for i, each in enumerate(owner[:100]))
    elif isinstance(owner, dict):
        # A hook's number, and what a tensor as a key is called, are others in each run.
        items = enumerate(itertools.islice(owner.items(), 100))
        yield from ((f"[{key!r}]" if isinstance(key, str) else f"[{i}]", each) for i, (key, each) in items)
    elif isinstance(owner, types.FunctionType):
        names, own = globals_in(owner.__code__), is_user_code(owner)
        for name, each in attributes_of(owner).items():
            # Of globals, unlike of what is closed over, a library's objects without a state are left out.
            is_followed = own and not isinstance(each, PASSED_OVER) and (is_user_code(each) or is_stateful(each))
            if is_followed or isinstance(each, GENERATORS) or name not in names:
                yield f" {name}", each
    else:
        yield from ((f".{name}", value) for name, value in attributes_of(owner).items())
        kinds = {f"__mro__[{i}]": kind for i, kind in enumerate(type(owner).__mro__)}
        code = vars(owner) if isinstance(owner, type) else kinds
        yield from ((f".{name}", function_of(each)) for name, each in code.items() if isinstance(each, CODE))


def function_of(member):
    """Returns the function of a class's property or method; a function or class as it is."""
    if isinstance(member, types.FunctionType | type):
        return member
    return next(getattr(member, name) for name in ("__func__", "fget", "func") if hasattr(member, name))
