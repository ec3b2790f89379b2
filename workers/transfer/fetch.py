"""Fills output files by ranges from the Hub, other nodes and local files, over many connections at once."""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from planner.errors import FairshardError, IntegrityError
from workers.disk.copying import own, read_pieces, reserve, send_to_disk, write_all
from workers.disk.durable import explained, sync
from workers.network.ranges import RangeReader, Server
from workers.progress import Progress
from workers.transfer.checking import Checks, Digester
from workers.transfer.digests import WHICH_IS_WRONG, Digests, FileDigest
from workers.transfer.journal import Journal
from workers.transfer.outputs import Output
from workers.transfer.segments import Origin, Segment
from workers.transfer.threads import ThreadGroup

CONNECTIONS = 16
#: Connections to begin with. More help on a slow network; on one that is as fast as this machine they only take
#: time from each other: 243 MB over loopback on 2 cores took 0.32 s with 16 from the start, 0.25 s with 2.
_FIRST_LANES = 2
#: How long the machine is watched before their number is doubled.
_LOOK_S = 0.02
#: Times that bytes which prove wrong are fetched before they are given up.
ROUNDS = 3
_BUFFER_BYTES = 1024 * 1024


@dataclass(slots=True, kw_only=True, eq=False)
class _File:
    """An output file on its way."""

    output: Output
    path: Path
    segments: list[Segment]
    digest: FileDigest
    #: Segments whose bytes are there, by number.
    there: set[int] = field(default_factory=set)
    #: Segments up to which all are there.
    front: int = 0
    round: int = 0


def fetch_outputs(
    outputs: Sequence[Output],
    segments: Sequence[Segment],
    journal: Journal,
    *,
    checks: Checks,
    progress: Progress,
    connections: int = CONNECTIONS,
) -> dict[str, Digests]:
    """Fetch `segments` straight to their places in `outputs`, in the journal's folder.

    Bytes that an interrupted call wrote are kept if they still have the digest that it noted.

    Args:
        outputs: The files; their headers are written here.
        segments: What fills them, as `workers.transfer.segments.cut` made them.
        journal: The folder, and what of it is done.
        checks: How to check.
        progress: Told the bytes.
        connections: How many ranges are fetched at once, at most.

    Returns:
        Digests by output name.

    Raises:
        NodeFailure: If the disk is full, or cannot be written.
        IntegrityError: If bytes stay wrong however often they are fetched.
        AccessDenied, NotFound, Unavailable: As the server answers.
    """
    total = sum(output.size_bytes for output in outputs)
    threads = ThreadGroup(total=total, progress=progress, what="shard")
    job = _Fetch(journal, checks, threads)
    try:
        job.begin(outputs, segments)
        job.start(max(1, min(connections, len(segments))))
    except BaseException:
        threads.stop()
        raise
    threads.wait()
    return job.results


