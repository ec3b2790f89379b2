"""A folder of a repository, or a variant of its weights, as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from planner.errors import NotFound
from planner.names import Part
from workers.checkpoint.base import Checkpoint, CheckpointFile, file_of
from workers.checkpoint.choice.instead import variants, weight_folders
from workers.checkpoint.choice.names import PLAIN, plain_name, variant_of

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOfCheckpoint:
    """The files of a part, under the names that they would have in a repository of their own; see `part_of`.

    Its revision says which part it is: whatever knows checkpoints by their revision keeps parts apart.
    """

    whole: Checkpoint
    revision: str
    files: Mapping[str, CheckpointFile]
    #: Name here -> name in the repository.
    there: Mapping[str, str]

    @property
    def model_name(self) -> str:
        """The repository's."""
        return self.whole.model_name

    def local_path(self, name: str) -> Path | None:
        """As `Checkpoint.local_path`."""
        return self.whole.local_path(self.there[file_of(self, name).name])

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """As `Checkpoint.read`."""
        return self.whole.read(self.there[file_of(self, name).name], begin, end)


def part_of(checkpoint: Checkpoint, part: Part) -> Checkpoint:
    """The part of a checkpoint; the checkpoint itself where none is named.

    A folder without a config of its own has the root's small files; weights of other variants, and those without
    one, are left out, and a variant's get the names that the loader knows.

    Raises:
        NotFound: If there is no such folder with files in it, or no weights of the variant; the message says which
            there are.
    """
    if not part:
        return checkpoint
    there = {name: name for name in checkpoint.files}
    if part.subfolder is not None:
        there = _folder(checkpoint, part.subfolder)
    if part.variant is not None:
        there = _variant(checkpoint, there, part.variant)
    return PartOfCheckpoint(
        whole=checkpoint,
        revision=f"{checkpoint.revision}{part}",
        files={name: replace(checkpoint.files[other], name=name) for name, other in there.items()},
        there=there,
    )


def whole_of(checkpoint: Checkpoint, name: str) -> tuple[Checkpoint, str]:
    """The repository that a file is of, and the file's name there."""
    if isinstance(checkpoint, PartOfCheckpoint):
        return checkpoint.whole, checkpoint.there[name]
    return checkpoint, name


def _folder(checkpoint: Checkpoint, subfolder: str) -> dict[str, str]:
    inside = {
        name.removeprefix(f"{subfolder}/"): name for name in checkpoint.files if name.startswith(f"{subfolder}/")
    }
    if not inside:
        folders = weight_folders(list(checkpoint.files))
        there = f"its weights lie in {', '.join(f'{name}/' for name in folders[:10])}" if folders else "it has none"
        raise NotFound(
            f"{checkpoint.model_name} has no folder {subfolder}/ at {checkpoint.revision}: {there}",
            details={"field": "subfolder", "subfolders": folders[:50]},
        )
    if "config.json" in inside:
        return inside
    return {name: name for name in checkpoint.files if "/" not in name and not name.endswith(_WEIGHTS)} | inside


def _variant(checkpoint: Checkpoint, there: Mapping[str, str], variant: str) -> dict[str, str]:
    mine = {name for name in there if variant_of(name) == variant}
    if not mine:
        found = variants(list(there))
        known = f"it has {', '.join(found)}" if found else "it has none"
        raise NotFound(
            f"{checkpoint.model_name} has no weights of variant {variant!r} at {checkpoint.revision}: {known}",
            details={"field": "variant", "variants": found},
        )
    plain = {name for name in there if name.removesuffix(".index.json") in PLAIN}
    kept = {name: other for name, other in there.items() if variant_of(name) is None and name not in plain}
    return kept | {plain_name(name): there[name] for name in mine}
