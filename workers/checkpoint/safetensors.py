"""One safetensors file's header: tensors' names, dtypes, shapes and byte ranges, checked against the file's size.

The check is strict, because every byte range that is copied later comes from here: a wrong header must never become a
wrong shard.
"""

from __future__ import annotations

from dataclasses import fields
from math import prod
from operator import attrgetter
from typing import Any

from planner.dtypes import SAFETENSORS_BITS as _BITS
from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.strict_json import pairs, parse_json, show, some

#: The format's own limit (safetensors refuses larger headers).
MAX_HEADER_BYTES = 100_000_000
#: Bytes asked for first: most headers fit, and a longer one costs only its rest.
_FIRST_READ_BYTES = 48 * 1024
#: A limit beyond any storage; products of larger sizes are refused before they are formed.
_MAX_VALUES = 2**60
_KEYS = ("dtype", "shape", "data_offsets")
# A frozen dataclass's own way to be made takes three times as long: 70 ms more for 92,000 tensors.
_new: Any = Tensor.__new__
_set_name, _set_file, _set_dtype, _set_shape, _set_begin, _set_end = (
    getattr(Tensor, each.name).__set__ for each in fields(Tensor)
)


def read_header(
    checkpoint: Checkpoint, name: str, *, header_bytes: int | None = None
) -> tuple[bytes, list[Tensor], dict[str, str]]:
    """Read and check one safetensors file's header.

    Args:
        checkpoint: Whose file.
        name: Which file; the checkpoint has it.
        header_bytes: The header's size, length field included, where it is known.

    Returns:
        The bytes before its data, its tensors by offset, and its `__metadata__`.

    Raises:
        InvalidCheckpoint: If the header is not what the format asks, or the file's size is not what it promises.
    """
    size = checkpoint.files[name].size_bytes
    if size < 8:
        raise InvalidCheckpoint(f"{name} is {size} bytes; a safetensors file has at least 8 (a Git LFS pointer?)")
    raw = checkpoint.read(name, 0, min(size, header_bytes or _FIRST_READ_BYTES))
    length = int.from_bytes(raw[:8], "little")
    for largest, text in (
        (MAX_HEADER_BYTES, f"is over the format's {MAX_HEADER_BYTES:,}"),
        (size - 8, f"goes beyond the file's {size:,} bytes"),
    ):
        if length > largest:
            raise InvalidCheckpoint(
                f"{name}: the header's stated length of {length:,} bytes {text}",
                details={"file": name, "header_bytes": length, "file_bytes": size},
            )
    if len(raw) < 8 + length:
        raw += checkpoint.read(name, len(raw), 8 + length)
    raw = raw[: 8 + length]
    tensors, metadata = parse_header(raw[8:], file=name, file_bytes=size)
    return raw, tensors, metadata


def parse_header(raw: bytes, *, file: str, file_bytes: int) -> tuple[list[Tensor], dict[str, str]]:
    """Parse a safetensors header (the JSON after the length field) of a file of `file_bytes`.

    Raises:
        InvalidCheckpoint: If it is malformed, or its tensors overlap, leave holes or don't fill the file.
    """
    if not raw.startswith(b"{"):
        raise InvalidCheckpoint(f"{file}: the header must begin with '{{', got {raw[:16]!r}")
    data_begin = 8 + len(raw)
    metadata: dict[str, str] = {}
    tensors: list[Tensor] = []
    for name, entry in pairs(parse_json(raw, f"{file}: header"), f"{file}: header"):
        if name == "__metadata__":
            metadata = _metadata(entry, file)
        else:
            tensors.append(_tensor(name, entry, file, data_begin))
    if not _fill(tensors, data_begin, file_bytes):
        tensors.sort(key=attrgetter("begin", "end"))
        _check_places(tensors, file, data_begin, file_bytes)
    return tensors, metadata


def _fill(tensors: list[Tensor], begin: int, end: int) -> bool:
    """Whether each tensor begins where the one before it ends, from `begin` to `end`: most files are written so."""
    for tensor in tensors:
        if tensor.begin != begin:
            return False
        begin = tensor.end
    return begin == end


