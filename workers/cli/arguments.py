"""What the command line's arguments mean: sizes, fractions, pairs; and how a command is added."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from planner.errors import InvalidInput
from planner.limits import parse_bytes

if TYPE_CHECKING:
    from planner.profile import ModelProfile

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


def count_or_auto(text: str) -> Literal["auto"] | int:
    """A whole number of at least 1, or "auto"."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"auto or a whole number of at least 1 is expected, got {text!r}")
    return int(text)


def pinned_layers(text: str, profile: ModelProfile) -> list[str]:
    """The layers that "lm_head", "model.layers.*", "0-3" or several of these with commas between mean.

    Raises:
        InvalidInput: If a part of it means none.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if span:
            first = int(span[1])
            last = int(span[2] or first)
            names = [layer.name for layer in profile.layers if first <= layer.index <= last]
            if last >= len(profile.layers) or first > last:
                names = []
        else:
            names = [layer.name for layer in profile.layers if layer.name == part or fnmatchcase(layer.name, part)]
        if not names:
            raise InvalidInput(
                f"--pin {part}: {profile.model_name} has no such layer; its {len(profile.layers)} are "
                f"{profile.layers[0].name} (0) to {profile.layers[-1].name} ({len(profile.layers) - 1})",
                details={"field": "pins", "layer": part},
            )
        found += names
    return found


def shares(option: str, given: list[tuple[str, str]]) -> dict[str, float]:
    """Fraction by node of "NODE=FRACTION" pairs.

    Raises:
        InvalidInput: If one is no fraction.
    """
    try:
        return {node_id: fraction(text) for node_id, text in given}
    except argparse.ArgumentTypeError as error:
        raise InvalidInput(f"{option}: {error}") from None
