"""Memory for the kernel's activations and gradients, reused from pass to pass."""

import collections
import weakref

import torch

# A forward and a backward pass need one each. Asking the system for the memory at every step would cost a tenth of the
# time, and leave the C library's heap in pieces, so that the peak rises.
_POOL = collections.deque(maxlen=2)


def take_workspace(size):
    """Returns a uint8 tensor of at least size bytes, for give_back; what is never given back is freed."""
    try:
        memory = _POOL.pop()
    except IndexError:
        memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    return memory if memory.numel() >= size else torch.empty(size, dtype=torch.uint8, device="cpu")


def give_back(memory):
    """Puts a workspace into the pool, for the next pass."""
    _POOL.append(memory)


def shared(memory):
    """Returns the workspace as a tensor that gives it back with its last reference."""
    array = memory.numpy()
    weakref.finalize(array, _POOL.append, memory).atexit = False
    return torch.from_numpy(array)
