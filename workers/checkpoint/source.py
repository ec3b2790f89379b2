"""The header of one checkpoint file, kept byte for byte: with it a shard can rebuild and prove the whole file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.profile import Tensor
from workers.checkpoint.base import Checkpoint, file_of
from workers.checkpoint.choice.modules import module_prefix
from workers.checkpoint.safetensors import read_header


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint file with its header as it was read."""

    name: str
    size_bytes: int
    #: Everything before the data; empty where the file is no safetensors file.
    header: bytes = b""
    #: By name, in the order of their places.
    tensors: Mapping[str, Tensor]
    #: The header's `__metadata__`.
    metadata: Mapping[str, str]
    sha256: str | None = None
    #: What its tensors' names begin with that is not in the file: a later module's are told apart by its folder.
    prefix: str = ""


def read_source(checkpoint: Checkpoint, name: str, *, header_bytes: int | None = None) -> Source:
    """Read and check the header of a checkpoint file (of a `.bin` file, its pickle).

    Args:
        checkpoint: Whose file.
        name: Which file.
        header_bytes: The header's size where it is known: then not a byte more is read.

    Raises:
        NotFound: If the checkpoint has no such file.
        InvalidCheckpoint: If the header is malformed, or contradicts the file's size.
        Unavailable: If the server cannot be reached.
    """
    file = file_of(checkpoint, name)
    if name.endswith(".safetensors"):
        header, tensors, metadata = read_header(checkpoint, name, header_bytes=header_bytes)
    else:
        from workers.checkpoint.torch_file import read_bin

        header, tensors, metadata = b"", read_bin(checkpoint, name), {}
    prefix = module_prefix(checkpoint, name)
    if prefix:
        tensors = [replace(tensor, name=prefix + tensor.name) for tensor in tensors]
    return Source(
        name=name,
        size_bytes=file.size_bytes,
        header=header,
        tensors={tensor.name: tensor for tensor in tensors},
        metadata=metadata,
        sha256=file.sha256,
        prefix=prefix,
    )
