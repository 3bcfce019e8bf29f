"""The generators that training may draw from."""

import collections
import contextlib
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
    """The state of the global generators, of a device's, and of further ones, as state_dict and load_state_dict.

    generators: a dict from a name to a generator of torch's, NumPy's or Python's.
    """

    def __init__(self, device=None, generators=()):
        self.device = device if device is not None and device.type not in ("cpu", "meta") else None
        self.generators = dict(generators)

    def state_dict(self):
        name, keys, *rest = np.random.get_state()
        state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
        if self.device is not None:
            state["device"] = torch.get_device_module(self.device).get_rng_state()
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
PASSED_OVER = (torch.Tensor, np.ndarray, torch.nn.Module, type, types.ModuleType, types.FunctionType, str, bytes)


def objects_of(loader, most=1000):
    """Yields (where, object) for a loader and whatever it holds: samplers, data sets, transforms, other loaders."""
    waiting, seen = collections.deque([("loader", loader)]), set()
    while waiting and len(seen) < most:
        where, owner = waiting.popleft()
        if id(owner) in seen or isinstance(owner, PASSED_OVER):
            continue
        seen.add(id(owner))
        yield where, owner
        if isinstance(owner, GENERATORS):
            continue
        if isinstance(owner, list | tuple):
            waiting.extend((f"{where}[{i}]", each) for i, each in enumerate(owner[:100]))
        elif hasattr(owner, "__dict__"):
            waiting.extend((f"{where}.{name}", value) for name, value in vars(owner).items())


def generators_of(loader):
    """Returns the random generators that a loader and what it holds draw from, by where they are found."""
    return {where: found for where, found in objects_of(loader) if isinstance(found, GENERATORS)}


@contextlib.contextmanager
def generators_preserved(device=None):
    """Gives the global generators, and the device's, back as they were."""
    state = RandomState(device)
    before = state.state_dict()
    try:
        yield
    finally:
        state.load_state_dict(before)
