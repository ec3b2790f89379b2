"""`.bin` checkpoints: the byte range of each tensor, found without running what the pickle asks for.

No data is loaded: a tensor is a range of the file.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from planner.dtypes import bits
from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.torch_zip import is_zip, read_archive
from workers.checkpoint.unpickler import Incomplete, Machine, Storage, View

_MAX_PICKLE_BYTES = 100_000_000
_FIRST_READ_BYTES = 1 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a `.bin` file: its view, and where its storage begins in the file."""

    view: View
    begin: int


def read_bin(checkpoint: Checkpoint, name: str) -> list[Tensor]:
    """Read the tensors of a `.bin` file as ranges of it, by offset.

    Several may share one range (tied weights).

    Raises:
        InvalidCheckpoint: If the file is no state dict, asks for anything but tensors, or has strided tensors.
    """
    stored = read_views(checkpoint, name)
    tensors: list[Tensor] = []
    for tensor, each in stored.items():
        if not each.view.contiguous:
            raise InvalidCheckpoint(
                f"{name}: tensor {tensor!r} is stored with strides {list(each.view.stride)}, so that no range of the "
                f"file is the tensor; `fairshard convert` writes it out plainly",
                details={"file": name, "tensor": tensor},
            )
        width = (bits(each.view.dtype) or 8) // 8
        begin = each.begin + each.view.offset * width
        end = begin + prod(each.view.shape) * width
        tensors.append(
            Tensor(name=tensor, file=name, dtype=each.view.dtype, shape=each.view.shape, begin=begin, end=end)
        )
    tensors.sort(key=lambda each: (each.begin, each.end))
    for one, other in itertools.pairwise(tensors):
        if other.begin < one.end and (one.begin, one.end) != (other.begin, other.end):
            raise InvalidCheckpoint(
                f"{name}: tensors {one.name!r} and {other.name!r} overlap in part; `fairshard convert` parts them",
                details={"file": name, "tensors": [one.name, other.name]},
            )
    return tensors


def read_views(checkpoint: Checkpoint, name: str) -> dict[str, Stored]:
    """Every tensor of a `.bin` file by name, with its place; of torch's present format or that before 1.6.

    Raises:
        InvalidCheckpoint: If the file is no state dict of tensors.
    """
    size = checkpoint.files[name].size_bytes
    if is_zip(checkpoint, name):
        archive = read_archive(checkpoint, name)
        pickled = archive.pickle_bytes(_MAX_PICKLE_BYTES)
        state = Machine(name).run(io.BytesIO(pickled))
        places: Callable[[Storage], int] = lambda storage: archive.place(storage.key, storage.size_bytes)  # noqa: E731
    else:
        state, legacy = _read_legacy(checkpoint, name, size)
        places = lambda storage: legacy[storage.key]  # noqa: E731
    if not isinstance(state, dict):
        raise InvalidCheckpoint(f"{name} holds a {type(state).__name__}, not a dict of tensors")
    found = {}
    for key, view in state.items():
        if not isinstance(key, str) or not isinstance(view, View):
            raise InvalidCheckpoint(f"{name}: {str(key)[:80]!r} is a {type(view).__name__}, not a tensor")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise InvalidCheckpoint(f"{name}: {key!r:.80} is no name of a tensor: {error}") from error
        begin = places(view.storage)
        _check_view(name, key, view, begin, size)
        found[key] = Stored(view, begin)
    return found


def _check_view(name: str, key: str, view: View, begin: int, size: int) -> None:
    storage_bytes, width = view.storage.size_bytes, (bits(view.dtype) or 8) // 8
    if view.offset < 0 or min(view.shape, default=0) < 0 or min(view.stride, default=0) < 0:
        raise InvalidCheckpoint(f"{name}: tensor {key!r} has a negative offset, shape or stride")
    if view.last * width > storage_bytes:
        raise InvalidCheckpoint(
            f"{name}: tensor {key!r} reads {view.last * width:,} bytes of a storage of {storage_bytes:,}"
        )
    if begin + storage_bytes > size:
        raise InvalidCheckpoint(
            f"{name}: tensor {key!r} ends at byte {begin + storage_bytes:,}, beyond the file's {size:,} (cut short?)"
        )


def _read_legacy(checkpoint: Checkpoint, name: str, size: int) -> tuple[Any, dict[str, int]]:
    """The format before torch 1.6: five pickles, then each storage's length and values."""
    length = min(size, _FIRST_READ_BYTES)
    while True:
        data = io.BytesIO(checkpoint.read(name, 0, length))
        try:
            machine = Machine(name)
            if machine.run(data) != _LEGACY_MAGIC:
                raise InvalidCheckpoint(f"{name} is no file of torch.save (a Git LFS pointer, or cut short?)")
            machine.run(data)
            machine.run(data)
            state = machine.run(data)
            keys = machine.run(data)
            break
        except Incomplete as error:
            if length >= size or length >= _MAX_PICKLE_BYTES:
                raise InvalidCheckpoint(f"{name} is no file of torch.save, or is cut short: {error}") from error
            length = min(size, length * 4)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or set(keys) != machine.storages.keys():
        raise InvalidCheckpoint(f"{name}: the list of storages is not one")
    places, at = {}, data.tell()
    for key in keys:
        storage = machine.storages[key]
        places[key] = at + 8
        at += 8 + storage.size_bytes
    return state, places
