"""The kernel's C++ under the compilers' own checks."""

import shutil
import subprocess
from pathlib import Path

import pytest

from normkit.fused.build import SOURCES

DRIVER = Path(__file__).with_name("csrc") / "driver.cpp"
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("compiler", ["g++", "clang++"])]


def compile(compiler, folder, *flags):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program = folder / "driver"
    command = [compiler, "-std=c++17", "-march=native", "-fno-math-errno", *flags, DRIVER, "-o", program, "-lgomp"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lgomp" in done.stderr or "unable to find library -lgomp" in done.stderr:
        pytest.skip("no libgomp to link with")
    if "libclang_rt" in done.stderr or "cannot find -lasan" in done.stderr:
        pytest.skip(f"{compiler} has no sanitizers here")
    assert done.returncode == 0, done.stderr
    return program


def test_addresses_and_undefined_behaviour_are_clean(compiler, tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile(compiler, tmp_path, *flags)
    done = subprocess.run([program], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout.split()[0]) > 500


@pytest.mark.parametrize("target", ["x86-64", "haswell", "skylake-avx512", "sapphirerapids"])
def test_no_warnings(compiler, target, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    flags = ["-std=c++17", "-O3", f"-march={target}", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra"]
    command = [compiler, *flags, "-c", SOURCES / "kernel.cpp", "-o", tmp_path / "kernel.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "march" in done.stderr:
        pytest.skip(f"{compiler} compiles for another processor")
    assert (done.returncode, done.stderr) == (0, "")
