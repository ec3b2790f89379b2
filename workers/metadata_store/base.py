"""What a metadata store is, and where in one metadata and plans lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from planner.errors import InvalidInput
from planner.limits import check_batch_size, check_sequence_length
from planner.names import check_model_name, check_revision

_PLAN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class MetadataStore(Protocol):
    """Published files by path, with history."""

    @property
    def spec(self) -> str:
        """Its name in messages; but for the service's own, "redis", also what `open_store` opens it by."""

    def read(self, path: str, *, revision: str | None = None) -> bytes:
        """The file's content, now or as of the commit `revision`.

        Raises:
            NotFound: If there is no such file, commit or repository.
            IntegrityError: If the content is not what was written.
            AccessDenied: If a token is missing or not enough.
            Unavailable: If the Hub cannot be reached within the retries.
        """

    def write(self, files: Mapping[str, bytes | None], *, message: str) -> str:
        """Publish `files` (path -> content; None removes it) in one commit and return its id.

        If nothing changed, that is the latest commit's id.

        Raises:
            InvalidInput: If a path is not a plain relative one.
            AccessDenied: If the token may not write there.
            NodeFailure: If the folder cannot be written.
            Unavailable: If the Hub cannot be reached within the retries.
        """

    def list(self, prefix: str = "") -> list[str]:
        """Paths of the published files below the folder `prefix`, sorted; none if there is no such folder."""


def profile_path(
    model_name: str, revision: str | None, batch_size: int, sequence_length: int, kv_dtype: str | None = None
) -> str:
    """Where the metadata of a model's revision lies in a store; `kv_dtype` only where it is not the model's own.

    Raises:
        InvalidInput: If the name, the revision or a size is none.
    """
    sizes = f"b{check_batch_size(batch_size)}-s{check_sequence_length(sequence_length)}"
    if kv_dtype is not None:
        sizes += f"-kv{check_plan_id(kv_dtype)}"
    return f"{profiles_folder(model_name, revision or 'unknown')}/{sizes}.json"


def profiles_folder(model_name: str, revision: str | None) -> str:
    """Where the metadata of a model's revision lies, or (None) that of all.

    Raises:
        InvalidInput: If the name or the revision is none.
    """
    folder = f"profiles/{check_model_name(model_name)}"
    if revision is None:
        return folder
    commit, tilde, part = check_revision(revision).partition("~")
    # Each part has a folder of its own: "~" is in none's name.
    return f"{folder}/{commit.replace('/', '-')}{tilde}{part.replace('/', '~')}"


def williw_path(model_name: str) -> str:
    """Where williw clients look for a model's metadata. `a/b_c` and `a_b/c` share it: check `model_name`."""
    return f"{check_model_name(model_name).replace('/', '_')}_metadata.json"


def plan_path(plan_id: str) -> str:
    """Where a plan lies in a store.

    Raises:
        InvalidInput: If `plan_id` is none.
    """
    return f"plans/{check_plan_id(plan_id)}.json"


def remade_path(plan_id: str) -> str:
    """Where a store says when a plan was made again, in which case it is its model's newest although it is older."""
    return f"plans/{check_plan_id(plan_id)}.again.json"


def check_plan_id(plan_id: object) -> str:
    """Return `plan_id` if it is one: it names folders and keys.

    Raises:
        InvalidInput: If it is none.
    """
    if not isinstance(plan_id, str) or not _PLAN_ID.fullmatch(plan_id):
        raise InvalidInput(f"plan_id must be 1 to 64 letters, digits, '_' or '-', got {plan_id!r:.80}")
    return plan_id


def check_path(path: str) -> str:
    """Return `path` if it is a plain relative one: no empty or hidden part, no "..", no control character.

    Raises:
        InvalidInput: If it is anything else.
    """
    parts = path.split("/")
    if len(path) > 1024 or "\\" in path or not path.isprintable() or any(not p or p.startswith(".") for p in parts):
        raise InvalidInput(f"a published file's path must be relative and plain, got {path!r:.80}")
    return path
