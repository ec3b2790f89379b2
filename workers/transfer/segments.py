"""What to fetch, cut into segments: each is retried, checked and resumed by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workers.checkpoint.base import Checkpoint
from workers.checkpoint.choice.part import whole_of
from workers.network.ranges import RemoteFile, Server
from workers.transfer.outputs import Output

#: Enough that a request's round trip is small beside its bytes, small enough to lose little when it breaks.
LARGEST_BYTES = 16 * 1024 * 1024
_SMALLEST_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Bytes from `offset` of a file on: of one on this machine, or of one that a server has."""

    file: Path | RemoteFile
    offset: int
    #: None for a file on this machine.
    server: Server | None = field(default=None, compare=False)


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
        if last and last.end == begin and _shifted(last.origins, last.end - last.begin) == places:
            at = min(end, last.begin + largest)
            if at > begin:
                segments[-1] = Segment(output=index, begin=last.begin, end=at, origins=last.origins)
            at = max(at, begin)
        while at < end:
            stop = min(end, at + largest)
            segments.append(Segment(output=index, begin=at, end=stop, origins=_shifted(places, at - begin)))
            at = stop
    return segments


def _shifted(places: Sequence[Origin], by: int) -> tuple[Origin, ...]:
    return tuple(replace(place, offset=place.offset + by) for place in places)


def of_checkpoint(checkpoint: Checkpoint, file: str, offset: int) -> Origin:
    """The checkpoint's own bytes, from `offset` of `file` on: here, or on the Hub."""
    local = checkpoint.local_path(file)
    if local is not None:
        return Origin(file=local, offset=offset)
    from workers.checkpoint.hub import HubCheckpoint

    checkpoint, file = whole_of(checkpoint, file)
    assert isinstance(checkpoint, HubCheckpoint)  # a folder's files are all local
    return Origin(file=checkpoint.remote(file), offset=offset, server=checkpoint.server)
