"""Trace a model without its weights, at full size, into polynomials of batch and sequence length.

A few passes on the meta device (`workers.counting`) give each layer's FLOP, KV cache and activations; three sequence
lengths fix a polynomial, a batch of two tells what a pass executes once, and further passes check both.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from workers.counting import Counts, count
from workers.grouping import Grouping, group_names
from workers.inputs import longest, make_inputs
from workers.kv import Kept, read_layer
from workers.mapping import Place, check_sizes, check_stacks, place_tensors
from workers.model_config import ModelConfig
from workers.parts import part_of
from workers.skeleton import NotTraceable, build, first_line, quiet
from workers.trace import ZERO, Exact, LayerTrace, ModelTrace, Terms, value

#: Sequence lengths that fix the polynomial: small, for models that loop over tokens.
_FIT = (16, 40, 72)
#: Lengths that chunked scans need not pad.
_FIT_CHUNKED = (256, 512, 1024)
#: Lengths to check at: no multiples of a chunk; the first beyond most windows and tables of positions.
_CHECKS = (1153, 509)
_CHECK_LOOPING = 97
# Hooks and the watched cache are the process's: one trace at a time.
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Pass:
    """One counted pass."""

    batch_size: int
    sequence_length: int
    counts: Counts
    #: Layer -> part -> FLOP.
    parts: Mapping[int, Mapping[str, int]]
    #: Layer -> what it left in the cache.
    kept: Mapping[int, Sequence[Kept]]

    def flop(self, layer: int) -> int:
        return sum(self.parts.get(layer, {}).values())


def trace(
    config: ModelConfig, tensors: Mapping[str, int], *, batch_size: int = 1, sequence_length: int = 512
) -> ModelTrace:
    """Trace the model of `config`.

    Args:
        config: The checkpoint's.
        tensors: Logical names of the checkpoint's tensors -> values they hold (0: not to be checked).
        batch_size: Where layers that no polynomial describes are counted.
        sequence_length: Likewise.

    Raises:
        NotTraceable: If transformers cannot build or run it without weights.
        InvalidCheckpoint: If the tensors are not those of the config's model.
    """
    with _LOCK, quiet():
        return _Tracer(config).run(tensors, batch_size, sequence_length)


class _Tracer:
    """The model of one config and its passes."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.model: PreTrainedModel = build(config)
        self.model.requires_grad_(requires_grad=False)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters(remove_duplicate=False))
        self.grouping: Grouping = group_names({name: each.numel() for name, each in self.parameters.items()})
        self.layer_of = _layer_of(self.grouping, self.model)
        self.images = True
        self._structures: dict[Any, int] = {}

    def run(self, tensors: Mapping[str, int], batch_size: int, sequence_length: int) -> ModelTrace:
        places = place_tensors(self.model, tensors, self.grouping, self.layer_of)
        check_stacks(self.model, tensors, places, self.grouping)
        check_sizes(self.parameters, tensors, places)
        fits = [self._first(_FIT[0]), *(self._pass(1, length) for length in _FIT[1:])]
        doubled = [self._pass(2, length) for length in _FIT[:2]]
        limit = longest(self.model)
        order = self._order(fits[0].counts.order)
        layers = {at: self._layer(at, order, fits, doubled) for at in order}
        looping = fits[2].counts.operators > fits[0].counts.operators * 1.5
        lengths = [_CHECK_LOOPING] if looping else [min(length, limit or length) for length in _CHECKS]
        wrong = self._check(layers, lengths, limit)
        reasons = [] if self.images else ["images are not counted: the image part cannot be run without weights"]
        if wrong:
            self._chunked(layers, wrong, order, batch_size, sequence_length)
        position = {at: place for place, at in enumerate(order)}
        return ModelTrace(
            layers=tuple(layers[at] for at in order),
            tensors=self._tensors(places, position, fits[2]),
            ties=self._ties(places, position),
            reasons=tuple(reasons),
        )

    def _first(self, length: int) -> _Pass:
        """The first pass; it finds out whether images can be run."""
        try:
            return self._pass(1, length)
        except NotTraceable:
            self.images = False
            if "pixel_values" not in make_inputs(self.model, 1, length):
                raise
            return self._pass(1, length)

    def _pass(self, batch_size: int, sequence_length: int) -> _Pass:
        """Count one pass; without memoised layers if it cannot be done with them."""
        inputs = make_inputs(self.model, batch_size, sequence_length, images=self.images)
        try:
            counts, _ = count(self.model, inputs, layer_of=self.layer_of, structures=self._structures)
        except Exception:  # noqa: BLE001 (any code of transformers runs here)
            try:
                inputs = make_inputs(self.model, batch_size, sequence_length, images=self.images)
                counts, _ = count(self.model, inputs, layer_of=self.layer_of, memoise=False)
            except Exception as error:
                raise NotTraceable(
                    f"transformers cannot run the model without weights: {first_line(error)}"
                ) from error
        parts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for (ran, path), flop in counts.flop.items():
            layer = ran if ran >= 0 else counts.order[0]
            group = self.grouping.groups[layer]
            inside = path[len(group.name) + 1 :] if path.startswith(f"{group.name}.") else path
            parts[layer][part_of(inside, group.layer_type)] += flop
        kept = {layer: [read_layer(each) for each in caches] for layer, caches in counts.kept.items()}
        counts.kept.clear()
        return _Pass(batch_size, sequence_length, counts, parts, kept)

    def _order(self, executed: Sequence[int]) -> list[int]:
        """Layers as they run; those that this pass does not run stay behind the one they follow by name."""
        order = list(executed)
        for at in range(len(self.grouping.groups)):
            if at not in order:
                order.insert(order.index(at - 1) + 1 if at else 0, at)
        return order

    def _layer(self, at: int, order: Sequence[int], fits: Sequence[_Pass], doubled: Sequence[_Pass]) -> LayerTrace:
        group = self.grouping.groups[at]
        names = sorted({part for each in fits for part in each.parts.get(at, {})})
        parts: dict[str, Terms] = {}
        once: Terms = ZERO
        for part in names:
            single = [each.parts.get(at, {}).get(part, 0) for each in fits]
            double = [each.parts.get(at, {}).get(part, 0) for each in doubled]
            shared = [2 * one - two for one, two in zip(single, double, strict=False)]
            part_once = _fit(_FIT[:2], shared)
            once = _add(once, part_once)
            parts[part] = _fit(_FIT, [flop - value(part_once, s) for s, flop in zip(_FIT, single, strict=True)])
        flows = [_crossing(each.counts, order, at) for each in fits]
        peaks = [each.counts.peak_bytes.get(at, 0) for each in fits]
        fixed, per_token, value_bytes, window, state = _cache([each.kept.get(at, ()) for each in fits])
        return LayerTrace(
            name=group.name,
            layer_type=group.layer_type,
            number=group.number,
            stack=group.stack,
            terms=_add(*parts.values()),
            once=once,
            parts=parts,
            causal=per_token > 0,
            attention_window=None if window is None else window + 1,
            kv_fixed=fixed,
            kv_per_token=per_token,
            kv_value_bytes=value_bytes,
            kv_window=window,
            state_bytes=state,
            activation=_fit(_FIT, flows),
            peak=_fit(_FIT, peaks),
        )

    def _check(self, layers: dict[int, LayerTrace], lengths: Sequence[int], limit: int | None) -> list[int]:
        """Compare the polynomials with further passes; returns the layers that none of them confirms."""
        wrong = list(layers)
        last = limit
        for length in lengths:
            try:
                check = self._pass(2, length)
            except NotTraceable:  # a table of positions ends before
                last = min(filter(None, (_CHECK_LOOPING, limit)))
                continue
            for at in list(wrong):
                layer = layers[at]
                if check.flop(at) == value(layer.once, length) + 2 * value(layer.terms, length):
                    wrong.remove(at)
                    layers[at] = replace(layer, terms_range=None if last is None else (1, last))
            if not wrong:
                break
            last = length if last is None else min(last, length)
            last = min(lengths[-1], last)
        return wrong

    def _chunked(
        self, layers: dict[int, LayerTrace], wrong: Sequence[int], order: Sequence[int], batch: int, length: int
    ) -> None:
        """Fit anew at lengths that need no padding, and count at the length that is asked for."""
        fits = [self._pass(1, each) for each in _FIT_CHUNKED]
        asked = self._pass(batch, length)
        for at in wrong:
            parts = {
                part: _fit(_FIT_CHUNKED, [each.parts.get(at, {}).get(part, 0) for each in fits])
                for part in sorted({part for each in fits for part in each.parts.get(at, {})})
            }
            layers[at] = replace(
                layers[at],
                terms=_add(*parts.values()),
                once=ZERO,
                parts=parts,
                chunked=True,
                activation=_fit(_FIT_CHUNKED, [_crossing(each.counts, order, at) for each in fits]),
                peak=_fit(_FIT_CHUNKED, [each.counts.peak_bytes.get(at, 0) for each in fits]),
                exact={f"{batch}x{length}": Exact(flop=asked.flop(at), parts=dict(asked.parts.get(at, {})))},
            )

    def _tensors(
        self, places: Mapping[str, Place], position: Mapping[int, int], counted: _Pass
    ) -> dict[str, tuple[int, int, float]]:
        """Where each tensor belongs in the trace, whether it is a parameter, and what share of it a token uses."""
        tokens = counted.batch_size * counted.sequence_length
        owners: dict[int, str] = {}
        found = {}
        for name, place in places.items():
            share, is_parameter = 1.0, place.parameter is not None
            if place.parameter is not None:
                rows, there = counted.counts.gathered.get(place.parameter, (0, 0))
                if there:
                    share = min(1.0, rows / tokens / there)
                # A tied weight that is stored twice counts once.
                owner = owners.setdefault(id(self.parameters[place.parameter]), place.parameter)
                is_parameter = owner == place.parameter
            found[name] = (position.get(place.layer, -1), int(is_parameter), share)
        return found

    def _ties(self, places: Mapping[str, Place], position: Mapping[int, int]) -> tuple[tuple[int, int, str], ...]:
        stored = {place.parameter: name for name, place in places.items() if place.parameter is not None}
        by_identity: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            by_identity[id(parameter)].append(name)
        ties = set()
        for names in by_identity.values():
            holder = next((name for name in names if name in stored), "")
            its = self.grouping.of.get(holder)
            for name in names:
                mine = self.grouping.of.get(name)
                if name not in stored and mine is not None and its is not None and mine != its:
                    ties.add((position[mine], position[its], stored[holder]))
        return tuple(sorted(ties))


