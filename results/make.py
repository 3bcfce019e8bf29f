"""Makes what lies beside this script: measured histories (CSV) and the pictures that the README shows.

CIFAR10_ROOT=folder python results/make.py NAME ...    (--help lists the names)

A study of many runs goes on where it was stopped; once complete it takes no time. --processes 2: two runs at a time.
"why" takes some minutes: it measures networks in their first epoch. "notebook" runs S8.ipynb from start to end, in
place, and saves its histories and pictures.
"""

import argparse
import base64
import io
import itertools
import os
import sys
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for worker processes

import model  # noqa: E402
import utils  # noqa: E402
from normkit import plots, probes, tables  # noqa: E402
from normkit.data import train_val_split  # noqa: E402
from normkit.norms import MORE_NORMS  # noqa: E402
from normkit.study import grid, run_many  # noqa: E402

NORMS = list(model.NORMS)
model.NORMS.update(MORE_NORMS)

# Of the best recipe, when the trials began.
START = utils.get_recipe("best", lr=0.02, weight_decay=0.0, adamw_lr=0.003)


def trials(data):
    """What was tried for the best recipe, on training images held out: ten epochs and one seed, then the whole length.

    Of the runs of twenty epochs the file holds only the last epoch.
    """
    muon = START
    sgd = muon.replace(optimizer="sgd", lr=0.2, momentum=0.9, weight_decay=5e-4)
    small_batches = sgd.replace(batch_size=64, lr=0.1, weight_decay=1e-4)
    tried = [
        ("batch", sgd),
        ("batch", sgd.replace(weight_decay=1e-4)),
        ("batch", muon),
        ("batch", muon.replace(lr=0.01)),
        ("batch", muon.replace(lr=0.05)),
        ("batch", muon.replace(momentum=0.9)),
        ("batch", muon.replace(weight_decay=0.1)),
        ("batch", muon.replace(adamw_lr=0.01)),
        ("batch", muon.replace(batch_size=256)),
        ("batch", muon.replace(batch_size=256, lr=0.04)),
        ("batch", muon.replace(batch_size=512, lr=0.04)),
        ("batch", muon.replace(dropout=0.01)),
        ("batch", muon.replace(augment=False)),
        ("group", sgd.replace(lr=0.1)),
        ("group", muon),
        ("layer", sgd),
        ("layer", sgd.replace(lr=0.1)),
        ("layer", sgd.replace(lr=0.05, weight_decay=1e-4)),
        ("layer", small_batches),
        ("layer", small_batches.replace(lr=0.2)),
        ("layer", muon),
        ("layer", muon.replace(lr=0.05)),
    ]
    fast = muon.replace(lr=0.05)
    whole_length = [
        (muon, (0, 1)),
        (muon.replace(adamw_lr=0.01), (0,)),
        (muon.replace(lr=0.1), (0,)),
        (fast, (0, 1)),
        (fast.replace(batch_size=64), (0,)),
        (fast.replace(weight_decay=0.1), (0,)),
        (fast.replace(adamw_lr=0.03), (0,)),
        (fast.replace(adamw_lr=0.01), (0, 1)),
        (fast.replace(adamw_lr=0.01, weight_decay=0.03), (0, 1)),
    ]
    runs = [{"norm": norm, "epochs": 10, "recipe": recipe} for norm, recipe in tried]
    runs += [{"norm": "batch", "seed": seed, "recipe": recipe} for recipe, seeds in whole_length for seed in seeds]
    return runs, train_val_split(data)


def seeds(data):
    """The headline: both recipes, ten seeds."""
    return grid(recipe=["classic", "best"], seed=range(10), norm=NORMS), data


def bfloat16(data, precision="bfloat16"):
    """What bfloat16 costs in accuracy: the classic recipe in it, and once more in float32, for three seeds."""
    return grid(seed=range(3), norm=NORMS, precision=precision), data


def float32(data):
    return bfloat16(data, "float32")


def at_batch_size(size, power):
    """Returns the settings of the best recipe at a batch size, its rates in proportion to a power of it."""
    best = utils.get_recipe("best")
    factor = (size / best.batch_size) ** power
    rates = {name: float(f"{getattr(best, name) * factor:.4g}") for name in ("lr", "adamw_lr")}
    return {"recipe": "best", "batch_size": size} | rates


def batch_rates(data):
    """How should the best recipe's rates follow the batch size? Three epochs, on training images held out."""
    scaled = [at_batch_size(size, power) for size in (512, 8) for power in (0, 0.5, 1)]
    return [run | settings for settings in scaled for run in grid(norm=NORMS, epochs=3)], train_val_split(data)


def trials_by_norm(data):
    """Trials for each norm by itself, of the whole length, on training images held out: warm-up, rates, batch size."""
    best = {"recipe": "best", "epochs": 20}
    higher = {"warmup": 0.05, "lr": 0.1, "adamw_lr": 0.03}
    tried = [{"warmup": 0.05}, {}, {"warmup": 0.05} | at_batch_size(64, 0.5), higher]
    runs = [run | best | changes for seed in (0, 1) for changes in tried for run in grid(seed=seed, norm=NORMS)]
    return runs, train_val_split(data)


def batch_sizes(data):
    """Wu and He's question: the best recipe in ten epochs, its rates with the square root of the batch size."""
    scaled = [at_batch_size(size, 0.5) for size in (512, 128, 64, 32, 16, 8, 4, 2)]
    return [run | settings for settings in scaled for run in grid(seed=range(3), norm=NORMS, epochs=10)], data


