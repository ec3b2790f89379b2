"""A layer's costs as polynomials of the sequence length, fitted through passes of a few lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from planner.profile import KvTerms, MaskTerms, Terms, value
from workers.profiling.layer_names import Group
from workers.profiling.trace import ZERO, Exact, LayerTrace
from workers.profiling.tracing.counter import Counts
from workers.profiling.tracing.kv_cache import Kept
from workers.profiling.tracing.masks import EVERYTHING, Sight


@dataclass(frozen=True, slots=True)
class Pass:
    """One counted pass."""

    batch_size: int
    sequence_length: int
    counts: Counts
    #: Layer -> part -> FLOP.
    parts: Mapping[int, Mapping[str, int]]
    #: Layer -> what it left in the cache.
    kept: Mapping[int, Sequence[Kept]]
    #: Layer -> what its attention's mask lets see.
    sights: Mapping[int, Sight]

    def exact(self, layer: int) -> Exact:
        """What a layer cost and kept."""
        parts = self.parts.get(layer, {})
        kept = sum(each.values for each in self.kept.get(layer, ()))
        return Exact(flop=sum(parts.values()), parts=dict(parts), kv_values=kept)


def fit_layer(
    group: Group, at: int, order: Sequence[int], fits: Sequence[Pass], doubled: Sequence[Pass]
) -> LayerTrace:
    """A layer's polynomials through three passes, and two of a batch of two where there are any."""
    lengths = [each.sequence_length for each in fits]
    parts: dict[str, Terms] = {}
    once_parts: dict[str, Terms] = {}
    for part in sorted({part for each in fits for part in each.parts.get(at, {})}):
        single = [each.parts.get(at, {}).get(part, 0) for each in fits]
        double = [each.parts.get(at, {}).get(part, 0) for each in doubled]
        shared = [2 * one - two for one, two in zip(single, double, strict=False)]
        once = once_parts[part] = _fit(lengths[:2], shared)
        parts[part] = _fit(lengths, [flop - value(once, s) for s, flop in zip(lengths, single, strict=True)])
    kept = _cache(lengths, [each.kept.get(at, ()) for each in fits])
    shared = [_crossing(each.counts, order, at, shared=True) for each in fits]
    return LayerTrace(
        name=group.name,
        layer_type=group.layer_type,
        number=group.number,
        stack=group.stack,
        terms=_add(*parts.values()),
        once=_add(*once_parts.values()),
        parts=parts,
        once_parts={part: terms for part, terms in once_parts.items() if any(terms)},
        kv_fixed=kept.fixed,
        kv_per_token=kept.per_token,
        kv_per_later_token=kept.per_later_token,
        kv_value_bytes=kept.value_bytes,
        kv_window=kept.window,
        state_bytes=kept.state_bytes,
        activation=_fit(lengths, [_crossing(each.counts, order, at) for each in fits]),
        shared_kv_per_token=round(_fit(lengths, shared)[1]),
        peak=_fit(lengths, [each.counts.peak_bytes.get(at, 0) for each in fits]),
    )


def _fit(lengths: Sequence[int], values: Sequence[float]) -> Terms:
    """The polynomial through the points: of degree 2 through three, 1 through two."""
    return _fitted(tuple(lengths), tuple(values)) if any(values) else ZERO


# Equal layers have equal points.
@lru_cache(maxsize=256)
def _fitted(lengths: tuple[int, ...], values: tuple[float, ...]) -> Terms:
    if len(values) == 2:
        slope = Fraction(int(values[1] - values[0]), lengths[1] - lengths[0])
        return (_plain(values[0] - slope * lengths[0]), _plain(slope), 0)
    (x0, x1, x2), (y0, y1, y2) = lengths, (Fraction(int(each)) for each in values)
    first = (y1 - y0) / (x1 - x0)
    second = ((y2 - y1) / (x2 - x1) - first) / (x2 - x0)
    return (_plain(y0 - first * x0 + second * x0 * x1), _plain(first - second * (x0 + x1)), _plain(second))


def _plain(number: Fraction | float) -> float:
    exact = Fraction(number)
    return exact.numerator if exact.denominator == 1 else float(exact)


