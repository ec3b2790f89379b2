"""The weight files that transformers' loader would read, and those of repositories that it would not load at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from planner.errors import InvalidCheckpoint
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.choice.instead import nothing_to_read
from workers.checkpoint.choice.modules import model_folder
from workers.checkpoint.choice.names import PLAIN, is_adapter, variant_of
from workers.checkpoint.config import ModelConfig, read_config
from workers.checkpoint.strict_json import pairs, parse_json, show, some

#: An index of 92,000 tensors takes 9 MB.
_MAX_INDEX_BYTES = 200_000_000
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


def weight_files(checkpoint: Checkpoint, config: ModelConfig | None = None) -> list[str]:
    """The checkpoint's weight files in name order, as transformers' loader chooses them.

    What the config names, else model.safetensors, else the files of its index, else the same of pytorch_model.bin.
    An index is believed in which files there are and in no more: the loader takes every tensor of each of them. Where
    it finds nothing, numbered files without an index and files of other names are taken.

    Args:
        checkpoint: Whose files.
        config: Its config, where it was read already.

    Raises:
        InvalidCheckpoint: If there are none (the message says what there is, and what would work), or an index, a
            numbered name or the config promises a file that is missing.
    """
    config = read_config(checkpoint) if config is None else config
    folder = model_folder(checkpoint)
    stated = config.values.get("transformers_weights")
    if stated is not None:
        return _stated(checkpoint, folder, stated)
    for plain in PLAIN:
        if folder + plain in checkpoint.files:
            return [folder + plain]
        if f"{folder}{plain}.index.json" in checkpoint.files:
            return _indexed(checkpoint, folder, f"{folder}{plain}.index.json")
    here = sorted(name for name in checkpoint.files if name.startswith(folder) and "/" not in name[len(folder) :])
    for suffix in (".safetensors", ".bin"):
        indices = [name for name in here if name.endswith(f"{suffix}.index.json")]
        if indices:
            return _indexed(checkpoint, folder, indices[0])
        found = _loose([name.removeprefix(folder) for name in here if name.endswith(suffix)])
        if found:
            _check_numbered(found)
            return [folder + name for name in found]
    raise nothing_to_read(checkpoint, folder)


def _stated(checkpoint: Checkpoint, folder: str, stated: object) -> list[str]:
    """What the config's `transformers_weights` means."""
    if not isinstance(stated, str) or not stated.endswith((".safetensors", ".safetensors.index.json")):
        raise InvalidCheckpoint(
            f"config.json: transformers_weights must name a .safetensors file or its index, got {show(stated)}"
        )
    if folder + stated not in checkpoint.files:
        raise InvalidCheckpoint(
            f"config.json: transformers_weights names {show(stated)}, which is not there",
            details={"missing": [stated[:200]]},
        )
    return _indexed(checkpoint, folder, folder + stated) if stated.endswith(".json") else [folder + stated]


def _indexed(checkpoint: Checkpoint, folder: str, index: str) -> list[str]:
    files = sorted({folder + name for name in read_index(checkpoint, index).values()})
    missing = [name for name in files if name not in checkpoint.files]
    if missing:
        raise InvalidCheckpoint(
            f"{index} names {len(files)} files, of which {len(missing)} are missing: {some(missing)}",
            details={"index": index, "missing": missing[:20]},
        )
    return files


def _loose(names: Iterable[str]) -> list[str]:
    """Of the weight files of a folder without an index those that are the model's, whatever they are called."""
    own = [name for name in names if not is_adapter(name) and variant_of(name) is None]
    if own and own[0].endswith(".bin"):
        own = [name for name in own if name.startswith(("pytorch_model", "model"))]
    numbered = [name for name in own if name.startswith(("model-", "pytorch_model-")) and _NUMBERED.fullmatch(name)]
    # The same weights under other names, for other loaders.
    return numbered or [name for name in own if not name.startswith("consolidated")] or own


def _check_numbered(names: list[str]) -> None:
    """Refuse `a-00001-of-00003` where another of the three is missing."""
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            continue
        stem, _, total, suffix = match.groups()
        wanted = (f"{stem}-{number:05d}-of-{total}{suffix}" for number in range(1, int(total) + 1))
        missing = [other for other in wanted if other not in names]
        if missing:
            raise InvalidCheckpoint(
                f"{name} says there are {int(total)} files, of which {len(missing)} are missing: {some(missing)}",
                details={"missing": missing[:20]},
            )


def read_index(checkpoint: Checkpoint, name: str) -> Mapping[str, str]:
    """The `weight_map` of an index file: tensor name -> file name.

    Raises:
        InvalidCheckpoint: If it is no such index, names a tensor twice, or names a file outside the root.
    """
    size = checkpoint.files[name].size_bytes
    if size > _MAX_INDEX_BYTES:
        raise InvalidCheckpoint(f"{name} is {size:,} bytes; an index has at most {_MAX_INDEX_BYTES:,}")
    index = dict(pairs(parse_json(checkpoint.read(name), name), name))
    weight_map = dict(pairs(index.get("weight_map"), f"{name}: weight_map"))
    if not weight_map:
        raise InvalidCheckpoint(f"{name}: weight_map names no tensor")
    # A few files hold 100,000 tensors: each is looked at once.
    right: set[str] = set()
    for tensor, file in weight_map.items():
        if type(file) is str and file in right:
            continue
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise InvalidCheckpoint(f"{name}: tensor {show(tensor)} is placed in {show(file)}, which is no file name")
        right.add(file)
    return weight_map
