"""Layers of the modules that run after a model (sentence-transformers'): what their weights take and do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from planner.dtypes import size_bytes
from planner.profile import Layer, Tensor, Terms
from workers.checkpoint.choice.modules import Module

#: Those whose work is a matrix product for each vector, or next to nothing.
_KNOWN = {"Dense": "projector", "LayerNorm": "norm"}


def with_modules(
    layers: Sequence[Layer], modules: Sequence[tuple[Module, Sequence[Tensor]]], *, batch_size: int, length: int
) -> tuple[list[Layer], list[str]]:
    """The layers with those of later modules behind them, and why their FLOP are approximate.

    A module behind the pooling runs once for each sequence, one before it for each token. Those without weights
    (pooling, normalisation) are no layers.

    Args:
        layers: The model's; tensors that it does not use stay the last entry.
        modules: In the order in which they run, with their tensors.
        batch_size: Of the profile.
        length: Tokens of each sequence.
    """
    made: list[Layer] = []
    reasons: list[str] = []
    pooled = False
    for module, tensors in modules:
        pooled = pooled or module.kind == "Pooling"
        if not tensors:
            continue
        if module.kind not in _KNOWN:
            reasons.append(f"FLOP of {module.folder[:-1]} ({module.kind}) by the general rule")
        made.append(_layer(module, tensors, once=pooled, batch_size=batch_size, length=length))
    unused = [layer for layer in layers if layer.layer_type == "unused"]
    used = [layer for layer in layers if layer.layer_type != "unused"]
    joined = [*used, *made, *unused] if made else list(layers)
    return [replace(layer, index=at) for at, layer in enumerate(joined)] if made else joined, reasons


def _layer(module: Module, tensors: Sequence[Tensor], *, once: bool, batch_size: int, length: int) -> Layer:
    count = sum(prod(tensor.shape) for tensor in tensors)
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    flop = 2.0 * sum(prod(tensor.shape) for tensor in matrices)
    width = matrices[-1].shape[0] if matrices else max(prod(tensor.shape) for tensor in tensors)
    handed = float(size_bytes((width,), tensors[0].dtype) or width * 4)

    def terms(cost: float) -> Terms:
        return (cost, 0.0, 0.0) if once else (0.0, cost, 0.0)

    times = batch_size * (1 if once else length)
    return Layer(
        name=module.folder[:-1].replace("/", "."),
        index=0,
        layer_type=_KNOWN.get(module.kind, "projector"),
        num_params=count,
        active_params=count,
        weight_bytes=sum(tensor.size_bytes for tensor in tensors),
        activation_bytes=round(handed * times),
        activation_terms=terms(handed),
        compute_required=flop * times,
        compute_terms=terms(flop),
        compute_min=flop * times,
        tensors=tuple(tensors),
    )
