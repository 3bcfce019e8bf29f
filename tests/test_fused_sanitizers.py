"""The kernel's C++ under the compilers' own checks."""

import os
import shutil
import subprocess

import pytest
from helpers import build_driver

from normkit.fused.build import COMPILE, SOURCES

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("compiler", ["g++", "clang++"])]


def test_addresses_and_undefined_behaviour_are_clean(compiler, tmp_path):
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = build_driver(tmp_path, compiler, "-march=native", "-O1", "-g", *checks)
    environment = os.environ | {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout.split()[0]) > 300


@pytest.mark.parametrize("target", ["x86-64", "haswell", "skylake-avx512", "sapphirerapids", "aarch64"])
def test_no_warnings(compiler, target, tmp_path):
    words = [compiler, f"-march={target}"]
    if target == "aarch64":
        words = ["aarch64-linux-gnu-g++"] if compiler == "g++" else [compiler, "--target=aarch64-linux-gnu"]
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {words[0]}")
    command = [*words, *COMPILE, "-Wall", "-Wextra", "-c", SOURCES / "kernel.cpp", "-o", tmp_path / "kernel.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "march" in done.stderr or "file not found" in done.stderr:
        pytest.skip(f"{compiler} does not compile for {target} here")
    assert (done.returncode, done.stderr) == (0, "")
