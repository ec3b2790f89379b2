"""Downloads whole files of a checkpoint to a folder, with the same ranges, resuming and checks as for shards."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from planner.errors import IntegrityError
from workers.checkpoint.base import Checkpoint, CheckpointFile, file_of
from workers.checkpoint.folder import FolderCheckpoint, mark_downloaded
from workers.checkpoint.hub import HubCheckpoint, git_id
from workers.disk.durable import explained, sync, write_whole
from workers.disk.paths import within
from workers.disk.space import check_free, needed_bytes
from workers.progress import Progress
from workers.transfer.checking import Checks
from workers.transfer.copy import copy_outputs
from workers.transfer.fetch import CONNECTIONS, fetch_outputs
from workers.transfer.journal import open_journal
from workers.transfer.outputs import Output, Run
from workers.transfer.segments import Origin, cut, of_checkpoint


def snapshot(
    checkpoint: Checkpoint, directory: Path | None, *, names: Iterable[str] | None, progress: Progress
) -> Path:
    """See `workers.downloader.download`."""
    wanted = sorted(checkpoint.files if names is None else names)
    for name in wanted:
        file_of(checkpoint, name)
    if directory is None:
        if isinstance(checkpoint, FolderCheckpoint):
            return checkpoint.folder
        assert isinstance(checkpoint, HubCheckpoint)
        directory = checkpoint.cache / "snapshots" / checkpoint.revision
        wanted = [name for name in wanted if checkpoint.local_path(name) is None or not (directory / name).exists()]
    todo = [name for name in wanted if not _is_there(directory / name, checkpoint.files[name])]
    if not todo:
        with contextlib.suppress(OSError):  # it may be a disk that is only read
            _note(checkpoint, directory)
        return directory
    outputs = [_output(checkpoint.files[name]) for name in todo]
    # On the same disk as the folder itself, or nothing could be renamed into it.
    real = directory.resolve()
    target = real / "download" if real.is_mount() else real
    journal = open_journal(target, key=f"{checkpoint.model_name} {checkpoint.revision} {todo}")
    try:
        with explained(directory):
            for name in todo:
                within(journal.folder, name).parent.mkdir(parents=True, exist_ok=True)
        check_free(
            journal.folder.parent, needed_bytes(journal.folder, {item.name: item.size_bytes for item in outputs})
        )
        stated = {name: checkpoint.files[name].sha256 or "" for name in todo if checkpoint.files[name].sha256}
        checks = Checks(stated_sha256=stated)
        here = {name: path for name in todo if (path := checkpoint.local_path(name)) is not None}
        if len(here) == len(todo):
            copy_outputs(outputs, here, journal, checks=checks, progress=progress)
        else:

            def origins(_: str, file: str, offset: int) -> tuple[Origin, ...]:
                return (of_checkpoint(checkpoint, file, offset),)

            total = sum(output.size_bytes for output in outputs)
            segments = [
                segment
                for index, output in enumerate(outputs)
                for segment in cut(output, index, origins=origins, connections=CONNECTIONS, total_bytes=total)
            ]
            fetch_outputs(outputs, segments, journal, checks=checks, progress=progress)
        with explained(directory):
            for name in todo:
                _check_git_id(journal.folder / name, checkpoint.files[name])
            for name in todo:
                within(directory, name, replaced=True).parent.mkdir(parents=True, exist_ok=True)
                (journal.folder / name).replace(directory / name)
                sync((directory / name).parent)
            _note(checkpoint, directory)
        journal.remove()
    except BaseException:
        journal.close()
        raise
    return directory


def _output(file: CheckpointFile) -> Output:
    runs = (Run(source=file.name, begin=0, end=file.size_bytes, target=0),) if file.size_bytes else ()
    return Output(name=file.name, header=b"", size_bytes=file.size_bytes, placed=(), runs=runs, whole=file.name)


def _is_there(path: Path, file: CheckpointFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    if file.sha256 is None:
        return file.etag is not None and git_id(path.read_bytes()) == file.etag
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest() == file.sha256


def _check_git_id(path: Path, file: CheckpointFile) -> None:
    if (
        file.sha256 is None
        and file.etag is not None
        and len(file.etag) == 40
        and git_id(path.read_bytes()) != file.etag
    ):
        found = git_id(path.read_bytes())
        path.unlink()
        raise IntegrityError(f"{file.name} has the git id {found}, the Hub states {file.etag}; try again")


def _note(checkpoint: Checkpoint, directory: Path) -> None:
    if not isinstance(checkpoint, HubCheckpoint):
        return
    if directory == checkpoint.cache / "snapshots" / checkpoint.revision:
        if checkpoint.ref is not None:
            ref = checkpoint.cache / "refs" / checkpoint.ref
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_whole(ref, checkpoint.revision.encode())
    elif all(path.relative_to(directory).as_posix() in checkpoint.files for path in _shown_files(directory)):
        mark_downloaded(directory, model_name=checkpoint.model_name, revision=checkpoint.revision)


def _shown_files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("[!.]*") if path.is_file())
