"""How long work tells how far it is, and learns that it should stop."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called often by long work; the shell that passes it in throttles.

    A call may raise (`planner.errors.Cancelled`, say): the work then stops at once and leaves nothing half written.
    """

    def __call__(self, done: int, total: int | None, /, *, what: str = "") -> None:
        """`done` of `total` (None: not known) units, usually bytes, of `what`."""


def silent(done: int, total: int | None, /, *, what: str = "") -> None:
    """The progress of those who do not ask."""
