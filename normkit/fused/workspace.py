"""Memory for the kernel's activations and gradients, reused from pass to pass."""

import collections
import weakref

import torch

# A forward and a backward pass need one each. Asking the system for the memory at every step would cost a tenth of the
# time, and leave the C library's heap in pieces, so that the peak rises.
_POOL = collections.deque(maxlen=2)


def take_workspace(size):
    """Returns a uint8 tensor of at least size bytes, whose memory goes back to the pool with its last reference."""
    try:
        memory = _POOL.pop()
    except IndexError:
        memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    if memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    array = memory.numpy()
    weakref.finalize(array, _POOL.append, memory).atexit = False
    return torch.from_numpy(array)[:size]
