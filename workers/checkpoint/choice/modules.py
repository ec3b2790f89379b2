"""sentence-transformers: `modules.json` says in which folder the transformer lies, and which modules follow it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from workers.checkpoint.base import Checkpoint
from workers.disk.paths import is_inner

_MODULES = "modules.json"
_MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module that runs after the transformer."""

    #: Its folder, with a slash at its end.
    folder: str
    #: The last part of its class's name (`Dense`).
    kind: str
    #: Its weight file; None where it has none.
    file: str | None


def model_folder(checkpoint: Checkpoint) -> str:
    """Where config and weights lie: "" for the root, or the folder that `modules.json` names, with a slash."""
    if "config.json" in checkpoint.files:
        return ""
    first = next(iter(_entries(checkpoint)), None)
    return first[0] if first is not None and f"{first[0]}config.json" in checkpoint.files else ""


def later_modules(checkpoint: Checkpoint) -> list[Module]:
    """The modules after the transformer, in the order in which they run; empty where there is no `modules.json`."""
    found = []
    for folder, kind in _entries(checkpoint)[1:]:
        names = [f"{folder}{name}" for name in ("model.safetensors", "pytorch_model.bin")]
        file = next((name for name in names if folder and name in checkpoint.files), None)
        found.append(Module(folder=folder, kind=kind, file=file))
    return found


def module_prefix(checkpoint: Checkpoint, file: str) -> str:
    """What the names of a weight file's tensors begin with elsewhere, if it is a later module's; else ""."""
    if "/" not in file:
        return ""
    folder = next((module.folder for module in later_modules(checkpoint) if module.file == file), "")
    return folder.replace("/", ".")


def _entries(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """(folder, class) of each module; none where the file is not as sentence-transformers writes it."""
    file = checkpoint.files.get(_MODULES)
    if file is None or file.size_bytes > _MAX_BYTES:
        return []
    try:
        listed = json.loads(checkpoint.read(_MODULES))
        entries = sorted(listed, key=lambda entry: int(entry["idx"]))
        found = [(str(entry["path"]).strip("/"), str(entry["type"]).rpartition(".")[2]) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return []
    if not all(folder == "" or is_inner(folder) for folder, _ in found):
        return []
    return [(folder and f"{folder}/", kind) for folder, kind in found]
