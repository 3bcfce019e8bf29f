"""Where a network trains: on Macs, on the faster one of GPU and CPU."""

import contextlib
import functools
import json
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F

from normkit.checks import in_words
from normkit.device import get_device
from normkit.files import write_whole
from normkit.fused import fuse
from normkit.fused.build import cache_folder, library
from normkit.randomness import generators_preserved


def choose_device(device, model, backend="auto"):
    """Returns the device asked for, or else the one to train the model on, and a line that says which and why.

    That is get_device's. But Apple's MPS takes longer to start the many small operations of a small network than to do
    them, so where the fused kernel can have the model, a few training steps on each decide between MPS and CPU.
    """
    chosen, remarks = get_device(device), []
    if device is None and chosen.type == "mps" and backend in ("auto", "fused") and fuse(model).reason is None:
        try:
            times = step_times(type(model))
            chosen = torch.device(min(times, key=times.get))
            remarks = ["a step takes " + ", ".join(f"{time:.1f} ms on {name}" for name, time in times.items())]
        except Exception as error:  # each operation that MPS lacks has one of its own
            chosen, remarks = torch.device("cpu"), [f"mps fails: {in_words(error, 100)}"]
    if chosen.type == "cpu":
        remarks.insert(0, f"{torch.get_num_threads()} threads")
    return chosen, f"{chosen} ({'; '.join(remarks)})" if remarks else str(chosen)


@functools.cache
def step_times(build_model):
    """Returns {"cpu": milliseconds with the kernel, "mps": with PyTorch's modules}, measured once a machine.

    They are kept beside the kernel: were the choice made anew in each process, one could not go on with another's run.
    """
    folder, _ = cache_folder()
    file = folder and folder / f"{Path(library().path).stem}-torch-{torch.__version__}.json"
    with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged
        if file:
            return json.loads(file.read_text("utf-8"))
    times = {name: time_step(build_model, torch.device(name)) for name in ("cpu", "mps")}
    with contextlib.suppress(OSError):
        if file:
            write_whole(file, json.dumps(times).encode())
    return times


def time_step(build_model, device, steps=5, seconds=0.5):
    """Returns the milliseconds of a training step with 64 images in float32, of the best round of steps."""
    with generators_preserved(device):
        network = fuse(build_model().to(device))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=device.type == "cpu")
        images, labels = torch.randn(64, 3, 32, 32, device=device), torch.arange(64, device=device) % 10

        def train():
            for _ in range(steps):
                loss = F.cross_entropy(network(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return loss.item()  # waits for the device

        train()  # compiles what is compiled at first use
        rounds = []
        while sum(rounds) < seconds:
            rounds.append(timeit.timeit(train, number=1))
        return min(rounds) / steps * 1000
