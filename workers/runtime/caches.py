"""The caches of a run, of the model's own kind: a real one for a node's own layers, and clocks for the others.

A clock has no memory. It answers what code asks a cache beside keys and values: how long it is, how large masks must
be, whether there is a state. So the code between the layers runs as on one machine, with no code per architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import EncoderDecoderCache, GenerationConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin

from planner.errors import InvalidInput
from workers.profiling.tracing.kv_cache import read_layer


@dataclass(frozen=True, slots=True)
class CachePart:
    """Stands in a recorded result for the pass's cache, or for one of the two in an encoder-decoder's."""

    number: int


def cache_argument(model: nn.Module) -> str | None:
    """The name by which `model`'s forward takes a cache; None if it takes none."""
    taken = inspect.signature(type(model).forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in taken), None)


def check_generates(model: Any, name: str) -> None:
    """Refuse a model that cannot generate text in stages; its weights need not be there.

    Raises:
        InvalidInput: If it generates no text, does so in a way of its own, or keeps what it read in a way of its own.
    """
    if not model.can_generate() or cache_argument(model) is None:
        raise InvalidInput(f"{name} ({type(model).__name__}) generates no text; its output can be asked for instead")
    if type(model).generate is not GenerationMixin.generate:
        raise InvalidInput(
            f"{name} cannot generate in stages: {type(model).__name__} does so in a way of its own, not in "
            f"transformers' common one"
        )
    if make_cache(model) is None:
        raise InvalidInput(
            f"{name} cannot generate in stages: {type(model).__name__} keeps what it has read in a cache of its own "
            f"kind"
        )


def make_cache(model: Any) -> Any:
    """An empty cache as `generate` makes it for `model`; None if it leaves that to the model."""
    made: dict[str, Any] = {}
    settings = GenerationConfig(use_cache=True)  # type: ignore[no-untyped-call]
    model._prepare_cache_for_generation(settings, made, GenerationMode.GREEDY_SEARCH, 1, 1)  # noqa: SLF001
    return made.get(str(cache_argument(model)))


def cache_parts(cache: Any) -> tuple[Any, ...]:
    """The cache objects that units may be given: itself and, of an encoder-decoder, its two halves."""
    if isinstance(cache, EncoderDecoderCache):
        return cache, cache.self_attention_cache, cache.cross_attention_cache
    return () if cache is None else (cache,)


def layers_of(cache: Any) -> list[Any]:
    """All layers of a cache; those of an encoder-decoder's cross attention come last."""
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return [] if cache is None else list(cache.layers)


class Watch:
    """Tells which layers of a cache were written to since it was last asked."""

    def __init__(self, cache: Any) -> None:
        self._layers = layers_of(cache)
        self._seen = [_mark(layer) for layer in self._layers]

    def changed(self) -> frozenset[int]:
        """Places, as in `layers_of`."""
        found = [place for place, layer in enumerate(self._layers) if _mark(layer) != self._seen[place]]
        for place in found:
            self._seen[place] = _mark(self._layers[place])
        return frozenset(found)


def _mark(layer: Any) -> tuple[Any, ...]:
    """What changes when a layer is written to: the identities of what it holds, and how often that was written to."""
    mark: list[Any] = []
    for value in vars(layer).values():
        for each in value.values() if isinstance(value, dict) else (value,):
            mark.append(id(each))
            if isinstance(each, Tensor):
                mark.append(each._version)  # noqa: SLF001
    return tuple(mark)


class Clock:
    """A cache without memory that is told how many tokens went by."""

    def __init__(self, model: Any) -> None:
        #: What is given to code as its cache.
        self.cache = make_cache(model)
        self._kinds = share(self.cache, range(len(layers_of(self.cache))))

    def advance(self, tokens: int) -> None:
        """A pass over `tokens` new ones of each sequence is done."""
        for layer in self._kinds:
            advance(layer, tokens)
        if isinstance(self.cache, EncoderDecoderCache):
            self.cache.is_updated = dict.fromkeys(self.cache.is_updated, True)


def share(cache: Any, places: Collection[int]) -> list[Any]:
    """Let one layer object stand for all layers of its kind at these places; the objects."""
    kinds: dict[Any, Any] = {}
    at = 0
    for half in cache_parts(cache)[1:] or (cache,):
        for index, layer in enumerate(half.layers):
            if at in places:
                # What crosses over to an encoder has a length of its own.
                kind = (id(half), type(layer), *_plain(layer))
                half.layers[index] = kinds.setdefault(kind, layer)
            at += 1
    crossing = cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else None
    return [layer for (half, *_), layer in kinds.items() if half != id(crossing)]


def _plain(layer: Any) -> Iterator[Any]:
    for name, value in sorted(vars(layer).items()):
        if isinstance(value, (int, str, float)):
            yield name, value


def advance(layer: Any, tokens: int) -> None:
    """Tell a layer without memory that `tokens` more went by."""
    if isinstance(layer, CacheLayerMixin):
        # What `update` would leave, at a hundredth of the time: torch joins meta tensors in Python.
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length += tokens
        length = tokens + (0 if layer.keys is None else layer.keys.shape[-2])
        layer.keys = layer.values = torch.empty(1, 1, length, 1, device="meta")
        layer.is_initialized = True
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)


class RealCache:
    """A session's cache on one node: memory for the layers that it holds, clocks for the others.

    Code within a layer may ask the cache's first layer for its length, which on one machine has this pass in it by
    then; so these clocks are told at a pass's begin.
    """

    def __init__(self, model: Any, held: Collection[int]) -> None:
        self.cache = make_cache(model)
        layers = layers_of(self.cache)
        self.held = [layers[place] for place in sorted(held)]
        self._kinds = share(self.cache, [place for place in range(len(layers)) if place not in held])
        self._parts = cache_parts(self.cache)

    def begin(self, tokens: int) -> None:
        """A pass over `tokens` new ones of each sequence begins."""
        for layer in self._kinds:
            advance(layer, tokens)

    def exchange(self, value: Any, clock: Any) -> Any:
        """The real cache where `value` is the clock, else `value`."""
        for real, part in zip(self._parts, cache_parts(clock), strict=True):
            if value is part:
                return real
        return value

    def returned(self, output: Any, clock: Any) -> Any:
        """A unit's output with the clock for the real cache."""
        pairs = list(zip(self._parts, cache_parts(clock), strict=True))
        return pytree.tree_map(lambda leaf: next((part for real, part in pairs if leaf is real), leaf), output)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""
        return sum(read_layer(layer).total_bytes for layer in self.held)


def bytes_at(layer: Any, tokens: int, length: int) -> int:
    """Bytes of a layer of keys and values at `length` tokens, given the layer as it is after `tokens`."""
    kept = read_layer(layer)
    now, then = tokens, length
    if kept.window_tokens is not None:
        now, then = min(tokens, kept.window_tokens), min(length, kept.window_tokens)
    return kept.values * kept.value_bytes * then // max(now, 1) + kept.state_bytes
