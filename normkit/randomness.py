"""The generators that training may draw from."""

import contextlib
import operator
import random
import secrets

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

    generators: a dict from a name to a torch.Generator, a np.random.Generator or a random.Random.
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
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def write(generator, state):
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def generators_of(loader):
    """Returns the generators that a loader, its samplers and its data set hold, by where they are found."""
    found, seen = {}, set()

    def search(name, owner):
        if owner is None or id(owner) in seen or not hasattr(owner, "__dict__"):
            return
        seen.add(id(owner))
        for attribute, value in vars(owner).items():
            if isinstance(value, torch.Generator | np.random.Generator | random.Random):
                found[f"{name}.{attribute}"] = value
            elif attribute.lstrip("_") in ("sampler", "batch_sampler", "dataset"):
                search(f"{name}.{attribute}", value)

    search("loader", loader)
    return found


@contextlib.contextmanager
def generators_preserved(device=None):
    """Gives the global generators, and the device's, back as they were."""
    state = RandomState(device)
    before = state.state_dict()
    try:
        yield
    finally:
        state.load_state_dict(before)
