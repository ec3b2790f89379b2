"""A profile's layers from a trace: bytes from the headers, costs from the trace's formulas."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from planner.dtypes import bits, canonical
from planner.errors import InvalidCheckpoint
from planner.profile import KvTerms, Layer, Tensor, value
from workers.profiling.contents import Contents
from workers.profiling.trace import ZERO, Exact, LayerTrace, ModelTrace


def exact_layers(
    contents: Contents, trace: ModelTrace, *, batch_size: int, sequence_length: int, kv_dtype: str | None = None
) -> list[Layer]:
    """The layers of a profile.

    Raises:
        InvalidCheckpoint: If a tensor is not in the trace (it is of another checkpoint).
    """
    members: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in contents.headers.tensors:
        place = trace.tensors.get(tensor.name)
        if place is None:
            raise InvalidCheckpoint(f"tensor {tensor.name} is not in the cached trace; remove the cache")
        members[place[0]].append(tensor)
    ties: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for layer, stored_in, name in trace.ties:
        ties[layer].append((stored_in, name))
    by_name = {tensor.name: tensor for tensor in contents.headers.tensors} if ties else {}
    layers = [
        _layer(
            traced,
            index,
            tuple(members[index]),
            trace=trace,
            tied=[(stored_in, by_name[name]) for stored_in, name in ties[index]],
            at=(batch_size, min(sequence_length, trace.longest or sequence_length)),
            kv_dtype=kv_dtype,
        )
        for index, traced in enumerate(trace.layers)
    ]
    layers = _with_modules(layers, trace)
    if members[-1]:
        layers.append(contents.unused_layer(members[-1], len(layers)))
    return layers


def _with_modules(layers: list[Layer], trace: ModelTrace) -> list[Layer]:
    """The layers with the modules that hold them, where the checkpoint's names do not tell (it has others)."""
    found = {path: layer.index for layer in layers for path in layer.module_paths}

    def layer_of(path: str) -> int | None:
        while path and path not in found:
            path = path.rpartition(".")[0]
        return found.get(path)

    if all(layer_of(path) == at for at, traced in enumerate(trace.layers) for path in traced.modules):
        return layers
    return [replace(layer, modules=traced.modules) for layer, traced in zip(layers, trace.layers, strict=True)]


def _layer(
    traced: LayerTrace,
    index: int,
    tensors: tuple[Tensor, ...],
    *,
    trace: ModelTrace,
    tied: Sequence[tuple[int, Tensor]],
    at: tuple[int, int],
    kv_dtype: str | None,
) -> Layer:
    batch, length = at
    num_params, active, overhead = 0, 0.0, 0
    for tensor in tensors:
        _, values, share, beside = trace.tensors[tensor.name]
        num_params += values
        active += values * share
        overhead += beside * tensor.size_bytes
    kv, width = kv_terms(traced, kv_dtype), kv_bits(traced, kv_dtype)
    kv_bytes = kv.bytes_at(batch, length) if kv else 0
    if counted := traced.exact.get(f"{batch}x{length}"):
        kv_bytes = -(-counted.kv_values * width // 8) + batch * traced.state_bytes
    tied_values = sum(trace.tensors[tensor.name][1] for _, tensor in tied)
    flop, parts = flop_at(traced, batch, length)
    return Layer(
        name=traced.name,
        index=index,
        layer_type=traced.layer_type,
        idle_in=traced.idle_in,
        num_params=num_params,
        active_params=round(active) + tied_values,
        weight_bytes=sum(tensor.end - tensor.begin for tensor in tensors),
        overhead_bytes=overhead,
        kv_cache_bytes=kv_bytes,
        activation_bytes=round(batch * max(0, value(traced.activation, length))),
        shared_kv_bytes_per_token=traced.shared_kv_per_token,
        peak_bytes=round(batch * max(0, value(traced.peak, length))),
        compute_required=flop,
        compute_min=flop - (traced.mask.hidden_flop(batch, length) if traced.mask else 0),
        compute_terms=traced.terms,
        once_terms=traced.once if any(traced.once) else None,
        terms_range=(length, length) if traced.chunked else traced.terms_range,
        kv_terms=kv,
        parts=parts,
        part_terms=traced.parts,
        once_part_terms=traced.once_parts,
        mask_terms=traced.mask,
        activation_terms=traced.activation,
        peak_terms=traced.peak,
        tied_to=trace.layers[tied[0][0]].name if tied else None,
        tied_bytes=sum(tensor.end - tensor.begin for _, tensor in tied),
        tied_tensors=tuple(tensor.name for _, tensor in tied),
        tensors=tensors,
    )


def flop_at(traced: LayerTrace, batch: int, length: int) -> tuple[float, dict[str, float]]:
    """FLOP of the layer and of its parts at a batch size and sequence length."""
    exact: Exact | None = traced.exact.get(f"{batch}x{length}")
    if exact is not None:
        return exact.flop, dict(exact.parts)
    once = traced.once_parts
    parts = {
        part: batch * value(terms, length) + value(once.get(part, ZERO), length)
        for part, terms in traced.parts.items()
    }
    return batch * value(traced.terms, length) + value(traced.once, length), parts


def kv_terms(traced: LayerTrace, kv_dtype: str | None) -> KvTerms | None:
    """The layer's KV cache; None where it keeps nothing."""
    if not (traced.kv_fixed or traced.kv_per_token or traced.kv_per_later_token or traced.state_bytes):
        return None
    width = kv_bits(traced, kv_dtype)
    return KvTerms(
        fixed_bytes=-(-traced.kv_fixed * width // 8) + traced.state_bytes,
        bytes_per_token=-(-traced.kv_per_token * width // 8),
        window_tokens=traced.kv_window,
        bytes_per_later_token=-(-traced.kv_per_later_token * width // 8),
    )


def kv_bits(traced: LayerTrace, kv_dtype: str | None) -> int:
    """Bits of one cached number."""
    return traced.kv_value_bytes * 8 if kv_dtype is None else bits(canonical(kv_dtype) or "") or 16
