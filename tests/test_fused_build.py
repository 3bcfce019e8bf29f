"""The kernel is built once a machine, into a cache that nobody else can write; or one line says why not."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import model
import utils
from normkit.environment import check_setup
from normkit.fused import build, fuse

ROOT = Path(__file__).parents[1]
COMPILER = pytest.mark.skipif(build.library().reason is not None, reason=f"no kernel: {build.library().reason}")
IMAGES = torch.randn(2, 3, 8, 8)
WORDS = f"env LANG=C {os.environ.get('CXX') or 'c++'}"  # a compiler of several


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has not asked for the kernel yet."""
    monkeypatch.setattr(build.platformdirs, "user_cache_dir", lambda *args, **how: str(tmp_path / "cache" / "normkit"))
    build.library.cache_clear()
    yield tmp_path / "cache" / "normkit"
    build.library.cache_clear()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A library that was really compiled, by a compiler of several words, but in haste."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", WORDS)
        return build.compile_into([*build.compile_command(), "-O0"], tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def compilations(monkeypatch, compiled):
    """The folders that were compiled into; what each would cost in time is saved by a copy of one library."""
    done = []

    def compile_into(command, folder):
        done.append(folder)
        return Path(shutil.copy(compiled, folder / "kernel.so"))

    monkeypatch.setattr(build, "compile_into", compile_into)
    return done


def ask_again():
    build.library.cache_clear()
    return build.library()


@COMPILER
def test_built_once_into_a_private_folder(cache, compilations):
    first = build.library()
    assert first.reason is None and Path(first.path).parent == cache and len(compilations) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and [str(path) for path in cache.iterdir()] == [first.path]
    assert not stat.S_IMODE(Path(first.path).stat().st_mode) & 0o077
    assert ask_again().path == first.path and len(compilations) == 1
    fused = fuse(model.Net())
    fused(IMAGES)
    assert fused.reason is None


@COMPILER
@pytest.mark.parametrize("change", ["sources", "flags", "compiler"])
def test_what_it_is_made_of_is_in_its_key(cache, compilations, monkeypatch, tmp_path, change):
    first = build.library()
    if change == "sources":
        sources = shutil.copytree(build.SOURCES, tmp_path / "csrc")
        with open(sources / "vec.h", "a") as file:
            file.write("// changed\n")
        monkeypatch.setattr(build, "SOURCES", sources)
    elif change == "flags":
        monkeypatch.setattr(build, "COMPILE", [*build.COMPILE, "-DCHANGED"])
    else:
        monkeypatch.setenv("CXX", "c++ -DANOTHER")
    second = ask_again()
    assert second.path != first.path and second.reason is None and len(compilations) == 2


@COMPILER
@pytest.mark.parametrize("damage", ["cut off", "empty", "another library"])
def test_a_damaged_library_is_built_anew(cache, compiled, compilations, damage):
    cache.mkdir(mode=0o700, parents=True)
    content = compiled.read_bytes()
    key = build.cache_key(build.compile_command())
    file = cache / f"kernel-{key}-{build.digest(content)}.so"
    if damage == "another library":  # whole, but of another version
        source = cache.parent / "another.cpp"
        source.write_text('extern "C" long layer_params_size() { return 8; }')
        subprocess.run(["c++", "-shared", "-fPIC", source, "-o", file], check=True)
        file = file.rename(cache / f"kernel-{key}-{build.digest(file.read_bytes())}.so")
    else:
        file.write_bytes(content[:5000] if damage == "cut off" else b"")
    file.chmod(0o700)
    found = build.library()
    assert len(compilations) == 1 and found.reason is None
    assert Path(found.path).read_bytes() == content and fuse(model.Net()).reason is None


@COMPILER
@pytest.mark.parametrize("who", ["group", "others", "link", "another user"])
def test_a_library_that_others_could_write_is_not_loaded(cache, compilations, monkeypatch, who):
    file = Path(build.library().path)
    if who == "link":
        shutil.move(file, cache.parent / "elsewhere.so")
        file.symlink_to(cache.parent / "elsewhere.so")
    elif who == "another user":
        os.chown(file, 12345, -1) if os.geteuid() == 0 else pytest.skip("only root gives files away")
    else:
        file.chmod(0o720 if who == "group" else 0o702)
    loaded, load = [], build.load
    monkeypatch.setattr(build, "load", lambda path: loaded.append(build.is_private(path)) or load(path))
    again = ask_again()
    assert loaded == [True] and len(compilations) == 2 and again.reason is None
    assert build.is_private(file)  # replaced by one's own


@COMPILER
@pytest.mark.parametrize("case", ["others can write", "read-only", "a file in its place", "no home", "no user", "full"])
def test_where_no_cache_can_be_kept_this_process_has_a_kernel_of_its_own(cache, compilations, monkeypatch, case):
    cache.parent.mkdir()
    if case == "others can write":
        cache.mkdir()
        cache.chmod(0o777)
    elif case == "a file in its place":
        cache.write_text("")
    elif case == "full":
        compile_into = build.compile_into

        def refuse(command, folder):
            if cache in folder.parents:
                raise build.BuildError("No space left on device")
            return compile_into(command, folder)

        monkeypatch.setattr(build, "compile_into", refuse)
    elif case == "read-only":
        monkeypatch.setattr(build.Path, "mkdir", lambda *args, **how: (_ for _ in ()).throw(OSError(30, "Read-only")))
    elif case == "no home":
        monkeypatch.setattr(build.platformdirs, "user_cache_dir", lambda *args, **how: "~/.cache/normkit")
    else:

        def refuse(*args, **how):
            raise RuntimeError("could not determine the home directory")

        monkeypatch.setattr(build.platformdirs, "user_cache_dir", refuse)
    found = build.library()
    assert found.reason is None and found.path.startswith("a temporary folder (")
    fused = fuse(model.Net())
    fused(IMAGES)
    assert fused.reason is None


@pytest.mark.parametrize("place", ["nowhere", "kit.zip/normkit/fused/csrc"])
def test_where_the_sources_cannot_be_read_the_modules_run(cache, monkeypatch, tmp_path, place):
    (tmp_path / "kit.zip").write_bytes(b"")
    monkeypatch.setattr(build, "SOURCES", tmp_path / place)
    fused = fuse(model.Net())
    fused(IMAGES)
    assert "the kernel's sources cannot be read: " in fused.reason and place in fused.reason


@COMPILER
def test_the_compiler_may_be_several_words(cache, compilations, monkeypatch):
    monkeypatch.setenv("CXX", WORDS)  # by which the library that is copied here was really compiled
    assert build.library().reason is None and len(compilations) == 1


@COMPILER
def test_flags_of_the_users_change_no_result(tmp_path):
    """In a process of its own, as such a library might end it, or change the arithmetic of all of it."""
    program = """
import numpy, torch, model
from normkit.fused import build, fuse
build.COMPILE.append("-Og")  # a third of the time; -ffast-math would take NaN for impossible there, too
fused, images = fuse(model.Net("group").eval()), torch.ones(2, 3, 8, 8)
images[0, 0, 0, 0] = float("nan")
print(fused.reason, fused(images).isnan().any(1).tolist(), numpy.float32(1e-40) * numpy.float32(1) > 0)
"""
    flags = "-ffast-math -Ofast -fsanitize=address"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "CXX": f"c++ {flags}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["None [True, False] True"], done.stderr


BROKEN = {
    "no-such-compiler": "the environment variable CXX names no C++ compiler that is there: 'no-such-compiler'",
    "false": "false failed to build the kernel",
    "'unbalanced": "CXX",
    " ": "the environment variable CXX names no C++ compiler that is there: ' '",
}


@pytest.mark.parametrize("compiler", BROKEN)
def test_without_a_compiler_the_modules_run_and_one_line_says_why(cache, monkeypatch, data, capsys, compiler):
    monkeypatch.setenv("CXX", compiler)
    fused = fuse(model.Net("group"))
    assert BROKEN[compiler] in fused.reason
    assert fused(IMAGES).shape == (2, 10)
    history = utils.run("group", data, 1, 110, device="cpu").history
    said = capsys.readouterr().out
    assert len(history) == 1
    assert [line for line in said.splitlines() if BROKEN[compiler] in line][0].startswith("Backend: eager: PyTorch's")
    with pytest.raises(ValueError, match="backend='fused' cannot be had.*Choose 'auto' or 'eager'"):
        utils.run("group", data, 1, 110, device="cpu", backend="fused", progress=False)
    check_setup()
    assert BROKEN[compiler] in capsys.readouterr().out


@pytest.mark.parametrize("compiler", [None, ""])
def test_where_cxx_names_none_the_command_that_installs_a_compiler_is_named(cache, monkeypatch, compiler):
    monkeypatch.setenv("CXX", "")
    if compiler is None:
        monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dnf" if name == "dnf" else None)
    assert build.library().reason == "no C++ compiler: 'c++' is not there; sudo dnf install gcc-c++"


def test_a_compiler_that_gives_no_answer_is_not_waited_for(cache, monkeypatch):
    monkeypatch.setenv("CXX", "sh -c 'exec sleep 60'")
    monkeypatch.setattr(build, "ASKING", 0.1)
    assert build.library().reason == "sh was not done after 0.1 seconds: CXX may name another compiler"


@COMPILER
def test_a_failed_build_quotes_the_compiler(cache, monkeypatch, tmp_path):
    sources = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    (sources / "network.h").write_text("this is no C++\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    reason = build.library().reason
    assert "failed to build the kernel" in reason and "network.h:1:" in reason


@COMPILER
def test_a_library_of_another_struct_is_refused(cache, compilations, monkeypatch):
    class Other(build.LayerParams):
        _fields_ = [("further", build.ctypes.c_int64)]

    monkeypatch.setattr(build, "LayerParams", Other)
    assert "LayerParams is not the one of params.py" in build.library().reason


def test_other_platforms_are_told_apart(cache, monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Windows")
    monkeypatch.setattr(build.platform, "machine", lambda: "AMD64")
    assert "no fused kernel for Windows AMD64" in build.library().reason
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    monkeypatch.setenv("CXX", shlex.quote(sys.executable))
    assert build.compile_command()[-1] == "-mcpu=apple-m1" and "dynamic_lookup" in build.LINK["Darwin"]


RUNTIME = next(Path(torch.__file__).with_name("lib").glob("libgomp.so.1"), None)
START = f"""
import ctypes, sys, types
sys.path.insert(0, {str(ROOT)!r})
package = sys.modules["normkit.fused"] = types.ModuleType("normkit.fused")  # in place of one that imports torch
package.__path__ = [{str(ROOT)!r} + "/normkit/fused"]
from normkit.fused import build
{"import torch" if RUNTIME is None else f"ctypes.CDLL({str(RUNTIME)!r})"}
"""


@COMPILER
@pytest.mark.slow
def test_five_processes_at_once_build_it_harmlessly_and_the_next_has_it_at_once(tmp_path):
    hasty = tmp_path / "hasty-c++"
    hasty.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    hasty.chmod(0o700)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "CXX": str(hasty)}
    command = [sys.executable, "-c", START + "print(build.library())"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for _ in range(5)]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, answers
    (place,) = {re.search("reason=None, path='(.*)'", out)[1] for out, _ in answers}
    assert list(Path(place).parent.iterdir()) == [Path(place)]
    before = time.time()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert place in again.stdout and Path(place).stat().st_mtime < before  # not built again


@COMPILER
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_kernel_allocates_nothing(compiled):
    """So it cannot run out of memory half-way: all of it comes from PyTorch, before a pass."""
    done = subprocess.run(["nm", "-D", "--undefined-only", compiled], capture_output=True, text=True, check=True)
    assert "GOMP_parallel" in done.stdout
    assert not re.search(r"\b(malloc|calloc|realloc|posix_memalign|aligned_alloc|_Zn\w+)\b", done.stdout)


@COMPILER
@pytest.mark.skipif(RUNTIME is None, reason="this PyTorch brings no libgomp")
def test_the_runtime_is_found_where_pytorch_has_it_for_itself_alone(compiled):
    """As PyTorch's wheels for ARM do."""
    script = f'{START}build.load({str(compiled)!r})\nassert "torch" not in sys.modules'
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
