"""The kernel's C++ under the compilers' own checks."""

import os
import subprocess

import pytest
from helpers import build_driver


@pytest.mark.slow
@pytest.mark.parametrize("compiler, optimize", [("g++", "-Og"), ("clang++", "-O1")])  # what they build soonest
def test_addresses_and_undefined_behaviour_are_clean(compiler, optimize, tmp_path):
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = build_driver(tmp_path, compiler, "-march=native", optimize, "-g1", *checks)
    environment = os.environ | {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout.split()[0]) > 300