def groups(data):
    """Group norm from one group (layer norm) to one channel a group (instance norm)."""
    runs = grid(norm="group", recipe=[START], epochs=8, seed=range(3), num_groups=[1, 2, 4, 8, 16, "channels"])
    return runs, data.first(5000)


def learning_rates(data):
    """Does the classic recipe's gap come from its learning rate? A miniature of it, and a network without a norm.

    Four epochs, the last of them at a tenth of the rate; all else as in the classic recipe.
    """
    rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    return grid(seed=range(3), norm=[*NORMS, "none"], lr=rates, epochs=4, step_size=3), data


def league(data):
    """Eight norms, and none, in four epochs of both recipes; classic lowers its rate before the last one."""
    recipes = {"recipe": "classic", "step_size": 3}, {"recipe": "best"}
    runs = grid(seed=range(3), norm=[*NORMS, *MORE_NORMS], epochs=4)
    return [run | recipe for run in runs for recipe in recipes], data


STUDIES = (
    trials, trials_by_norm, seeds, bfloat16, float32, batch_rates, batch_sizes, groups,
    learning_rates, league
)  # fmt: skip
STUDIES = {study.__name__: study for study in STUDIES}
PICTURES = "seeds", "batch_sizes", "groups", "learning_rates", "league"
PICTURES = {study: getattr(plots, f"plot_{study}") for study in PICTURES}


def why(data, batches=34, rates=(0.05, 0.1, 0.2, 0.4)):
    """What each norm, and none, changes in the first epoch of the classic recipe, measured every so many batches.

    The rates of the steps along which the loss is measured are 0.5 to 4 times lr / (1 - momentum), as far as momentum
    carries a gradient of the recipe's.
    """
    rows = []
    for seed, norm in itertools.product(range(3), [*NORMS, "none"]):
        utils.seed_everything(seed)
        net, recipe = model.Net(norm), utils.get_recipe("classic")
        optimizer = utils.build_optimizer(net, recipe)
        loader, _ = utils.get_loaders(data, recipe.batch_size, device="cpu", seed=seed)
        others, _ = utils.get_loaders(data, 256, device="cpu", seed=seed + 1)
        images, labels = next(iter(others))
        epoch = list(loader)
        for step in range(0, len(epoch) + 1, batches):
            measured = probes.measure(net, images, labels, rates)
            rows += [{"norm": norm, "seed": seed, "step": step} | row for row in measured]
            if step < len(epoch):
                utils.train(net, epoch[step : step + batches], optimizer, progress=False)
        print(f"{norm}, seed {seed}: measured", flush=True)
    rows = pd.DataFrame(rows).assign(data=data.name)
    ends = rows["step"].isin([0, rows["step"].max()])
    return rows[ends | (rows["quantity"] == "loss")]


def compare_precisions(folder):
    """Last-epoch test accuracies of the runs that were made in both precisions, and how much higher bfloat16's are."""
    both = pd.concat([pd.read_csv(folder / f"{name}.csv") for name in ("bfloat16", "float32")])
    last = both[both["epoch"] == both["epoch"].max()]
    table = last.pivot(index=["norm", "seed"], columns="precision", values="test_acc").dropna()
    return table.assign(difference=table["bfloat16"] - table["float32"]).round(2)


# One more cell after the notebook's, of the same kernel. Results of the stand-in get names that say so.
SAVE = """
prefix = "results/synthetic-" if data.synthetic else "results/"
tables.histories_table(results).to_csv(prefix + "histories.csv", index=False, float_format="%.6g")
plots.plot_curves(results).savefig(prefix + "curves.png", dpi=110)
anatomy.plot_norm_sets(layers).savefig("results/norms.png")
"""


def pack_picture(data):
    """Makes the PNG of an output as small as it can be without loss."""
    if "image/png" in data:
        picture, packed = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))), io.BytesIO()
        if picture.mode == "RGBA" and picture.getextrema()[3] == (255, 255):
            picture = picture.convert("RGB")
        picture.save(packed, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(packed.getvalue()).decode()


def run_notebook():
    path = ROOT / "S8.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # keeps the last state of each progress bar
        resources={"metadata": {"path": ROOT}},
        on_cell_start=lambda cell, cell_index: print(cell.source.splitlines()[0], flush=True),
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            cell.metadata.pop("execution", None)
            client.execute_cell(cell, index)
            for output in cell.get("outputs", []):
                pack_picture(output.get("data", {}))
        nbformat.write(notebook, path)
        notebook.cells.append(nbformat.v4.new_code_cell(SAVE))
        client.execute_cell(notebook.cells[-1], index + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*STUDIES, "why", "notebook"])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, on a CPU one for each core")
    arguments = parser.parse_args()
    folder = ROOT / "results"
    studies = [name for name in arguments.what if name in STUDIES]
    data = utils.load_data("cifar10", ROOT / "data") if studies or "why" in arguments.what else None
    for name in studies:
        runs, images = STUDIES[name](data)
        rows = run_many(runs, images, folder / f"{name}.csv", arguments.processes, keep_diverged=True)
        if name in PICTURES:
            PICTURES[name](rows).savefig(folder / f"{name}.png", dpi=110)
        if name in ("trials", "trials_by_norm"):
            print(tables.trials_table(rows).to_string())
        if name == "float32":
            compare_precisions(folder).to_csv(folder / "precision.csv")
    if "why" in arguments.what:
        why(data).to_csv(folder / "why.csv", index=False, float_format="%.5g")
    if "notebook" in arguments.what:
        run_notebook()


if __name__ == "__main__":
    main()
