"""How close the fused kernel is to what this processor can do, layer by layer, in a minute.

    python tests/benchmarks/kernel_roofline.py [--batch-size 64] [--norm batch group] [--threads 2] [--precision P]

Measures the processor's peak (multiply-adds in registers) and bandwidths, and each layer's forward and backward
pass. The floor is the time that all multiply-adds, transforms and norms would take if vector units never waited:
two vector instructions a cycle, as the measured peak has them, and memory for nothing.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from arguments import positive, whole_blocks  # noqa: E402

from normkit.device import choose_precision  # noqa: E402
from normkit.fused.build import compile_command  # noqa: E402

PROGRAM = Path(__file__).parents[1] / "csrc" / "roofline.cpp"
GROUPS = {"batch": 0, "group": 4, "layer": 1}

# name, kind, C, K, pixels of the layer's input along a side
LAYERS = [
    ("C1", "im2col", 3, 16, 32),
    ("C2", "winograd", 16, 16, 32),
    ("c3", "1x1", 16, 8, 32),
    ("C3", "winograd", 8, 32, 16),
    ("C4", "winograd", 32, 32, 16),
    ("C5", "winograd", 32, 32, 16),
    ("c6", "1x1", 32, 16, 16),
    ("C7", "winograd", 16, 32, 8),
    ("C8", "winograd", 32, 32, 8),
    ("C9", "winograd", 32, 32, 8),
    ("C10", "linear", 32, 10, 8),
]

# Vector instructions: of the two-dimensional transforms of a tile, counted in csrc/winograd.h, and of a value's norm,
# ReLU and dropout, in csrc/conv_norm_relu.h and norm_relu.h.
INPUT_TRANSFORM, OUTPUT_TRANSFORM = 12 * 14, 10 * 13
OUTPUT_TRANSFORM_BACKWARD, INPUT_TRANSFORM_BACKWARD = 10 * 10, 12 * 15
NORM, NORM_BACKWARD = 3 + 3, 3 + 6 + 6


def count_work(kind, C, K, size, lanes):
    """Returns, for an image: multiply-adds forward and backward, and other vector instructions forward and backward."""
    pixels = size * size
    if kind == "linear":
        return C * K, 2 * C * K, pixels * C / lanes, pixels * C / lanes
    if kind == "1x1":
        return pixels * C * K, 2 * pixels * C * K, 0, 0
    norm, norm_backward = (pixels * K * each / lanes for each in (NORM, NORM_BACKWARD))
    if kind == "im2col":  # the images need no gradient
        return 9 * pixels * C * K, 9 * pixels * C * K, norm, norm_backward
    tiles, ins, outs = (size // 4) ** 2, -(-C // lanes), -(-K // lanes)
    products = 36 * tiles * C * K
    forward = tiles * (ins * INPUT_TRANSFORM + outs * OUTPUT_TRANSFORM)
    backward = tiles * (ins * (INPUT_TRANSFORM + INPUT_TRANSFORM_BACKWARD) + outs * OUTPUT_TRANSFORM_BACKWARD)
    return products, 2 * products, forward + norm, backward + norm_backward


def build(folder):
    """Compiles the program as the kernel is compiled; returns its path."""
    program = Path(folder) / "roofline"
    command = [*compile_command(), str(PROGRAM), "-o", str(program), "-lgomp"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return program


def measure(program, batch_size, groups, threads, precision):
    """Returns the program's values by the words before them, and of the layers forward and backward in ms."""
    command = [program, *map(str, (batch_size, groups, threads)), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the program stopped with status {done.returncode}:\n{done.stderr}")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    values = {tuple(words[:-1]): float(words[-1]) for words in lines if words[0] != "layer"}
    return values, {words[1]: [float(word) / 1e3 for word in words[2:]] for words in lines if words[0] == "layer"}


def tabulate(values, measured, limits, batch_size, threads, precision):
    """Returns the table of layers, and the time of a step with its floor in ms."""
    lanes = int(values["lanes",])
    instructions = limits["peak", "float32"] * 1e9 / 2 / lanes  # a second, of all threads
    bf16 = precision == "bfloat16" and ("peak", "bfloat16") in limits
    backward_instructions = limits["peak", "bfloat16"] * 1e9 / 2 / lanes if bf16 else instructions
    rows, floors = [], 0.0
    for name, kind, C, K, size in LAYERS:
        forward_products, backward_products, forward_others, backward_others = count_work(kind, C, K, size, lanes)
        there = 1e3 * batch_size * (forward_products / lanes + forward_others) / instructions
        narrow = backward_instructions if kind in ("im2col", "winograd") else instructions
        back = 1e3 * batch_size * (backward_products / lanes / narrow + backward_others / instructions)
        forward, backward = measured[name]
        row = {"layer": name, "forward ms": forward, "backward ms": backward}
        row |= {"GFLOP/s": 2e-6 * batch_size * (forward_products + backward_products) / (forward + backward)}
        row |= {"floor ms": there + back, "share of the floor %": 100 * (there + back) / (forward + backward)}
        for part in ("transforms", "products"):
            times = [values.get(("part", name, f"{way} {part}")) for way in ("forward", "backward")]
            if None not in times:  # measured in one thread
                row[f"{part} %"] = 100 * sum(times) / 1e3 / threads / (forward + backward)
        if "products %" in row:
            row["norm and rest %"] = max(0.0, 100 - row["transforms %"] - row["products %"])
        rows.append(row)
        floors += there + back
    return pd.DataFrame(rows), values["step",] / 1e3, floors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=whole_blocks, default=64)
    parser.add_argument("--norm", nargs="+", choices=GROUPS, default=["batch", "group"])
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    precision = args.precision or str(choose_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        program = build(folder)
        runs = {
            norm: measure(program, args.batch_size, GROUPS[norm], args.threads, precision)
            for norm in dict.fromkeys(args.norm)
        }
    # The processor does not slow down for one norm: where something else does it, what it reached in any run counts.
    limits = {}
    for values, _ in runs.values():
        for key, value in values.items():
            if key[0] in ("peak", "bandwidth"):
                limits[key] = max(value, limits.get(key, 0))
    print(f"{args.threads} threads, batch size {args.batch_size}, {precision}")
    for (kind, what), value in limits.items():
        print(f"{kind} {what}: {value} {'GFLOP/s' if kind == 'peak' else 'GB/s'}")
    for norm, (values, measured) in runs.items():
        table, step, floor = tabulate(values, measured, limits, args.batch_size, args.threads, precision)
        print(f"\n{norm} norm\n{table.to_string(index=False, na_rep='', float_format='{:.2f}'.format)}")
        print(f"the whole step: {step:.2f} ms, floor {floor:.2f} ms: {100 * floor / step:.0f} % of it")


if __name__ == "__main__":
    main()
