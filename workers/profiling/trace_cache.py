"""Traces on disk, by a hash of all they depend on: a model that was traced before needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from planner.errors import InvalidMetadata
from planner.profile import Tensor
from workers.checkpoint.config import QUANTIZATION, ModelConfig
from workers.disk.durable import write_whole
from workers.profiling.trace import ModelTrace, from_json, to_json

#: Raised whenever a trace's meaning or form changes.
_FORMAT = 8
#: What a config says that no trace depends on.
_NOISE = {"_name_or_path", "transformers_version", "auto_map", *QUANTIZATION, "id2label", "label2id"}
#: Dtypes that pack nothing: which one it is changes no trace.
_FLOATS = {"F64", "F32", "F16", "BF16"}


class TraceCache:
    """The cached trace of one config and its tensors."""

    def __init__(self, folder: Path | None, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self._path = None if folder is None else folder / f"{_key(config, tensors)}.json"

    def read(self) -> ModelTrace | None:
        """The trace, or None if there is none that can be read."""
        if self._path is None:
            return None
        try:
            return from_json(json.loads(self._path.read_bytes()))
        except (OSError, ValueError, RecursionError, InvalidMetadata):
            return None

    def write(self, trace: ModelTrace, older: ModelTrace | None) -> ModelTrace:
        """Store a trace joined with an older one's counts at other batch sizes and lengths; returns both together."""
        if older is not None and len(older.layers) == len(trace.layers):
            layers = (
                replace(new, exact={**old.exact, **new.exact})
                for new, old in zip(trace.layers, older.layers, strict=True)
            )
            trace = replace(trace, layers=tuple(layers))
        if self._path is not None:
            # A cache that cannot be written costs time, not the profile.
            with contextlib.suppress(OSError):
                write_whole(self._path, json.dumps(to_json(trace), separators=(",", ":")).encode())
        return trace


def _key(config: ModelConfig, tensors: Mapping[str, Tensor]) -> str:
    """A hash of the config, the tensors' names, shapes and packing, and the versions that count."""
    values = {name: each for name, each in config.values.items() if name not in _NOISE}
    digest = hashlib.sha256()
    digest.update(json.dumps([_FORMAT, _version("torch"), _version("transformers"), values], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        packing = "" if tensor.dtype in _FLOATS else f"{tensor.dtype} {tensor.size_bytes}"
        digest.update(f"\0{name}\0{tensor.shape}{packing}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
