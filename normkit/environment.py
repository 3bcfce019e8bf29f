"""The set-up report."""

import platform
import shutil
import sys
from importlib import metadata

import torch

from normkit.cifar10 import data_root, find_cifar10
from normkit.device import choose_precision, get_device
from normkit.fused.build import library


def check_setup(root="data"):
    """Prints what the kit runs on and whether it has its data; for what is missing, what to do about it."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "matplotlib", "pandas")}
    device = get_device()
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"Python {platform.python_version()}, " + ", ".join(" ".join(pair) for pair in versions.items()))
    print(f"Device: {device}{threads}, computing in {precision}")
    if tuple(map(int, versions["torch"].split(".")[:2])) < (2, 10):
        command = f'{sys.executable} -m pip install --upgrade "torch>=2.10" torchvision'
        print(f"TO FIX: torch 2.10 or newer is needed. Run: {command}")
    if device.type != "cuda":
        print(f"Fused kernel: {library().reason or 'ready'}")
        if library().reason and device.type == "cpu":
            print("Without it PyTorch's modules do the work, in about three times the time.")
        if not library().reason and device.type == "mps":
            print("With it the CPU may be faster: the first run times a few steps on both, and takes the faster.")

    root = data_root(root)
    form = find_cifar10(root)
    if form:
        print(f"CIFAR-10: {form}, in {root}")
        return
    whole = root.absolute()
    existing = next((folder for folder in (whole, *whole.parents) if folder.exists()), None)
    print(
        f"CIFAR-10: not in {root} yet. To be fetched: 170 MB, from a minute to an hour by the mirror that answers; "
        "without a network a synthetic stand-in takes its place."
    )
    if existing is None:
        print(f"TO FIX: {whole.anchor} is not there: is a disk missing? Point CIFAR10_ROOT elsewhere.")
    elif (free := shutil.disk_usage(existing).free / 1e9) < 0.5:
        print(f"TO FIX: {free:.1f} GB are free at {existing}, 0.5 needed. Make room, or point CIFAR10_ROOT elsewhere.")
