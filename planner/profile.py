"""What a model costs: layers with their parameters, bytes and compute.

Plain values that load nothing but the standard library, so that a profile from headers alone costs no more
than Python's start. `planner.wire.read` reads and writes them as the published metadata JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

#: What the planner moves: whole layers, or single tensors for williw metadata.
Unit = Literal["layer", "tensor"]

#: The most names in one line.
_MOST_NAMED = 12

#: [c0, c1, c2] of c0 + c1*S + c2*S**2, for a sequence of S tokens.
Terms = tuple[float, float, float]


def value(terms: Sequence[float], sequence_length: int) -> float:
    """The polynomial's value."""
    c0, c1, c2 = terms
    return c0 + c1 * sequence_length + c2 * sequence_length**2


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
    """KV cache of one layer: `B * (fixed_bytes + bytes_per_token * T + bytes_per_later_token * (S - T))` bytes.

    T = min(S, window_tokens).
    """

    #: State that does not grow with the sequence (state space, cross attention), in bytes for one sequence.
    fixed_bytes: int = 0
    bytes_per_token: int = 0
    #: Sliding window, in tokens; None where every token is kept.
    window_tokens: int | None = None
    #: Of each token beyond the window (cross attention and compressed keys beside a window).
    bytes_per_later_token: int = 0

    def bytes_at(self, batch_size: int, sequence_length: int) -> int:
        """Bytes for `batch_size` sequences of `sequence_length` tokens."""
        kept = sequence_length if self.window_tokens is None else min(sequence_length, self.window_tokens)
        later = self.bytes_per_later_token * (sequence_length - kept)
        return batch_size * (self.fixed_bytes + self.bytes_per_token * kept + later)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTerms:
    """What a layer's attention mask hides: pairs of tokens whose FLOP eager PyTorch executes all the same."""

    #: FLOP of one pair of tokens, in one sequence.
    flop_per_pair: float
    #: Earlier tokens that a token sees beside itself; None: all of them.
    behind_tokens: int | None = None
    #: Later ones; 0 behind a causal mask.
    ahead_tokens: int | None = None
    #: Tokens that see one another in blocks of so many; None: no blocks.
    chunk_tokens: int | None = None

    def seen_pairs(self, sequence_length: int) -> int:
        """Pairs of a sequence that the mask lets see, a token and itself included."""
        chunk = min(self.chunk_tokens or sequence_length, sequence_length)
        whole, rest = divmod(sequence_length, chunk) if chunk else (0, 0)
        return whole * self._seen(chunk) + self._seen(rest)

    def _seen(self, tokens: int) -> int:
        pairs = tokens
        for limit in (self.behind_tokens, self.ahead_tokens):
            reach = max(0, tokens - 1) if limit is None else min(limit, max(0, tokens - 1))
            pairs += reach * (reach + 1) // 2 + (tokens - 1 - reach) * reach if tokens else 0
        return pairs

    def hidden_flop(self, batch_size: int, sequence_length: int) -> float:
        """FLOP that a kernel which skips hidden pairs does not execute."""
        return batch_size * self.flop_per_pair * (sequence_length**2 - self.seen_pairs(sequence_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What one unit of the plan costs: the embedding, one numbered layer of a stack, the final norm + head."""

    #: Module path ("model.layers.3", "model.embed_tokens", "lm_head").
    name: str
    #: Position in execution order, from 0.
    index: int
    #: "embedding", "decoder", "encoder", "head", ..., or "unused" for tensors that no layer uses.
    layer_type: str
    #: None: not known (how its weights are packed is not certain).
    num_params: int | None = 0
    #: Parameters that one token passes through; less than `num_params` for mixtures of experts. None: not known.
    active_params: int | None = 0
    weight_bytes: int = 0
    #: Of these, what lies beside packed weights: scales, zero points, codebooks. 0 where not known.
    overhead_bytes: int = 0
    #: At the profile's batch size and sequence length.
    kv_cache_bytes: int = 0
    #: Whether these are all of it; False: what the layer keeps is not known, and no figure is given.
    kv_known: bool = True
    #: Bytes that cross to the next layer, at the profile's batch size and sequence length.
    activation_bytes: int = 0
    #: Largest working set while the layer runs, beyond weights and KV cache; 0 where not known.
    peak_bytes: int = 0
    #: FLOP of one forward pass (prefill) at the profile's batch size and sequence length.
    compute_required: float = 0
    #: FLOP where kernels skip what masks hide; None where not known.
    compute_min: float | None = None
    #: [c0, c1, c2] of FLOP = B * (c0 + c1*S + c2*S**2); None where not known.
    compute_terms: Terms | None = None
    #: Likewise, of FLOP that a pass executes once whatever its batch (tables of positions); added to the former.
    once_terms: Terms | None = None
    #: Sequence lengths [first, last] between which `compute_terms` and `kv_terms` are exact; None: all of them.
    terms_range: tuple[int, int | None] | None = None
    kv_terms: KvTerms | None = None
    #: FLOP by sub-part ("attention", "mlp", "experts", "router", "norm", ...).
    parts: Mapping[str, float] = field(default_factory=dict)
    #: `compute_terms` and `once_terms` by sub-part; empty where not known.
    part_terms: Mapping[str, Terms] = field(default_factory=dict)
    once_part_terms: Mapping[str, Terms] = field(default_factory=dict)
    #: What `compute_min` is less by; None where no mask hides anything.
    mask_terms: MaskTerms | None = None
    #: [c0, c1, c2] of `activation_bytes` = B * (c0 + c1*S + c2*S**2); None where not known.
    activation_terms: Terms | None = None
    #: Likewise of `peak_bytes`: a fit through three lengths, the profile's among them. (The largest of several
    #: working sets is no polynomial; with the length another one may become the largest.)
    peak_terms: Terms | None = None
    #: Name of the layer that stores the weights this one shares (a tied head), or None.
    tied_to: str | None = None
    #: Bytes of the shared weights, counted in `tied_to`'s `weight_bytes`, that this layer needs as well.
    tied_bytes: int = 0
    #: Their names in `tied_to`'s tensors; empty where not known.
    tied_tensors: tuple[str, ...] = ()
    #: Passes that do not run it: "text" (those without images), "profile" (the profiled one: it takes other inputs);
    #: "": every pass does.
    idle_in: str = ""
    #: Of `activation_bytes`: bytes of one token's keys and values, which later layers share with earlier ones.
    shared_kv_bytes_per_token: int = 0
    #: Modules that hold its weights, where the tensors' names do not tell; see `module_paths`.
    modules: tuple[str, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Paths of the modules that hold its weights, as the module tree names them ("": the model itself).

        What lies deeper belongs to the layer that names it deeper.
        """
        if self.modules or not self.tensors:
            return self.modules or (self.name,)
        inside = any(tensor.name.startswith(f"{self.name}.") for tensor in self.tensors)
        beside = [
            tensor.name.rpartition(".")[0] or tensor.name
            for tensor in self.tensors
            if not tensor.name.startswith(f"{self.name}.") and tensor.name != self.name
        ]
        own = [self.name] if inside or self.tied_to or not beside else []
        return tuple(dict.fromkeys([*own, *beside]))

    def at(self, *, batch_size: int, sequence_length: int, from_batch: int, from_sequence: int) -> Layer:
        """The same layer's costs at another batch size and sequence length.

        Exact where the terms are known; else scaled by the tokens.
        """
        tokens = batch_size * sequence_length / (from_batch * from_sequence)
        flop = self.compute_required * tokens
        if self.compute_terms is not None:
            flop = batch_size * value(self.compute_terms, sequence_length)
            flop += value(self.once_terms or (0, 0, 0), sequence_length)
        kv = round(self.kv_cache_bytes * tokens)
        if self.kv_terms is not None:
            kv = self.kv_terms.bytes_at(batch_size, sequence_length)
        scale = flop / self.compute_required if self.compute_required else 1.0
        least = None if self.compute_min is None else self.compute_min * scale
        if least is not None and self.mask_terms is not None:
            least = flop - self.mask_terms.hidden_flop(batch_size, sequence_length)
        parts = {
            name: batch_size * value(terms, sequence_length)
            + value(self.once_part_terms.get(name, (0, 0, 0)), sequence_length)
            for name, terms in self.part_terms.items()
        }

        def size(size_bytes: int, terms: Terms | None) -> int:
            if terms is None:
                return round(size_bytes * tokens)
            return round(batch_size * max(0, value(terms, sequence_length)))

        return replace(
            self,
            compute_required=flop,
            compute_min=least,
            parts=parts or {name: part * scale for name, part in self.parts.items()},
            kv_cache_bytes=kv,
            activation_bytes=size(self.activation_bytes, self.activation_terms),
            peak_bytes=size(self.peak_bytes, self.peak_terms),
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
    #: The model's tensors that the checkpoint lacks, as transformers names them. None: not checked, since the model's
    #: class is not known here.
    missing_tensors: tuple[str, ...] | None = None
    #: Tokens that the model takes at most: of a longer sequence it reads so many. None: any number.
    longest_sequence: int | None = None
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
    def total_params(self) -> int | None:
        """Parameters, tied weights once; None where a layer's are not known."""
        return summed(layer.num_params for layer in self.layers)

    @property
    def overhead_bytes(self) -> int:
        """Of `total_bytes`, what lies beside packed weights."""
        return sum(layer.overhead_bytes for layer in self.layers)

    def at(self, *, batch_size: int, sequence_length: int) -> ModelProfile:
        """The same model's profile at another batch size and sequence length; no tracing, no torch.

        Where a layer's terms are not exact there, `approximate` says so.
        """
        length = min(sequence_length, self.longest_sequence or sequence_length)
        now = min(self.sequence_length, self.longest_sequence or self.sequence_length)
        if (batch_size, length) == (self.batch_size, now):
            # What was counted is kept: where no formula holds, none would find it again.
            return replace(self, sequence_length=sequence_length)
        layers = tuple(
            layer.at(
                batch_size=batch_size,
                sequence_length=length,
                from_batch=self.batch_size,
                from_sequence=now,
            )
            for layer in self.layers
        )
        reasons = outside(layers, length, batched=batch_size != self.batch_size)
        return replace(
            self,
            batch_size=batch_size,
            sequence_length=sequence_length,
            layers=layers,
            approximate=(*self.approximate, *(each for each in reasons if each not in self.approximate)),
        )


def lacking(missing: Sequence[str] | None) -> list[str]:
    """What an output says of the tensors that a checkpoint lacks: nothing if it has all, else one line.

    Args:
        missing: As `ModelProfile.missing_tensors`.
    """
    if missing is None:
        return ["missing tensors: not checked, which needs the model's class"]
    if not missing:
        return []
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    count = f"{len(missing)} tensor{'s' if len(missing) > 1 else ''}"
    return [f"the checkpoint lacks {count} of its model: {', '.join(missing[:_MOST_NAMED])}{more}"]


def summed(counts: Iterable[int | None]) -> int | None:
    """The sum, or None if one of the counts is not known."""
    found = list(counts)
    known = [count for count in found if count is not None]
    return sum(known) if len(known) == len(found) else None


def outside(layers: Sequence[Layer], sequence_length: int, *, batched: bool) -> list[str]:
    """Say which layers' terms are not exact at a length, or at another batch size than the profile's (`batched`)."""
    left: Counter[tuple[int, int | None]] = Counter()
    for first, last in (layer.terms_range for layer in layers if layer.terms_range is not None):
        # No polynomial describes a layer that is exact at one length: it was counted there, for one batch size.
        if not first <= sequence_length <= (last or sequence_length) or (batched and first == last):
            left[first, last] += 1
    return [
        f"FLOP or KV cache of {count} layers follow no formula: counted at {first} tokens, estimates elsewhere"
        if first == last
        else f"FLOP and KV cache of {count} layers are exact at {first} to {last or 'any'} tokens, else extrapolated"
        for (first, last), count in sorted(left.items(), key=str)
    ]