def agrees(layer: LayerTrace, check: Pass, at: int) -> bool:
    """Whether a pass cost what the polynomials of the layer and of each of its parts say, and kept what it should."""
    counted, length = check.parts.get(at, {}), check.sequence_length
    kept, batch = check.kept.get(at, ()), check.batch_size
    cache = KvTerms(
        fixed_bytes=layer.kv_fixed,
        bytes_per_token=layer.kv_per_token,
        window_tokens=layer.kv_window,
        bytes_per_later_token=layer.kv_per_later_token,
    )
    if sum(each.values for each in kept) != cache.bytes_at(batch, length):
        return False
    if sum(each.state_bytes for each in kept) != batch * layer.state_bytes:
        return False
    return all(
        counted.get(part, 0)
        == batch * value(layer.parts.get(part, ZERO), length) + value(layer.once_parts.get(part, ZERO), length)
        for part in {*counted, *layer.parts}
    )


def mask_terms(parts: Mapping[str, Terms], sight: Sight | None) -> MaskTerms | None:
    """What a mask hides, of the FLOP that grow with the square of the length: those of pairs of tokens."""
    per_pair = parts.get("attention", ZERO)[2]
    if sight is None or sight == EVERYTHING or not per_pair:
        return None
    return MaskTerms(
        flop_per_pair=per_pair,
        behind_tokens=sight.behind,
        ahead_tokens=sight.ahead,
        chunk_tokens=sight.chunk,
    )


def _add(*terms: Terms) -> Terms:
    c0, c1, c2 = (sum(column) for column in zip(*terms, strict=True)) if terms else ZERO
    return (c0, c1, c2)


def _crossing(counts: Counts, order: Sequence[int], at: int, *, shared: bool = False) -> int:
    """Bytes that are made up to layer `at` and read after it; the last layer's are the output's.

    Args:
        counts: Of a pass.
        order: The layers'.
        at: The layer.
        shared: Only those that layers share in a mapping.
    """
    executed = counts.order
    place = order.index(at)
    while place >= 0 and order[place] not in executed:
        place -= 1
    if place < 0:
        return 0
    now = executed.index(order[place])
    if now == len(executed) - 1:
        return 0 if shared else counts.output_bytes
    return sum(size for made, read, size, its in counts.flows if made <= now < read and its >= shared)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A layer's cache for each sequence of the batch."""

    #: Values, whatever the length; for each token; for each beyond the window; bytes of one.
    fixed: int = 0
    per_token: int = 0
    per_later_token: int = 0
    value_bytes: int = 2
    #: Tokens kept.
    window: int | None = None
    state_bytes: int = 0


def _cache(lengths: Sequence[int], kept: Sequence[Sequence[Kept]]) -> _Kept:
    """A layer's cache out of what passes of a few lengths left; whether it is right, a check tells (`agrees`)."""
    if not any(kept):
        return _Kept()
    window = max((each.window_tokens for each in kept[0] if each.window_tokens is not None), default=None)
    value_bytes = next((each.value_bytes for each in kept[0] if each.values), 2)
    state = sum(each.state_bytes for each in kept[0])
    fixed = per_token = later = 0
    for parts in zip(*kept, strict=False):
        values = [each.values for each in parts]
        growth = (values[-1] - values[-2]) // (lengths[-1] - lengths[-2])
        if window is not None and parts[0].window_tokens is not None:
            within = [min(length, window) for length in lengths]
            if all(each * within[0] == values[0] * kept for each, kept in zip(values, within, strict=True)):
                growth = 0
            per_token += (values[0] - growth * (lengths[0] - within[0])) // within[0]
        else:
            fixed += values[-1] - growth * lengths[-1]
            per_token += growth
        later += growth
    return _Kept(fixed, per_token, later if window is not None else 0, value_bytes, window, state)


def distinct_lengths(lengths: tuple[int, int, int], limit: int | None) -> tuple[int, int, int]:
    """The lengths, or half as long and so on until the model takes the longest: three that it runs at."""
    while limit is not None and lengths[2] > limit and lengths[0] > 1:
        lengths = (lengths[0] // 2, lengths[1] // 2, lengths[2] // 2)
    return lengths


def beyond_windows(counted: Pass, step: int) -> int:
    """A multiple of `step`, to check at, that no window of the KV cache reaches."""
    windows = [each.window_tokens or 0 for kept in counted.kept.values() for each in kept]
    return max([0, *windows]) // step * step + step
