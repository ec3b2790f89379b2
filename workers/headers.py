"""What a checkpoint holds, read from its headers alone: names, dtypes, shapes, places.

Strict, because every byte range that is copied later comes from here: a header that lies must never become
a wrong shard. No torch, numpy or Hub client is loaded; a Hub checkpoint is read by ranges, files in parallel.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from typing import Any

from planner.dtypes import SAFETENSORS_BITS as _BITS
from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.checkpoint import Checkpoint
from workers.progress import Progress, silent

#: The format's own limit (safetensors refuses larger headers).
MAX_HEADER_BYTES = 100_000_000
#: Bytes asked for first: most headers fit, and a longer one costs only its rest.
_FIRST_READ_BYTES = 48 * 1024
#: An index of 92,000 tensors takes 9 MB.
_MAX_INDEX_BYTES = 200_000_000
#: A limit beyond any storage; products of larger sizes are refused before they are formed.
_MAX_VALUES = 2**60
_PARALLEL_FILES = 16
_KEYS = ("dtype", "shape", "data_offsets")
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """The headers of all weight files of a checkpoint."""

    #: By file in name order, within a file by offset.
    tensors: tuple[Tensor, ...]
    #: `__metadata__` of the files, merged in name order.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: Size of each weight file, in bytes.
    files: Mapping[str, int] = field(default_factory=dict)
    #: Size of each file's header with its length field, in bytes.
    header_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.end - tensor.begin for tensor in self.tensors)


def read_headers(checkpoint: Checkpoint, *, progress: Progress = silent) -> Headers:
    """Read and check the headers of every weight file of `checkpoint`.

    Safetensors files are preferred; a checkpoint that has only `.bin` files is read by `workers.picklefile`.

    Raises:
        InvalidCheckpoint: If there are no weights, or a file or index contradicts itself or another.
        Unavailable: If the server cannot be reached.
    """
    # 100,000 tensors make a million objects, none of them garbage: the collector would look through all, often.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _read_headers(checkpoint, progress)
    finally:
        if collecting:
            gc.enable()


def _read_headers(checkpoint: Checkpoint, progress: Progress) -> Headers:
    names, weight_map = weight_files(checkpoint)
    parse: Callable[[Checkpoint, str], tuple[list[Tensor], dict[str, str], int]] = read_file
    if not names[0].endswith(".safetensors"):
        from workers.picklefile import read_bin

        parse = read_bin
    results: list[tuple[list[Tensor], dict[str, str], int]] = []
    if len(names) == 1 or checkpoint.local_path(names[0]) is not None:
        for done, name in enumerate(names):
            progress(done, len(names), what="headers")
            results.append(parse(checkpoint, name))
    else:
        with ThreadPoolExecutor(min(_PARALLEL_FILES, len(names)), "headers") as pool:
            try:
                for done, result in enumerate(pool.map(lambda name: parse(checkpoint, name), names)):
                    progress(done, len(names), what="headers")
                    results.append(result)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    progress(len(names), len(names), what="headers")
    tensors = [tensor for found, _, _ in results for tensor in found]
    _check_names(tensors, weight_map)
    return Headers(
        tensors=tuple(tensors),
        metadata={key: value for _, metadata, _ in results for key, value in metadata.items()},
        files={name: checkpoint.files[name].size_bytes for name in names},
        header_bytes={name: size for name, (_, _, size) in zip(names, results, strict=True)},
    )


def weight_files(checkpoint: Checkpoint) -> tuple[list[str], dict[str, str] | None]:
    """The checkpoint's weight files in name order, and its index (tensor -> file) if it has one.

    Raises:
        InvalidCheckpoint: If there are none, or an index or a numbered name promises a file that is missing.
    """
    for suffix, plain in ((".safetensors", "model.safetensors"), (".bin", "pytorch_model.bin")):
        index = f"{plain}.index.json"
        found = sorted(name for name in checkpoint.files if name.endswith(suffix) and "/" not in name)
        if index not in checkpoint.files:
            others = sorted(n for n in checkpoint.files if n.endswith(f"{suffix}.index.json") and "/" not in n)
            index = others[0] if others and plain not in found else ""
        if index:
            weight_map = read_index(checkpoint, index)
            files = sorted(set(weight_map.values()))
            missing = [name for name in files if name not in checkpoint.files]
            if missing:
                raise InvalidCheckpoint(
                    f"{index} names {len(files)} files, of which {len(missing)} are missing: {_some(missing)}",
                    details={"index": index, "missing": missing[:20]},
                )
            return files, weight_map
        if plain in found:
            return [plain], None
        if suffix == ".bin":
            found = [name for name in found if name.startswith(("pytorch_model", "model"))]
        if found:
            _check_numbered(found)
            return found, None
    raise InvalidCheckpoint(
        f"{checkpoint.model_name} has no weights that can be read: expected model.safetensors, "
        f"model.safetensors.index.json or pytorch_model.bin among its {len(checkpoint.files)} files",
        details={"files": sorted(checkpoint.files)[:50]},
    )


def _check_numbered(names: list[str]) -> None:
    """Refuse `a-00001-of-00003` without its sisters."""
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            continue
        stem, _, total, suffix = match.groups()
        wanted = (f"{stem}-{number:05d}-of-{total}{suffix}" for number in range(1, int(total) + 1))
        missing = [other for other in wanted if other not in names]
        if missing:
            raise InvalidCheckpoint(
                f"{name} says there are {int(total)} files, of which {len(missing)} are missing: {_some(missing)}",
                details={"missing": missing[:20]},
            )


def read_index(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> file name.

    Raises:
        InvalidCheckpoint: If it is no such index, names a tensor twice, or names a file outside the root.
    """
    size = checkpoint.files[name].size_bytes
    if size > _MAX_INDEX_BYTES:
        raise InvalidCheckpoint(f"{name} is {size:,} bytes; an index has at most {_MAX_INDEX_BYTES:,}")
    pairs = dict(_pairs(parse_json(checkpoint.read(name), name), name))
    weight_map = dict(_pairs(pairs.get("weight_map"), f"{name}: weight_map"))
    if not weight_map:
        raise InvalidCheckpoint(f"{name}: weight_map names no tensor")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise InvalidCheckpoint(
                f"{name}: tensor {_show(tensor)} is placed in {_show(file)}, which is no file name"
            )
    return weight_map


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON with its objects as tuples of (key, value), so that no key is lost to another of its name.

    Raises:
        InvalidCheckpoint: If it is not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{where} is not valid JSON: {str(error)[:200]}") from error


