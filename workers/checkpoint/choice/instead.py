"""What a repository holds instead of weights that can be read, and what would work: what its refusal says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from planner.errors import InvalidCheckpoint
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.choice.names import is_adapter, variant_of
from workers.checkpoint.strict_json import some

_MAX_BYTES = 1_000_000
_UNPACK = (
    "load it with the tool that wrote it and save it with save_pretrained, or profile the repository it came from"
)
_UNPACK_GGUF = (
    "profile the repository with safetensors that it was made from, or unpack it: transformers' "
    "from_pretrained(..., gguf_file=...), then save_pretrained"
)
#: Endings of files that hold weights in other forms: what they are, and what would work.
_FORMS = {
    ".gguf": ("GGUF", _UNPACK_GGUF),
    ".onnx": ("ONNX", "profile the repository with safetensors that it was exported from"),
    ".h5": ("TensorFlow (.h5)", "load it with from_tf=True in transformers 4, then save_pretrained"),
    ".msgpack": ("Flax (.msgpack)", "load it with from_flax=True in transformers 4, then save_pretrained"),
    ".tflite": ("TensorFlow Lite", "profile the repository with safetensors that it was exported from"),
    ".mlmodel": ("Core ML", "profile the repository with safetensors that it was exported from"),
    ".pdparams": ("Paddle", _UNPACK),
    ".nemo": ("NeMo", _UNPACK),
    ".npz": ("NumPy (.npz)", _UNPACK),
    ".ckpt": ("a training checkpoint (.ckpt)", _UNPACK),
    ".pth": ("PyTorch (.pth)", _UNPACK),
    ".pt": ("PyTorch (.pt)", _UNPACK),
}  # fmt: skip


def nothing_to_read(checkpoint: Checkpoint, folder: str) -> InvalidCheckpoint:
    """The refusal of a repository without weights that can be read in `folder` ("" or a path with a slash)."""
    files = [name.removeprefix(folder) for name in sorted(checkpoint.files) if name.startswith(folder)]
    said = _variants(files) or _pipeline(checkpoint, files) or _adapter(checkpoint, files) or _elsewhere(files)
    said = said or _other_forms(files)
    where = checkpoint.model_name + (f"/{folder[:-1]}" if folder else "")
    if said is not None:
        return InvalidCheckpoint(f"{where} {said[0]}", details={"files": files[:50], **said[1]})
    return InvalidCheckpoint(
        f"{where} has no weights that can be read: expected model.safetensors, "
        f"model.safetensors.index.json or pytorch_model.bin among its {len(files)} files",
        details={"files": files[:50]},
    )


def variants(files: list[str]) -> list[str]:
    """The variants that the weights of a folder are there as."""
    return sorted({variant for name in files if (variant := variant_of(name)) is not None})


def weight_folders(files: list[str]) -> list[str]:
    """Folders below with weights that can be read."""
    parts = (name.rpartition("/") for name in files)
    return sorted(
        {
            place
            for place, _, name in parts
            if place and name.endswith((".safetensors", ".bin")) and not is_adapter(name)
        }
    )


def _variants(files: list[str]) -> tuple[str, Mapping[str, Any]] | None:
    found = variants(files)
    if not found:
        return None
    how = f"name one with --variant (over HTTP `variant`), such as --variant {found[0]}"
    return f"has its weights as variants only ({', '.join(found)}): {how}", {"variants": found}


def _pipeline(checkpoint: Checkpoint, files: list[str]) -> tuple[str, Mapping[str, Any]] | None:
    index = _read(checkpoint, "model_index.json") if "model_index.json" in files else {}
    if not index:
        return None
    folders = {name.partition("/")[0] for name in files if "/" in name}
    parts = {
        name: value
        for name, value in index.items()
        if name in folders and isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    }
    known = [f"{name} ({kind})" for name, (library, kind) in parts.items() if library == "transformers"]
    others = [f"{name} ({kind})" for name, (library, kind) in parts.items() if library != "transformers"]
    text = f"is a diffusers pipeline ({str(index.get('_class_name'))[:80]}) and no single model"
    text += (
        f": profile a component of it with --subfolder (over HTTP `subfolder`): {', '.join(known)}" if known else ""
    )
    if others:
        text += f"; transformers does not know {', '.join(others)}"
    return text, {"components": {name: list(value) for name, value in parts.items()}}


def _adapter(checkpoint: Checkpoint, files: list[str]) -> tuple[str, Mapping[str, Any]] | None:
    if "adapter_config.json" not in files and not any(map(is_adapter, files)):
        return None
    config = _read(checkpoint, "adapter_config.json")
    kind, base = str(config.get("peft_type") or "")[:40], config.get("base_model_name_or_path")
    of = f" of {base[:200]}" if isinstance(base, str) and base else ""
    text = f"is an adapter ({kind or 'PEFT'}){of} and no model: profile {base[:200] if of else 'its base model'}"  # type: ignore[index]
    return f"{text}, or merge both (PEFT's merge_and_unload), save that and profile it", {"base_model": base}


def _elsewhere(files: list[str]) -> tuple[str, Mapping[str, Any]] | None:
    found = weight_folders(files)
    if not found:
        return None
    named = ", ".join(f"{name}/" for name in found[:10])
    how = f"name the folder with --subfolder (over HTTP `subfolder`), such as --subfolder {found[0]}"
    return f"has no weights at its root, but in {named}: {how}", {"subfolders": found[:50]}


def _other_forms(files: list[str]) -> tuple[str, Mapping[str, Any]] | None:
    for ending, (form, remedy) in _FORMS.items():
        found = [name for name in files if name.endswith(ending)]
        if found:
            return (
                f"has weights as {form} only ({some(found)}), which can't be read: {remedy}",
                {"form": ending[1:], "found": found[:20]},
            )
    return None


def _read(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """A small JSON object; empty where it is none."""
    file = checkpoint.files.get(name)
    if file is None or file.size_bytes > _MAX_BYTES:
        return {}
    try:
        found = json.loads(checkpoint.read(name))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
