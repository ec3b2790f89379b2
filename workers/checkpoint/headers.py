"""What a checkpoint holds, read from its headers alone: tensors' names, dtypes, shapes and byte ranges.

Loads no torch, numpy or Hub client. Of a Hub checkpoint only the headers' ranges are read, files in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.choice.modules import Module, later_modules
from workers.checkpoint.choice.weights import weight_files
from workers.checkpoint.config import ModelConfig
from workers.checkpoint.shared_storage import distinct
from workers.checkpoint.source import Source, read_source
from workers.checkpoint.strict_json import show
from workers.collector import uncollected
from workers.progress import Progress, silent

_PARALLEL_FILES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """The headers of all weight files of a checkpoint."""

    #: By file in name order, within a file by offset; each range of bytes once, by its first name.
    tensors: tuple[Tensor, ...]
    #: Other names of such ranges (in `.bin` files; safetensors allows none).
    twins: tuple[Tensor, ...] = ()
    #: Modules that run after the model, with their own tensors (sentence-transformers').
    modules: tuple[tuple[Module, tuple[Tensor, ...]], ...] = ()
    #: `__metadata__` of the files, merged in name order.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: Size of each weight file, in bytes.
    files: Mapping[str, int] = field(default_factory=dict)
    #: Size of each file's header with its length field, in bytes.
    header_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.end - tensor.begin for tensor in self.tensors)


def read_headers(
    checkpoint: Checkpoint, *, config: ModelConfig | None = None, progress: Progress = silent
) -> Headers:
    """Read and check the headers of every weight file of `checkpoint`, as transformers' loader chooses them.

    Args:
        checkpoint: Whose files; `workers.checkpoint.torch_file` reads those of one that has only `.bin` files.
        config: Its config, where it was read already.
        progress: Told of the files.

    Raises:
        InvalidCheckpoint: If there are no weights, or a file or index contradicts itself or another.
        Unavailable: If the server cannot be reached.
    """
    # 100,000 tensors make a million objects: the collector would look through all, often.
    with uncollected():
        return _read_headers(checkpoint, config, progress)


def _read_headers(checkpoint: Checkpoint, config: ModelConfig | None, progress: Progress) -> Headers:
    names = weight_files(checkpoint, config)
    modules = later_modules(checkpoint)
    later = [module.file for module in modules if module.file is not None]
    sources: list[Source] = []
    for source in read_sources(checkpoint, dict.fromkeys([*names, *later])):
        sources.append(source)
        progress(len(sources), len(names) + len(later), what="headers")
    own = {source.name: source for source in sources[len(names) :]}
    sources = sources[: len(names)]
    tensors = [tensor for source in sources for tensor in source.tensors.values()]
    _check_names(tensors)
    first, twins = (tensors, []) if names[0].endswith(".safetensors") else distinct(tensors)
    return Headers(
        tensors=tuple(first),
        twins=tuple(twins),
        modules=tuple(
            (module, tuple(own[module.file].tensors.values()) if module.file else ()) for module in modules
        ),
        metadata={key: value for source in sources for key, value in source.metadata.items()},
        files={source.name: source.size_bytes for source in sources},
        header_bytes={source.name: len(source.header) for source in sources},
    )


def read_sources(checkpoint: Checkpoint, header_bytes: Mapping[str, int | None]) -> Iterator[Source]:
    """Read files' headers, in their order; those of a server several at once, as each costs a round trip or three.

    Args:
        checkpoint: Whose files.
        header_bytes: File -> the size of its header, where that is known.

    Raises:
        NotFound: If the checkpoint lacks one of the files.
        InvalidCheckpoint: If a header is malformed.
        Unavailable: If the server cannot be reached.
    """

    def read(name: str) -> Source:
        return read_source(checkpoint, name, header_bytes=header_bytes[name])

    names = list(header_bytes)
    if len(names) < 2 or checkpoint.local_path(names[0]) is not None:
        yield from map(read, names)
        return
    with ThreadPoolExecutor(min(_PARALLEL_FILES, len(names)), "headers") as pool:
        try:
            yield from pool.map(read, names)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_names(tensors: list[Tensor]) -> None:
    """Check that there are tensors, and that no name is in two files."""
    if not tensors:
        raise InvalidCheckpoint("the checkpoint's files hold no tensor")
    places = {tensor.name: tensor.file for tensor in tensors}
    if len(places) != len(tensors):
        seen: dict[str, str] = {}
        for tensor in tensors:
            other = seen.setdefault(tensor.name, tensor.file)
            if other != tensor.file:
                raise InvalidCheckpoint(f"tensor {show(tensor.name)} is in both {other} and {tensor.file}")
