"""Who may be a node: what nodes announce and report is signed by keys that lead back to the service's authority.

    python -m workers.nodes.joining authority FILE
        makes the authority's key, prints FAIRSHARD_JOIN_KEY
    python -m workers.nodes.joining secret
        prints a new FAIRSHARD_SECRET, for every role
    python -m workers.nodes.joining token NODE --authority FILE
        prints the FAIRSHARD_JOIN_TOKEN of that node ("gpu-*": of all whose ids begin so, which then trust each other)

    authority's key ──grants──► a node's key, for its id ──signs──► announcements, results of steps

FAIRSHARD_JOIN_KEY is public and belongs to every role; a token is secret and belongs to its node. Whoever has Redis'
password alone can be no node, and no node can be another: what they write is not believed. (They can still disturb:
see SECURITY.md.) Ed25519 throughout.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from planner.errors import Conflict, FairshardError, InvalidInput, NodeFailure
from planner.names import check_node_id
from workers.disk.durable import write_new, write_whole
from workers.settings import Settings

#: FAIRSHARD_JOIN_KEY where every node is let in, on purpose.
OPEN = "open"
_PREFIX = "fsj_"
_GRANT = b"fairshard join 1\0"
_SIGNED = b"fairshard node 1\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """Grants nodes their ids; its key is needed to make tokens, and by no running process."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate, repr=False)

    @property
    def join_key(self) -> str:
        """The public half: FAIRSHARD_JOIN_KEY."""
        return _text(self.key.public_key().public_bytes_raw())

    def token(self, ids: str) -> str:
        """A new FAIRSHARD_JOIN_TOKEN for the node `ids`, or for all that begin with what stands before its "*".

        Raises:
            InvalidInput: If it can be no id, or part of one.
        """
        check_node_id((ids.removesuffix("*") + "x") if ids.endswith("*") else ids)
        own = Ed25519PrivateKey.generate()
        grant = self.key.sign(_granted(ids, own.public_key()))
        return f"{_PREFIX}{ids}.{_text(own.private_bytes_raw())}.{_text(grant)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A node's own key with the authority's grant."""

    ids: str
    key: Ed25519PrivateKey = field(repr=False)
    grant: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read FAIRSHARD_JOIN_TOKEN.

        Raises:
            InvalidInput: If it is none; the message does not repeat it.
        """
        parts = text.removeprefix(_PREFIX).rsplit(".", 2)
        try:
            ids, private, grant = parts
            return cls(ids=ids, key=Ed25519PrivateKey.from_private_bytes(_bytes(private)), grant=_bytes(grant))
        except ValueError:
            raise InvalidInput(
                "FAIRSHARD_JOIN_TOKEN is no join token: make one with `python -m workers.nodes.joining token NODE "
                "--authority FILE`",
                details={"setting": "FAIRSHARD_JOIN_TOKEN"},
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """What one process knows of it."""

    #: None: every node is let in.
    authority: Ed25519PublicKey | None = None
    #: None: this process is no node, or everyone is let in.
    token: Token | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """By FAIRSHARD_JOIN_KEY and FAIRSHARD_JOIN_TOKEN.

        Raises:
            InvalidInput: If one is not what it must be.
        """
        if settings.join_key in {None, OPEN}:
            return cls()
        try:
            authority = Ed25519PublicKey.from_public_bytes(_bytes(settings.join_key or ""))
        except ValueError:
            raise InvalidInput(
                f"FAIRSHARD_JOIN_KEY must be what `python -m workers.nodes.joining authority FILE` prints, "
                f"or {OPEN!r}",
                details={"setting": "FAIRSHARD_JOIN_KEY"},
            ) from None
        return cls(authority=authority, token=Token.parse(settings.join_token) if settings.join_token else None)

    def prove(self, node_id: str, what: str, value: Mapping[str, Any]) -> dict[str, str]:
        """The proof that `node_id` says `value`, `what` being where it is said; {} where nobody asks for one."""
        if self.token is None:
            return {}
        key, grant = _text(self.token.key.public_key().public_bytes_raw()), _text(self.token.grant)
        signature = self.token.key.sign(_signed(node_id, what, value))
        return {"node_id": node_id, "ids": self.token.ids, "key": key, "grant": grant, "signature": _text(signature)}

    def holds(self, node_id: str, what: str, value: Mapping[str, Any], proof: object) -> bool:
        """Whether `proof` shows that the node `node_id` said `value`; always, where every node is let in."""
        if self.authority is None:
            return True
        try:
            if not isinstance(proof, Mapping) or not _covers(str(proof["ids"]), node_id):
                return False
            key = Ed25519PublicKey.from_public_bytes(_bytes(str(proof["key"])))
            _check_grant(
                self.authority.public_bytes_raw(), str(proof["ids"]), key.public_bytes_raw(), str(proof["grant"])
            )
            key.verify(_bytes(str(proof["signature"])), _signed(node_id, what, value))
        except (InvalidSignature, KeyError, TypeError, ValueError):
            return False
        return True

    def check_node(self, node_id: str) -> None:
        """Check that this process may be the node.

        Raises:
            Conflict: If a token is asked for, and there is none, or one of another node.
        """
        proof = self.prove(node_id, "start", {})
        if not self.holds(node_id, "start", {}, proof):
            has = f"has one for {self.token.ids!r}" if self.token else "has none"
            if self.token and _covers(self.token.ids, node_id):
                has = "has another service's"
            raise Conflict(
                f"node {node_id!r} needs a join token of this service and {has}: set FAIRSHARD_JOIN_TOKEN to what "
                f"`python -m workers.nodes.joining token {node_id} --authority FILE` prints",
                details={"node_id": node_id, "setting": "FAIRSHARD_JOIN_TOKEN"},
            )


@lru_cache(maxsize=10_000)
def _check_grant(authority: bytes, ids: str, key: bytes, grant: str) -> None:
    """Check that the authority granted `ids` to `key`; once a process, since each announcement comes with it.

    Raises:
        InvalidSignature, ValueError: If it did not.
    """
    granted = _granted(ids, Ed25519PublicKey.from_public_bytes(key))
    Ed25519PublicKey.from_public_bytes(authority).verify(_bytes(grant), granted)


def _covers(ids: str, node_id: str) -> bool:
    return node_id.startswith(ids[:-1]) if ids.endswith("*") else node_id == ids


def _granted(ids: str, key: Ed25519PublicKey) -> bytes:
    return _GRANT + key.public_bytes_raw() + ids.encode()


def _signed(node_id: str, what: str, value: Mapping[str, Any]) -> bytes:
    # The same bytes whether the value has been through JSON yet or not.
    return _SIGNED + json.dumps([node_id, what, value], sort_keys=True, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise ValueError("not base64")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def read_authority(path: Path) -> Authority:
    """The authority whose key lies in the file `path`.

    Raises:
        InvalidInput: If there is none.
    """
    try:
        return Authority(key=Ed25519PrivateKey.from_private_bytes(_bytes(path.read_text(encoding="ascii").strip())))
    except (OSError, ValueError):
        raise InvalidInput(
            f"{path} holds no authority's key: `python -m workers.nodes.joining authority {path}` makes one"
        ) from None


def make_authority(path: Path) -> Authority:
    """A new authority, its key in a file of mode 0600.

    Raises:
        NodeFailure: If the file is there already or cannot be written.
    """
    made = Authority()
    try:
        write_new(path, f"{_text(made.key.private_bytes_raw())}\n".encode(), mode=0o600)
    except OSError as error:
        raise NodeFailure(f"{path} cannot be written: {error.strerror}") from None
    return made


def _make_files(*, authority: Path, key: Path, token: Path) -> None:
    """The authority's key, what every role has of it, and a token for all nodes that share the file `token`."""
    made = read_authority(authority) if authority.exists() else make_authority(authority)
    for path, text, mode in ((key, made.join_key, 0o644), (token, made.token("*"), 0o600)):
        if not path.exists():
            write_whole(path, f"{text}\n".encode("ascii"), mode=mode)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the authority's key and nodes' join tokens."""
    parser = argparse.ArgumentParser(prog="python -m workers.nodes.joining", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("authority", help="make the authority's key, and print FAIRSHARD_JOIN_KEY")
    new.add_argument("file", type=Path)
    commands.add_parser("secret", help="print a new FAIRSHARD_SECRET")
    token = commands.add_parser("token", help="print a node's FAIRSHARD_JOIN_TOKEN")
    token.add_argument("node", help='its NODE_ID, or "prefix*" for all whose ids begin so')
    token.add_argument("--authority", type=Path, required=True, metavar="FILE")
    files = commands.add_parser("files", help="make the files of a docker-compose.yml, unless they are there")
    for name in ("authority", "key", "token"):
        files.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        if given.command == "authority":
            print(make_authority(given.file).join_key)
        elif given.command == "secret":
            print(Fernet.generate_key().decode())
        elif given.command == "files":
            _make_files(authority=given.authority, key=given.key, token=given.token)
        else:
            print(read_authority(given.authority).token(given.node))
    except FairshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
