"""What the command line's arguments mean: sizes, fractions, pairs; and how a command is added."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from planner.errors import InvalidInput
from planner.limits import parse_bytes

#: A command: what it does with its arguments; the exit status.
Command = Callable[[argparse.Namespace], int]


class WrongUsage(InvalidInput):
    """The arguments are not those of `command`; `usage` shows what it takes."""

    def __init__(self, message: str, *, command: str, usage: str) -> None:
        super().__init__(message)
        self.command, self.usage = command, usage


class Parser(argparse.ArgumentParser):
    """A parser that raises where argparse would print and end the process: --json is answered with JSON then too."""

    def error(self, message: str) -> NoReturn:
        """Raise `WrongUsage`."""
        raise WrongUsage(message, command=self.prog.partition(" ")[2], usage=self.format_usage())


def adder(commands: Any, common: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """What adds a command: `add(name, run, help, epilog)`; the epilog's lines stay as they are."""

    def add(name: str, run: Command, text: str, epilog: str) -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        command: argparse.ArgumentParser = commands.add_parser(
            name, parents=[common], formatter_class=form, description=f"{text}.", epilog=epilog, help=text
        )
        command.set_defaults(run=run)
        return command

    return add


def size(text: str) -> int:
    """Bytes from "2GiB", "500 MB" or "1e9"; for argparse, as all below.

    Raises:
        ArgumentTypeError: If it is none of these.
    """
    try:
        return parse_bytes(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, lambda value: 0 <= value <= 1, "a fraction from 0 to 1")


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{expected} is expected, got {text!r}")
    return value


def assignment(text: str) -> tuple[str, str]:
    """The two sides of "LEFT=RIGHT", split at the last "="."""
    left, sign, right = text.rpartition("=")
    if not sign or not left.strip() or not right.strip():
        raise argparse.ArgumentTypeError(f"NAME=VALUE is expected, got {text!r}")
    return left.strip(), right.strip()
