"""How long one waits from `python` to the end of the tenth batch, all caches warm, beside `import torch` alone.

    CIFAR10_ROOT=folder python tests/benchmarks/first_batch.py [--data cifar10] [--rounds 3]

Each line of the table comes from fresh processes, which take all steps up to that one; the best of the rounds counts.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from arguments import positive  # noqa: E402
from training_speed import name_of  # noqa: E402

import model  # noqa: E402
import utils  # noqa: E402
from normkit.backend import choose_backend  # noqa: E402

STEPS = {
    "import torch": "import torch",
    "import utils": "import model, utils",
    "load the data": "data = utils.load_data('{data}')",
    "load the kernel": "from normkit.fused import fuse; fuse(model.Net())",
    "train ten batches": "utils.run('batch', data.first(640, 10), epochs=1, progress=False)",
}


def seconds_of(code):
    """Returns the seconds that a Python process takes to run the code."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["synthetic", "cifar10"], default="cifar10")
    parser.add_argument("--rounds", type=positive, default=3, help="processes for each number of steps (default 3)")
    args = parser.parse_args()

    data = utils.load_data(args.data)  # makes the data's cache where there is none, as the next line makes the kernel's
    backend = choose_backend("auto", model.Net())[1]
    print(f"{name_of(utils.get_device())}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{data.name}, {backend}\n")

    lines = [line.format(data=args.data) for line in STEPS.values()]
    codes = {name: "\n".join(lines[:count]) for count, name in enumerate(STEPS, 1)}
    rounds = [{name: seconds_of(code) for name, code in codes.items()} for _ in range(args.rounds)]
    table = pd.DataFrame({"seconds to its end": pd.DataFrame(rounds).min()})
    table["of them its own"] = table["seconds to its end"].diff()
    table["beyond import torch"] = table["seconds to its end"] - table["seconds to its end"]["import torch"]
    table["times import torch"] = table["seconds to its end"] / table["seconds to its end"]["import torch"]
    print(table.round(2).to_string(na_rep=""))


if __name__ == "__main__":
    main()
