"""API tokens: who calls, and what they may do.

Tokens are 256 random bits, so their plain SHA-256 is stored: there is nothing to guess that a slow hash would
protect. `python -m web.auth new NAME --scopes read,submit --file tokens.json` makes one and shows it once.
The file is read again when it changes, so that a token removed from it is refused at once.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import re
import secrets
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from planner.errors import FairshardError, InvalidInput, NodeFailure
from planner.wire.documents import loads_json
from workers.disk.durable import write_whole

#: What a token may be allowed; each includes those before it.
SCOPES = ("read", "submit", "admin")
_PREFIX = "fs_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A caller: its name and what it may do."""

    name: str
    #: SHA-256 of the token, in hex.
    sha256: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether one of its scopes is, or includes, `scope`."""
        return any(SCOPES.index(own) >= SCOPES.index(scope) for own in self.scopes)


class Tokens:
    """The tokens of a file, read again whenever it changes."""

    def __init__(self, path: Path) -> None:
        """Read `path`.

        Raises:
            InvalidInput: If it is missing or not a tokens file.
        """
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._tokens: tuple[Token, ...] = ()
        self._refresh()

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
        except OSError as error:
            raise InvalidInput(
                f"the tokens file {self._path.name} cannot be read: {error.strerror}; "
                "`python -m web.auth new NAME --file FILE` makes one",
                details={"setting": "FAIRSHARD_TOKENS_FILE"},
            ) from None
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        with self._lock:
            if stamp != self._seen:
                self._tokens = read_tokens(self._path)
                self._seen = stamp

    def find(self, presented: str) -> Token | None:
        """The caller whose token this is; looks at every one, so that the time tells nothing.

        Raises:
            InvalidInput: If the file has become unreadable: nobody is let in on an old list.
        """
        self._refresh()
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()
        match = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, digest):
                match = token
        return match


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file `{"tokens": [{"name", "sha256", "scopes": [...]}]}`.

    Raises:
        InvalidInput: If it is anything else; the message never shows a digest.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"the tokens file {path.name} cannot be read: {error.strerror}") from None
    document = loads_json(text, source=f"the tokens file {path.name}")
    entries = document.get("tokens") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise InvalidInput(f'the tokens file {path.name} must be {{"tokens": [...]}}')
    tokens = tuple(_token(entry, at=f"{path.name}: tokens[{index}]") for index, entry in enumerate(entries))
    names = [token.name for token in tokens]
    if len(set(names)) != len(names):
        raise InvalidInput(f"{path.name}: each token needs a name of its own")
    return tokens


def _token(entry: Any, *, at: str) -> Token:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{at} must be an object")
    name, digest, scopes = entry.get("name"), entry.get("sha256"), entry.get("scopes")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput(f"{at}: name must be 1 to 64 letters, digits, '.', '_' or '-'")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidInput(f"{at}: sha256 must be 64 lower-case hex digits")
    if not isinstance(scopes, list) or not scopes or any(scope not in SCOPES for scope in scopes):
        raise InvalidInput(f"{at}: scopes must be one or more of {', '.join(SCOPES)}")
    return Token(name=name, sha256=digest, scopes=frozenset(scopes))


def new_token(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Make a token, add its hash to the file at `path` (made with mode 0600 if missing), and return it.

    Raises:
        InvalidInput: If the name is taken, or a scope unknown.
        NodeFailure: If the file cannot be written.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    entry = {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), "scopes": list(scopes)}
    old = read_tokens(path) if path.exists() else ()
    token = _token(entry, at=name)
    if any(other.name == token.name for other in old):
        raise InvalidInput(f"there is a token named {name!r} already")
    rows = [{"name": t.name, "sha256": t.sha256, "scopes": sorted(t.scopes)} for t in (*old, token)]
    try:
        write_whole(path, f"{json.dumps({'tokens': rows}, indent=2)}\n".encode(), mode=0o600)
    except OSError as error:
        raise NodeFailure(f"the tokens file {path} cannot be written: {error.strerror}") from None
    return secret


def is_loopback(bind: str) -> bool:
    """Whether only this machine can reach a server bound to `bind` ("127.0.0.1:8080", "[::1]:80", "unix:/run/x")."""
    if bind.startswith("unix:"):
        return True
    host = bind.rpartition(":")[0] if ":" in bind and not bind.endswith("]") else bind
    host = host.strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make an API token; it is shown once and only its hash is kept."""
    parser = argparse.ArgumentParser(prog="python -m web.auth", description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("new", help="make a token")
    new.add_argument("name", help="whose it is; shown in jobs and in the audit log")
    new.add_argument("--scopes", default="read,submit", help=f"of {', '.join(SCOPES)}; default read,submit")
    new.add_argument("--file", type=Path, required=True, help="the tokens file (FAIRSHARD_TOKENS_FILE)")
    given = parser.parse_args(arguments)
    try:
        print(new_token(given.file, given.name, [scope for scope in given.scopes.split(",") if scope]))
    except FairshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
