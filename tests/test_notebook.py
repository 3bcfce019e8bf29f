import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PICTURES, notebook_on_few_images

import model
import utils
from normkit import cifar10

ROOT = Path(__file__).parent.parent


@pytest.fixture
def notebook():
    import nbformat  # which takes a second, as do papermill and nbconvert: not in each process of tests

    return nbformat.read(ROOT / "S8.ipynb", as_version=4)


def outputs(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if kind in output.get("data", {})]


def test_runs_from_start_to_end(tmp_path):
    import nbformat
    import papermill

    nbformat.write(notebook_on_few_images(tmp_path / "images"), tmp_path / "S8.ipynb")
    options = {"cwd": ROOT, "progress_bar": False, "shutdown_kernel": "immediate"}
    options |= {"request_save_on_cell_execute": False, "autosave_cell_every": 0}  # else it is written 100 times
    done = papermill.execute_notebook(tmp_path / "S8.ipynb", tmp_path / "run.ipynb", **options)
    norms = len(model.NORMS)  # one more has one more gallery of mistakes
    pictures = outputs(done, "image/png")
    assert len(pictures) == PICTURES + norms and len(outputs(done, "text/html")) == 6
    assert all(picture.metadata["image/png"]["alt"] for picture in pictures)  # for who cannot see them
    text = "".join(output.text for cell in done.cells for output in cell.get("outputs", []) if "text" in output)
    assert text.count("Epoch 1") == text.count("Test set: Average loss") == norms + 2  # and two of one's own
    assert text.count("Nothing filled in yet.") == 7


@pytest.mark.parametrize(
    "line, error, message",
    [
        ("EPOCHS = 21", ValueError, "the assignment allows 20"),
        ("NUM_GROUPS = 3", ValueError, "num_groups=3: choose 1, 2, 4, 8, 16 or 'channels'"),
        ("CHECKPOINTS = True", TypeError, "CHECKPOINTS is True: expected a folder, as text or Path"),
    ],
)
def test_what_a_parameter_cannot_be_stops_it_at_once(notebook, line, error, message):
    """In the first cell after that of the parameters, before the data is looked for."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    start = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    namespace = {"utils": utils}
    exec(f"{code[start].source}\n{line}", namespace)
    with pytest.raises(error, match=message):
        exec(code[start + 1].source, namespace)
    assert "data" not in namespace


def test_one_parameters_cell(notebook):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = set(re.findall(r"[A-Z_]+", " ".join(re.findall(r"^([A-Z_, ]+) =", tagged[0].source, re.M))))
    assert names >= set(
        "EPOCHS BATCH_SIZE LR MOMENTUM STEP_SIZE GAMMA DROPOUT NUM_GROUPS SEED DATA DATA_ROOT CHECKPOINTS".split()
    )


def test_committed_with_the_outputs_of_a_whole_real_run(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "widgets" not in notebook.metadata
    assert not any("execution" in cell.metadata for cell in code)  # timing
    assert [cell.metadata.get("scrolled") for cell in code if "results.append(result)" in cell.source] == [True]
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    text = "".join(output.text for cell in code for output in cell.outputs if "text" in output)
    assert len(re.findall(r"^Epoch 20$", text, re.M)) == 3 and "synthetic" not in text and "\r" not in text
    assert "/tmp" not in text and "/home" not in text and "/root" not in text
    assert (ROOT / "S8.ipynb").stat().st_size < 3_000_000


def test_cells_and_text_are_short(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code[0].source.splitlines()) <= 5
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    assert all(len(cell.source.splitlines()) <= 15 for cell in code if cell is not parameters)
    lines = [line for line in parameters.source.splitlines() if line[0] != "#"]
    assert all(re.match(r"[A-Z_]+ = ", line) for line in lines)  # one each, as papermill reads them
    assert all(len(line) <= 115 for cell in code for line in cell.source.splitlines())
    text = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    words = re.sub(r"```.*?```|^#+ ", "", text, flags=re.S | re.M).split()  # without the code of the answers
    assert len(words) <= 1850


def test_the_readmes_code(tmp_path, monkeypatch, data, capsys):
    """All of it, one block after the other, as in one notebook."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "MIRRORS", ("http://127.0.0.1:9/none",))
    monkeypatch.setattr(cifar10, "make_synthetic", lambda: data)
    monkeypatch.setattr(model, "NORMS", dict(model.NORMS))
    namespace = {}
    for block in blocks:
        assert len(block.strip().splitlines()) <= 10
        exec(block, namespace)
    assert len(blocks) == 3 and namespace["logits"].shape == (64, 10)
    assert sum(p.numel() for p in model.Net("instance").parameters()) == 48_178


def test_nbconvert_knows_its_language(notebook):
    from nbconvert import ScriptExporter

    _, resources = ScriptExporter().from_notebook_node(notebook)
    assert resources["output_extension"] == ".py"


@pytest.mark.slow
def test_runs_as_a_script(tmp_path):
    """As nbconvert writes it; pictures that are a cell's last line are lost, and nothing else."""
    from nbconvert import PythonExporter

    source, _ = PythonExporter().from_notebook_node(notebook_on_few_images(tmp_path / "images"))
    (tmp_path / "S8.py").write_text(source, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, tmp_path / "S8.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Test set: Average loss") == len(model.NORMS) + 2
