"""S8.ipynb as a person meets it: JupyterLab and Notebook 7 in a browser, all cells run."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from helpers import PICTURES, notebook_on_few_images

from model import NORMS

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium")]

# Every cell is kept in the page, also out of sight, and nothing asks for attention.
SETTINGS = {
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}


@pytest.fixture
def folder(tmp_path):
    """The kit, its notebook without outputs and set to one epoch on few images."""
    import nbformat  # which takes a second

    for name in ("model.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "normkit", tmp_path / "normkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "results", tmp_path / "results")
    notebook = notebook_on_few_images(tmp_path / "images")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, tmp_path / "S8.ipynb")
    return tmp_path


PATHS = {"jupyterlab": "/lab/tree/S8.ipynb?reset", "notebook": "/notebooks/S8.ipynb"}


@pytest.fixture
def address(application, folder, tmp_path_factory):
    """The address of the notebook in a JupyterLab, and in a Notebook 7, that serves the folder."""
    home = tmp_path_factory.mktemp("jupyter")
    for name, text in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTER_CONFIG_DIR": str(home)}
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--IdentityProvider.token=", "--ip=127.0.0.1"]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", application, *options, f"--port={port}", f"--ServerApp.root_dir={folder}"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, (home / "log").read_text()
            try:
                requests.get(f"{address}/api", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield address + PATHS[application]
    finally:
        process.terminate()
        process.wait(30)


def take_screenshots(page, folder):
    folder.mkdir(exist_ok=True, parents=True)
    panel = page.locator(".jp-WindowedPanel-outer").first
    for number in range(panel.evaluate("panel => Math.ceil(panel.scrollHeight / 700)")):
        panel.evaluate("(panel, top) => panel.scrollTo(0, top)", 700 * number)
        page.wait_for_timeout(100)
        page.screenshot(path=folder / f"{number:02}.png")


@pytest.mark.parametrize("application, theme", [("jupyterlab", "Dark"), ("notebook", "Light")])
def test_all_cells_run_in_a_browser(application, theme, address, folder):
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(address, timeout=120_000)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
        kernel = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
        page.wait_for_function(kernel, timeout=120_000)
        page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_timeout(1000)

        assert page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']").count() == 0
        shown = page.locator(".jp-OutputArea-output img")
        loaded = [image.evaluate("image => image.complete && image.naturalWidth > 0") for image in shown.all()]
        if "SCREENSHOTS" in os.environ:
            take_screenshots(page, Path(os.environ["SCREENSHOTS"]) / f"{application}-{theme}")

    saved = json.loads((folder / "S8.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(loaded) == len(pictures) == PICTURES + len(NORMS) and all(loaded)
    assert "widgets" not in saved["metadata"]
