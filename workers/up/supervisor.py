"""Keeps processes running: starts them, starts again what dies, ends them in order.

One thread, no callbacks: whoever owns a `Supervisor` calls `poll` a few times a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Seconds before a dead role starts again: doubled at each death, back to the first after `STEADY_S` of life.
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
STEADY_S = 30.0


def backoff_s(deaths: int) -> float:
    """Seconds to wait before the start after the `deaths`-th death in a row, from 1."""
    return float(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(deaths - 1, 30)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A process that should run."""

    name: str
    argv: Sequence[str]
    #: Its whole environment.
    env: Mapping[str, str]
    #: Its stdout and stderr are appended here.
    log: Path
    #: Seconds between the request to end and kill -9.
    grace_s: float = 45.0
    #: File descriptors it inherits beside the three standard ones.
    inherit: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Running:
    role: Role
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    #: Deaths since the role last lived for STEADY_S.
    deaths: int = 0
    #: When to start again; None while it runs.
    due_at: float | None = None
    #: Where in the log the present process began to write.
    log_offset: int = 0


@dataclass(slots=True)
class Supervisor:
    """The processes of one service."""

    #: Called with one line for everything that a person should know.
    say: Callable[[str], None]
    _running: dict[str, _Running] = field(default_factory=dict)

    def start(self, role: Role) -> None:
        """Start `role` and keep it running from now on.

        Raises:
            OSError: If its program cannot be started at all.
        """
        running = _Running(role=role)
        self._spawn(running)
        self._running[role.name] = running

    def poll(self) -> None:
        """Notice the dead, and start those whose wait is over."""
        now = time.monotonic()
        for running in self._running.values():
            if running.process is not None and running.process.poll() is not None:
                self._note_death(running, now)
            if running.due_at is not None and now >= running.due_at:
                running.due_at = None
                try:
                    self._spawn(running)
                except OSError as error:  # a full process table, say: passes
                    running.deaths += 1
                    running.due_at = now + backoff_s(running.deaths)
                    self.say(f"{running.role.name} cannot be started ({error}); trying again")

    def _note_death(self, running: _Running, now: float) -> None:
        """Take note of a death, and end what the dead process left behind."""
        process = running.process
        assert process is not None
        # Pool children outlive a worker that was killed; a second generation beside them would double the memory.
        _signal_group(process.pid, signal.SIGKILL)
        running.process = None
        running.deaths = 1 if now - running.started_at >= STEADY_S else running.deaths + 1
        wait_s = backoff_s(running.deaths)
        running.due_at = now + wait_s
        role = running.role
        self.say(f"{role.name} {_how(process.returncode)}; starting it again in {wait_s:g} s (log: {role.log})")

    def _spawn(self, running: _Running) -> None:
        role = running.role
        role.log.parent.mkdir(parents=True, exist_ok=True)
        with role.log.open("ab") as log:
            running.log_offset = log.tell()
            running.process = subprocess.Popen(
                list(role.argv),
                env=dict(role.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own session: a Ctrl-C in the terminal is ours alone, and we end the roles in order.
                start_new_session=True,
                pass_fds=role.inherit,
                # The one thing here that is no thread's: nothing else of this process runs beside `poll`.
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
            )
        running.started_at = time.monotonic()

    def deaths(self, name: str) -> int:
        """How often in a row the role died young."""
        return self._running[name].deaths

    def pid(self, name: str) -> int | None:
        """The role's process id, None while it is down."""
        process = self._running[name].process
        return None if process is None else process.pid

    def log_since_start(self, name: str) -> str:
        """What the role's present (or last) process wrote so far."""
        running = self._running[name]
        try:
            with running.role.log.open("rb") as log:
                log.seek(running.log_offset)
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def stop(self, groups: Sequence[Sequence[str]], *, hurry: Callable[[], bool] = lambda: False) -> None:
        """End the roles, group after group, each group together; whatever is left is ended last.

        Args:
            groups: Names of roles; unknown ones are skipped.
            hurry: Asked now and then; once it says True, kill -9 instead of waiting.
        """
        listed = [name for group in groups for name in group]
        rest = [name for name in self._running if name not in listed]
        for group in [*groups, rest]:
            self._stop([self._running.pop(name) for name in group if name in self._running], hurry)

    def _stop(self, group: Sequence[_Running], hurry: Callable[[], bool]) -> None:
        alive = [running for running in group if running.process is not None]
        for running in alive:
            assert running.process is not None
            with contextlib.suppress(ProcessLookupError):
                running.process.terminate()
        began = time.monotonic()
        for running in alive:
            assert running.process is not None
            while running.process.poll() is None:
                if hurry() or time.monotonic() - began > running.role.grace_s:
                    self.say(f"{running.role.name} did not end in time: killed")
                    break
                time.sleep(0.02)
            _signal_group(running.process.pid, signal.SIGKILL)
            running.process.wait()


def _how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the whole process group that `pid` leads or led."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Ask Linux to end this process when the supervisor is killed, so that nothing is left running then either."""
    assert _LIBC is not None
    _LIBC.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
