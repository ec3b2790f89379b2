"""`.bin` to safetensors: the raw bytes of each tensor copied, nothing loaded, nothing run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from planner.dtypes import bits
from planner.errors import Conflict, InvalidCheckpoint, InvalidInput
from workers.checkpoint import Checkpoint
from workers.headers import weight_files
from workers.picklefile import Stored, read_views
from workers.progress import Progress, silent

_COPY_BYTES = 8 << 20
#: Views of one storage are written out each: so much more than the files, and what small ones may take.
_MOST_GROWTH = 4
_SMALL_BYTES = 64 << 20


def convert(checkpoint: Checkpoint, directory: Path, *, progress: Progress = silent) -> Path:
    """Write `checkpoint`, whose weights are `.bin` files, as safetensors.

    Weights that share one storage are written once, under the first name; strided ones are written out plainly.

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
    """
    names, _ = weight_files(checkpoint)
    if names[0].endswith(".safetensors"):
        raise InvalidInput(
            f"{checkpoint.model_name} has safetensors already ({names[0]}); there is nothing to convert"
        )
    if directory.exists() and any(directory.iterdir()):
        raise Conflict(f"{directory} is not empty; name a new folder")
    views = {name: _distinct(read_views(checkpoint, name)) for name in names}
    total = sum(_size(each) for stored in views.values() for each in stored.values())
    _check_growth(total, sum(checkpoint.files[name].size_bytes for name in names))
    directory.mkdir(parents=True, exist_ok=True)
    done, weight_map = 0, {}
    for name, stored in views.items():
        target = _target(name)
        weight_map.update(dict.fromkeys(stored, target))
        partial = directory / f".{target}.partial"
        try:
            with partial.open("wb") as file:
                file.write(_header(stored))
                for each in stored.values():
                    for chunk in _data(checkpoint, name, each):
                        file.write(chunk)
                        done += len(chunk)
                        progress(done, total, what=target)
            partial.replace(directory / target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(directory / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())
    for name, other in sorted(checkpoint.files.items()):
        if (
            "/" not in name
            and other.size_bytes < 100_000_000
            and not name.endswith((".bin", ".bin.index.json", ".pt"))
        ):
            _write(directory / name, checkpoint.read(name))
    return directory


def _check_growth(total: int, stored: int) -> None:
    """16 bytes and strides of 0 can say terabytes, which would fill memory or the disk."""
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


def _distinct(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors, those left out whose values are another's."""
    seen, kept = set(), {}
    for name, each in stored.items():
        view = each.view
        place = (each.begin, view.dtype, view.offset, view.shape, view.stride)
        if place not in seen or not _size(each):
            seen.add(place)
            kept[name] = each
    return kept


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


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
