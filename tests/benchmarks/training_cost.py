"""What an epoch costs as the work grows: seconds and peak memory by batch size, amount of data and norm.

    python tests/benchmarks/training_cost.py [--device cpu] [--images 5000 50000] [--csv results/cost.csv]

Each row comes from a process of its own, which trains one whole epoch with the classic recipe, twice: a second run
that took longer, or a peak that had risen by then, would tell of something kept.
"""

import argparse
import multiprocessing
import platform
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from training_speed import name_of  # noqa: E402

import model  # noqa: E402
import utils  # noqa: E402


def peak_memory(device):
    """Megabytes: what torch has held of a GPU at most, or the whole process of the machine's memory."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6)
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def measure(pipe, norm, images, batch_size, device):
    """Sends the seconds of an epoch and the peak so far, for each of two runs."""
    device = torch.device(device)
    data = utils.make_synthetic(images, 10)  # next to nothing to test on: training is what is measured
    for _ in range(2):
        result = utils.run(norm, data, 1, batch_size, device=device, progress=False)
        pipe.send((round(result.history[0]["seconds"], 2), peak_memory(device)))


def cost(norm, images, batch_size, device):
    """A row of the table."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, norm, images, batch_size, str(device)))
    process.start()
    theirs.close()
    (seconds, peak), (seconds_again, peak_again) = pipe.recv(), pipe.recv()
    process.join()
    return {
        "norm": norm,
        "images": images,
        "batch size": batch_size,
        "seconds an epoch": seconds,
        "in a second run": seconds_again,
        "images a second": round(images / min(seconds, seconds_again)),
        "peak memory MB": peak,
        "after a second run": peak_again,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=utils.get_device, default=utils.get_device())
    parser.add_argument("--norm", nargs="+", choices=model.NORMS, default=list(model.NORMS))
    parser.add_argument("--batch-size", nargs="+", type=int, default=[2, 8, 32, 64, 128, 512, 2048])
    parser.add_argument("--images", nargs="+", type=int, default=[5_000, 50_000])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, after each row")
    args = parser.parse_args()

    precision = str(utils.choose_precision("auto", args.device)).removeprefix("torch.")
    where = f"{name_of(args.device)}, {torch.get_num_threads()} threads, {precision}, torch {torch.__version__}"
    print(where)
    rows = []
    for images in args.images:
        for norm in args.norm:
            for batch_size in args.batch_size:
                rows.append(cost(norm, images, batch_size, args.device) | {"where": where})
                if args.csv:
                    utils.pd.DataFrame(rows).to_csv(args.csv, index=False)
            part = utils.pd.DataFrame(rows[-len(args.batch_size) :]).drop(columns="where")
            print("\n" + part.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
