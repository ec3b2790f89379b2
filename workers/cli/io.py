"""What the command line reads and writes: JSON or tables on stdout, progress on stderr, sizes in and out."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from planner.errors import InvalidInput, NodeFailure
from workers.progress import Progress, silent

#: A command: what it does with its arguments; the exit status.
Command = Callable[[argparse.Namespace], int]


def adder(commands: Any, common: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """What adds a command: `add(name, run, help, epilog)`, the epilog's lines staying as they are."""

    def add(name: str, run: Command, text: str, epilog: str) -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        command: argparse.ArgumentParser = commands.add_parser(
            name, parents=[common], formatter_class=form, epilog=epilog, help=text
        )
        command.set_defaults(run=run)
        return command

    return add


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def size(text: str) -> int:
    """Bytes from "2GiB", "500 MB" or "1e9"; for argparse.

    Raises:
        ArgumentTypeError: If it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else -1.0
    except (ValueError, KeyError):
        value = -1.0
    if not 0 <= value <= 2**60:
        raise argparse.ArgumentTypeError(f"a size such as 2GiB, 500MB or 1000000000 is expected, got {text!r}")
    return int(value)


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 is expected, got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a fraction from 0 to 1 is expected, got {text!r}")
    return value


def shown_bytes(count: float) -> str:
    """Bytes for people: "1.25 GB"."""
    return _scaled(count, "B")


def shown_rate(flop_per_s: float) -> str:
    """FLOP/s for people: "165 TFLOP/s"."""
    return _scaled(flop_per_s, "FLOP/s")


def shown_flop(flop: float) -> str:
    """FLOP for people: "2.53 TFLOP"."""
    return _scaled(flop, "FLOP")


def shown_seconds(seconds: float) -> str:
    """A duration for people: "12.3 ms"."""
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}" if seconds < 1e4 else f"{seconds:,.0f} s"
    return f"{seconds * 1e9:.3g} ns"


def _scaled(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:,.4g} E{unit}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: str = "") -> list[str]:
    """Lines of a table, columns as wide as needed.

    Args:
        head: The columns' names.
        rows: Their values.
        right: A letter for each column: "r" sets it right, anything else left.
    """
    texts = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    lines = []
    for row in texts:
        cells = [
            cell.rjust(width) if right[column : column + 1] == "r" else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return lines


def emit(args: argparse.Namespace, obj: Any, lines: Iterable[str] = ()) -> None:
    """Put the result on stdout: `obj` as JSON with --json, else `lines`."""
    if args.json:
        json.dump(obj, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write("\n")
    else:
        for line in lines:
            print(line)


def say(args: argparse.Namespace, line: str) -> None:
    """A remark for people, on stderr."""
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)


def progress(args: argparse.Namespace) -> Progress:
    """Progress on stderr by tqdm; nothing with --quiet, nothing for what is done within a third of a second."""
    if args.quiet:
        return silent
    return _Bar()


class _Bar:
    """A tqdm bar for each thing that is worked on, loaded only once the work has taken a while."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._bar: Any = None
        self._what: str | None = None
        self._lines = not sys.stderr.isatty()

    def __call__(self, done: int, total: int | None, /, *, what: str = "") -> None:
        if self._bar is None or what != self._what:
            if time.monotonic() - self._began < 0.3:
                return
            try:
                from tqdm import tqdm
            except ImportError:  # the base install has no tqdm
                return
            self.close()
            self._what = what
            self._bar = tqdm(
                total=total, desc=what or None, unit="B", unit_scale=True, unit_divisor=1000, file=sys.stderr,
                leave=False, mininterval=5.0 if self._lines else 0.1, ascii=self._lines,
            )  # fmt: skip
        if total is not None:
            self._bar.total = total
        self._bar.update(max(0, done - self._bar.n))
        if total is not None and done >= total:
            self.close()
            self._began = time.monotonic()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def write(path: Path, text: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        NodeFailure: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise NodeFailure(
            f"{path} cannot be written: {error.strerror or error}", details={"path": str(path)}
        ) from None


def write_document(path: Path, obj: Any) -> None:
    """Write JSON, or YAML where the file's name says so.

    Raises:
        InvalidInput: If the name ends in neither.
        NodeFailure: If it cannot be written.
    """
    from planner.wire.documents import dumps, dumps_yaml

    suffix = path.suffix.lower()
    if suffix in {".yaml", ".yml"}:
        write(path, dumps_yaml(obj))
    elif suffix in {".json", ""}:
        write(path, dumps(obj))
    else:
        raise InvalidInput(f"{path.name}: the name must end in .json, .yaml or .yml")


def assignment(text: str) -> tuple[str, str]:
    """The two sides of "LEFT=RIGHT", for argparse; the last "=" parts them."""
    left, sign, right = text.rpartition("=")
    if not sign or not left.strip() or not right.strip():
        raise argparse.ArgumentTypeError(f"NAME=VALUE is expected, got {text!r}")
    return left.strip(), right.strip()
