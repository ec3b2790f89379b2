"""Which tokens an attention mask lets each token see, found by asking the function that makes the mask.

No rule per architecture: a model hands `transformers.masking_utils` a function that says for two tokens whether the
one sees the other. Calling it for a few tokens far into a long sequence shows windows and blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

#: Where the questions are asked: farther in than any window is wide.
_FAR = 2**30
_WAYS = 1024


@dataclass(frozen=True, slots=True)
class Sight:
    """Which tokens a token sees."""

    #: Earlier and later tokens that it sees; None: all.
    behind: int | None
    ahead: int | None
    #: Tokens see one another in blocks of so many only.
    chunk: int | None = None


#: No mask at all.
EVERYTHING = Sight(behind=None, ahead=None)


class _Zeros(TorchFunctionMode):
    """Puts zeros where a mask function asks tensors without data (how many tokens of padding: none)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        real = [torch.zeros_like(a, device="cpu") if isinstance(a, Tensor) and a.is_meta else a for a in args]
        return func(*real, **(kwargs or {}))


def sight_of(mask_function: Callable[..., Any]) -> Sight | None:
    """What a mask function lets a token see; None where it cannot be called here."""
    return _causal() if mask_function is causal_mask_function else _asked(mask_function)


@cache
def _causal() -> Sight | None:
    return _asked(causal_mask_function)


def _asked(mask_function: Callable[..., Any]) -> Sight | None:
    none = torch.zeros(1, 1, dtype=torch.long)

    def sees(query: int, keys: Tensor) -> Tensor:
        answer = mask_function(none, none, torch.tensor([[query]]), keys[None])
        return torch.as_tensor(answer).expand(1, len(keys))[0].bool()

    def reach(query: int, sign: int) -> int:
        """How far the token sees; `_FAR` if that is everything."""
        known, step = 0, _FAR // _WAYS
        while True:
            offsets = torch.arange(known, known + _WAYS * step + 1, step)
            seen = sees(query, query + sign * offsets)
            # What is seen is seen without gaps, from the token itself outwards.
            known = int(offsets[int(seen.long().cumprod(0).sum()) - 1])
            if step == 1 or known == _FAR:
                return known
            step //= _WAYS

    try:
        with _disable_current_modes(), _Zeros():
            if not bool(sees(_FAR, torch.tensor([_FAR])).all()):
                return None
            behind, ahead = reach(_FAR, -1), reach(_FAR, 1)
            if behind < _FAR and {reach(_FAR + more, -1) for more in (1, 2)} != {behind}:
                # The block that the token is in begins where the one before it ended.
                return Sight(None, 0 if ahead == 0 else None, chunk=reach(_FAR - behind - 1, -1) + 1)
    except Exception:  # noqa: BLE001 (any code of transformers runs here)
        return None
    return Sight(*(None if each == _FAR else each for each in (behind, ahead)))


@contextlib.contextmanager
def watch_masks(made: Callable[[Tensor, Sight], None]) -> Iterator[None]:
    """Call `made(mask, sight)` whenever a pass makes a mask for eager attention.

    Replaces an entry of transformers' table while it is open, so only one thread may be in it (the tracer's lock).
    """
    original = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        mask = original(*args, **kwargs)
        if isinstance(mask, Tensor):
            sight = sight_of(kwargs.get("mask_function", causal_mask_function))
            if sight is not None:
                made(mask, sight)
        return mask

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = watched
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["eager"] = original