def _pairs(value: Any, where: str) -> tuple[tuple[str, Any], ...]:
    """`value` if it is a JSON object without a doubled key."""
    if not isinstance(value, tuple):
        raise InvalidCheckpoint(f"{where} must be a JSON object, got {_show(value)}")
    if len({key for key, _ in value}) != len(value):
        seen: set[str] = set()
        doubled = sorted({key for key, _ in value if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise InvalidCheckpoint(f"{where}: key written twice: {_some(doubled)}", details={"keys": doubled[:20]})
    return value


def read_file(checkpoint: Checkpoint, name: str) -> tuple[list[Tensor], dict[str, str], int]:
    """Read and check one safetensors file's header.

    Returns:
        Its tensors by offset, its `__metadata__`, and the bytes before its data.

    Raises:
        InvalidCheckpoint: If the header is not what the format asks, or the file's size is not what it promises.
    """
    size = checkpoint.files[name].size_bytes
    if size < 8:
        raise InvalidCheckpoint(f"{name} is {size} bytes; a safetensors file has at least 8 (a Git LFS pointer?)")
    first = checkpoint.read(name, 0, min(size, _FIRST_READ_BYTES))
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidCheckpoint(
            f"{name}: the header's stated length of {length:,} bytes is over the format's {MAX_HEADER_BYTES:,}",
            details={"file": name, "header_bytes": length},
        )
    data_begin = 8 + length
    if data_begin > size:
        raise InvalidCheckpoint(
            f"{name}: the header's stated length of {length:,} bytes goes beyond the file's {size:,} bytes",
            details={"file": name, "header_bytes": length, "file_bytes": size},
        )
    raw = first[8:data_begin]
    if len(first) < data_begin:
        raw += checkpoint.read(name, len(first), data_begin)
    tensors, metadata = parse_header(raw, file=name, file_bytes=size)
    return tensors, metadata, data_begin


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
    for name, entry in _pairs(parse_json(raw, f"{file}: header"), f"{file}: header"):
        if name == "__metadata__":
            metadata = _metadata(entry, file)
        else:
            tensors.append(_tensor(name, entry, file, data_begin))
    tensors.sort(key=attrgetter("begin", "end"))
    _check_places(tensors, file, data_begin, file_bytes)
    return tensors, metadata


def _metadata(entry: Any, file: str) -> dict[str, str]:
    metadata = dict(_pairs(entry, f"{file}: __metadata__"))
    if not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidCheckpoint(f"{file}: __metadata__ may hold only text")
    return metadata


def _tensor(name: str, entry: Any, file: str, data_begin: int) -> Tensor:
    """The tensor that a header entry describes, its place turned into file offsets."""
    # A checkpoint may have 100,000 of them: the usual order of keys is read without a dict.
    if type(entry) is tuple and len(entry) == 3:
        (first, dtype), (second, shape), (third, offsets) = entry
        if first != "dtype" or second != "shape" or third != "data_offsets":
            dtype, shape, offsets = _values(name, entry, file)
    else:
        dtype, shape, offsets = _values(name, entry, file)
    value_bits = _BITS.get(dtype) if type(dtype) is str else None
    if value_bits is None:
        raise InvalidCheckpoint(f"{file}: tensor {_show(name)} has the unknown dtype {_show(dtype)}")
    if not _counts(shape):
        raise InvalidCheckpoint(f"{file}: tensor {_show(name)} has the impossible shape {_show(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidCheckpoint(f"{file}: tensor {_show(name)} has the impossible data_offsets {_show(offsets)}")
    begin, end = offsets
    total_bits = prod(shape) * value_bits
    if total_bits != (end - begin) * 8:
        raise InvalidCheckpoint(
            f"{file}: tensor {_show(name)} of {dtype} {shape} takes {total_bits / 8:,.10g} bytes, "
            f"but its data_offsets {offsets} span {end - begin:,}",
            details={"file": file, "tensor": name, "bytes": end - begin},
        )
    return Tensor(
        name=name, file=file, dtype=dtype, shape=tuple(shape), begin=data_begin + begin, end=data_begin + end
    )


def _values(name: str, entry: Any, file: str) -> tuple[Any, Any, Any]:
    """(dtype, shape, data_offsets) of a header entry whose keys are in another order."""
    values = dict(_pairs(entry, f"{file}: tensor {_show(name)}"))
    if values.keys() != set(_KEYS):
        raise InvalidCheckpoint(
            f"{file}: tensor {_show(name)} must have dtype, shape and data_offsets, got {_some(sorted(values))}"
        )
    return values["dtype"], values["shape"], values["data_offsets"]


def _counts(values: Any) -> bool:
    """Whether `values` is a list of a few non-negative whole numbers of a possible size."""
    if type(values) is not list or len(values) > 64:
        return False
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
                f"{file}: tensor {_show(tensor.name)} begins at byte {tensor.begin:,} and overlaps {_show(before)}, "
                f"which ends at {end:,}",
                details={"file": file, "tensor": tensor.name, "other": before},
            )
        if tensor.begin > end:
            raise InvalidCheckpoint(
                f"{file}: a hole of {tensor.begin - end:,} bytes before tensor {_show(tensor.name)}, "
                f"after {_show(before)}",
                details={"file": file, "tensor": tensor.name, "hole_bytes": tensor.begin - end},
            )
        end, before = tensor.end, tensor.name
    if end > file_bytes:
        raise InvalidCheckpoint(
            f"{file}: tensor {_show(before)} ends at byte {end:,}, beyond the file's {file_bytes:,}: "
            f"{end - file_bytes:,} bytes are missing (cut short?)",
            details={"file": file, "tensor": before, "missing_bytes": end - file_bytes},
        )
    if end < file_bytes:
        raise InvalidCheckpoint(
            f"{file}: {file_bytes - end:,} bytes after the last tensor belong to none",
            details={"file": file, "trailing_bytes": file_bytes - end},
        )


def _check_names(tensors: list[Tensor], weight_map: Mapping[str, str] | None) -> None:
    """Check that no name is in two files, and that the index and the headers agree."""
    if not tensors:
        raise InvalidCheckpoint("the checkpoint's files hold no tensor")
    places = {tensor.name: tensor.file for tensor in tensors}
    if len(places) != len(tensors):
        seen: dict[str, str] = {}
        for tensor in tensors:
            other = seen.setdefault(tensor.name, tensor.file)
            if other != tensor.file:
                raise InvalidCheckpoint(f"tensor {_show(tensor.name)} is in both {other} and {tensor.file}")
    if weight_map is None or weight_map == places:
        return
    wrong = [name for name, file in weight_map.items() if places.get(name) != file]
    if wrong:
        name = min(wrong)
        found = f"it is in {places[name]}" if name in places else "no header names it"
        raise InvalidCheckpoint(
            f"the index places tensor {_show(name)} in {weight_map[name]}, but {found} "
            f"({len(wrong)} of {len(weight_map)} names disagree)",
            details={"tensors": sorted(wrong)[:20]},
        )


def _some(names: Iterable[str]) -> str:
    shown = [_show(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
