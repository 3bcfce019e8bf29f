"""Files on systems that refuse what Linux's own allow, at times or always."""

import errno
import os
import shutil
import time

import pytest

from normkit import checkpoint, cifar10, files
from normkit.checkpoint import Checkpoint
from normkit.study import forget


def refusing(function, times=1000):
    """Has a function fail for so many calls, as on Windows while another program has the file open."""
    error = PermissionError(errno.EACCES, "The process cannot access the file")
    error.winerror = 32
    errors = [error] * times

    def refuse(*args, **options):
        if errors:
            raise errors.pop()
        return function(*args, **options)

    return refuse


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def test_a_file_that_another_program_holds_for_a_moment_is_replaced_then(tmp_path, pauses, monkeypatch):
    """As virus scanners do on Windows, and what keeps a folder in step with a cloud."""
    file, previous = tmp_path / "file", tmp_path / "previous"
    files.write_whole(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing(os.replace, 4))
        files.write_whole(file, b"new", previous)
    assert (file.read_bytes(), previous.read_bytes()) == (b"new", b"old") and len(pauses) == 4
    monkeypatch.setattr(os, "replace", refusing(os.replace))
    with pytest.raises(PermissionError):
        files.write_whole(file, b"newest")
    assert file.read_bytes() == b"new" and sorted(tmp_path.iterdir()) == [file, previous] and sum(pauses) < 10


def test_what_is_refused_for_good_is_an_error_at_once(tmp_path, pauses, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError):
        files.write_whole(tmp_path / "file", b"")
    assert not pauses


def test_an_archive_is_unpacked_and_a_checkpoint_deleted_once_nobody_holds_them(
    official, tmp_path, pauses, monkeypatch
):
    monkeypatch.setattr(os, "rename", refusing(os.rename, 2))
    cifar10.unpack(official.archive, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [cifar10.FOLDER]
    file = tmp_path / "file"
    file.write_bytes(b"")
    unlink = refusing(type(file).unlink, 2)
    monkeypatch.setattr(type(file), "unlink", lambda *args, **options: unlink(*args, **options))
    forget(file)
    assert not file.exists() and len(pauses) == 4


def test_a_file_whose_mode_cannot_be_kept_is_written(tmp_path, monkeypatch):
    """As of a share or a stick that is mounted for all as somebody else's."""

    def refuse(*args, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(shutil, "copymode", refuse)
    for content in (b"old", b"new"):
        files.write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_checkpoint_that_cannot_be_read_after_training_costs_no_result(tmp_path, monkeypatch):
    """As only what has moved since was to be noted."""
    kept = Checkpoint(tmp_path / "file", {}, dict)
    kept.save([])
    monkeypatch.setattr(checkpoint, "read_state", refusing(checkpoint.read_state))
    kept.note_settings()
