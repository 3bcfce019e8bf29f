"""The download against a server on the loopback address."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision import datasets

import utils
from normkit import cifar10


@pytest.fixture
def server(official, monkeypatch):
    """Serves the archive in good and bad ways; counts what was asked for."""
    archive, asked, over = official.archive.read_bytes(), [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            bodies = {
                "/good": archive,
                "/slow": archive,
                "/truncated": archive[: len(archive) // 2],
                "/stalled": archive[:1000],
                "/wrong": archive[:-1] + b"?",
                "/html": b"<html>please log in</html>",
            }
            body = bodies.get(self.path)
            self.send_response(200 if body else 404)
            self.send_header(
                "Content-Length", str(len(archive) if self.path in ("/truncated", "/stalled") else len(body or b""))
            )
            self.end_headers()
            step = len(archive) // 8 if self.path == "/slow" else len(archive)
            for start in range(0, len(body or b""), step):
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
                over.wait(0.2 if self.path == "/slow" else 0)
            if self.path == "/stalled":
                over.wait(10)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # seconds until it stops
    server.url, server.asked = f"http://127.0.0.1:{server.server_port}", asked
    monkeypatch.setattr(cifar10, "TIMEOUT", (1, 1))
    yield server
    over.set()
    server.shutdown()
    server.server_close()


def mirrors(monkeypatch, server, *paths):
    monkeypatch.setattr(cifar10, "MIRRORS", tuple(server.url + path for path in paths))


def leftovers(root):
    return sorted(path.name for path in root.iterdir())


def test_good(server, official, tmp_path, monkeypatch):
    mirrors(monkeypatch, server, "/good", "/404")
    data = utils.load_data("auto", tmp_path / "new" / "folder")
    assert data.name == "CIFAR-10" and data.train_labels.tolist() == official.labels["train"]
    assert server.asked == ["/good"]
    assert leftovers(tmp_path / "new" / "folder") == sorted(
        [datasets.CIFAR10.base_folder, cifar10.ARCHIVE, "normkit-cache.pt"]
    )
    utils.load_data("auto", tmp_path / "new" / "folder")
    assert server.asked == ["/good"]  # from then on it is on disk


def test_a_slow_mirror_is_waited_for(server, tmp_path, monkeypatch):
    mirrors(monkeypatch, server, "/slow")
    assert utils.load_data("auto", tmp_path).name == "CIFAR-10"  # longer in all than the timeout for the next bytes


def test_a_process_without_output_fetches_as_any(server, tmp_path, monkeypatch):
    mirrors(monkeypatch, server, "/good")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert utils.load_data("cifar10", tmp_path).name == "CIFAR-10"


@pytest.mark.parametrize("bad", ["/truncated", "/wrong", "/404", "/html", "/stalled"])
def test_a_bad_mirror_leaves_nothing_behind(server, tmp_path, monkeypatch, bad):
    mirrors(monkeypatch, server, bad)
    with pytest.raises(cifar10.DataUnavailable, match="By hand: put"):
        utils.load_data("cifar10", tmp_path)
    assert leftovers(tmp_path) == [] and server.asked == [bad]


@pytest.mark.parametrize("bad", ["/truncated", "/wrong", "/404", "/html", "/stalled"])
def test_the_next_mirror_takes_over(server, tmp_path, monkeypatch, bad):
    mirrors(monkeypatch, server, bad, "/good")
    assert utils.load_data("auto", tmp_path).name == "CIFAR-10"
    assert server.asked == [bad, "/good"]


def test_a_dead_host_is_passed_over(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MIRRORS", ("http://127.0.0.1:9/nobody", f"{server.url}/good"))
    assert utils.load_data("auto", tmp_path).name == "CIFAR-10"


@pytest.mark.parametrize("around", ["{}", "{} \r\n", "'{}'"])  # as a file of settings may leave it
def test_the_users_mirror_comes_first(server, tmp_path, monkeypatch, around):
    mirrors(monkeypatch, server, "/404")
    monkeypatch.setenv("CIFAR10_URL", around.format(f"{server.url}/good"))
    assert utils.load_data("auto", tmp_path).name == "CIFAR-10"
    assert server.asked == ["/good"]


def test_auto_says_why_it_goes_on_without(server, tmp_path, monkeypatch, capsys):
    mirrors(monkeypatch, server, "/404", "/wrong")
    assert utils.load_data("auto", tmp_path).synthetic
    notice = capsys.readouterr().out
    assert "THIS IS NOT CIFAR-10" in notice
    assert f"{server.url}/404" in notice and f"{server.url}/wrong" in notice and "CIFAR10_URL" in notice


def test_an_interrupted_unpacking_is_not_taken_for_good(official, tmp_path, monkeypatch):
    (tmp_path / cifar10.ARCHIVE).write_bytes(official.archive.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(cifar10.os, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            utils.load_data("auto", tmp_path)
    assert leftovers(tmp_path) == [cifar10.ARCHIVE]
    assert utils.load_data("auto", tmp_path).name == "CIFAR-10"


def test_two_at_once(server, official, tmp_path, monkeypatch):
    mirrors(monkeypatch, server, "/good")
    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(lambda _: utils.load_data("cifar10", tmp_path), range(4)):
            assert data.train_labels.tolist() == official.labels["train"]
    assert leftovers(tmp_path) == sorted([datasets.CIFAR10.base_folder, cifar10.ARCHIVE, "normkit-cache.pt"])


TWO_PROCESSES = """
import json, sys
sys.path.insert(0, {code!r})
import utils
from normkit import cifar10
from torchvision import datasets
sha256, train, test, meta, url = json.loads({settings!r})
cifar10.ARCHIVE_SHA256, cifar10.MIRRORS = sha256, (url,)
datasets.CIFAR10.train_list, datasets.CIFAR10.test_list, datasets.CIFAR10.meta = train, test, meta
print("ready", flush=True)
sys.stdin.readline()
print("labels", utils.load_data("cifar10", {root!r}).train_labels.tolist())
"""


@pytest.mark.slow
def test_two_processes_at_once(server, official, tmp_path):
    files, root = datasets.CIFAR10, tmp_path / "root"
    settings = [cifar10.ARCHIVE_SHA256, files.train_list, files.test_list, files.meta, f"{server.url}/slow"]
    code = str(Path(utils.__file__).parent)
    script = TWO_PROCESSES.format(code=code, settings=json.dumps(settings), root=str(root))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        output, errors = process.communicate(timeout=60)
        assert f"labels {official.labels['train']}" in output, errors
    assert leftovers(root) == sorted([files.base_folder, cifar10.ARCHIVE, "normkit-cache.pt"])


def test_a_full_disk_is_said(server, tmp_path, monkeypatch, capsys):
    mirrors(monkeypatch, server, "/good")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cifar10.pooch.core.shutil, "move", full)
    with pytest.raises(cifar10.DataUnavailable):
        utils.load_data("cifar10", tmp_path)
    assert "No space left" in capsys.readouterr().out and leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["path", "link"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, monkeypatch, kind):
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / cifar10.ARCHIVE, "w:gz") as tar:
        member = tarfile.TarInfo("../evil" if kind == "path" else "cifar-10-batches-py/link")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "../../../evil"
        tar.addfile(member, io.BytesIO())
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256((root / cifar10.ARCHIVE).read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="cannot be unpacked"):
        utils.load_data("cifar10", root)
    assert leftovers(root) == [cifar10.ARCHIVE] and leftovers(tmp_path) == ["root"]
