"""A trace's result as plain values: what each layer costs at any batch size and sequence length.

Needs no torch, so machines without it can use cached traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from planner.errors import InvalidMetadata
from planner.profile import MaskTerms, Terms

ZERO: Terms = (0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """What was counted at one batch size and sequence length, for layers that no formula describes."""

    flop: float
    parts: Mapping[str, float]
    #: Cached keys and values, in values.
    kv_values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """What one layer costs."""

    name: str
    layer_type: str
    number: int | None = None
    stack: str = ""
    #: As `planner.profile.Layer.idle_in`.
    idle_in: str = ""
    #: Modules that hold its weights, as the module tree names them.
    modules: tuple[str, ...] = ()
    #: FLOP for each sequence of the batch.
    terms: Terms = ZERO
    #: FLOP that a pass executes once, whatever the batch (tables of positions).
    once: Terms = ZERO
    #: Sequence lengths [first, last] between which `terms` and the KV cache's are exact; None: all.
    terms_range: tuple[int, int | None] | None = None
    #: `terms` and `once` by sub-part.
    parts: Mapping[str, Terms] = field(default_factory=dict)
    once_parts: Mapping[str, Terms] = field(default_factory=dict)
    #: What the mask of `parts["attention"]` hides.
    mask: MaskTerms | None = None
    #: Cached keys and values: values for each sequence, fixed, for each token and each beyond the window; bytes of
    #: one; tokens that the window keeps.
    kv_fixed: int = 0
    kv_per_token: int = 0
    kv_per_later_token: int = 0
    kv_value_bytes: int = 2
    kv_window: int | None = None
    #: Bytes of state of a fixed dtype for each sequence.
    state_bytes: int = 0
    #: Bytes that cross to the next layer, for each sequence; those of each token that are keys and values which
    #: later layers share.
    activation: Terms = ZERO
    shared_kv_per_token: int = 0
    #: Largest bytes alive beside weights and KV cache, for each sequence.
    peak: Terms = ZERO
    #: Whether no formula describes it at all lengths: scans that pad to a chunk are exact at multiples of it only.
    chunked: bool = False
    #: At batch and sequence ("1x512") where `terms` is not exact.
    exact: Mapping[str, Exact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTrace:
    """A traced model and where its checkpoint's tensors belong."""

    layers: tuple[LayerTrace, ...]
    #: Tensor -> [layer (-1: none), parameters that it holds, share of them that one token uses, 1 if it lies beside
    #: a packed parameter].
    tensors: Mapping[str, tuple[int, int, float, int]]
    #: (layer, layer that stores its weight, name of the stored tensor), for weights stored elsewhere.
    ties: tuple[tuple[int, int, str], ...] = ()
    #: The model's tensors that the checkpoint lacks, as transformers names them.
    missing: tuple[str, ...] = ()
    #: Tokens that the model takes at most: of a longer sequence it reads so many. None: any number.
    longest: int | None = None
    #: Why something is not exact; empty if all is.
    reasons: tuple[str, ...] = ()

    def covers(self, batch_size: int, sequence_length: int) -> bool:
        """Whether a new trace would add nothing at that batch size and sequence length."""
        at = f"{batch_size}x{min(sequence_length, self.longest or sequence_length)}"
        return all(at in layer.exact or not layer.chunked for layer in self.layers)


def to_json(trace: ModelTrace) -> dict[str, Any]:
    """JSON values of a trace."""
    return {
        "layers": [
            {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "exact"}
            | {"parts": dict(layer.parts), "once_parts": dict(layer.once_parts)}
            | {"mask": None if layer.mask is None else asdict(layer.mask)}
            | {"exact": {at: {**asdict(e), "parts": dict(e.parts)} for at, e in layer.exact.items()}}
            for layer in trace.layers
        ],
        "tensors": {name: list(place) for name, place in trace.tensors.items()},
        "ties": [list(tie) for tie in trace.ties],
        "missing": list(trace.missing),
        "longest": trace.longest,
        "reasons": list(trace.reasons),
    }


def from_json(data: Any) -> ModelTrace:
    """A trace out of its JSON values.

    Raises:
        InvalidMetadata: If they are not those of a trace.
    """
    try:
        return ModelTrace(
            layers=tuple(_layer(values) for values in data["layers"]),
            tensors={
                name: (int(at), int(values), share, int(beside))
                for name, (at, values, share, beside) in data["tensors"].items()
            },
            ties=tuple((int(layer), int(stored), str(name)) for layer, stored, name in data["ties"]),
            missing=tuple(data["missing"]),
            longest=data["longest"],
            reasons=tuple(data["reasons"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidMetadata(f"a cached trace cannot be read: {error!r}") from error


def _layer(values: Mapping[str, Any]) -> LayerTrace:
    known = {f.name for f in fields(LayerTrace)}
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known
    }
    for name in ("parts", "once_parts"):
        given[name] = {part: tuple(terms) for part, terms in values[name].items()}
    given["exact"] = {at: Exact(**e) for at, e in values["exact"].items()}
    given["mask"] = None if values["mask"] is None else MaskTerms(**values["mask"])
    return LayerTrace(**given)
