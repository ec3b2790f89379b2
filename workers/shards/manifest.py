"""`manifest.json`: what a shard's folder holds, with the digests that prove it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import index
from pathlib import Path
from typing import Any

from planner.errors import IntegrityError, NotFound
from workers.disk.durable import write_whole
from workers.disk.paths import is_inner

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One file of a shard."""

    name: str
    size_bytes: int
    #: "blake3:<hex>"; None for a linked file whose bytes nobody has read yet.
    digest: str | None = None
    #: In hex, where it was asked for or the Hub states it.
    sha256: str | None = None
    #: "copy", "fetch", "link" or "reflink".
    how: str = "copy"
    #: Modification time when it was finished: a file that still has it was not written to since.
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTensor:
    """One tensor of a shard, where it lies and where it came from."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    #: Place in `file`, counted from its start.
    begin: int
    end: int
    #: Layer of the plan that it belongs to.
    layer: str
    source_file: str
    source_begin: int
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A checkpoint file that a shard's tensors came from."""

    size_bytes: int
    #: In hex, where the Hub states it.
    sha256: str | None = None
    #: Bytes before its data; its header is kept as `source/<name>.header`.
    header_bytes: int = 0
    #: What the names of its tensors begin with here that is not in the file (`2_Dense.`).
    prefix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A finished shard."""

    plan_id: str
    model_name: str
    revision: str
    node_id: str
    #: Layers of the plan that this node holds, in execution order.
    layers: tuple[str, ...]
    #: Every node of the plan with its layers: what `fairshard verify` needs to tell whether all is there.
    nodes: Mapping[str, tuple[str, ...]]
    #: Weight files.
    files: tuple[ShardFile, ...]
    tensors: tuple[ShardTensor, ...]
    #: Config, tokenizer, index, and the headers of the source files.
    extras: tuple[ShardFile, ...] = ()
    #: Name without bytes of its own -> tensor that it shares them with.
    aliases: Mapping[str, str] = field(default_factory=dict)
    #: Those of them that are names of tensors in the checkpoint (`.bin` files, in which names may share storage).
    twins: tuple[str, ...] = ()
    #: The model's tensors that the checkpoint lacks; None: not checked.
    missing_tensors: tuple[str, ...] | None = None
    #: Tensors that no layer uses.
    unused: tuple[str, ...] = ()
    #: Tensors that another node holds too, because a layer here is tied to them.
    duplicated: tuple[str, ...] = ()
    source_files: Mapping[str, SourceFile] = field(default_factory=dict)
    max_shard_bytes: int = 0
    #: Whether every byte that came over the network was read twice and compared.
    paranoid: bool = False
    created_at: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.end - tensor.begin for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The object that `manifest.json` holds."""
        plain = _plain(self) | {
            "files": [_plain(file) for file in self.files],
            "tensors": [_plain(tensor) for tensor in self.tensors],
            "extras": [_plain(file) for file in self.extras],
            "source_files": {name: _plain(file) for name, file in self.source_files.items()},
        }
        return {"schema_version": SCHEMA_VERSION, **plain, "total_bytes": self.total_bytes}

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`."""
        return json.dumps(self.to_json(), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, obj: Mapping[str, Any], *, where: str = MANIFEST) -> Manifest:
        """Read the object that `to_json` gave.

        Raises:
            IntegrityError: If it is anything else.
        """
        try:
            if obj["schema_version"] != SCHEMA_VERSION:
                raise IntegrityError(f"{where} has schema_version {obj['schema_version']}, not {SCHEMA_VERSION}")
            made = cls(
                plan_id=str(obj["plan_id"]),
                model_name=str(obj["model_name"]),
                revision=str(obj["revision"]),
                node_id=str(obj["node_id"]),
                layers=tuple(obj["layers"]),
                nodes={node: tuple(layers) for node, layers in obj["nodes"].items()},
                files=tuple(ShardFile(**file) for file in obj["files"]),
                tensors=tuple(ShardTensor(**{**t, "shape": tuple(t["shape"])}) for t in obj["tensors"]),
                extras=tuple(ShardFile(**file) for file in obj["extras"]),
                aliases=dict(obj["aliases"]),
                twins=tuple(obj.get("twins", ())),
                missing_tensors=None if obj.get("missing_tensors") is None else tuple(obj["missing_tensors"]),
                unused=tuple(obj["unused"]),
                duplicated=tuple(obj["duplicated"]),
                source_files={name: SourceFile(**file) for name, file in obj["source_files"].items()},
                max_shard_bytes=int(obj["max_shard_bytes"]),
                paranoid=bool(obj.get("paranoid")),
                created_at=str(obj["created_at"]),
            )
            outside = next((name for name in set(made.paths()) if not is_inner(name)), None)
            if outside is not None:
                raise IntegrityError(f"{where} names {outside!r:.200}, which is outside the shard")
            made._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise IntegrityError(f"{where} is not a valid manifest of a shard: {error!r}") from error
        return made

    def _check(self) -> None:
        """Raise TypeError, KeyError or ValueError if a value in it is impossible: all later code relies on them."""
        sizes = {file.name: index(file.size_bytes) for file in self.files}
        for tensor in self.tensors:
            if not 0 <= index(tensor.begin) <= index(tensor.end) <= sizes[tensor.file]:
                raise ValueError(f"{tensor.name!r:.100} ends at byte {tensor.end} of {tensor.file}")
        names = {tensor.name for tensor in self.tensors}
        if not all(self.aliases[twin] in names for twin in self.twins):
            raise ValueError("an alias is of no tensor")
        files, sources = (*self.files, *self.extras), self.source_files.values()
        figures = [file.size_bytes for file in files] + [tensor.source_begin for tensor in self.tensors]
        figures += [figure for source in sources for figure in (source.size_bytes, source.header_bytes)]
        figures += {size for tensor in self.tensors for size in tensor.shape}
        if not set(map(type, figures)) <= {int} or min(figures, default=0) < 0:
            raise TypeError("a figure is no whole number")
        digests = [file.digest for file in files] + [tensor.digest for tensor in self.tensors]
        digests += [file.sha256 for file in files] + [source.sha256 for source in sources]
        if not set(map(type, digests)) <= {str, type(None)}:
            raise TypeError("a digest is no text")
        texts = [*self.layers, *self.unused, *self.duplicated, *self.aliases.values(), *(self.missing_tensors or ())]
        texts += [source.prefix for source in sources]
        texts += [layer for layers in self.nodes.values() for layer in layers]
        texts += [text for tensor in self.tensors for text in (tensor.name, tensor.layer, tensor.dtype)]
        if not set(map(type, texts)) <= {str}:
            raise TypeError("a name is no text")

    def paths(self) -> Iterator[str]:
        """Every file name in it: of the shard, and of the checkpoint that it can be rebuilt to."""
        yield from (file.name for file in (*self.files, *self.extras))
        yield from self.source_files
        for tensor in self.tensors:
            yield tensor.file
            yield tensor.source_file


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as a dict, one level deep: `asdict` copies every leaf and takes eight times as long."""
    return {item.name: getattr(value, item.name) for item in fields(value)}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the shard in `directory`.

    Raises:
        NotFound: If there is none: no shard, or one that was never finished.
        IntegrityError: If it cannot be read, or names a file outside the folder.
    """
    path = directory / MANIFEST
    try:
        manifest = Manifest.from_json(json.loads(path.read_bytes()), where=str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{directory} holds no finished shard: it has no {MANIFEST}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}") from error
    return manifest


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write `manifest.json` to `directory`: under another name, fsynced, renamed."""
    write_whole(directory / MANIFEST, manifest.to_bytes())