class _Fetch:
    def __init__(self, journal: Journal, checks: Checks, threads: ThreadGroup) -> None:
        self.results: dict[str, Digests] = {}
        self._journal = journal
        self._checks = checks
        self._threads = threads
        self._lock = threading.Lock()
        self._files: list[_File] = []
        self._ahead: queue.SimpleQueue[tuple[_File, int] | None] = queue.SimpleQueue()
        self._digester = Digester(threads)
        #: Servers that failed while another could be asked: not asked again, so a dead node is waited for only once.
        self._failed: set[int] = set()
        self._over = threading.Event()
        threads.on_stop(self._wake)

    def begin(self, outputs: Sequence[Output], segments: Sequence[Segment]) -> None:
        """Make the files at their full size, and line up what fills them."""
        by_output: dict[int, list[Segment]] = collections.defaultdict(list)
        for segment in segments:
            by_output[segment.output].append(segment)
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        for index, output in enumerate(outputs):
            path = self._journal.folder / output.name
            with explained(path):
                digest = FileDigest(path, output.spans, sha256=self._with_sha256(output), buffer=buffer)
                file = _File(output=output, path=path, segments=by_output[index], digest=digest)
                self._files.append(file)
                with own(path) as descriptor:
                    os.ftruncate(descriptor, output.size_bytes)
                    reserve(descriptor, output.size_bytes)
                    write_all(descriptor, output.header, 0)
            self._threads.advance(len(output.header))
            for number in range(len(file.segments)):
                self._ahead.put((file, number))
            if not file.segments:
                self._digester.submit(lambda file=file: self._finish(file))  # type: ignore[misc]
        if not outputs:
            self._wake()

    def start(self, lanes: int) -> None:
        """Start the first lanes; the others, up to `lanes` in all, while this machine has time left for them."""
        first = min(lanes, _FIRST_LANES)
        for _ in range(first):
            self._threads.start(self._lane)
        self._threads.start(lambda: self._start_more(first, lanes))

    def _start_more(self, running: int, lanes: int) -> None:
        began, busy_s = time.perf_counter(), time.process_time()
        while running < lanes and not self._over.wait(_LOOK_S):
            now, now_busy_s = time.perf_counter(), time.process_time()
            if now_busy_s - busy_s < _cores() / 2 * (now - began):
                for _ in range(min(running, lanes - running)):
                    self._threads.start(self._lane)
                running = min(lanes, 2 * running)
            began, busy_s = now, now_busy_s

    def _lane(self) -> None:
        """Fetch what is next until nothing is left."""
        with contextlib.ExitStack() as stack:
            readers = _Readers(self._threads, stack)
            while (item := self._ahead.get()) is not None:
                file, number = item
                segment, round_ = file.segments[number], file.round
                if round_ or not self._kept(file, segment):
                    digest = self._bring(file, segment, round_, readers)
                    with explained(self._journal.folder), own(file.path) as descriptor:
                        send_to_disk(descriptor, segment.begin, segment.end - segment.begin)
                        self._journal.record(file.output, segment.begin, segment.end, digest)
                self._threads.advance(0 if round_ else segment.end - segment.begin)
                self._arrived(file, number)
        self._ahead.put(None)  # for the next lane

    def _wake(self) -> None:
        self._over.set()
        self._ahead.put(None)

    def _with_sha256(self, output: Output) -> bool:
        return self._checks.sha256 or output.name in self._checks.stated_sha256

    def _kept(self, file: _File, segment: Segment) -> bool:
        """Whether an interrupted call wrote these bytes, and they are still what they were."""
        claim = self._journal.claim(file.output, segment.begin, segment.end)
        if claim is None:
            return False
        digest = blake3()
        with explained(file.path):
            for data in read_pieces(file.path, segment.begin, segment.end):
                digest.update(data)
                self._threads.check()
        return digest.hexdigest() == claim

    def _bring(self, file: _File, segment: Segment, round_: int, readers: _Readers) -> str:
        """Fetch a segment from the first origin that gives it; the digest of its bytes."""
        start = min(round_, len(segment.origins) - 1)
        *firsts, last = segment.origins[start:]
        for origin in firsts:
            if id(origin.server) in self._failed:
                continue
            with contextlib.suppress(FairshardError, OSError):
                return self._from(origin, file, segment, round_, readers)
            self._threads.check()
            if origin.server is not None:
                self._failed.add(id(origin.server))
        with explained(file.path):
            return self._from(last, file, segment, round_, readers)

    def _from(self, origin: Origin, file: _File, segment: Segment, round_: int, readers: _Readers) -> str:
        def read() -> str:
            return self._pass(origin, segment, file, readers, round_)

        found, last = read(), segment.origins[-1]
        if not self._checks.paranoid or last.server is None or isinstance(last.file, Path):
            return found
        for _ in range(1 if origin.server is None else ROUNDS):
            if self._pass(last, segment, None, readers, -1) == found:
                return found
            readers.drop(last.server)
            found = read()
        end = last.offset + segment.end - segment.begin
        raise IntegrityError(
            f"{last.file.url}: bytes {last.offset}-{end} came differently in each of {ROUNDS} pairs of reads",
            details={"begin": last.offset, "end": end},
        )

    def _pass(self, origin: Origin, segment: Segment, file: _File | None, readers: _Readers, round_: int) -> str:
        """Read a segment once, to its place in `file` or only through the digest."""
        digest = blake3()
        at = segment.begin
        end = origin.offset + segment.end - segment.begin
        # Opened for each segment: a shard may have thousands of files.
        with contextlib.nullcontext() if file is None else own(file.path) as descriptor:

            def sink(data: memoryview | bytes) -> None:
                nonlocal at
                self._threads.check()
                if file is not None and descriptor is not None:
                    with explained(file.path):
                        at += write_all(descriptor, data, at)
                digest.update(data)

            if isinstance(origin.file, Path) or origin.server is None:
                assert isinstance(origin.file, Path)
                for data in read_pieces(origin.file, origin.offset, end):
                    sink(data)
            else:
                readers.reader(origin.server, round_).read(origin.file, origin.offset, end, sink)
        return digest.hexdigest()

    def _arrived(self, file: _File, number: int) -> None:
        with self._lock:
            file.there.add(number)
            before = file.front
            while file.front in file.there:
                file.front += 1
            if file.front == before:
                return
            done, reached = file.front == len(file.segments), file.segments[file.front - 1].end
            digest = file.digest
            # Inside the lock, so that fronts are digested in their order.
            self._digester.submit(lambda: self._up_to(file, digest, reached))
            if done:
                self._digester.submit(lambda: self._finish(file))

    def _up_to(self, file: _File, digest: FileDigest, reached: int) -> None:
        with explained(file.path):
            digest.up_to(reached)

    def _finish(self, file: _File) -> None:
        self._up_to(file, file.digest, file.output.size_bytes)
        found = file.digest.finish()
        wrong = self._checks.wrong(file.output.name, found)
        if wrong:
            self._again(file, wrong, found)
            return
        with explained(file.path):
            sync(file.path)
        self.results[file.output.name] = found
        if len(self.results) == len(self._files):
            self._digester.close()
            self._wake()

    def _again(self, file: _File, wrong: Sequence[str], found: Digests) -> None:
        """Fetch the segments of the tensors that are wrong once more, from the next origin if there is one."""
        name = file.output.name
        if file.round + 1 >= ROUNDS:
            stated = self._checks.stated_sha256.get(name)
            text = f"{name} has sha256 {found.sha256}, the Hub states {stated}"
            if stated is None or stated == found.sha256:
                text = f"{wrong[0]} is {found.tensors[wrong[0]]}, elsewhere it is {self._checks.known.get(wrong[0])}"
                text += f" ({WHICH_IS_WRONG})"
            raise IntegrityError(f"{text}: fetched {ROUNDS} times", details={"tensors": list(wrong)[:20]})
        bad = set(wrong)
        spans = [(p.begin, p.end) for p in file.output.placed if p.tensor.name in bad]
        if name in self._checks.stated_sha256:
            spans.append((0, file.output.size_bytes))
        numbers = [
            number
            for number, segment in enumerate(file.segments)
            if any(begin < segment.end and segment.begin < end for begin, end in spans)
        ]
        with self._lock:
            file.round += 1
            file.there.difference_update(numbers)
            file.front = 0
            while file.front in file.there:
                file.front += 1
            file.digest = FileDigest(file.path, file.output.spans, sha256=self._with_sha256(file.output))
        for number in numbers:
            self._ahead.put((file, number))


class _Readers:
    """One lane's connections."""

    def __init__(self, threads: ThreadGroup, stack: contextlib.ExitStack) -> None:
        self._threads = threads
        self._stack = stack
        self._readers: dict[tuple[int, int], RangeReader] = {}

    def reader(self, server: Server, round_: int) -> RangeReader:
        """The lane's connection to `server`; another one for each round."""
        key = (id(server), round_)
        if key not in self._readers:
            made = RangeReader(server, pause=self._threads.pause)
            self._threads.on_stop(made.abort)
            self._stack.callback(made.close)
            self._readers[key] = made
        return self._readers[key]

    def drop(self, server: Server) -> None:
        """Close the connections to `server`."""
        for (key, _), reader in self._readers.items():
            if key == id(server):
                reader.close()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
