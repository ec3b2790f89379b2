"""A shard's weight files: which tensors go into which file, and where each byte comes from and goes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.dtypes import bits
from planner.profile import Tensor
from workers.checkpoint.source import Source

_PAGE_BYTES = 4096
#: Largest weight file unless the user says otherwise; transformers' own limit was 5 GB for years.
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor and its place in an output file."""

    tensor: Tensor
    layer: str
    begin: int

    @property
    def end(self) -> int:
        """One past its last byte in the output file."""
        return self.begin + self.tensor.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Bytes [begin, end) of a checkpoint file that go to `target` of an output file."""

    source: str
    begin: int
    end: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One weight file of the shard."""

    name: str
    #: Everything before the data; empty where `whole` is copied with its own.
    header: bytes
    size_bytes: int
    placed: tuple[Placed, ...]
    #: In the order of the output file, neighbours joined; they fill it behind the header.
    runs: tuple[Run, ...]
    #: The checkpoint file that this is, byte for byte.
    whole: str | None = None

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """Each tensor's name, first byte, and one past its last."""
        return [(placed.tensor.name, placed.begin, placed.end) for placed in self.placed]


def pack(
    wanted: Sequence[tuple[Tensor, str]],
    sources: Mapping[str, Source],
    *,
    max_shard_bytes: int,
    file_per_run: bool,
) -> tuple[Output, ...]:
    """Divide tensors over output files, and place each.

    Args:
        wanted: Tensors with their layers, by checkpoint file and place.
        sources: The checkpoint files that they come from.
        max_shard_bytes: A file is closed before it would grow beyond this; a larger tensor has its own.
        file_per_run: Give each contiguous run a file of its own, so that all of it can be reflinked.
    """
    groups: list[list[tuple[Tensor, str]]] = [[]]
    whole: dict[int, str] = {}
    filled = 0
    for name, items in itertools.groupby(wanted, key=lambda item: item[0].file):
        source, mine = sources[name], list(items)
        as_it_is = source.header and not source.prefix and len(mine) == len(source.tensors)
        if as_it_is and source.size_bytes <= max(max_shard_bytes, 1):
            if groups[-1]:
                groups.append([])
            groups[-1] = mine
            whole[len(groups) - 1] = name
            groups.append([])
            filled = 0
            continue
        previous: Tensor | None = None
        for tensor, layer in mine:
            gap = previous is not None and tensor.begin != previous.end
            if groups[-1] and (
                filled + tensor.size_bytes > max_shard_bytes or (file_per_run and (gap or not previous))
            ):
                groups.append([])
                filled = 0
            groups[-1].append((tensor, layer))
            filled += tensor.size_bytes
            previous = tensor
    if len(groups) > 1 and not groups[-1]:
        groups.pop()
    return tuple(
        _output(_file_name(number, len(groups)), group, sources, whole.get(number))
        for number, group in enumerate(groups)
    )


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _output(
    name: str, group: Sequence[tuple[Tensor, str]], sources: Mapping[str, Source], whole: str | None
) -> Output:
    if whole is not None:
        source = sources[whole]
        return Output(
            name=name,
            header=b"",
            size_bytes=source.size_bytes,
            placed=tuple(Placed(tensor=tensor, layer=layer, begin=tensor.begin) for tensor, layer in group),
            runs=(Run(source=whole, begin=0, end=source.size_bytes, target=0),),
            whole=whole,
        )
    group = _aligned(group)
    metadata: dict[str, str] = {}
    for file in dict.fromkeys(tensor.file for tensor, _ in group):
        metadata |= sources[file].metadata
    entries: dict[str, object] = {"__metadata__": {"format": "pt"} | metadata}
    at = 0
    for tensor, _ in group:
        end = at + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    header = _header(entries, begin=next((t.begin for t, _ in group if t.size_bytes), 0))
    placed: list[Placed] = []
    runs: list[Run] = []
    at = len(header)
    for tensor, layer in group:
        placed.append(Placed(tensor=tensor, layer=layer, begin=at))
        last = runs[-1] if runs else None
        if last and last.source == tensor.file and last.end == tensor.begin:
            runs[-1] = replace(last, end=tensor.end)
        elif tensor.size_bytes:
            runs.append(Run(source=tensor.file, begin=tensor.begin, end=tensor.end, target=at))
        at += tensor.size_bytes
    return Output(name=name, header=header, size_bytes=at, placed=tuple(placed), runs=tuple(runs))


def _aligned(group: Sequence[tuple[Tensor, str]]) -> Sequence[tuple[Tensor, str]]:
    """The group in an order in which each tensor begins at a multiple of its item's size.

    Readers need that to view the data in place. The checkpoint's own order nearly always has it; if not, wider items
    go first.
    """
    at = 0
    for tensor, _ in group:
        if at % _item_bytes(tensor):
            return sorted(group, key=lambda item: -_item_bytes(item[0]))
        at += tensor.size_bytes
    return group


def _item_bytes(tensor: Tensor) -> int:
    return max(1, (bits(tensor.dtype) or 8) // 8)


def _header(entries: Mapping[str, object], *, begin: int) -> bytes:
    """The header's bytes, padded so that the data keeps its place within a page (reflinks need that)."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    step, offset = (_PAGE_BYTES, begin % _PAGE_BYTES) if begin % 8 == 0 else (8, 0)
    padding = (offset - 8 - len(text)) % step
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding
