"""Running a claimed step: the lease is renewed beside the work, and the work learns that it should stop.

One thread a process renews the leases of all its claims, once a second; the progress that the work reported goes
with it. What it learns (cancelled, fenced) is raised by the work's next call of `Claim.progress`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from planner.errors import AccessDenied, Cancelled, FairshardError, NodeFailure, Unavailable
from workers.ledger.ledger import Ledger
from workers.ledger.steps import Claimed, StepSpec
from workers.nodes.joining import Joining
from workers.progress import Pace, watched

logger = logging.getLogger(__name__)

#: How often leases are renewed and progress is written, in seconds.
BEAT_S = 1.0
#: First delay before a failed attempt is repeated, in seconds; it doubles with each attempt.
RETRY_S = 2.0
#: How long an outcome is held for a Redis that is away, in seconds; then the step is simply done again.
OUTCOME_S = 120.0
#: Errors of this machine's disk and memory: trying again here mends nothing.
_THIS_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOMEM}
)
#: In a result: who committed it (`workers.nodes.joining`).
_PROOF = "proof"
#: Steps that any node may run; others of nodes are named after theirs.
_OF_ANY_NODE = frozenset({"download", "profile", "publish"})


class Fenced(Cancelled):
    """The step was given to another worker, or started over; what this one does no longer counts."""

    code = "fenced"


class HandedBack(Exception):
    """The step is handed back, no attempt counted: this worker is going, or what it needs may come later."""

    def __init__(self, message: str = "", *, delay_s: float = 0.0) -> None:
        super().__init__(message)
        #: When to try again.
        self.delay_s = delay_s


class Claim:
    """A step that this process runs."""

    def __init__(self, ledger: Ledger, claimed: Claimed) -> None:
        self._ledger = ledger
        self.claimed = claimed
        self._stop: Exception | None = None
        self._progress: dict[str, Any] = {"done": 0, "total": None, "what": ""}
        #: Whether it was reported since it was last written, and the wait that was written with it.
        self._reported = False
        self._wait: tuple[str, float | None, float] | None = None
        self._pace = Pace()
        #: thread -> what it waits for: (why, until when, since when), in seconds since the epoch.
        self._waits: dict[int, tuple[str, float | None, float]] = {}
        #: How many blocks that may be left at any point the main thread is in.
        self._stoppable = 0
        self._add: tuple[StepSpec, ...] = ()
        self._drop: tuple[str, ...] = ()
        self._job_result: Mapping[str, Any] | None = None
        #: What the Celery task returns in place of the step's own result: for what is too large for the ledger.
        self.answer: dict[str, Any] | None = None
        #: Signs what is committed, and tells whether what others committed was signed.
        self.joining = Joining()
        #: The node that this process is.
        self.node_id = ""
        #: Called with each progress report that is written, in the heartbeat's thread.
        self.on_progress: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def params(self) -> Mapping[str, Any]:
        """The job's parameters."""
        return self.claimed.params

    @property
    def args(self) -> Mapping[str, Any]:
        """The step's own."""
        return self.claimed.args

    def result(self, step: str, *, of: str | None = None) -> dict[str, Any]:
        """What another step of the job (or of the job `of`) was committed with; {} if it was not.

        Raises:
            AccessDenied: If it is a node's to run, and it was not that node who committed it.
        """
        job_id = of or self.claimed.job_id
        found = self._ledger.result(job_id, step) or {}
        proof = found.pop(_PROOF, None)
        kind, _, node_id = step.partition(":")
        if found and (node_id or kind in _OF_ANY_NODE):
            by = node_id or str((proof or {}).get("node_id"))
            if not self.joining.holds(by, f"{job_id} {step}", found, proof):
                raise AccessDenied(
                    f"step {step} was committed by someone who is not {f'node {by}' if node_id else 'a node'} here: "
                    "nothing in the job can be believed; look into who has the password of Redis",
                    details={"step": step},
                )
        return found

    def job_result(self) -> dict[str, Any]:
        """The job's result so far."""
        return self._ledger.job_result(self.claimed.job_id)

    def progress(self, done: int, total: int | None, /, *, what: str = "") -> None:
        """A `workers.progress.Progress`: cheap, and raises once the job is cancelled or the step is another's."""
        if self._stop is not None:
            raise self._stop
        self._progress = {"done": done, "total": total, "what": what}
        self._reported = True

    def check(self) -> None:
        """Raise if the work should stop."""
        if self._stop is not None:
            raise self._stop

    @contextlib.contextmanager
    def stoppable(self, why: str, until_s: float | None) -> Iterator[None]:
        """See `workers.progress.Watch`. In the process' main thread even a blocked call is left, by a signal."""
        self.check()
        thread, main = threading.get_ident(), threading.current_thread() is threading.main_thread()
        before = self._waits.get(thread)
        if why:
            self._waits[thread] = (why, until_s, time.time())
        self._stoppable += main
        try:
            yield
        finally:
            self._stoppable -= main
            if before is not None:
                self._waits[thread] = before
            else:
                self._waits.pop(thread, None)

    def interrupt(self) -> None:
        """In the main thread, by a signal: leave the block that may be left, if the work should stop."""
        if self._stoppable:
            self.check()

    def _shown(self) -> dict[str, Any] | None:
        """What to tell of the progress now; None if it was told already."""
        now = time.time()
        # What takes no second is no wait; of several threads' the longest counts.
        waits = [w for w in list(self._waits.values()) if max(now, w[1] or 0.0) - w[2] >= BEAT_S]
        wait = max(waits, key=lambda w: w[1] or 0.0, default=None)
        if not self._reported and wait == self._wait:
            return None
        self._reported, self._wait = False, wait
        told = self._progress
        shown = told | self._pace.figures(told["done"], told["total"], told["what"])
        return shown | ({"what": wait[0], "waits_until": wait[1] and _instant(wait[1])} if wait else {})

    def then(
        self,
        *,
        add: Sequence[StepSpec] = (),
        drop: Sequence[str] = (),
        job_result: Mapping[str, Any] | None = None,
    ) -> None:
        """What the commit shall do beside storing the result; see `Ledger.commit`."""
        self._add, self._drop, self._job_result = tuple(add), tuple(drop), job_result

    def beat(self) -> None:
        """Renew the lease; remember it if the work should stop."""
        progress = self._shown()
        try:
            standing = self._ledger.renew(self.claimed, progress=progress)
        except Unavailable as error:
            # The work goes on: if the lease runs out meanwhile, the fence keeps its outcome from counting twice.
            logger.warning("job %s, step %s: lease not renewed: %s", self.claimed.job_id, self.claimed.step, error)
            self._reported = True
            return
        if standing == "cancelled":
            self._stop = Cancelled(f"job {self.claimed.job_id} was cancelled")
        elif standing != "ok":
            self._stop = Fenced()
        elif progress and self.on_progress is not None:
            self.on_progress(progress)
        if self._stop is not None and _interrupted is self:
            # Again with each beat: what the work is in may catch the exception.
            signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)

    def commit(self, result: Mapping[str, Any]) -> str:
        """Store the outcome; waits for a Redis that is away."""
        proof = self.joining.prove(self.node_id, f"{self.claimed.job_id} {self.claimed.step}", result)
        signed = {**result, _PROOF: proof} if proof else result
        return _patiently(
            lambda: self._ledger.commit(
                self.claimed, signed, add=self._add, drop=self._drop, job_result=self._job_result
            )
        )


#: The claim whose work is left at this signal; it is the main thread's.
_INTERRUPT = signal.SIGUSR2
_interrupted: Claim | None = None


@contextlib.contextmanager
def _interruptible(claim: Claim) -> Iterator[None]:
    """Let the heartbeat end what `claim`'s work is blocked in, where it runs in the main thread, as in a pool."""
    global _interrupted  # noqa: PLW0603  (signals are the process')
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(_INTERRUPT, lambda *_: claim.interrupt())
    _interrupted = claim
    try:
        yield
    finally:
        _interrupted = None
        # Not `before`, which may be the system's default: a signal that comes late would end the process.
        signal.signal(_INTERRUPT, before if callable(before) else signal.SIG_IGN)


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class _Heart(threading.Thread):
    """Renews this process's claims; one a process, started with its first claim."""

    def __init__(self) -> None:
        super().__init__(name="fairshard-leases", daemon=True)
        self.pid = os.getpid()
        self._claims: set[Claim] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()

    def add(self, claim: Claim) -> None:
        with self._lock:
            self._claims.add(claim)
        self._wake.set()

    def remove(self, claim: Claim) -> None:
        with self._lock:
            self._claims.discard(claim)

    def claims(self) -> list[Claim]:
        with self._lock:
            return list(self._claims)

    def run(self) -> None:
        while True:
            if not self.claims():
                # Idle: no timer runs in a worker that has nothing to do.
                self._wake.wait()
                self._wake.clear()
                continue
            time.sleep(BEAT_S)
            for claim in self.claims():
                try:
                    claim.beat()
                except Exception:
                    logger.exception("a lease was not renewed")


