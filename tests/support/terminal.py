"""A pseudo-terminal for commands: what a person at a terminal sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Seen:
    """How a command ended, and what it wrote to its terminal."""

    status: int
    raw: str

    @property
    def lines(self) -> list[str]:
        """What was written, without colours and the like; a line that was drawn again is there again."""
        return [line.rstrip() for line in re.split(r"[\r\n]+", _CODES.sub("", self.raw))]

    @property
    def coloured(self) -> bool:
        """Whether there are colours."""
        return re.search(r"\x1b\[[0-9;]*3[0-7]m", self.raw) is not None


def in_terminal(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    columns: int = 80,
    interrupt_on: threading.Event | None = None,
    timeout_s: float = 60.0,
) -> Seen:
    """Run a command with stdin, stdout and stderr on one terminal.

    Args:
        argv: The command.
        cwd: Where it runs.
        env: Beside this process's environment; NO_COLOR and COLUMNS only from here.
        columns: The terminal's width.
        interrupt_on: Ctrl-C is pressed once this is set.
        timeout_s: It is killed then.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS", "FORCE_COLOR"}
    }
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        list(argv),
        cwd=cwd,
        env={**inherited, "TERM": "xterm", **(env or {})},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        # Where the tests run in a shell's background it is ignored, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    os.close(slave)
    deadline = threading.Timer(timeout_s, process.kill)
    deadline.start()
    if interrupt_on is not None:
        asked = interrupt_on

        def press() -> None:
            if asked.wait(timeout_s):
                os.killpg(process.pid, signal.SIGINT)  # what the terminal does

        threading.Thread(target=press, daemon=True).start()
    written = b""
    try:
        while True:
            try:
                more = os.read(master, 65536)
            except OSError:  # Linux: the last process has let go of the terminal
                break
            if not more:
                break
            written += more
    finally:
        os.close(master)
        status = process.wait(timeout_s)
        deadline.cancel()
    return Seen(status, written.decode("utf-8", "replace"))
