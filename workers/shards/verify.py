"""Proves that shards are undamaged, and that together they are the checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from planner.errors import FairshardError, IntegrityError, InvalidCheckpoint, InvalidInput
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.safetensors import parse_header
from workers.disk.copying import read_pieces
from workers.progress import Progress, silent
from workers.shards.manifest import Manifest, ShardFile, ShardTensor, read_manifest, write_manifest
from workers.transfer.digests import Digests, FileDigest

#: Bytes after which progress is told.
_STEP_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not as it must be."""

    #: The shard's folder.
    directory: str
    #: File, tensor, layer or node that it concerns.
    what: str
    #: One sentence, with expected and found.
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found."""

    problems: tuple[Problem, ...]
    #: Shards, files, tensors and bytes that were read.
    shards: int
    files: int
    tensors: int
    bytes: int
    #: Tensors of the model that the checkpoint itself lacks.
    missing_tensors: tuple[str, ...] = ()
    #: Nodes of the plan whose shard is not among those given.
    missing_nodes: tuple[str, ...] = ()
    #: Checkpoint files put together again from all shards -> sha256 of the result.
    rebuilt: Mapping[str, str] = field(default_factory=dict)
    #: Of these, those whose sha256 is the one that the Hub states, or equal to the checkpoint's file.
    proven: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything given is right (parts of a plan may be given)."""
        return not self.problems

    @property
    def complete(self) -> bool:
        """Whether everything is right and nothing of the model is missing."""
        return self.ok and not self.missing_nodes

    def check(self) -> None:
        """Raise if anything given is wrong.

        Raises:
            IntegrityError: With the first problem, and all in its details.
        """
        if self.problems:
            problem = self.problems[0]
            raise IntegrityError(
                f"{problem.directory}: {problem.what}: {problem.reason} ({len(self.problems)} problems)",
                details=self.to_json(),
            )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, for `--json`."""
        return {"ok": self.ok, "complete": self.complete, **asdict(self)}


def verify(
    dirs: Path | Iterable[Path],
    *,
    checkpoint: Checkpoint | None = None,
    rebuild: bool = True,
    progress: Progress = silent,
) -> VerifyReport:
    """Read every byte of the shards in `dirs` and compare it with the manifests, and with the checkpoint.

    A file that was linked without reading it gets its digests now. With all shards of a plan, the checkpoint's
    files are put together in passing, and their sha256 compared with what the Hub states: that needs no network.

    Args:
        dirs: Shard folders.
        checkpoint: Compare each tensor with this one's bytes as well; files whose stated sha256 is met already,
            and files that are not on this machine and have none, are not fetched for it.
        rebuild: Put the checkpoint's files together, which reads what is complete a second time.
        progress: Told the bytes.

    Raises:
        InvalidInput: If no folder is given.
        NotFound: If one holds no finished shard.
        IntegrityError: If a manifest cannot be read.
    """
    folders = [dirs] if isinstance(dirs, Path) else list(dirs)
    if not folders:
        raise InvalidInput("name at least one shard's folder")
    shards = [(folder, read_manifest(folder)) for folder in folders]
    total = sum(file.size_bytes for _, manifest in shards for file in manifest.files)
    reading = _Reading(progress=progress, total=total)
    problems: list[Problem] = _contradictions(shards)
    for folder, manifest in shards:
        problems += reading.check_shard(folder, manifest)
    missing = _missing_nodes(shards)
    rebuilt: dict[str, str] = {}
    proven: list[str] = []
    if not problems:
        for name, sha256 in (rebuild_digests(shards) if rebuild else {}).items():
            rebuilt[name] = sha256
            stated = {m.source_files[name].sha256 for _, m in shards if name in m.source_files} - {None}
            if checkpoint is not None and name in checkpoint.files:
                stated |= {checkpoint.files[name].sha256} - {None}
            if not stated and checkpoint is not None:
                stated = _sha256_of_source(checkpoint, name)
            if stated == {sha256}:
                proven.append(name)
            elif stated:
                problems.append(
                    Problem(
                        directory="",
                        what=name,
                        reason=f"put together it has sha256 {sha256}, the checkpoint's is {stated}",
                    )
                )
        if checkpoint is not None:
            problems += _compare(shards, checkpoint, skip=set(proven))
    return VerifyReport(
        problems=tuple(problems),
        shards=len(shards),
        files=sum(len(manifest.files) for _, manifest in shards),
        tensors=sum(len(manifest.tensors) for _, manifest in shards),
        bytes=total,
        missing_tensors=tuple(sorted({name for _, m in shards for name in m.missing_tensors or ()})),
        missing_nodes=missing,
        rebuilt=rebuilt,
        proven=tuple(sorted(proven)),
    )


def digest_file(path: Path) -> str:
    """The digest of a file, as "blake3:<hex>"."""
    digest = blake3()
    for data in read_pieces(path, 0, path.stat().st_size):
        digest.update(data)
    return f"blake3:{digest.hexdigest()}"


def rebuild_digests(shards: Sequence[tuple[Path, Manifest]]) -> dict[str, str]:
    """The sha256 of each checkpoint file that the shards hold all tensors and the header of."""
    found = {}
    for name, parts in source_parts(shards).items():
        digest = hashlib.sha256()
        for part in parts:
            for data in (part,) if isinstance(part, bytes) else read_pieces(*part):
                digest.update(data)
        found[name] = digest.hexdigest()
    return found


def source_parts(shards: Sequence[tuple[Path, Manifest]]) -> dict[str, list[bytes | tuple[Path, int, int]]]:
    """Checkpoint file -> its header and the places of its tensors in order, where nothing of it is missing."""
    headers: dict[str, bytes] = {}
    places: dict[str, dict[str, tuple[Path, int, int]]] = {}
    for folder, manifest in shards:
        for name, source in manifest.source_files.items():
            if source.header_bytes and name not in headers:
                headers[name] = (folder / "source" / f"{name}.header").read_bytes()
        for tensor in manifest.tensors:
            place = (folder / tensor.file, tensor.begin, tensor.end)
            places.setdefault(tensor.source_file, {}).setdefault(tensor.name, place)
    files = {name: source for _, manifest in shards for name, source in manifest.source_files.items()}
    whole: dict[str, list[bytes | tuple[Path, int, int]]] = {}
    for name, header in headers.items():
        tensors, _ = parse_header(header[8:], file=name, file_bytes=files[name].size_bytes)
        held, names = places.get(name, {}), [files[name].prefix + tensor.name for tensor in tensors]
        if all(tensor in held for tensor in names):
            whole[name] = [header, *(held[tensor] for tensor in names)]
    return whole


class _Reading:
    def __init__(self, *, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def check_shard(self, folder: Path, manifest: Manifest) -> list[Problem]:
        """Read one shard; digests that it lacked are written to its manifest."""
        problems: list[Problem] = []
        files: list[ShardFile] = []
        found: dict[str, str] = {}
        for file in manifest.files:
            tensors = [tensor for tensor in manifest.tensors if tensor.file == file.name]
            try:
                digests = self._read(folder / file.name, file, tensors)
                problems += _check_file(folder, file, tensors, digests)
                found |= digests.tensors
                files.append(replace(file, digest=file.digest or digests.file))
            except (OSError, FairshardError) as error:
                problems.append(Problem(directory=str(folder), what=file.name, reason=str(error)))
        for extra in manifest.extras:
            path = folder / extra.name
            if not path.is_file() or digest_file(path) != extra.digest:
                problems.append(
                    Problem(directory=str(folder), what=extra.name, reason="missing, or changed since it was written")
                )
        if not problems and any(file.digest is None for file in manifest.files):
            tensors_now = tuple(replace(t, digest=t.digest or found[t.name]) for t in manifest.tensors)
            with contextlib.suppress(OSError):  # on a disk that may not be written to they are found each time
                write_manifest(replace(manifest, files=tuple(files), tensors=tensors_now), folder)
        return problems

    def _read(self, path: Path, file: ShardFile, tensors: Sequence[ShardTensor]) -> Digests:
        """The digests of a file and its tensors.

        Raises:
            InvalidCheckpoint: If its size, or the sha256 that is stated for it, is another.
        """
        size = path.stat().st_size
        if size != file.size_bytes:
            raise InvalidCheckpoint(f"it has {size:,} bytes, not {file.size_bytes:,}")
        digest = FileDigest(path, [(t.name, t.begin, t.end) for t in tensors], sha256=file.sha256 is not None)
        for at in range(0, size, _STEP_BYTES):
            count = min(_STEP_BYTES, size - at)
            digest.up_to(at + count)
            self._done += count
            self._progress(self._done, self._total, what="verify")
        found = digest.finish()
        if found.sha256 != file.sha256:
            raise InvalidCheckpoint(f"its sha256 is {found.sha256}, not {file.sha256}")
        return found


def _check_file(folder: Path, file: ShardFile, tensors: Sequence[ShardTensor], found: Digests) -> list[Problem]:
    problems = []
    for tensor in tensors:
        if tensor.digest not in {None, found.tensors[tensor.name]}:
            reason = f"in {file.name} it is {found.tensors[tensor.name]}, not {tensor.digest}"
            problems.append(Problem(directory=str(folder), what=tensor.name, reason=reason))
    if file.digest not in {None, found.file}:
        reason = f"it is {found.file}, not {file.digest}"
        problems.append(Problem(directory=str(folder), what=file.name, reason=reason))
    with (folder / file.name).open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header, _ = parse_header(source.read(length), file=file.name, file_bytes=file.size_bytes)
    stated = {(t.name, t.dtype, t.shape, t.begin, t.end) for t in tensors}
    if {(t.name, t.dtype, t.shape, t.begin, t.end) for t in header} != stated:
        reason = "its header and the manifest name different tensors"
        problems.append(Problem(directory=str(folder), what=file.name, reason=reason))
    return problems


def _contradictions(shards: Sequence[tuple[Path, Manifest]]) -> list[Problem]:
    """Shards of different plans, and tensors whose digest differs between two nodes."""
    problems = []
    first = shards[0][1]
    digests: dict[str, str] = {}
    for folder, manifest in shards:
        if (manifest.plan_id, manifest.revision) != (first.plan_id, first.revision):
            reason = f"plan {manifest.plan_id} at {manifest.revision}, others are {first.plan_id} at {first.revision}"
            problems.append(Problem(directory=str(folder), what=manifest.node_id, reason=reason))
        for tensor in manifest.tensors:
            if tensor.digest and digests.setdefault(tensor.name, tensor.digest) != tensor.digest:
                reason = f"{tensor.digest} here, {digests[tensor.name]} on another node"
                problems.append(Problem(directory=str(folder), what=tensor.name, reason=reason))
    return problems


def _missing_nodes(shards: Sequence[tuple[Path, Manifest]]) -> tuple[str, ...]:
    present = {manifest.node_id for _, manifest in shards}
    return tuple(sorted({node for _, manifest in shards for node in manifest.nodes} - present))


def _sha256_of_source(checkpoint: Checkpoint, name: str) -> set[str | None]:
    path = checkpoint.local_path(name) if name in checkpoint.files else None
    if path is None:
        return set()
    with path.open("rb") as file:
        return {hashlib.file_digest(file, "sha256").hexdigest()}


def _compare(shards: Sequence[tuple[Path, Manifest]], checkpoint: Checkpoint, *, skip: set[str]) -> list[Problem]:
    """Compare each tensor with the checkpoint's bytes, where the whole file was not proven already."""
    problems = []
    for folder, manifest in shards:
        if manifest.revision != checkpoint.revision:
            reason = f"cut from revision {manifest.revision}, the checkpoint is {checkpoint.revision}"
            problems.append(Problem(directory=str(folder), what=manifest.node_id, reason=reason))
            continue
        for tensor in manifest.tensors:
            if tensor.source_file in skip:
                continue
            mine, theirs, at = blake3(), blake3(), tensor.source_begin
            for data in read_pieces(folder / tensor.file, tensor.begin, tensor.end):
                mine.update(data)
                theirs.update(checkpoint.read(tensor.source_file, at, at + len(data)))
                at += len(data)
            if mine.digest() != theirs.digest():
                reason = f"blake3:{mine.hexdigest()} here, blake3:{theirs.hexdigest()} in the checkpoint"
                problems.append(Problem(directory=str(folder), what=tensor.name, reason=reason))
    return problems
