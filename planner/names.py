"""What may be named over HTTP and in files: models, revisions, nodes. No path can be spelled with these."""

from __future__ import annotations

import re

from planner.errors import InvalidInput

# The Hub's own rule (huggingface_hub.utils.validate_repo_id): 96 characters, no "--" or "..", no edge punctuation.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_model_name(name: object) -> str:
    """Return `name` if it is a repository id "owner/name".

    Raises:
        InvalidInput: If it is anything else; the message says what is expected.
    """
    if isinstance(name, str) and len(name) <= 193 and name.count("/") == 1:
        parts = name.split("/")
        if all(_PART.fullmatch(p) and "--" not in p and ".." not in p for p in parts) and not name.endswith(".git"):
            return name
    raise _refused("model_name", name, "'owner/name' (letters, digits, '-', '_', '.'; 96 characters a part)")


def check_asked_name(name: object) -> str:
    """Return `name` if it is "owner/name", or a name that the Hub may know without its owner ("gpt2").

    Raises:
        InvalidInput: If it is anything else.
    """
    if isinstance(name, str) and "/" not in name and _PART.fullmatch(name) and "--" not in name and ".." not in name:
        return name
    return check_model_name(name)


def check_revision(revision: object) -> str:
    """Return `revision` if it can name a branch, tag or commit.

    Raises:
        InvalidInput: If it is anything else.
    """
    if isinstance(revision, str) and _REVISION.fullmatch(revision) and ".." not in revision and "//" not in revision:
        return revision
    raise _refused("revision", revision, "a branch, tag or commit of up to 128 characters")


def check_node_id(node_id: object) -> str:
    """Return `node_id` if it is a legal node id.

    Raises:
        InvalidInput: If it is anything else.
    """
    if isinstance(node_id, str) and _NODE.fullmatch(node_id) and ".." not in node_id:
        return node_id
    raise _refused("node_id", node_id, "1 to 64 letters, digits, '.', '_' or '-'")


def _refused(field: str, value: object, expected: str) -> InvalidInput:
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}... ({len(str(value))} characters)"
    return InvalidInput(f"{field} must be {expected}, got {text}", details={"field": field})
