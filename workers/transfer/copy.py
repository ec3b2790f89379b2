"""Fills output files from checkpoint files that lie on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from planner.errors import IntegrityError, NodeFailure
from workers.disk.copying import clone_run, copy_range, own, reserve, send_to_disk, write_all
from workers.disk.durable import explained, sync
from workers.progress import Progress
from workers.transfer.checking import Checks, Digester
from workers.transfer.digests import Digests, FileDigest
from workers.transfer.journal import Journal
from workers.transfer.outputs import Output
from workers.transfer.threads import ThreadGroup


def copy_outputs(
    outputs: Sequence[Output],
    sources: Mapping[str, Path],
    journal: Journal,
    *,
    checks: Checks,
    progress: Progress,
    clone: bool = False,
) -> dict[str, Digests | None]:
    """Copy `outputs` into the journal's folder, file after file.

    One thread copies (a second one would gain nothing: one takes all of the memory's bandwidth), and another digests
    what was just copied. A file that an interrupted call finished is kept if its bytes still have the noted digest.

    Args:
        outputs: What to write.
        sources: Checkpoint file -> where it lies.
        journal: The folder, and what of it is done.
        checks: How to check.
        progress: Told the bytes.
        clone: Share extents with the sources where runs lie on pages; then nothing is digested.

    Returns:
        Digests by output name; None where no bytes passed, or no digests were asked for.

    Raises:
        NodeFailure: If the disk is full, or a file cannot be read or written.
        IntegrityError: If a tensor is not what `checks` knows.
    """
    threads = ThreadGroup(total=sum(output.size_bytes for output in outputs), progress=progress, what="shard")
    copier = _Copier(
        sources=sources, journal=journal, checks=checks, threads=threads, digester=Digester(threads), clone=clone
    )

    def copy_all() -> None:
        try:
            for output in outputs:
                copier.copy(output)
        finally:
            copier.digester.close()

    threads.start(copy_all)
    threads.wait()
    return copier.results


@dataclass(slots=True, kw_only=True)
class _Copier:
    sources: Mapping[str, Path]
    journal: Journal
    checks: Checks
    threads: ThreadGroup
    digester: Digester
    clone: bool
    results: dict[str, Digests | None] = field(default_factory=dict)

    def copy(self, output: Output) -> None:
        path = self.journal.folder / output.name
        with explained(path), own(path) as target:
            if self._resume(output, target, path):
                os.fsync(target)
                return
            os.ftruncate(target, 0)
            if not self.clone:
                reserve(target, output.size_bytes)
            write_all(target, output.header, 0)
            self.threads.advance(len(output.header))
            if self.clone and self._cloned(output, path):
                self.results[output.name] = None
                os.fsync(target)
                return
            digest = self._digest(output, path) if self.checks.digests else None
            at = 0

            def step(count: int) -> None:
                nonlocal at
                send_to_disk(target, at, count)
                at += count
                if digest is not None:
                    reached = at
                    self.digester.submit(lambda: digest.up_to(reached))
                self.threads.advance(count)

            for run in output.runs:
                at = run.target
                with self._source(run.source) as source:
                    copy_range(source.fileno(), target, run.begin, run.end, run.target, each=step)
        self.digester.submit(lambda: self._finish(output, path, digest))

    def _finish(self, output: Output, path: Path, digest: FileDigest | None) -> None:
        with explained(path):
            found = None
            if digest is not None:
                digest.up_to(output.size_bytes)
                found = digest.finish()
                self._check(output, found)
            sync(path)
            if found is not None:
                self.journal.record(output, 0, output.size_bytes, found.file)
        self.results[output.name] = found

    def _check(self, output: Output, found: Digests) -> None:
        wrong = self.checks.wrong(output.name, found)
        if wrong:
            raise IntegrityError(
                f"{wrong[0]}: the checkpoint's bytes here are {found.tensors[wrong[0]]}, elsewhere they are "
                f"{self.checks.known.get(wrong[0]) or self.checks.stated_sha256.get(output.name)} "
                f"({len(wrong)} tensors differ): this copy is damaged, or another one",
                details={"tensors": wrong[:20]},
            )

    def _resume(self, output: Output, target: int, path: Path) -> bool:
        """Whether an interrupted call finished this file, and its bytes are still what they were."""
        claim = self.journal.claim(output, 0, output.size_bytes)
        if claim is None or not self.checks.digests or os.fstat(target).st_size != output.size_bytes:
            return False
        digest = self._digest(output, path)
        digest.up_to(output.size_bytes)
        found = digest.finish()
        if found.file != claim:
            return False
        self.results[output.name] = found
        self.threads.advance(output.size_bytes)
        return True

    def _digest(self, output: Output, path: Path) -> FileDigest:
        return FileDigest(path, output.spans, sha256=self.checks.sha256 or output.name in self.checks.stated_sha256)

    def _cloned(self, output: Output, path: Path) -> bool:
        """Whether all runs could be shared; they lie alike within pages, so only their edges are copied."""
        for run in output.runs:
            if not clone_run(self.sources[run.source], path, run.begin, run.end, run.target):
                return False
            self.threads.advance(run.end - run.begin)
        return True

    def _source(self, name: str) -> FileIO:
        try:
            return self.sources[name].open("rb", buffering=0)
        except OSError as error:
            raise NodeFailure(f"{self.sources[name]} cannot be read: {error.strerror}") from error
