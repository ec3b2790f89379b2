"""What the command line shows: JSON, tables and text on stdout, progress and remarks on stderr.

On a terminal rich draws tables and bars, fits them to its width and colours them (unless NO_COLOR is set). Elsewhere
everything is plain lines, and rich, which loads slower than a profile from headers takes, is not loaded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import InvalidInput
from workers.progress import Pace, Progress, silent

#: Work that ends sooner shows no progress.
_QUICK_S = 0.3
#: How often progress is written: bars, and lines where stderr is no terminal.
_BAR_S, _LINE_S = 0.1, 5.0
#: What is counted in pieces; all else in bytes.
_PIECES = frozenset({"headers"})
_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "cancelled": "yellow"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows for people. In a pipe a row is a line, its cells parted by two or more spaces, and no cell is empty."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    #: The columns set right: numbers.
    right: Sequence[str] = ()
    #: The columns that a narrow terminal must not fold: what people copy.
    whole: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The rows as plain text."""
        texts = [list(self.head), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        columns = list(zip(self.head, widths, strict=True))
        return [
            "  ".join(
                cell.rjust(width) if name in self.right else cell.ljust(width)
                for cell, (name, width) in zip(row, columns, strict=True)
            ).rstrip()
            for row in texts
        ]

    def drawn(self) -> Any:
        """The rows as rich draws them."""
        from rich import box, table, text

        drawn = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for name in self.head:
            drawn.add_column(
                name,
                justify="right" if name in self.right else "left",
                no_wrap=name in self.whole,
                overflow="fold",
            )
        for row in self._cells():
            drawn.add_row(*(text.Text(cell, style=_COLOURS.get(cell.partition(":")[0], "")) for cell in row))
        return drawn

    def _cells(self) -> list[list[str]]:
        return [[" ".join(harmless(str(cell)).split()) or "–" for cell in row] for row in self.rows]


def harmless(text: str) -> str:
    """Text without what a terminal would obey: errors quote files and services that others made."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text)


def emit(args: argparse.Namespace, obj: Any, shown: Iterable[str | Table] = ()) -> None:
    """Put the result on stdout: `obj` as JSON with --json, else what is `shown`."""
    args.bars.close()
    if args.json:
        json.dump(obj, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write("\n")
    parts = [] if args.json else [harmless(part) if isinstance(part, str) else part for part in shown]
    if parts and sys.stdout.isatty():
        from rich.console import Console

        console = Console(markup=False, highlight=False, emoji=False)
        for part in parts:
            console.print(part.drawn() if isinstance(part, Table) else _wrapped(part, console.width), soft_wrap=True)
    else:
        for part in parts:
            print(*(part.lines() if isinstance(part, Table) else [part]), sep="\n")
    sys.stdout.flush()  # before what stderr says next


def _wrapped(text: str, width: int) -> str:
    """Text at so many columns; a word that is longer, a path or a digest, stays whole: it is copied."""
    from textwrap import TextWrapper

    wrapper = TextWrapper(width=width, break_long_words=False, break_on_hyphens=False)
    lines = []
    for line in text.splitlines():
        wrapper.subsequent_indent = " " * 2 * (len(line) - len(line.lstrip()))
        lines += wrapper.wrap(line) or [""]
    return "\n".join(lines)


def say(args: argparse.Namespace, line: str) -> None:
    """A remark for people, on stderr."""
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)


def progress(args: argparse.Namespace) -> Progress:
    """Progress of work in this process, on stderr; nothing with --quiet, nothing for what ends at once."""
    if args.quiet:
        return silent
    began, told, shown, pace = time.monotonic(), 0.0, False, Pace()

    def show(done: int, total: int | None, /, *, what: str = "") -> None:
        nonlocal told, shown
        now = time.monotonic()
        if now - told < _BAR_S and done != total:
            return
        told = now
        figures = pace.figures(done, total, what)
        # The end is shown of what was shown.
        if shown or (now - began >= _QUICK_S and done != total):
            shown = True
            args.bars.show(what, {"done": done, "total": total, "what": what, **figures})

    return show


class Bars:
    """Things that are worked on at once: a bar each on a terminal, a line each every few seconds elsewhere."""

    def __init__(self) -> None:
        self._drawn: Any = None
        self._places: dict[str, Any] = {}
        self._told: dict[str, float] = {}

    def show(self, name: str, at: Mapping[str, Any], *, ended: str = "") -> None:
        """Show how far `name` is.

        Args:
            name: What is worked on.
            at: {done, total?, what?, rate_per_s?, eta_s?}, as a step's progress has it.
            ended: The state in which it ended, "" while it runs.
        """
        total = at.get("total")
        says = "done, 100%" if ended == "done" else ended or far(at, name) or "running"
        if not sys.stderr.isatty():
            now = time.monotonic()
            if ended or now - self._told.setdefault(name, now) >= _LINE_S:
                self._told[name] = now
                print(f"  {name}: {says}", file=sys.stderr, flush=True)
            return
        if self._drawn is None:
            from rich import console, progress, table

            self._drawn = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=20),
                progress.TextColumn("{task.fields[says]}", markup=False, table_column=table.Column(overflow="fold")),
                console=console.Console(stderr=True, markup=False, highlight=False, emoji=False),
            )
            self._drawn.start()
        if name not in self._places:
            self._places[name] = self._drawn.add_task(name, says=says)
        if ended == "done":
            at = {"done": total or 1, "total": total or 1}
        self._drawn.update(self._places[name], completed=at.get("done", 0), total=at.get("total"), says=says)

    def close(self) -> None:
        """End the bars; the last of each stays."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn, self._places = None, {}


def far(at: Mapping[str, Any], name: str = "") -> str:
    """How far something is: "45% of 1.2 GB, 34 MB/s, 12 s left (what it is about, if not `name`)"."""
    total, done = at.get("total"), at.get("done")
    counted = at.get("what") in _PIECES
    if total:
        words = [f"{done:,} of {total:,}" if counted else f"{done / total:.0%} of {shown_bytes(total)}"]
    else:
        words = [] if not done else [f"{done:,}" if counted else shown_bytes(done)]
    if at.get("rate_per_s") and not counted:
        words.append(f"{shown_bytes(at['rate_per_s'])}/s")
    if at.get("eta_s"):
        words.append(f"{at['eta_s']:.0f} s left")
    what = at.get("what") or ""
    return ", ".join(words) + (f" ({what})" if words and what not in {"", name} else "") or what


def shown_bytes(count: float) -> str:
    """Bytes on disk or on the way, for people: "1.25 GB"."""
    return _scaled(count, "B")


def shown_memory(count: float) -> str:
    """Bytes of memory, for people: "1.16 GiB"."""
    return _scaled(count, "iB", step=1024, digits=3).replace(" iB", " B")


def shown_rate(flop_per_s: float) -> str:
    """FLOP/s for people: "165 TFLOP/s"."""
    return _scaled(flop_per_s, "FLOP/s")


def shown_flop(flop: float) -> str:
    """FLOP for people: "2.53 TFLOP"."""
    return _scaled(flop, "FLOP")


def _scaled(value: float, unit: str, *, step: int = 1000, digits: int = 4) -> str:
    for prefix in ("", "k" if step == 1000 else "K", "M", "G", "T", "P"):
        if abs(value) < 1000:
            return f"{value:.{digits}g} {prefix}{unit}"
        value /= step
    return f"{value:,.{digits}g} E{unit}"


def shown_seconds(seconds: float) -> str:
    """A duration for people: "12.3 ms"."""
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}" if seconds < 1e4 else f"{seconds:,.0f} s"
    return f"{seconds * 1e9:.3g} ns"


def write_document(path: Path, obj: Any) -> None:
    """Write JSON, or YAML where the file's name says so; whole or not at all.

    Raises:
        InvalidInput: If the name ends in neither.
        NodeFailure: If it cannot be written.
    """
    from planner.wire.documents import dumps, dumps_yaml
    from workers.disk.durable import explained, write_whole

    suffix = path.suffix.lower()
    if suffix not in {".yaml", ".yml", ".json", ""}:
        raise InvalidInput(f"{path.name}: the name must end in .json, .yaml or .yml")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, dumps_yaml(obj) if suffix in {".yaml", ".yml"} else dumps(obj))
