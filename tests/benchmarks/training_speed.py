"""How fast the kit trains, beside the loop that the assignment's solutions use, in one run and one table.

    python tests/benchmarks/training_speed.py [--device cpu] [--norm batch group layer] [--compile] [--only NAME ...]

Each contender lives in a process of its own, so that none profits from another's settings. They train in
turn, several rounds of one pass over the same images; the table shows medians, and the spread between rounds.
"""

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[2]))
from arguments import device, positive  # noqa: E402

import model  # noqa: E402
import utils  # noqa: E402
from normkit.backend import choose_backend  # noqa: E402
from normkit.cifar10 import MEAN, STD  # noqa: E402
from normkit.device import autocast, choose_memory_format, choose_precision  # noqa: E402
from normkit.fused import Fused  # noqa: E402
from normkit.synthetic import make_synthetic  # noqa: E402

FULL_EPOCH = 50_000  # images


class Pictures(Dataset):
    """PIL images out of an array in memory, as torchvision's CIFAR10 gives them."""

    def __init__(self, images, labels):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def usual_loop(norm, data, batch_size, device, workers):
    """A pass of the plain loop: PIL images, DataLoader, float32, numbers read at each step."""
    net = model.Net(norm).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(Pictures(data.train_images, data.train_labels), batch_size, shuffle=True, num_workers=workers)

    def one_pass():
        net.train()
        loss_sum = correct = 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            output = net(images)
            loss = F.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += (output.argmax(dim=1) == labels).sum().item()

    return one_pass


def network_for(norm, device, precision, backend):
    """The network as utils.run sets it up."""
    net = model.Net(norm).to(device)
    network, _ = choose_backend(backend, net)
    if not isinstance(network, Fused):
        net.to(memory_format=choose_memory_format("auto", net, device, choose_precision(precision, device)))
    return network


def sgd(network, device):
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=device.type in ("cuda", "cpu"))


def kit(norm, data, batch_size, device, precision="auto", augment=False, backend="auto", resident=False):
    """An epoch of utils.train; resident=True feeds it one ready batch again and again."""
    network = network_for(norm, device, precision, backend)
    loader, _ = utils.get_loaders(data, batch_size, augment, device)
    optimizer, batches = sgd(network, device), [next(iter(loader))] * len(loader) if resident else loader
    return lambda: utils.train_epoch(network, batches, optimizer, None, F.cross_entropy, precision, progress=False)


def own_loop(norm, data, batch_size, device):
    """A pass of a loop that anybody could write, on the kit's loader and fuse(model), numbers read at its end."""
    network, dtype = network_for(norm, device, "auto", "auto"), choose_precision("auto", device)
    loader, _ = utils.get_loaders(data, batch_size, False, device)
    optimizer = sgd(network, device)

    def one_pass():
        network.train()
        for images, labels in loader:
            with autocast(device, dtype):
                logits = network(images)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    return one_pass


def loading(norm, data, batch_size, device):
    """A pass of the kit's loader alone, with augmentation: batches that nobody trains on."""
    loader, _ = utils.get_loaders(data, batch_size, True, device)

    def one_pass():
        for _ in loader:
            pass

    return one_pass


CONTENDERS = {
    "usual loop, 0 workers": lambda *args: usual_loop(*args, workers=0),
    "usual loop, 2 workers": lambda *args: usual_loop(*args, workers=2),
    "kit": kit,
    "kit, float32": lambda *args: kit(*args, precision="float32"),
    "kit, augmentation": lambda *args: kit(*args, augment=True),
    "kit, modules": lambda *args: kit(*args, backend="eager"),
    "kit, compiled": lambda *args: kit(*args, backend="compile"),
    "own loop on fuse(model)": own_loop,
    "floor: one resident batch": lambda *args: kit(*args, resident=True),
    "loader alone, augmentation": loading,
}


def load(name, images):
    """The first training images of the data set called name, and next to nothing to test on."""
    return make_synthetic(images, 10) if name == "synthetic" else utils.load_data(name).first(images, 10)


def serve(pipe, contender, norm, data, batch_size, device):
    """Answers each message with the seconds that one pass took."""
    device = torch.device(device)
    one_pass = CONTENDERS[contender](norm, data, batch_size, device)
    while pipe.recv():
        start = time.perf_counter()
        one_pass()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)


def race(contenders, norm, data, batch_size, device, rounds):
    """Seconds of each round's pass, by contender; a first pass of each is not counted."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, seconds = {}, [], {contender: [] for contender in contenders}
    try:
        for contender in contenders:
            pipes[contender], theirs = context.Pipe()
            processes.append(
                context.Process(target=serve, args=(theirs, contender, norm, data, batch_size, str(device)))
            )
            processes[-1].start()
            theirs.close()
        for counted in [False] + [True] * rounds:
            for contender, pipe in pipes.items():
                pipe.send("go")
                answer = pipe.recv()
                if counted:
                    seconds[contender].append(answer)
    except BaseException:
        for process in processes:
            process.terminate()  # this one would wait for them for ever
        raise
    for pipe in pipes.values():
        pipe.send(None)
    return seconds


def rows_of(norm, seconds, images):
    epoch = {contender: statistics.median(times) * FULL_EPOCH / images for contender, times in seconds.items()}
    usual = min((epoch[contender] for contender in seconds if contender.startswith("usual")), default=math.nan)
    floor = epoch.get("floor: one resident batch", math.nan)
    for contender, times in seconds.items():
        yield {
            "norm": norm,
            "contender": contender,
            "images a second": round(FULL_EPOCH / epoch[contender]),
            "seconds an epoch": round(epoch[contender], 2),
            "spread %": round(100 * (max(times) - min(times)) / statistics.median(times)),
            "times the usual loop": round(usual / epoch[contender], 2),
            "floor's share %": None if contender.startswith("loader") else round(100 * floor / epoch[contender], 1),
        }


def loaders_share(seconds):
    """How much of the time of training with augmentation the loader takes, in percent."""
    alone, training = (statistics.median(seconds[name]) for name in ("loader alone, augmentation", "kit, augmentation"))
    return round(100 * alone / training, 1)


def name_of(device):
    """The device in words: its kind, and the name of the processor or GPU."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{device.type}: {name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=device, default=utils.get_device())
    parser.add_argument("--norm", nargs="+", choices=model.NORMS, default=list(model.NORMS))
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--images", type=positive, default=6400, help="images in a pass (default 6400)")
    parser.add_argument("--data", choices=["synthetic", "cifar10"], default="synthetic")
    parser.add_argument("--compile", action="store_true", help="the kit's network compiled by torch.compile, too")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=positive, default=3, help="counted passes of each contender (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()

    data = load(args.data, args.images)
    about = {
        "device": name_of(args.device),
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "data": f"{data.name}, {len(data.train_labels)} images, seconds scaled to {FULL_EPOCH}",
        "batch size": args.batch_size,
        "rounds": args.rounds,
    }
    for key, value in about.items():
        print(f"{key}: {value}")
    contenders = args.only or [name for name in CONTENDERS if args.compile or name != "kit, compiled"]
    rows = []
    for norm in args.norm:
        seconds = race(contenders, norm, data, args.batch_size, args.device, args.rounds)
        rows += rows_of(norm, seconds, len(data.train_labels))
        print("\n" + pd.DataFrame(rows[-len(contenders) :]).to_string(index=False))
        if {"loader alone, augmentation", "kit, augmentation"} <= seconds.keys():
            print(f"loader's share of training with augmentation: {loaders_share(seconds)} %", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
