"""The generators that training may draw from."""

import collections
import contextlib
import copy
import itertools
import operator
import random
import secrets
import types

import numpy as np
import torch


def check_seed(seed):
    """Returns the seed as an int; None draws one."""
    if seed is None:
        return secrets.randbits(32)
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    if number is None or not -(2**63) <= number < 2**64:  # what torch takes
        raise ValueError(f"seed={seed!r}: expected a whole number from -2**63 to 2**64 - 1, or None for any")
    return number


def seed_everything(seed):
    """Seeds the global generators of Python, NumPy and torch (all devices); returns the seed, drawn if it is None."""
    seed = check_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed


class RandomState:
    """What is random about training, as state_dict and load_state_dict: the global generators, a device's, a loader's.

    Of a loader that is the generators in it, and the counters of samplers and data sets of somebody's own: whatever
    plain value in them moves while training goes on. note: what of it no file can hold, in words, or "".
    """

    def __init__(self, device=None, loader=None):
        self.device = device if device is not None and device.type not in ("cpu", "meta") else None
        self.loader = loader
        self.generators = generators_of(loader)
        self.start, self.moved = counters_of(loader), set()
        lost = "; ".join(lost_in(loader))
        self.note = f". Its order may differ from an uninterrupted run's: {lost}" if lost else ""

    def state_dict(self):
        name, keys, *rest = np.random.get_state()
        state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
        if self.device is not None:
            state["device"] = torch.get_device_module(self.device).get_rng_state()
        counters = counters_of(self.loader)
        self.moved |= {place for place in counters if counters[place] != self.start.get(place, counters[place])}
        state["counters"] = {f"{owner} {name}": counters[owner, name] for owner, name in self.moved}
        return state | {f"generator {name}": read(each) for name, each in self.generators.items()}

    def load_state_dict(self, state):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "device" in state and self.device is not None:
            torch.get_device_module(self.device).set_rng_state(state["device"])
        for name, generator in self.generators.items():
            if f"generator {name}" in state:
                write(generator, state[f"generator {name}"])
        owners, places = dict(objects_of(self.loader)), counters_of(self.loader).keys()
        for place, value in state.get("counters", {}).items():
            where, name = place.rsplit(" ", 1)
            if (where, name) in places:
                setattr(owners[where], name, value)
                self.moved.add((where, name))


def read(generator):
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.RandomState):
        name, keys, *rest = generator.get_state()
        return (name, keys.tolist(), *rest)
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def write(generator, state):
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
LIBRARIES = {"builtins", "normkit", "numpy", "torch", "torchvision", "utils"}
PASSED_OVER = (torch.Tensor, np.ndarray, torch.nn.Module, type, types.ModuleType, str, bytes)


def objects_of(loader, most=1000):
    """Yields (where, object) for a loader and whatever it holds: samplers, data sets, transforms, other loaders."""
    waiting, seen = collections.deque([("loader", loader)]), set()
    while waiting and len(seen) < most:
        where, owner = waiting.popleft()
        if id(owner) in seen or isinstance(owner, PASSED_OVER):
            continue
        seen.add(id(owner))
        yield where, owner
        if not isinstance(owner, GENERATORS):
            waiting.extend((where + step, part) for step, part in parts_of(owner))


def parts_of(owner):
    """Yields (step, object) for what an object holds, and for the generators that its code draws from by name."""
    functions = [owner] if isinstance(owner, types.FunctionType) else []
    if isinstance(owner, list | tuple):
        yield from ((f"[{i}]", each) for i, each in enumerate(owner[:100]))
    elif isinstance(owner, dict):
        yield from ((f"[{key!r}]", each) for key, each in itertools.islice(owner.items(), 100))
    elif functions:
        yield from ((f".__closure__[{i}]", cell.cell_contents) for i, cell in enumerate(owner.__closure__ or ()))
    elif hasattr(owner, "__dict__"):
        yield from ((f".{name}", value) for name, value in vars(owner).items())
        if is_somebodys(owner):
            functions = [each for each in vars(type(owner)).values() if isinstance(each, types.FunctionType)]
    for function in functions:
        names = function.__globals__, function.__code__.co_names
        yield from ((f" {name}", names[0][name]) for name in names[1] if isinstance(names[0].get(name), GENERATORS))


def is_somebodys(owner):
    """Whether an object is of a class that is neither the kit's nor a library's."""
    return type(owner).__module__.partition(".")[0] not in LIBRARIES


def generators_of(loader):
    """Returns the random generators that a loader and what it holds draw from, by where they are found."""
    return {where: found for where, found in objects_of(loader) if isinstance(found, GENERATORS)}


def counters_of(loader):
    """Returns the plain values of the objects of somebody's own that a loader holds, by (where, name)."""
    owners = {where: found for where, found in objects_of(loader) if hasattr(found, "__dict__") and is_somebodys(found)}
    found = {(where, name): value for where, owner in owners.items() for name, value in vars(owner).items()}
    return {place: copy.copy(value) for place, value in found.items() if is_plain(value)}


def is_plain(value):
    if isinstance(value, list):
        return all(isinstance(each, bool | int | float | str) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def lost_in(loader):
    """Yields what a loader's order or augmentation depends on and no file can hold, in words."""
    for where, found in objects_of(loader):
        if hasattr(found, "__next__") and not hasattr(found, "__dict__"):
            yield f"{where} is a {type(found).__name__}, and where it stood cannot be kept"
        if isinstance(found, torch.utils.data.DataLoader) and found.persistent_workers:
            yield f"{where} has persistent workers: what they draw begins anew"


@contextlib.contextmanager
def generators_preserved(device=None):
    """Gives the global generators, and the device's, back as they were."""
    state = RandomState(device)
    before = state.state_dict()
    try:
        yield
    finally:
        state.load_state_dict(before)
