"""Tensors of `.bin` files that share one storage ("twins"): which layer each name belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

from planner.profile import Layer, Tensor, summed


def distinct(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Divide tensors into the first name of each range of bytes, and the further names (twins)."""
    seen: dict[tuple[str, int, int], str] = {}
    first: list[Tensor] = []
    twins: list[Tensor] = []
    for tensor in tensors:
        twin = tensor.size_bytes and seen.setdefault(place(tensor), tensor.name) != tensor.name
        (twins if twin else first).append(tensor)
    return first, twins


def place(tensor: Tensor) -> tuple[str, int, int]:
    """The file and byte range of a tensor."""
    return tensor.file, tensor.begin, tensor.end


def with_twins(layers: Sequence[Layer], twins: Sequence[Tensor]) -> list[Layer]:
    """Add to each layer the twins that are its own weights.

    A twin is left out if the model ties it anyway, or if its name belongs to the layer that stores the bytes or to no
    layer: then it travels with the bytes.
    """
    found = list(layers)
    if not twins:
        return found
    owners = {place(tensor): (at, tensor.name) for at, layer in enumerate(layers) for tensor in layer.tensors}
    paths = _paths(layers)
    for twin in twins:
        stored_in, name = owners[place(twin)]
        at = next((paths[path] for path in _prefixes(twin.name.rpartition(".")[0]) if path in paths), -1)
        if at in {-1, stored_in} or name in layers[at].tied_tensors:
            continue
        values = prod(twin.shape)
        found[at] = replace(
            found[at],
            tensors=(*found[at].tensors, twin),
            weight_bytes=found[at].weight_bytes + twin.size_bytes,
            num_params=summed((found[at].num_params, values)),
            active_params=summed((found[at].active_params, values)),
        )
    return found


def _paths(layers: Sequence[Layer]) -> dict[str, int]:
    """Module path -> number of the one layer below it; -1 where there are several."""
    paths: dict[str, int] = {}
    for at, layer in enumerate(layers):
        for path in {layer.name, *(tensor.name.rpartition(".")[0] for tensor in layer.tensors)}:
            for prefix in _prefixes(path):
                if paths.setdefault(prefix, at) != at:
                    paths[prefix] = -1
    for at, layer in enumerate(layers):
        # A checkpoint of the bare model lacks the first part.
        paths.setdefault(layer.name.partition(".")[2], at)
    return paths


def _prefixes(path: str) -> Iterator[str]:
    """The path and those above it, longest first."""
    while path:
        yield path
        path = path.rpartition(".")[0]
