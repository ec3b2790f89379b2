"""Checkpoints of a chosen size, and small disks to fill."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 2**20


def model(folder: Path, *, weights: int = 16 * MIB, tokenizer: int = 2, layers: int = 4) -> Path:
    """A checkpoint of `weights` bytes of tensors in one file, and a tokenizer of `tokenizer` bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}".ljust(tokenizer))
    state = {f"l.{i}.w": torch.rand(weights // layers // 4) for i in range(layers)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    place.mkdir()
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("a small disk is mounted, which takes root")
    done = subprocess.run(["mount", *options, str(place)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk is mounted, and here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def disk(place: Path, size_bytes: int) -> Iterator[Path]:
    """A filesystem in memory of just so many bytes."""
    with mounted(place, "-t", "tmpfs", "-o", f"size={size_bytes}", "none"):
        yield place
