"""Converts `.bin` files to safetensors by copying each tensor's raw bytes; no code of the pickle is run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from planner.dtypes import bits
from planner.errors import InvalidCheckpoint, InvalidInput
from planner.names import Part
from workers.checkpoint.base import Checkpoint, CheckpointFile
from workers.checkpoint.choice.modules import model_folder
from workers.checkpoint.choice.part import part_of
from workers.checkpoint.choice.weights import weight_files
from workers.checkpoint.torch_file import Stored, read_views
from workers.disk.durable import write_whole
from workers.disk.space import check_fits
from workers.progress import Progress, silent
from workers.transfer.journal import check_new, staged

_COPY_BYTES = 8 << 20
#: Views of one storage are written out each: so much more than the files, and what small ones may take.
_MOST_GROWTH = 4
_SMALL_BYTES = 64 << 20
_LARGEST_OTHER_BYTES = 100_000_000


def convert(checkpoint: Checkpoint, directory: Path, *, progress: Progress = silent) -> Path:
    """Write `checkpoint`, whose weights are `.bin` files, as safetensors.

    Each name gets bytes of its own, also where names share one storage; strided tensors are written out contiguously.
    On failure no folder is left.

    Args:
        checkpoint: What is converted; it stays as it is.
        directory: A new or empty folder; config and tokenizer files are copied into it as well.
        progress: Told of the bytes written.

    Returns:
        The folder.

    Raises:
        InvalidInput: If the weights are safetensors already.
        InvalidCheckpoint: If a `.bin` file is no state dict of tensors, or they are far larger than the files.
        Conflict: If the folder is not empty.
        NodeFailure: If it cannot be written, or the disk lacks the room.
    """
    # Where the model lies in a folder of the repository, that folder is what is converted.
    checkpoint = part_of(checkpoint, Part(subfolder=model_folder(checkpoint).rstrip("/") or None))
    names = weight_files(checkpoint)
    if names[0].endswith(".safetensors"):
        raise InvalidInput(
            f"{checkpoint.model_name} has safetensors already ({names[0]}); there is nothing to convert"
        )
    check_new(directory)
    views = {name: read_views(checkpoint, name) for name in names}
    total = sum(_size(each) for stored in views.values() for each in stored.values())
    _check_growth(total, sum(checkpoint.files[name].size_bytes for name in names))
    headers = {name: _header(stored) for name, stored in views.items()}
    weight_map = {tensor: _target(name) for name, stored in views.items() for tensor in stored}
    index = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True
    ).encode()
    others = [other for other in checkpoint.files.values() if _is_other(other)]
    weights = {name: len(headers[name]) + sum(map(_size, stored.values())) for name, stored in views.items()}
    check_fits(directory, weights | {file.name: file.size_bytes for file in others} | {"index": len(index)})
    done = 0
    with staged(directory) as folder:
        for name, stored in views.items():
            with (folder / _target(name)).open("wb") as file:
                file.write(headers[name])
                for each in stored.values():
                    for chunk in _data(checkpoint, name, each):
                        file.write(chunk)
                        done += len(chunk)
                        progress(done, total, what=_target(name))
                file.flush()
                os.fsync(file.fileno())
        if len(names) > 1:
            write_whole(folder / "model.safetensors.index.json", index)
        for other in others:
            write_whole(folder / other.name, checkpoint.read(other.name))
    return directory


def _is_other(file: CheckpointFile) -> bool:
    """Whether it comes along as it is: config, tokenizer and the like."""
    left_out = (".bin", ".bin.index.json", ".pt")
    return "/" not in file.name and file.size_bytes < _LARGEST_OTHER_BYTES and not file.name.endswith(left_out)


def _check_growth(total: int, stored: int) -> None:
    """Refuse expanded tensors: 16 bytes and strides of 0 can mean terabytes, which would fill memory or the disk."""
    most = _MOST_GROWTH * stored + _SMALL_BYTES
    if total > most:
        raise InvalidCheckpoint(
            f"the tensors take {total:,} bytes written out, the files hold {stored:,}: refused beyond {most:,}; "
            "`torch.save` clones of expanded tensors",
            details={"total_bytes": total, "stored_bytes": stored},
        )


def _target(name: str) -> str:
    stem = name.removesuffix(".bin")
    return f"{stem.replace('pytorch_model', 'model', 1)}.safetensors"


def _size(stored: Stored) -> int:
    return prod(stored.view.shape) * ((bits(stored.view.dtype) or 8) // 8)


def _header(stored: Mapping[str, Stored]) -> bytes:
    """The file's header, padded so that the data begins at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, each in stored.items():
        begin, end = end, end + _size(each)
        entries[name] = {"dtype": each.view.dtype, "shape": list(each.view.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _data(checkpoint: Checkpoint, name: str, stored: Stored) -> Iterator[bytes]:
    """A tensor's values in its own order."""
    view, width = stored.view, (bits(stored.view.dtype) or 8) // 8
    begin = stored.begin + view.offset * width
    if view.contiguous:
        end = begin + _size(stored)
        for at in range(begin, end, _COPY_BYTES):
            yield checkpoint.read(name, at, min(end, at + _COPY_BYTES))
        return
    if not _size(stored):
        return
    import numpy as np

    raw = checkpoint.read(name, begin, stored.begin + view.last * width)
    values = np.frombuffer(raw, dtype=f"V{width}")
    strided = np.lib.stride_tricks.as_strided(values, view.shape, [step * width for step in view.stride])
    yield np.ascontiguousarray(strided).tobytes()
