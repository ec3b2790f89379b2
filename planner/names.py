"""What may be named over HTTP and in files: models, revisions, nodes. No path can be spelled with these."""

from __future__ import annotations

import re

from planner.errors import InvalidInput

# The Hub's own rule (huggingface_hub.utils.validate_repo_id): 96 characters, no "--" or "..", no edge punctuation.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:77]}... ({len(str(name))} characters)"


def check_model_name(name: object) -> str:
    """Return `name` if it is a repository id "owner/name".

    Raises:
        InvalidInput: If it is anything else; the message says what is expected.
    """
    if isinstance(name, str) and len(name) <= 193 and name.count("/") == 1:
        parts = name.split("/")
        if all(_PART.fullmatch(p) and "--" not in p and ".." not in p for p in parts) and not name.endswith(".git"):
            return name
    raise InvalidInput(
        f"model_name must be 'owner/name' (letters, digits, '-', '_', '.'; 96 characters a part), got {_shown(name)}",
        details={"field": "model_name"},
    )


def check_revision(revision: object) -> str:
    """Return `revision` if it can name a branch, tag or commit.

    Raises:
        InvalidInput: If it is anything else.
    """
    if isinstance(revision, str) and _REVISION.fullmatch(revision) and ".." not in revision and "//" not in revision:
        return revision
    raise InvalidInput(
        f"revision must be a branch, tag or commit of up to 128 characters, got {_shown(revision)}",
        details={"field": "revision"},
    )


def check_node_id(node_id: object) -> str:
    """Return `node_id` if it is a legal node id.

    Raises:
        InvalidInput: If it is anything else.
    """
    if isinstance(node_id, str) and _NODE.fullmatch(node_id) and ".." not in node_id:
        return node_id
    raise InvalidInput(
        f"node_id must be 1 to 64 letters, digits, '.', '_' or '-', got {_shown(node_id)}",
        details={"field": "node_id"},
    )
