import gc
import os

import pytest

gc.disable()  # until all tests are collected: what is imported stays
# Two processes run the tests, and some start others: threads of each would wait for one another, and where a test asks
# for several, turn in circles while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads what is set here
def pytest_cmdline_main(config):
    """Runs the tests in two processes, unless some are picked out, or their output or a debugger is asked for."""
    option = config.option
    some = ".py" in " ".join(config.args) or option.keyword or option.collectonly or option.showfixtures
    interactive = option.capture == "no" or option.usepdb or option.trace
    # pytest-xdist is there, and neither -n nor --dist is given
    unset = getattr(option, "numprocesses", 0) is None and option.dist == "no"
    if unset and not some and not interactive and not hasattr(config, "workerinput"):
        option.numprocesses, option.dist = 2, "worksteal"


def pytest_configure(config):
    """Imports the fixtures, and PyTorch with them, where tests run: not in the process that waits for two others."""
    option = config.option
    if getattr(option, "dist", "no") == "no" or option.collectonly or option.showfixtures:  # of the two it is "no"
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish():
    """Spares Python the search through all that was imported, which many small objects set off: 5 % of the time."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure():
    """Spares it the search for what the end of the process gives back anyway."""
    gc.freeze()
