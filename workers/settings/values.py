"""How the text of a setting becomes its value. What a setting can't be raises ValueError, saying what it must be."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from planner.errors import InvalidInput
from planner.names import check_model_name, check_node_id

#: Ten years, in seconds: more than anything here waits or is kept.
_LONGEST_S = 315_360_000
_RATE = r"\d{1,9}\s*(?:/|per)\s*(?:\d{1,9}\s*)?(?:second|minute|hour|day|month|year)s?"


def text(value: str) -> str:
    """Any text that can stand in a header."""
    if not value.isascii() or re.search(r"\s", value) or not value.isprintable():
        raise ValueError("without spaces, and of ASCII characters only")
    return value


def number(*, unit: str) -> Callable[[str], float]:
    """A number above 0, such as a rate."""

    def parse(value: str) -> float:
        found = _float(value)
        if not 0 < found < float("inf"):
            raise ValueError(f"a number above 0, in {unit}")
        return found

    return parse


def seconds(value: str) -> float:
    """A duration."""
    found = _float(value)
    if not 0 < found <= _LONGEST_S:
        raise ValueError(f"a number of seconds above 0 (at most {_LONGEST_S:,}, ten years)")
    return found


def whole(low: int, high: int, *, unit: str = "") -> Callable[[str], int]:
    """A whole number from `low` to `high`; "1e9" is one."""

    def parse(value: str) -> int:
        found = _float(value)
        if not low <= found <= high or found != int(found):
            raise ValueError(f"a whole number from {low:,} to {high:,}{f' ({unit})' if unit else ''}")
        return int(value) if value.isdigit() else int(found)

    return parse


def size(value: str) -> int:
    """A number of bytes, at least one."""
    return whole(1, 2**60, unit="bytes")(value)


def _float(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")


def choice(*names: str) -> Callable[[str], Any]:
    """One of `names`, in any case."""

    def parse(value: str) -> str:
        if value.lower() not in names:
            raise ValueError(f"{', '.join(names[:-1])} or {names[-1]}")
        return value.lower()

    return parse


def switch(value: str) -> bool:
    """Yes or no, as the Hub's client writes it."""
    if value.lower() in {"1", "on", "yes", "true"}:
        return True
    if value.lower() in {"0", "off", "no", "false"}:
        return False
    raise ValueError("1 or 0 (on, yes, true; off, no, false)")


def path(value: str) -> Path:
    """A path, made absolute; a leading ~ is the user's folder."""
    if "://" in value:
        raise ValueError("a path of this machine")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise ValueError("a path of this machine, and this one's user is unknown") from None


def folder(value: str) -> Path:
    """A folder's path; it need not exist yet."""
    found = path(value)
    if found.exists() and not found.is_dir():
        raise ValueError("a folder, and a file lies there")
    return found


def node_id(value: str) -> str:
    """A node's id."""
    try:
        return check_node_id(value)
    except InvalidInput:
        raise ValueError("1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit") from None


def metadata_repo(value: str) -> str:
    """A Hub repository, or the path of a folder that is written as one."""
    try:
        if not value.startswith(("/", "./", "../", "~")):
            check_model_name(value.removeprefix("datasets/"))
    except InvalidInput:
        raise ValueError(
            "owner/name or datasets/owner/name of a Hub repository (not its address), or a folder's path that begins "
            "with / or ./"
        ) from None
    return value


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    """A text that matches `pattern` as a whole."""
    compiled = re.compile(pattern)

    def parse(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(expected)
        return value

    return parse


key_prefix = matching(r"[A-Za-z0-9_.:-]{1,100}", "1 to 100 letters, digits, '_', '.', ':' or '-'")
rate = matching(
    rf"(?i)off|{_RATE}(?:\s*[,;|]\s*{_RATE})*", "off, or requests in a time such as 600/minute or 10/second"
)


def fernet_key(value: str) -> str:
    """What encrypts users' Hub tokens."""
    try:
        fits = len(base64.urlsafe_b64decode(value.encode("ascii"))) == 32
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("32 url-safe base64-encoded bytes (a Fernet key; deploy/new-env.sh prints one)")
    return value


def http_url(*schemes: str) -> Callable[[str], str]:
    """An http(s) address, without a slash at its end."""
    allowed = schemes or ("http", "https")

    def parse(value: str) -> str:
        try:
            parts = urlsplit(value)
            fits = parts.scheme in allowed and parts.hostname and parts.port != 0 and not re.search(r"\s", value)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"an address such as {allowed[-1]}://host:port")
        return value.rstrip("/")

    return parse


def origins(value: str) -> tuple[str, ...]:
    """Origins, separated by commas, or "*"."""
    found = tuple(origin.strip() for origin in value.split(",") if origin.strip())
    if any(origin != "*" and not re.fullmatch(r"https?://[^/\s?#*]+", origin) for origin in found):
        raise ValueError("*, or origins such as https://app.example, separated by commas and without a path")
    return found


def bind(value: str) -> str:
    """Where a server listens: an address with its port, or a socket's path."""
    if value.startswith("unix:/"):
        return value
    host, _, port = value.rpartition(":")
    if not re.fullmatch(r"\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+", host) or not port.isdigit() or int(port) > 65535:
        raise ValueError("host:port such as 127.0.0.1:8080 or [::1]:8080, or unix:/path")
    return value
