"""What to fetch, cut into segments: each is retried, checked and resumed by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import InvalidInput
from workers.checkpoint.base import Checkpoint
from workers.network.ranges import RemoteFile, Server
from workers.transfer.outputs import Output

if TYPE_CHECKING:
    from workers.checkpoint.hub import HubCheckpoint

#: Enough that a request's round trip is small beside its bytes, small enough to lose little when it breaks.
LARGEST_BYTES = 16 * 1024 * 1024
_SMALLEST_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class LocalOrigin:
    """Bytes that lie in a file here, from `offset` on."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class RemoteOrigin:
    """Bytes that a server has, from `offset` of `file` on."""

    server: Server
    file: RemoteFile
    offset: int


Origin = LocalOrigin | RemoteOrigin


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Bytes [begin, end) of an output file, and where they can be had, best place first."""

    output: int
    begin: int
    end: int
    origins: tuple[Origin, ...]


def cut(
    output: Output,
    index: int,
    *,
    origins: Callable[[str, str, int], tuple[Origin, ...]],
    connections: int,
    total_bytes: int,
) -> list[Segment]:
    """Cut an output file into segments: neighbours in the origin are joined, large tensors divided.

    Args:
        output: The file.
        index: Its number, which the segments carry.
        origins: (tensor name, source file, offset in it) -> where the bytes from there on can be had; the name is
            empty for a file's header.
        connections: How many will fetch at once; small files are cut so that all have work.
        total_bytes: Bytes of all output files together.
    """
    largest = max(_SMALLEST_BYTES, min(LARGEST_BYTES, total_bytes // (2 * connections)))
    pieces: list[tuple[int, int, tuple[Origin, ...]]] = []
    if output.whole is not None:
        first = min((placed.begin for placed in output.placed), default=output.size_bytes)
        pieces.append((0, first, origins("", output.whole, 0)))
    for placed in output.placed:
        if placed.begin < placed.end:
            found = origins(placed.tensor.name, placed.tensor.file, placed.tensor.begin)
            pieces.append((placed.begin, placed.end, found))
    segments: list[Segment] = []
    for begin, end, places in pieces:
        last = segments[-1] if segments else None
        at = begin
        if last and last.end == begin and _follows(last, places):
            at = min(end, last.begin + largest)
            if at > begin:
                segments[-1] = Segment(output=index, begin=last.begin, end=at, origins=last.origins)
            at = max(at, begin)
        while at < end:
            stop = min(end, at + largest)
            segments.append(Segment(output=index, begin=at, end=stop, origins=_shifted(places, at - begin)))
            at = stop
    return segments


def _follows(segment: Segment, places: Sequence[Origin]) -> bool:
    """Whether `places` go on where every origin of `segment` ends."""
    moved = _shifted(segment.origins, segment.end - segment.begin)
    return len(moved) == len(places) and all(_key(a) == _key(b) for a, b in zip(moved, places, strict=True))


def _shifted(places: Sequence[Origin], by: int) -> tuple[Origin, ...]:
    return tuple(
        LocalOrigin(place.path, place.offset + by)
        if isinstance(place, LocalOrigin)
        else RemoteOrigin(place.server, place.file, place.offset + by)
        for place in places
    )


def _key(place: Origin) -> tuple[object, ...]:
    where = place.path if isinstance(place, LocalOrigin) else place.file.url
    return where, place.offset


def of_checkpoint(checkpoint: Checkpoint, file: str, offset: int) -> Origin:
    """The checkpoint's own bytes, from `offset` of `file` on: here, or on the Hub."""
    local = checkpoint.local_path(file)
    if local is not None:
        return LocalOrigin(local, offset)
    hub = _remote(checkpoint)
    return RemoteOrigin(hub.server, hub.remote(file), offset)


def _remote(checkpoint: Checkpoint) -> HubCheckpoint:
    from workers.checkpoint.hub import HubCheckpoint

    if not isinstance(checkpoint, HubCheckpoint):
        raise InvalidInput(f"the files of {checkpoint.model_name} are neither on this machine nor on a server")
    return checkpoint
