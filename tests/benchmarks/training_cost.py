"""What an epoch costs as the work grows: seconds and peak memory by batch size, amount of data and norm.

    CIFAR10_ROOT=folder python tests/benchmarks/training_cost.py --data cifar10 --csv results/cost.csv

Each row comes from a process of its own, which trains one whole epoch with the classic recipe. With the least data it
does so twice: a second run that took longer, or a peak that had risen by then, would tell of something kept.
"""

import argparse
import multiprocessing
import resource
import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from arguments import device, positive  # noqa: E402
from training_speed import load, name_of  # noqa: E402

import model  # noqa: E402
import utils  # noqa: E402
from normkit.device import choose_precision  # noqa: E402


def peak_memory(device):
    """Megabytes: what torch has held of a GPU at most, or the whole process of the machine's memory."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6)
    if Path("/proc/self/status").exists():  # Linux, where getrusage counts the process that started this one, too
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return round(int(status["VmHWM"].split()[0]) * 1024 / 1e6)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def measure(pipe, norm, data, batch_size, device, runs):
    """Sends the seconds of an epoch and the peak so far, for each run."""
    device = torch.device(device)
    for _ in range(runs):
        result = utils.run(norm, data, 1, batch_size, device=device, progress=False)
        pipe.send((round(result.history[0]["seconds"], 2), peak_memory(device)))


def cost(norm, data, batch_size, device, runs):
    """A row of the table."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, norm, data, batch_size, str(device), runs))
    process.start()
    theirs.close()
    (seconds, peak), *again = [pipe.recv() for _ in range(runs)]
    process.join()
    row = {"norm": norm, "images": len(data.train_labels), "batch size": batch_size, "seconds an epoch": seconds}
    row |= {"images a second": round(len(data.train_labels) / seconds), "peak memory MB": peak}
    for seconds, peak in again:
        row |= {"second run, seconds": seconds, "second run, peak MB": peak}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=device, default=utils.get_device())
    parser.add_argument("--norm", nargs="+", choices=model.NORMS, default=list(model.NORMS))
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[2, 8, 32, 64, 128, 512, 2048])
    parser.add_argument("--images", nargs="+", type=positive, default=[5_000, 50_000])
    parser.add_argument("--data", choices=["synthetic", "cifar10"], default="synthetic")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, after each row")
    args = parser.parse_args()

    precision = str(choose_precision("auto", args.device)).removeprefix("torch.")
    where = f"{name_of(args.device)}, {torch.get_num_threads()} threads, {precision}, torch {torch.__version__}"
    print(where)
    rows = []
    for images in args.images:
        data, runs = load(args.data, images), 2 if images == min(args.images) else 1
        for norm in args.norm:
            for batch_size in args.batch_size:
                row = cost(norm, data, batch_size, args.device, runs)
                rows.append(row | {"data": data.name, "where": where})
                if args.csv:
                    pd.DataFrame(rows).to_csv(args.csv, index=False)
            part = pd.DataFrame(rows[-len(args.batch_size) :]).drop(columns=["data", "where"])
            print("\n" + part.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