_heart: _Heart | None = None
_heart_lock = threading.Lock()


def _beating() -> _Heart:
    # Threads do not survive a fork: each pool process starts its own.
    global _heart  # noqa: PLW0603  (one a process)
    with _heart_lock:
        if _heart is None or _heart.pid != os.getpid():
            _heart = _Heart()
            _heart.start()
        return _heart


def _patiently(call: Callable[[], str]) -> str:
    deadline = time.monotonic() + OUTCOME_S
    delay = 0.1
    while True:
        try:
            return call()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(delay)
            delay = min(2 * delay, 2.0)


def run_step(
    ledger: Ledger,
    job_id: str,
    step: str,
    work: Callable[[Claim], Mapping[str, Any]],
    *,
    owner: str,
    node_id: str = "",
    task_id: str = "",
    joining: Joining | None = None,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Claim the step, run `work` on it, and record how it ended; signed, where nodes have join tokens.

    Returns:
        What `work` returned if it was committed; None if there was nothing to do, or if it does not count.

    Raises:
        FairshardError: What the step failed with for good, after it was recorded (for Celery's own records).
    """
    # A random part makes each claim its own: the client may repeat the call after a timeout.
    claimed = ledger.claim(job_id, step, owner=f"{owner}#{secrets.token_hex(4)}", task_id=task_id)
    if isinstance(claimed, str):
        logger.info("job %s, step %s: nothing to do (%s)", job_id, step, claimed)
        return None
    claim = Claim(ledger, claimed)
    claim.node_id, claim.joining = node_id, joining or claim.joining
    claim.on_progress = on_progress
    heart = _beating()
    heart.add(claim)
    try:
        with _interruptible(claim), watched(claim):
            result = dict(work(claim))
        standing = claim.commit(result)
    except Cancelled as stopped:
        logger.info("job %s, step %s: stopped: %s", job_id, step, stopped)
        return None
    except HandedBack as back:
        logger.info("job %s, step %s: handed back: %s", job_id, step, back)
        delay_s = back.delay_s
        _patiently(lambda: ledger.defer(claimed, delay_s=delay_s))
        return None
    except Exception as error:  # noqa: BLE001  (whatever it is, the ledger must know)
        _record_failure(ledger, claim, error)
        return None
    finally:
        heart.remove(claim)
    if standing != "ok":
        logger.info("job %s, step %s: done, but it no longer counts (%s)", job_id, step, standing)
        return None
    return claim.answer if claim.answer is not None else result


def _record_failure(ledger: Ledger, claim: Claim, error: Exception) -> None:
    claimed = claim.claimed
    cause = explained(error)
    # An error that nobody foresaw may pass; what is explained says itself whether it does.
    final = type(cause) is not FairshardError and not cause.retryable
    delay_s = RETRY_S * 2 ** (claimed.attempt - 1)
    outcome = _patiently(lambda: ledger.fail(claimed, cause, delay_s=delay_s, final=final))
    logger.warning(
        "job %s, step %s, attempt %d: %s (%s)", claimed.job_id, claimed.step, claimed.attempt, cause, outcome,
        exc_info=None if isinstance(error, FairshardError) else error,
    )  # fmt: skip
    if outcome == "failed":
        raise cause from None


def explained(error: Exception) -> FairshardError:
    """`error` as one of ours: what users see never holds a stack trace."""
    if isinstance(error, FairshardError):
        return error
    if isinstance(error, MemoryError):
        return NodeFailure(
            "the step needs more memory than it may take (FAIRSHARD_STEP_MEMORY_BYTES, or the machine's)"
        )
    if isinstance(error, OSError) and error.errno in _THIS_MACHINE:
        return NodeFailure(
            f"{os.strerror(error.errno)}: {error.filename or 'no file named'}", details={"errno": error.errno}
        )
    failure = FairshardError(f"an error that should not happen: {type(error).__name__}: {str(error)[:500]}")
    with contextlib.suppress(AttributeError):
        failure.details["type"] = type(error).__name__
    return failure
