"""The house keeps its shape: which file may import which, how long files are, what utils offers."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

import utils

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "model.py", ROOT / "utils.py", *sorted((ROOT / "normkit").rglob("*.py"))]
# Slow to import, so only where they are used.
LATE = {"matplotlib.font_manager", "normkit.figure", "normkit.gpu.kernels", "normkit.muon"}
LATE |= {"scipy", "torchvision"}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def imports_of(path):
    """Yields (module, whether it is at the top of the file) for each import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        at_top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else node.module), at_top


ARROWS = {name_of(path): {module for module, _ in imports_of(path) if module in MODULES} for path in FILES}


def test_no_circle():
    list(TopologicalSorter(ARROWS).static_order())


def test_the_network_stands_on_torch_alone():
    assert {module.split(".")[0] for module, _ in imports_of(ROOT / "model.py")} == {"torch"}


def test_nothing_below_imports_what_is_above():
    assert {name for name, targets in ARROWS.items() if "utils" in targets} == {"normkit.study"}
    assert {name for name, targets in ARROWS.items() if "model" in targets} == {
        "utils",
        "normkit.study",
        "normkit.network",
        "normkit.fused.legality",
    }
    for name in ("normkit.plots", "normkit.anatomy", "normkit.tables"):
        below = ("style", "text", "tables", "checks", "predictions", "copies")
        assert ARROWS[name] <= {f"normkit.{each}" for each in below}
    assert ARROWS["normkit.copies"] == set()
    for name, targets in ARROWS.items():
        if name.startswith("normkit.fused"):
            assert all(target == "model" or target.startswith("normkit.fused") for target in targets)
    assert ARROWS["normkit.checkpoint"] == {"normkit.files"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_stand_at_the_top(path):
    assert {module for module, at_top in imports_of(path) if not at_top} <= LATE


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("results/*.py")], ids=str)
def test_files_are_short(path):
    limits = {"model.py": 160, "utils.py": 500}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limits.get(path.name, 450)


def test_the_package_opens_with_its_map():
    text = (ROOT / "normkit" / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(tree.body) == 1 and ast.get_docstring(tree)
    for path in (ROOT / "normkit").iterdir():
        if not path.name.startswith("__"):
            assert re.search(rf"^{path.stem}\s", text, re.M), path.name


def test_utils_offers_what_is_promised():
    promised = "get_device seed_everything load_data get_loaders train test fit run plot_curves results_table".split()
    own = {name for name, value in vars(utils).items() if getattr(value, "__module__", None) == "utils"}
    source = (ROOT / "utils.py").read_text(encoding="utf-8")
    for name in promised:
        assert callable(getattr(utils, name))
    for name in re.findall(r"import (.*)  # noqa: F401", source):  # imported to be offered, and for nothing else
        assert set(name.split(", ")) - {"MEAN", "STD"} <= set(promised) - own


def test_the_struct_is_declared_alike_in_both_languages():
    """Field by field; its size is checked when the library is loaded."""
    from normkit.fused.params import LayerParams

    header = (ROOT / "normkit/fused/csrc/layer_params.h").read_text(encoding="utf-8")
    body = header[header.index("struct LayerParams {") :].split("{", 1)[1]
    body = re.sub(r"//.*", "", body[: body.index("int64_t weight_index")])
    body = re.sub(r"union \{.*?\};", "void *saved;", body, flags=re.S)
    names = re.findall(r"(\w+)\s*[,;]", body)
    assert names == [name for name, _ in LayerParams._fields_]


def test_nothing_speaks_of_an_owner_or_of_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".h", ".cpp", ".yml", ".yaml", ".toml", ".txt") and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "OWNER/" + "REPOSITORY" not in text and not re.search(r"/(root|home/[a-z]+)/", text), name


def test_the_workflow_runs_the_readmes_command():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert len(matrix["python"]) == 2
