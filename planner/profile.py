"""What a model costs: layers with their parameters, bytes and compute.

Plain values that load nothing but the standard library, so that a profile from headers alone costs no more
than Python's start. `planner.wire` reads and writes them as the published metadata JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

#: What the planner moves: whole layers, or single tensors for metadata of the seed's form.
Unit = Literal["layer", "tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor as a checkpoint file stores it."""

    name: str
    #: Checkpoint file that holds it, relative to the repository's root.
    file: str
    #: Name in the file's own terms (safetensors: "BF16", "F8_E4M3", ...).
    dtype: str
    shape: tuple[int, ...]
    #: First byte of its data, counted from the start of the file (not of the data section).
    begin: int
    #: One past its last byte, likewise.
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes that the file holds for it."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTerms:
    """KV cache of one layer: `B * (fixed_bytes + bytes_per_token * min(S, window_tokens))` bytes."""

    #: State that does not grow with the sequence (state space, cross attention), in bytes for one sequence.
    fixed_bytes: int = 0
    bytes_per_token: int = 0
    #: Sliding window, in tokens; None where every token is kept.
    window_tokens: int | None = None

    def bytes_at(self, batch_size: int, sequence_length: int) -> int:
        """Bytes for `batch_size` sequences of `sequence_length` tokens."""
        kept = sequence_length if self.window_tokens is None else min(sequence_length, self.window_tokens)
        return batch_size * (self.fixed_bytes + self.bytes_per_token * kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What one unit of the plan costs: the embedding, one numbered layer of a stack, the final norm + head."""

    #: Module path ("model.layers.3", "model.embed_tokens", "lm_head").
    name: str
    #: Position in execution order, from 0.
    index: int
    #: "embedding", "decoder", "encoder", "head", ..., or "unused" for tensors that no layer uses.
    layer_type: str
    num_params: int = 0
    #: Parameters that one token passes through; less than `num_params` for mixtures of experts.
    active_params: int = 0
    weight_bytes: int = 0
    #: At the profile's batch size and sequence length.
    kv_cache_bytes: int = 0
    #: Bytes that cross to the next layer, at the profile's batch size and sequence length.
    activation_bytes: int = 0
    #: Largest working set while the layer runs, beyond weights and KV cache; 0 where not known.
    peak_bytes: int = 0
    #: FLOP of one forward pass (prefill) at the profile's batch size and sequence length.
    compute_required: float = 0
    #: FLOP where kernels skip what masks hide; None where not known.
    compute_min: float | None = None
    #: [c0, c1, c2] of FLOP = B * (c0 + c1*S + c2*S**2); None where not known.
    compute_terms: tuple[float, float, float] | None = None
    #: Likewise, of FLOP that a pass executes once whatever its batch (tables of positions); added to the former.
    once_terms: tuple[float, float, float] | None = None
    #: Sequence lengths [first, last] between which `compute_terms` is exact; None: all of them.
    terms_range: tuple[int, int | None] | None = None
    kv_terms: KvTerms | None = None
    #: FLOP by sub-part ("attention", "mlp", "experts", "router", "norm", ...).
    parts: Mapping[str, float] = field(default_factory=dict)
    #: Name of the layer that stores the weights this one shares (a tied head), or None.
    tied_to: str | None = None
    #: Bytes of the shared weights, counted in `tied_to`'s `weight_bytes`, that this layer needs as well.
    tied_bytes: int = 0
    #: Their names in `tied_to`'s tensors; empty where not known.
    tied_tensors: tuple[str, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    def at(self, *, batch_size: int, sequence_length: int, from_batch: int, from_sequence: int) -> Layer:
        """The same layer's costs at another batch size and sequence length.

        Exact where `compute_terms` and `kv_terms` are known; else scaled by the tokens.
        """
        tokens = batch_size * sequence_length / (from_batch * from_sequence)
        flop = self.compute_required * tokens
        if self.compute_terms is not None:
            c0, c1, c2 = self.compute_terms
            flop = batch_size * (c0 + c1 * sequence_length + c2 * sequence_length**2)
        if self.compute_terms is not None and self.once_terms is not None:
            c0, c1, c2 = self.once_terms
            flop += c0 + c1 * sequence_length + c2 * sequence_length**2
        kv = round(self.kv_cache_bytes * tokens)
        if self.kv_terms is not None:
            kv = self.kv_terms.bytes_at(batch_size, sequence_length)
        scale = flop / self.compute_required if self.compute_required else 1.0
        return replace(
            self,
            compute_required=flop,
            compute_min=None if self.compute_min is None else self.compute_min * scale,
            parts={name: part * scale for name, part in self.parts.items()},
            kv_cache_bytes=kv,
            activation_bytes=round(self.activation_bytes * tokens),
            peak_bytes=round(self.peak_bytes * tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """Per-layer costs of one model revision at one batch size and sequence length."""

    #: "owner/name" on the Hub or below the models folder.
    model_name: str
    #: Commit hash, or the hash of a folder's config and headers.
    revision: str | None = None
    model_type: str | None = None
    architecture: str | None = None
    #: Most common dtype by bytes, as the checkpoint files name it.
    dtype: str | None = None
    batch_size: int = 1
    sequence_length: int = 512
    #: In execution order; an `unused` entry, if any, comes last.
    layers: tuple[Layer, ...] = ()
    unit: Unit = "layer"
    #: Why FLOP or KV bytes are a general rule and not exact; empty where they are exact.
    approximate: tuple[str, ...] = ()
    #: When it was made, RFC 3339 in UTC.
    generated_at: str | None = None
    #: The node that made it.
    node_id: str | None = None

    @property
    def total_compute(self) -> float:
        """FLOP of one forward pass."""
        return sum(layer.compute_required for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Weight bytes of the checkpoint, tied weights once."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def total_params(self) -> int:
        """Parameters, tied weights once."""
        return sum(layer.num_params for layer in self.layers)

    def at(self, *, batch_size: int, sequence_length: int) -> ModelProfile:
        """The same model's profile at another batch size and sequence length; no tracing, no torch."""
        if (batch_size, sequence_length) == (self.batch_size, self.sequence_length):
            return self
        layers = tuple(
            layer.at(
                batch_size=batch_size,
                sequence_length=sequence_length,
                from_batch=self.batch_size,
                from_sequence=self.sequence_length,
            )
            for layer in self.layers
        )
        return replace(self, batch_size=batch_size, sequence_length=sequence_length, layers=layers)
