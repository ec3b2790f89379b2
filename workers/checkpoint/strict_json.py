"""Strict JSON for files from strangers: a key that is written twice is an error; error texts are cut short."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from planner.errors import InvalidCheckpoint

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON; objects become tuples of (key, value), so that `pairs` can see a key that is written twice.

    Raises:
        InvalidCheckpoint: If it is not JSON.
    """
    try:
        text = data.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=tuple)
        if _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode()  # half a pair is no text, and raises
        return parsed
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{where} is not valid JSON: {str(error)[:200]}") from error


def pairs(value: Any, where: str) -> tuple[tuple[str, Any], ...]:
    """`value` if it is a JSON object in which no key is written twice."""
    if not isinstance(value, tuple):
        raise InvalidCheckpoint(f"{where} must be a JSON object, got {show(value)}")
    if len(dict(value)) != len(value):
        seen: set[str] = set()
        doubled = sorted({key for key, _ in value if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise InvalidCheckpoint(f"{where}: key written twice: {some(doubled)}", details={"keys": doubled[:20]})
    return value


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    shown = [show(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def show(value: Any) -> str:
    """A value as it was written, cut short."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