def _layer_of(grouping: Grouping, model: nn.Module) -> Callable[[str], int | None]:
    """Module path -> layer: below a numbered layer, that one; else the one that all its parameters are of."""
    owners: dict[str, set[int]] = defaultdict(set)
    for name, layer in grouping.of.items():
        path = name.rpartition(".")[0]
        while path:
            owners[path].add(layer)
            path = path.rpartition(".")[0]
    known = {path: next(iter(layers)) for path, layers in owners.items() if len(layers) == 1}
    found: dict[str, int | None] = {}
    for path, _ in model.named_modules():
        above = path
        while above and above not in known:
            above = above.rpartition(".")[0]
        found[path] = known.get(path, known.get(above))
    return found.get


def _fit(lengths: Sequence[int], values: Sequence[float]) -> Terms:
    """The polynomial through the points: of degree 2 through three, 1 through two."""
    if not any(values):
        return ZERO
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


def _add(*terms: Terms) -> Terms:
    c0, c1, c2 = (sum(column) for column in zip(*terms, strict=True)) if terms else ZERO
    return (c0, c1, c2)


def _crossing(counts: Counts, order: Sequence[int], at: int) -> int:
    """Bytes that are made up to layer `at` and read after it; the last layer's are the output's."""
    executed = counts.order
    place = order.index(at)
    while place >= 0 and order[place] not in executed:
        place -= 1
    if place < 0:
        return 0
    now = executed.index(order[place])
    if now == len(executed) - 1:
        return counts.output_bytes
    return sum(size for made, read, size in counts.flows if made <= now < read)


def _cache(kept: Sequence[Sequence[Kept]]) -> tuple[int, int, int, int | None, int]:
    """(fixed values, values for each token, bytes of one, window, state bytes) out of what three lengths left."""
    if not any(kept):
        return (0, 0, 2, None, 0)
    windows = [each.window_tokens for each in kept[0] if each.window_tokens is not None]
    value_bytes = next((each.value_bytes for each in kept[0] if each.values), 2)
    state = sum(each.state_bytes for each in kept[0])
    totals = [sum(each.values for each in layer) for layer in kept]
    if windows:
        window = max(windows)
        return (0, totals[0] // min(_FIT[0], window) if window else 0, value_bytes, window, state)
    per_token = (totals[1] - totals[0]) // (_FIT[1] - _FIT[0])
    return (totals[0] - per_token * _FIT[0], per_token, value_bytes, None, state)
