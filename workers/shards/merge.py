"""Joins all nodes' shards to the checkpoint that they were cut from: its weights, config and tokenizer files."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from planner.errors import Conflict, IntegrityError, InvalidInput
from planner.profile import Tensor
from workers.checkpoint.source import Source
from workers.disk.copying import copy_range, write_all
from workers.disk.durable import write_whole
from workers.disk.space import check_fits, listing_bytes
from workers.progress import Progress, silent
from workers.shards.manifest import Manifest, ShardFile, ShardTensor, read_manifest
from workers.shards.verify import source_parts, verify
from workers.transfer.journal import check_new, staged
from workers.transfer.outputs import MAX_SHARD_BYTES, Output, pack


def merge(dirs: Path | Iterable[Path], out: Path, *, progress: Progress = silent, check: bool = True) -> Path:
    """Write the checkpoint that the shards in `dirs` came from to the new folder `out`.

    A safetensors file is put together exactly as it was, header included, so that its sha256 is the original's.
    Tensors of other files (`.bin`) come as new safetensors files, each under every name that it had. Config and
    tokenizer files are copied, and where a `modules.json` names folders, each file lies in its folder.

    Args:
        dirs: The shard folders of every node of one plan.
        out: A folder that does not exist yet, or is empty.
        progress: Told the bytes.
        check: Verify every digest first.

    Returns:
        `out`.

    Raises:
        InvalidInput: If no folder is given.
        Conflict: If `out` holds something, or the shards are of several plans.
        NotFound: If a folder holds no finished shard.
        IntegrityError: If a shard is damaged, or a node's is missing; the message says which.
        NodeFailure: If `out` cannot be written, or the disk lacks the room.
    """
    folders = [dirs] if isinstance(dirs, Path) else list(dirs)
    if not folders:
        raise InvalidInput("name at least one shard's folder")
    check_new(out)
    shards = [(folder, read_manifest(folder)) for folder in folders]
    _check_complete(shards)
    _check_room(shards, out)
    if check:
        verify(folders, progress=progress).check()
    with staged(out) as folder:
        _write(shards, folder, progress)
    return out


def _check_room(shards: list[tuple[Path, Manifest]], out: Path) -> None:
    """Check that the disk has room for the checkpoint, before a byte is read or written."""
    tensors = {tensor.name: tensor for _, manifest in shards for tensor in _named(manifest)}
    sizes = Counter({name: s.header_bytes for _, manifest in shards for name, s in manifest.source_files.items()})
    sizes |= {extra.name: extra.size_bytes for _, manifest in shards for extra in _extras(manifest)}
    for tensor in tensors.values():
        sizes[tensor.source_file] += tensor.end - tensor.begin
    sizes["model.safetensors.index.json"] = listing_bytes(list(tensors))
    check_fits(out, sizes)


def _extras(manifest: Manifest) -> Iterator[ShardFile]:
    """The small files of the checkpoint that came with a shard."""
    return (
        file
        for file in manifest.extras
        if not file.name.startswith("source/") and not file.name.endswith(".index.json")
    )


def _check_complete(shards: list[tuple[Path, Manifest]]) -> None:
    plans = {(manifest.plan_id, manifest.revision) for _, manifest in shards}
    if len(plans) > 1:
        raise Conflict(f"the shards are of {len(plans)} plans: {', '.join(sorted(plan for plan, _ in plans))}")
    missing = sorted(set(shards[0][1].nodes) - {manifest.node_id for _, manifest in shards})
    if missing:
        raise IntegrityError(
            f"the shard of {', '.join(missing)} is missing: {len(missing)} of {len(shards[0][1].nodes)} nodes",
            details={"missing_nodes": missing},
        )


def _write(shards: list[tuple[Path, Manifest]], folder: Path, progress: Progress) -> None:
    weight_map: dict[str, str] = {}
    parts = source_parts(shards)
    sizes = {tensor.name: tensor.end - tensor.begin for _, manifest in shards for tensor in _named(manifest)}
    total = sum(sizes.values())
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total, what="merge")

    for name, pieces in parts.items():
        with _created(folder / name) as target:
            at = 0
            for piece in pieces:
                if isinstance(piece, bytes):
                    at += write_all(target.fileno(), piece, at)
                    continue
                path, begin, end = piece
                with path.open("rb", buffering=0) as source:
                    copy_range(source.fileno(), target.fileno(), begin, end, at, each=step)
                at += end - begin
            os.fsync(target.fileno())
    rest: dict[str, dict[str, tuple[Tensor, str]]] = defaultdict(dict)
    for shard, manifest in shards:
        for tensor in _named(manifest):
            prefix = manifest.source_files[tensor.source_file].prefix
            if tensor.source_file in parts:
                weight_map |= {} if prefix else {tensor.name: tensor.source_file}
            else:
                moved = Tensor(
                    name=tensor.name.removeprefix(prefix),
                    file=str(shard / tensor.file),
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    begin=tensor.begin,
                    end=tensor.end,
                )
                place = _folder_of(tensor.source_file)
                rest[place].setdefault(moved.name, (moved, tensor.layer))
    # Modules that follow the model have folders of their own, with a file each.
    later = {_folder_of(n) for _, m in shards for n, source in m.source_files.items() if source.prefix}
    for place, tensors in rest.items():
        for output in _packed(tensors):
            with _created(folder / place / output.name) as target:
                write_all(target.fileno(), output.header, 0)
                for run in output.runs:
                    with Path(run.source).open("rb", buffering=0) as source:
                        copy_range(source.fileno(), target.fileno(), run.begin, run.end, run.target, each=step)
                os.fsync(target.fileno())
            if place not in later:
                weight_map |= {placed.tensor.name: place + output.name for placed in output.placed}
    for shard, manifest in shards:
        for extra in _extras(manifest):
            (folder / extra.name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / extra.name, (shard / extra.name).read_bytes())
    place = _folder_of(next(iter(weight_map.values()), ""))
    names = {tensor: file.removeprefix(place) for tensor, file in sorted(weight_map.items())}
    # A file of another name than the loader's is found by an index alone.
    if names and set(names.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_whole(folder / place / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def _folder_of(name: str) -> str:
    """The folder of a file, with a slash; "" at the root."""
    folder, slash, _ = name.rpartition("/")
    return folder + slash


def _named(manifest: Manifest) -> Iterator[ShardTensor]:
    """The tensors, under each name that the checkpoint has for them."""
    yield from manifest.tensors
    by_name = {tensor.name: tensor for tensor in manifest.tensors if manifest.twins}
    for twin in manifest.twins:
        yield replace(by_name[manifest.aliases[twin]], name=twin)


def _packed(rest: dict[str, tuple[Tensor, str]]) -> tuple[Output, ...]:
    """New files for the tensors whose checkpoint files cannot be rebuilt."""
    if not rest:
        return ()
    wanted = sorted(rest.values(), key=lambda item: (item[0].file, item[0].begin))
    sources = {
        tensor.file: Source(name=tensor.file, size_bytes=0, header=b"", tensors={}, metadata={})
        for tensor, _ in wanted
    }
    return pack(wanted, sources, max_shard_bytes=MAX_SHARD_BYTES, file_per_run=False)


def _created(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb", buffering=0)
