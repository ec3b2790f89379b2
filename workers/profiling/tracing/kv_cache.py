"""What a pass leaves in the KV cache, read from the cache object that transformers fills.

So grouped, latent, sliding, cross and linear attention need no formulas of their own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer of a cache holds after a pass."""

    #: Cached keys and values, in values (their dtype may be chosen).
    values: int
    #: Bytes of one of them.
    value_bytes: int
    #: Bytes of state whose dtype the architecture fixes (convolution and recurrent states).
    state_bytes: int
    #: Tokens that a sliding window keeps; None without one.
    window_tokens: int | None

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.values * self.value_bytes + self.state_bytes


def read_layer(layer: Any) -> Kept:
    """What one cache layer (`transformers.cache_utils.CacheLayerMixin`) holds now."""
    values, value_bytes, state_bytes = 0, 2, 0
    # Keys that serve as values, too, are one tensor.
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in _tensors(layer)}.values():
        if not tensor.is_floating_point():
            continue
        if name in _STATES:
            state_bytes += tensor.numel() * tensor.element_size()
        elif tensor.numel():
            values += tensor.numel()
            value_bytes = tensor.element_size()
    window = getattr(layer, "sliding_window", None)
    # transformers drops the oldest so that, with the next token, the window is full.
    window = max(window - 1, 0) if isinstance(window, int) and values else None
    return Kept(values, value_bytes, state_bytes, window)


def _tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict):
            for each in value.values():
                if isinstance(each, Tensor):
                    yield name, each


@contextlib.contextmanager
def watch(updated: Callable[[Any, int], None]) -> Iterator[None]:
    """Call `updated(cache_layer, grown_bytes)` whenever a pass writes to a cache.

    Replaces methods of transformers' `Cache` while it is open, so only one thread may be in it (the tracer's lock).
    """
    originals = {name: method for name, method in vars(Cache).items() if name.startswith("update")}

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = _signature(method)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            index = signature.bind(self, *args, **kwargs).arguments.get("layer_idx")
            before = read_layer(self.layers[index]).total_bytes if _holds(self, index) else 0
            result = method(self, *args, **kwargs)
            if _holds(self, index):
                updated(self.layers[index], read_layer(self.layers[index]).total_bytes - before)
            return result

        return call

    for name, method in originals.items():
        setattr(Cache, name, watched(method))
    try:
        yield
    finally:
        for name, method in originals.items():
            setattr(Cache, name, method)


_signature = functools.cache(inspect.signature)


def _holds(cache: Any, index: Any) -> bool:
    return isinstance(index, int) and 0 <= index < len(getattr(cache, "layers", ()))
