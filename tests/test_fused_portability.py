"""The kernel's C++ built for other processors computes what the build for this one does."""

import os
import platform
import shutil
import signal
import subprocess

import numpy as np
import pytest
from filelock import FileLock
from helpers import build_driver

from normkit.fused.build import TARGET

HERE = platform.system(), platform.machine()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(HERE not in TARGET, reason=f"there is no kernel for {HERE}")]

# Of the difference from the build for this processor, as a share of what is compared. In bfloat16 now and then another
# pixel is the largest of four, and a gradient goes there.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}


def run_driver(command, dtype, threads=2):
    """Returns the groups of values that the driver writes, each after its size."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([*command, dtype], capture_output=True, env=environment, timeout=600)
    if done.returncode == -signal.SIGILL:
        pytest.skip("this processor lacks the instructions")
    assert done.returncode == 0, done.stderr
    groups, place = [], 0
    while place < len(done.stdout):
        size = int.from_bytes(done.stdout[place : place + 8], "little")
        groups.append(np.frombuffer(done.stdout, np.float32, size, place + 8))
        place += 8 + 4 * size
    assert len(groups) > 50
    return groups


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """By dtype, what the build for this processor computes: test_fused.py compares it with the definition."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes of tests: it is built once
    folder = folder / "native"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        program = folder / "driver"
        if not program.exists():
            build_driver(folder, "c++", *TARGET[HERE])
    return {dtype: run_driver([program], dtype) for dtype in TOLERANCES}


def assert_close(actual, expected, tolerance):
    for values, exact in zip(actual, expected, strict=True):
        assert np.linalg.norm(values - exact) < tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("target", ["x86-64", "haswell", "skylake-avx512", "sapphirerapids"])
def test_on_x86_with_vectors_of_4_8_and_16(expected, compiler, target, tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("for x86-64")
    command = [build_driver(tmp_path, compiler, f"-march={target}")]
    for dtype, tolerance in TOLERANCES.items():
        assert_close(run_driver(command, dtype), expected[dtype], tolerance)


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++", "clang++ --target=aarch64-linux-gnu"])
def test_on_arm_with_neon(expected, compiler, tmp_path):
    """Cross-compiled and emulated, for which there are the packages g++-aarch64-linux-gnu and qemu-user."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None or shutil.which("aarch64-linux-gnu-g++") is None:  # which brings the libraries for clang too
        pytest.skip("no emulator or no libraries for aarch64")
    command = [emulator, build_driver(tmp_path, *compiler.split(), "-static")]
    for dtype, tolerance in TOLERANCES.items():
        one, three = (run_driver(command, dtype, threads) for threads in (1, 3))
        assert all(map(np.array_equal, one, three))
        assert_close(one, expected[dtype], tolerance)
