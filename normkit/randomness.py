"""Seeds, the global generators that training draws from, and the states of generators of any kind."""

import contextlib
import random
import secrets
import threading

import numpy as np
import torch

from normkit.checks import shown, whole_number


def check_seed(seed):
    """Returns the seed as an int; None draws one."""
    if seed is None:
        return secrets.randbits(32)
    try:
        return whole_number("seed", seed, -(2**63), 2**64 - 1)  # what torch takes
    except ValueError:
        bounds = "from -2**63 to 2**64 - 1, or None for any"
        raise ValueError(f"seed={shown(seed)}: expected a whole number {bounds}") from None


def seed_everything(seed):
    """Seeds the global generators of Python, NumPy and torch (all devices); returns the seed, drawn if it is None."""
    seed = check_seed(seed)
    random.seed(seed)
    generator = np.random.get_bit_generator()
    if isinstance(generator, np.random.MT19937):
        np.random.seed(seed % 2**32)
    else:  # somebody has set another, which seed() refuses
        np.random.set_state(type(generator)(seed % 2**32).state)
    torch.manual_seed(seed)
    return seed


class Generators:
    """The global generators of Python, NumPy and torch, a device's, and others: their state_dict and load_state_dict.

    others: generators of any kind, by name.
    """

    def __init__(self, device=None, others=None):
        self.device = device if device is not None and device.type not in ("cpu", "meta") else None
        self.others = others or {}

    def state_dict(self):
        numpy = np.random.get_state(legacy=False)
        state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
        if self.device is not None:
            state["device"] = torch.get_device_module(self.device).get_rng_state(self.device)
        return state | {"others": {where: get_state(each) for where, each in self.others.items()}}

    def load_state_dict(self, state):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "device" in state and self.device is not None:
            torch.get_device_module(self.device).set_rng_state(state["device"], self.device)
        for where in self.others.keys() & state["others"].keys():
            set_state(self.others[where], state["others"][where])


CPU = torch.device("cpu")
ONE_AT_A_TIME = threading.RLock()  # for threads share the generators


@contextlib.contextmanager
def generators_preserved(device=CPU):
    """Gives the global generators back as they were, those of all GPUs among them; other threads that draw wait.

    device: one that is going to be used; GPUs that nothing has used have nothing to preserve.
    """
    gpu = torch.accelerator.current_accelerator(check_available=True)
    is_initialized = getattr(torch.get_device_module(gpu or "cuda"), "is_initialized", lambda: True)  # MPS tells none
    in_use = gpu is not None and (device.type == gpu.type or is_initialized())
    gpus = range(torch.accelerator.device_count()) if in_use else ()
    with ONE_AT_A_TIME, torch.random.fork_rng(gpus, device_type=gpu.type if in_use else "cuda"):
        state = Generators()
        before = state.state_dict()
        try:
            yield
        finally:
            state.load_state_dict(before)


# ---------------------------------------------------------------------- generators of any kind

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def get_state(generator):
    """Returns the state of a generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def set_state(generator, state):
    """Brings a generator to a state."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def new_generator(kind, state, device):
    """Returns a generator of a kind in a state; raises LookupError where its bit generator is none of NumPy's."""
    if kind is torch.Generator:
        generator = kind(device)
    elif kind is random.Random:
        generator = kind()
    elif state["bit_generator"] in BIT_GENERATORS:
        generator = kind(getattr(np.random, state["bit_generator"])())
    else:
        raise LookupError(f"a {state['bit_generator']} cannot be made")
    set_state(generator, state)
    return generator
