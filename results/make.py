"""Runs S8.ipynb from start to end, in place, and saves its histories and curves beside this script.

CIFAR10_ROOT=folder python results/make.py
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def main():
    path = ROOT / "S8.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,  # keeps the last state of each progress bar
        resources={"metadata": {"path": ROOT}},
        on_cell_start=lambda cell, cell_index: print(cell.source.splitlines()[0], flush=True),
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        nbformat.write(notebook, path)
        # One more cell, of the same kernel and not of the notebook.
        notebook.cells.append(nbformat.v4.new_code_cell('utils.save_results(results, "results")'))
        client.execute_cell(notebook.cells[-1], index + 1)


if __name__ == "__main__":
    main()
