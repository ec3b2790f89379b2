"""Small files are there whole or not at all, and secrets are readable by their owner alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.disk.durable import write_whole


def test_a_secret_is_its_owners_alone_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    write_whole(path, b"one", mode=0o600)
    write_whole(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["secret"]  # noqa: PTH208


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
