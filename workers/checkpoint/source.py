"""A checkpoint file's header, kept as it was read: a shard needs it to prove, and to rebuild, the whole file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.errors import InvalidMetadata
from planner.profile import Tensor
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.safetensors import MAX_HEADER_BYTES, parse_header

_FIRST_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint file with its header as it was read."""

    name: str
    size_bytes: int
    #: Everything before the data; empty where the file is no safetensors file.
    header: bytes
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str | None = None


def read_source(checkpoint: Checkpoint, name: str, *, header_bytes: int | None = None) -> Source:
    """Read and check the header of a checkpoint file (of a `.bin` file, its pickle).

    Args:
        checkpoint: Whose file.
        name: Which file.
        header_bytes: What it takes, if that is known: then not a byte more is read.

    Raises:
        InvalidCheckpoint: If it lies.
    """
    file = checkpoint.files.get(name)
    if file is None:
        raise InvalidMetadata(f"the profile places tensors in {name!r}, which {checkpoint.model_name} does not have")
    if not name.endswith(".safetensors"):
        from workers.checkpoint.torch_file import read_bin

        found, _, _ = read_bin(checkpoint, name)
        return Source(
            name=name,
            size_bytes=file.size_bytes,
            header=b"",
            tensors={tensor.name: tensor for tensor in found},
            metadata={},
            sha256=file.sha256,
        )
    raw = checkpoint.read(name, 0, min(file.size_bytes, header_bytes or _FIRST_READ_BYTES))
    length = int.from_bytes(raw[:8], "little")
    if 8 + length > len(raw) and length <= MAX_HEADER_BYTES and 8 + length <= file.size_bytes:
        raw += checkpoint.read(name, len(raw), 8 + length)
    tensors, metadata = parse_header(raw[8 : 8 + length], file=name, file_bytes=file.size_bytes)
    return Source(
        name=name,
        size_bytes=file.size_bytes,
        header=raw[: 8 + length],
        tensors={tensor.name: tensor for tensor in tensors},
        metadata=metadata,
        sha256=file.sha256,
    )
