"""Copies come out the same by every way that a kernel may leave us."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from workers.disk.copying import copy_range, write_all

DATA = random.Random(1).randbytes(20_000_003)


def refusing(code: int) -> Any:
    def refuse(*_args: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("refused", [(), ("copy_file_range",)])
@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_every_way_copies_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], code: int
) -> None:
    for name in refused:
        monkeypatch.setattr(os, name, refusing(code))
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(DATA)
    target.write_bytes(b"head")
    steps: list[int] = []
    with source.open("rb") as from_, target.open("rb+") as to:
        copy_range(from_.fileno(), to.fileno(), 7, len(DATA) - 2, 4, each=steps.append)
        copy_range(from_.fileno(), to.fileno(), 0, 5, len(DATA) - 5)
    assert target.read_bytes() == b"head" + DATA[7:-2] + DATA[:5]
    assert sum(steps) == len(DATA) - 9
    assert len(steps) > 2, "progress is told on the way"


def test_real_errors_are_not_taken_for_missing_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(errno.ENOSPC))
    (tmp_path / "source").write_bytes(b"12345678")
    with (tmp_path / "source").open("rb") as from_, (tmp_path / "target").open("wb") as to:
        with pytest.raises(OSError, match="No space"):
            copy_range(from_.fileno(), to.fileno(), 0, 8, 0)
        monkeypatch.undo()
        with pytest.raises(OSError, match="12 bytes early"):
            copy_range(from_.fileno(), to.fileno(), 0, 20, 0)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:3], at))
    with (tmp_path / "target").open("wb") as to:
        assert write_all(to.fileno(), b"0123456789", 2) == 10
    assert (tmp_path / "target").read_bytes() == b"\0\0" + b"0123456789"


@pytest.mark.parametrize(
    "module", ["workers.splitter", "workers.shards.verify", "workers.shards.merge", "workers.downloader"]
)
def test_shards_need_neither_torch_nor_numpy(module: str) -> None:
    heavy = "torch", "numpy", "transformers", "safetensors", "huggingface_hub", "flask", "celery"
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