def _metadata(entry: Any, file: str) -> dict[str, str]:
    metadata = dict(pairs(entry, f"{file}: __metadata__"))
    if not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidCheckpoint(f"{file}: __metadata__ may hold only text")
    return metadata


def _tensor(name: str, entry: Any, file: str, data_begin: int) -> Tensor:
    """The tensor that a header entry describes, its place turned into file offsets."""
    # A checkpoint may have 100,000 of them: the usual order of keys is read without a dict, and without calls.
    if type(entry) is tuple and len(entry) == 3:
        (first, dtype), (second, shape), (third, offsets) = entry
        if first != "dtype" or second != "shape" or third != "data_offsets":
            dtype, shape, offsets = _values(name, entry, file)
    else:
        dtype, shape, offsets = _values(name, entry, file)
    value_bits = _BITS.get(dtype) if type(dtype) is str else None
    if value_bits is None:
        raise InvalidCheckpoint(f"{file}: tensor {show(name)} has the unknown dtype {show(dtype)}")
    if type(shape) is not list or len(shape) > 64 or not _counts(shape):
        raise InvalidCheckpoint(f"{file}: tensor {show(name)} has the impossible shape {show(shape)}")
    begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < _MAX_VALUES:
        raise InvalidCheckpoint(f"{file}: tensor {show(name)} has the impossible data_offsets {show(offsets)}")
    total_bits = prod(shape) * value_bits
    if total_bits != (end - begin) * 8:
        raise InvalidCheckpoint(
            f"{file}: tensor {show(name)} of {dtype} {shape} takes {total_bits / 8:,.10g} bytes, "
            f"but its data_offsets {offsets} span {end - begin:,}",
            details={"file": file, "tensor": name, "bytes": end - begin},
        )
    tensor: Tensor = _new(Tensor)
    _set_name(tensor, name)
    _set_file(tensor, file)
    _set_dtype(tensor, dtype)
    _set_shape(tensor, tuple(shape))
    _set_begin(tensor, data_begin + begin)
    _set_end(tensor, data_begin + end)
    return tensor


def _values(name: str, entry: Any, file: str) -> tuple[Any, Any, Any]:
    """(dtype, shape, data_offsets) of a header entry whose keys are in another order."""
    values = dict(pairs(entry, f"{file}: tensor {show(name)}"))
    if values.keys() != set(_KEYS):
        raise InvalidCheckpoint(
            f"{file}: tensor {show(name)} must have dtype, shape and data_offsets, got {some(sorted(values))}"
        )
    return values["dtype"], values["shape"], values["data_offsets"]


def _counts(values: list[Any]) -> bool:
    """Whether `values` are non-negative whole numbers of a possible size."""
    for value in values:  # noqa: SIM110 (a generator costs three times as much, 200,000 times)
        if type(value) is not int or not 0 <= value < _MAX_VALUES:
            return False
    return True


def _check_places(tensors: list[Tensor], file: str, data_begin: int, file_bytes: int) -> None:
    """Check that the tensors, sorted by place, fill the data section exactly."""
    end, before = data_begin, "the header"
    for tensor in tensors:
        if tensor.begin < end:
            raise InvalidCheckpoint(
                f"{file}: tensor {show(tensor.name)} begins at byte {tensor.begin:,} and overlaps {show(before)}, "
                f"which ends at {end:,}",
                details={"file": file, "tensor": tensor.name, "other": before},
            )
        if tensor.begin > end:
            raise InvalidCheckpoint(
                f"{file}: a hole of {tensor.begin - end:,} bytes before tensor {show(tensor.name)}, "
                f"after {show(before)}",
                details={"file": file, "tensor": tensor.name, "hole_bytes": tensor.begin - end},
            )
        end, before = tensor.end, tensor.name
    if end > file_bytes:
        raise InvalidCheckpoint(
            f"{file}: tensor {show(before)} ends at byte {end:,}, beyond the file's {file_bytes:,}: "
            f"{end - file_bytes:,} bytes are missing (cut short?)",
            details={"file": file, "tensor": before, "missing_bytes": end - file_bytes},
        )
    if end < file_bytes:
        raise InvalidCheckpoint(
            f"{file}: {file_bytes - end:,} bytes after the last tensor belong to none",
            details={"file": file, "trailing_bytes": file_bytes - end},
        )
