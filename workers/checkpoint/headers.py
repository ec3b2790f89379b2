"""What a checkpoint holds, read from its headers alone: tensors' names, dtypes, shapes and byte ranges.

Loads no torch, numpy or Hub client. Of a Hub checkpoint only the headers' ranges are read, files in parallel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.shared_storage import distinct
from workers.checkpoint.source import Source, read_source
from workers.checkpoint.strict_json import pairs, parse_json, show, some
from workers.collector import uncollected
from workers.progress import Progress, silent

#: An index of 92,000 tensors takes 9 MB.
_MAX_INDEX_BYTES = 200_000_000
_PARALLEL_FILES = 16
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """The headers of all weight files of a checkpoint."""

    #: By file in name order, within a file by offset; each range of bytes once, by its first name.
    tensors: tuple[Tensor, ...]
    #: Other names of such ranges (in `.bin` files; safetensors allows none).
    twins: tuple[Tensor, ...] = ()
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

    Safetensors files are preferred; `workers.checkpoint.torch_file` reads a checkpoint that has only `.bin` files.

    Raises:
        InvalidCheckpoint: If there are no weights, or a file or index contradicts itself or another.
        Unavailable: If the server cannot be reached.
    """
    # 100,000 tensors make a million objects: the collector would look through all, often.
    with uncollected():
        return _read_headers(checkpoint, progress)


def _read_headers(checkpoint: Checkpoint, progress: Progress) -> Headers:
    names, weight_map = weight_files(checkpoint)
    sources: list[Source] = []
    for source in read_sources(checkpoint, dict.fromkeys(names)):
        sources.append(source)
        progress(len(sources), len(names), what="headers")
    tensors = [tensor for source in sources for tensor in source.tensors.values()]
    _check_names(tensors, weight_map)
    first, twins = (tensors, []) if names[0].endswith(".safetensors") else distinct(tensors)
    return Headers(
        tensors=tuple(first),
        twins=tuple(twins),
        metadata={key: value for source in sources for key, value in source.metadata.items()},
        files={source.name: source.size_bytes for source in sources},
        header_bytes={source.name: len(source.header) for source in sources},
    )


def read_sources(checkpoint: Checkpoint, header_bytes: Mapping[str, int | None]) -> Iterator[Source]:
    """Read files' headers, in their order; those of a server several at once, as each costs a round trip or three.

    Args:
        checkpoint: Whose files.
        header_bytes: File -> the size of its header, where that is known.

    Raises:
        NotFound: If the checkpoint lacks one of the files.
        InvalidCheckpoint: If a header is malformed.
        Unavailable: If the server cannot be reached.
    """

    def read(name: str) -> Source:
        return read_source(checkpoint, name, header_bytes=header_bytes[name])

    names = list(header_bytes)
    if len(names) < 2 or checkpoint.local_path(names[0]) is not None:
        yield from map(read, names)
        return
    with ThreadPoolExecutor(min(_PARALLEL_FILES, len(names)), "headers") as pool:
        try:
            yield from pool.map(read, names)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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
                    f"{index} names {len(files)} files, of which {len(missing)} are missing: {some(missing)}",
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
    """Refuse `a-00001-of-00003` where another of the three is missing."""
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            continue
        stem, _, total, suffix = match.groups()
        wanted = (f"{stem}-{number:05d}-of-{total}{suffix}" for number in range(1, int(total) + 1))
        missing = [other for other in wanted if other not in names]
        if missing:
            raise InvalidCheckpoint(
                f"{name} says there are {int(total)} files, of which {len(missing)} are missing: {some(missing)}",
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
    index = dict(pairs(parse_json(checkpoint.read(name), name), name))
    weight_map = dict(pairs(index.get("weight_map"), f"{name}: weight_map"))
    if not weight_map:
        raise InvalidCheckpoint(f"{name}: weight_map names no tensor")
    # A few files hold 100,000 tensors: each is looked at once.
    right: set[str] = set()
    for tensor, file in weight_map.items():
        if type(file) is str and file in right:
            continue
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise InvalidCheckpoint(f"{name}: tensor {show(tensor)} is placed in {show(file)}, which is no file name")
        right.add(file)
    return weight_map


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
                raise InvalidCheckpoint(f"tensor {show(tensor.name)} is in both {other} and {tensor.file}")
    if weight_map is None or weight_map == places:
        return
    wrong = [name for name, file in weight_map.items() if places.get(name) != file]
    if wrong:
        name = min(wrong)
        found = f"it is in {places[name]}" if name in places else "no header names it"
        raise InvalidCheckpoint(
            f"the index places tensor {show(name)} in {weight_map[name]}, but {found} "
            f"({len(wrong)} of {len(weight_map)} names disagree)",
            details={"tensors": sorted(wrong)[:20]},
        )
