"""What may be named over HTTP and in files: models, revisions, nodes. No path can be spelled with these."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planner.errors import InvalidInput

# The Hub's own rule (huggingface_hub.utils.validate_repo_id): 96 characters, no "--" or "..", no edge punctuation.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
FOLDER = r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*"
VARIANT = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
#: A branch, tag or commit; then which part of the repository is meant ("~" is in no name of git's).
REVISION = rf"(?:[A-Za-z0-9_][A-Za-z0-9._/-]{{0,127}})?(?:~subfolder={FOLDER})?(?:~variant={VARIANT})?"
MOST_REVISION = 320
MOST_SUBFOLDER, MOST_VARIANT = 128, 32
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
    """Return `revision` if it can name a branch, tag or commit, and perhaps a part of the repository then.

    Raises:
        InvalidInput: If it is anything else.
    """
    if (
        isinstance(revision, str)
        and 0 < len(revision) <= MOST_REVISION
        and re.fullmatch(REVISION, revision)
        and ".." not in revision
        and "//" not in revision
    ):
        return revision
    raise _refused("revision", revision, "a branch, tag or commit of up to 128 characters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a repository is meant; all of it, unless one of both is named."""

    #: The folder that holds the model, relative to the repository's root.
    subfolder: str | None = None
    #: Weights under names with it in ("bf16": model.bf16.safetensors).
    variant: str | None = None

    def __str__(self) -> str:
        """As it ends a revision, so that no two parts of a commit are taken for each other anywhere."""
        folder = f"~subfolder={self.subfolder}" if self.subfolder else ""
        return folder + (f"~variant={self.variant}" if self.variant else "")

    def __bool__(self) -> bool:
        return bool(self.subfolder or self.variant)


def split_revision(revision: str | None) -> tuple[str | None, Part]:
    """The branch, tag or commit that a revision names (None: the default's), and the part of the repository."""
    ref, *chosen = (revision or "").split("~")
    named = dict(each.partition("=")[::2] for each in chosen)
    return ref or None, Part(subfolder=named.get("subfolder"), variant=named.get("variant"))


def join_revision(revision: str | None, *, subfolder: str | None = None, variant: str | None = None) -> str | None:
    """The revision with the part of the repository that is named beside it, which goes before its own.

    Raises:
        InvalidInput: If the folder or the variant can't be named.
    """
    ref, own = split_revision(revision)
    part = Part(
        subfolder=own.subfolder if subfolder is None else check_subfolder(subfolder),
        variant=own.variant if variant is None else check_variant(variant),
    )
    return f"{ref or ''}{part}" or None


def check_subfolder(subfolder: object) -> str:
    """Return `subfolder` if it can name a folder of a repository.

    Raises:
        InvalidInput: If it is anything else.
    """
    plain = isinstance(subfolder, str) and len(subfolder) <= MOST_SUBFOLDER and ".." not in subfolder
    if isinstance(subfolder, str) and plain and re.fullmatch(FOLDER, subfolder):
        return subfolder
    raise _refused("subfolder", subfolder, "a folder of the repository (letters, digits, '-', '_', '.', '/')")


def check_variant(variant: object) -> str:
    """Return `variant` if weights can be named so.

    Raises:
        InvalidInput: If it is anything else.
    """
    if isinstance(variant, str) and len(variant) <= MOST_VARIANT and re.fullmatch(VARIANT, variant):
        return variant
    raise _refused("variant", variant, "what model.<variant>.safetensors has in its name (such as 'bf16')")


def is_of(found: str | None, asked: str | None) -> bool:
    """Whether what is of the revision `found` will do where `asked` is: its commit if one is named, and its part."""
    ref, part = split_revision(asked)
    return split_revision(found)[1] == part and (ref is None or found == asked)


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
