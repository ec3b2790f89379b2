"""Finds the checkpoint that a name means (a folder, the Hub's cache, the Hub), and downloads whole checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from planner.errors import Conflict, InvalidInput
from planner.names import check_asked_name, check_revision, join_revision, split_revision
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.choice.part import PartOfCheckpoint, part_of
from workers.checkpoint.folder import open_folder
from workers.progress import Progress, silent
from workers.settings import HubSettings

_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    models_dir: Path | None = None,
    hub: HubSettings | None = None,
) -> Checkpoint:
    """Find the checkpoint that `source` names, pinned to one revision.

    With `subfolder` or `variant`, or a revision that ends in both ("main~subfolder=text_encoder~variant=fp16"), it is
    that part of the repository, as a checkpoint of its own whose revision ends so.

    A `Path` is a folder. A text that can be a model's name is one: the folder `models_dir/owner/name` if it
    exists, else the Hub's repository (or its cached copy, where HF_HUB_OFFLINE is set or the Hub is down).
    Any other text is a folder's path; shells that take names from the network check them first.

    Args:
        source: `owner/name`, a name that the Hub resolves without its owner (`gpt2`), or a folder.
        revision: Branch, tag or commit; default the Hub's main branch, or the folder as it is.
        subfolder: The folder of the repository that holds the model.
        variant: Which of several weights (`bf16` of `model.bf16.safetensors`).
        token: A user's Hub token; default this process's own.
        models_dir: Where `owner/name` folders are looked for before the Hub.
        hub: How to reach the Hub; default what the environment says.

    Raises:
        NotFound: If there is no such folder, repository, revision, subfolder or variant.
        AccessDenied: If the repository is gated or private and the token does not open it.
        Conflict: If the folder is not of the revision asked for.
        InvalidInput: If `source` or `revision` cannot name anything.
        Unavailable: If the Hub cannot be reached within the retries and has no cached copy.
    """
    if revision is not None:
        check_revision(revision)
    asked, part = split_revision(join_revision(revision, subfolder=subfolder, variant=variant))
    return part_of(_resolve(source, asked, token=token, models_dir=models_dir, hub=hub), part)


def _resolve(
    source: str | Path, revision: str | None, *, token: str | None, models_dir: Path | None, hub: HubSettings | None
) -> Checkpoint:
    name = _model_name(source)
    if name is None:
        return _folder(Path(source).expanduser(), None, revision)
    hub = hub or HubSettings.from_env()
    if "/" not in name:
        from workers.checkpoint.hub import canonical_name

        name = canonical_name(name, token=token or hub.token, hub=hub)
    if models_dir is not None and (models_dir / name).is_dir():
        return _folder(models_dir / name, name, revision)
    from workers.checkpoint.hub import open_hub

    return open_hub(name, revision=revision, token=token, hub=hub)


def download(
    checkpoint: Checkpoint,
    directory: Path | None = None,
    *,
    names: Iterable[str] | None = None,
    progress: Progress = silent,
) -> Path:
    """Bring files of a checkpoint to a folder: resumable, many connections a file, checked against the Hub's digests.

    Args:
        checkpoint: What `resolve` found.
        directory: Where to; default the Hub's cache, where `resolve` and every Hub client find it. A folder that
            was downloaded to remembers its commit, until a file in it is changed.
        names: Which files; default all.
        progress: Told the bytes; may raise to stop, and the next call goes on from there.

    Returns:
        The folder that holds the files.

    Raises:
        NotFound: If the checkpoint has no such file.
        NodeFailure: If the disk is full or cannot be written.
        IntegrityError: If bytes stay wrong however often they are fetched.
        AccessDenied, Unavailable: As the server answers.
    """
    from workers.transfer.snapshot import snapshot

    if directory is None and isinstance(checkpoint, PartOfCheckpoint):
        # The Hub's cache has repositories as they are.
        wanted = [checkpoint.there[name] for name in (checkpoint.files if names is None else names)]
        return snapshot(checkpoint.whole, None, names=wanted, progress=progress)
    return snapshot(checkpoint, directory, names=names, progress=progress)


def _model_name(source: str | Path) -> str | None:
    if isinstance(source, Path):
        return None
    if source and "/" not in source and os.path.isdir(source):  # noqa: PTH112 - bears any text
        return None
    try:
        return check_asked_name(source)
    except InvalidInput:
        if source and (source[0] in "/.~" or os.path.isdir(source)):  # noqa: PTH112 - bears any text
            return None
        raise


def _folder(folder: Path, name: str | None, revision: str | None) -> Checkpoint:
    checkpoint = open_folder(folder, model_name=name)
    if revision in {None, "main", checkpoint.revision}:
        return checkpoint
    if name is None and not _COMMIT.fullmatch(revision or ""):
        raise Conflict(f"a folder has no branches; leave the revision out, or name {checkpoint.revision}")
    raise Conflict(
        f"{folder} is of revision {checkpoint.revision}, not {revision}: it changed, or the wrong folder lies there",
        details={"found": checkpoint.revision, "wanted": revision},
    )
