"""File names from strangers (a Hub's listing, a manifest, a plan) as paths that stay in their folder."""

from __future__ import annotations

from pathlib import Path

from planner.errors import InvalidCheckpoint

#: Longest path in a repository; what Linux takes for a whole path is four times that.
_LONGEST = 1024
#: What Linux takes for one part of it, in bytes.
_LONGEST_PART = 255


def is_inner(name: object) -> bool:
    """Whether `name` is a plain relative path: no ".." in it, not absolute, no NUL or other control character."""
    if not isinstance(name, str) or len(name) > _LONGEST or "\\" in name:
        return False
    try:
        sizes = [len(part.encode()) for part in name.split("/")]
    except UnicodeError:
        return False
    plain = all(character >= " " and character != "\x7f" for character in name)
    return plain and all(0 < size <= _LONGEST_PART for size in sizes) and not {".", ".."} & set(name.split("/"))


def within(folder: Path, name: str, *, replaced: bool = False) -> Path:
    """The path of `name` in `folder`; no link on the way may lead out of the folder.

    Args:
        folder: May be a link itself.
        name: From elsewhere.
        replaced: A file will be renamed to this path, so it may itself be a link to elsewhere (the Hub's cache has
            such links).

    Raises:
        InvalidCheckpoint: If the name, or a link that its path passes through, leads elsewhere.
    """
    path = folder / name if is_inner(name) else None
    if path is None or not (path.parent if replaced else path).resolve().is_relative_to(folder.resolve()):
        raise InvalidCheckpoint(f"{str(name)!r:.100} leads out of {folder}", details={"name": str(name)[:200]})
    return path
