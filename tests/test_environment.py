import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from normkit import environment
from normkit.environment import check_setup
from normkit.fused.build import Library


def test_check_setup_says_where_the_data_is_or_what_its_download_takes(official, tmp_path, capsys):
    check_setup(official.archive.parent)
    assert f"CIFAR-10: the official files, in {official.archive.parent}" in capsys.readouterr().out
    check_setup(tmp_path / "not" / "there")
    said = capsys.readouterr().out
    assert f"not in {tmp_path / 'not' / 'there'} yet" in said and "170 MB" in said and "TO FIX" not in said
    assert f"torch {torch.__version__.split('+')[0]}" in said and "Device: " in said


def test_check_setup_names_what_to_mend(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e8))
    monkeypatch.setattr(environment.metadata, "version", lambda name: "2.9.1")
    check_setup(tmp_path / "data")
    said = capsys.readouterr().out
    assert f"TO FIX: 0.2 GB are free at {tmp_path}" in said
    assert (
        "TO FIX: torch 2.10" in said and f'{sys.executable} -m pip install --upgrade "torch>=2.10" torchvision' in said
    )


def test_check_setup_names_a_drive_that_is_not_there(tmp_path, monkeypatch, capsys):
    """As E: on Windows, when its disk is not plugged in: nothing of the folder's name exists."""
    monkeypatch.setattr(type(tmp_path), "exists", lambda path: False)
    check_setup(tmp_path / "data")
    assert f"TO FIX: {tmp_path.anchor} is not there: is a disk missing?" in capsys.readouterr().out


def test_check_setup_names_the_kernel_or_why_there_is_none(tmp_path, monkeypatch, capsys):
    for device, reason, said in (
        ("cpu", None, "Fused kernel: ready\nCIFAR-10"),
        ("cpu", "no C++ compiler", "Fused kernel: no C++ compiler\nWithout"),
        ("mps", None, "Fused kernel: ready\nWith it the CPU may be faster: "),
        ("mps", "no C++ compiler", "Fused kernel: no C++ compiler\nCIFAR-10"),
    ):
        monkeypatch.setattr(environment, "get_device", lambda device=device: torch.device(device))
        monkeypatch.setattr(environment, "library", lambda reason=reason: Library(None, reason))
        check_setup(tmp_path)
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model", "utils"])
def test_a_file_of_the_users_that_is_found_in_place_of_the_kits_is_named(name, tmp_path, kit_forgotten, monkeypatch):
    """As where the kit's folder was added to the end of sys.path: their names are everybody's."""
    file = tmp_path / f"{name}.py"
    file.write_text("class Mine: ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=re.escape(f"from '{name}' ({file})")):
        importlib.import_module("normkit.study")
