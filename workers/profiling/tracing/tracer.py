"""Traces a model without its weights: each layer's costs as polynomials of batch size and sequence length.

A few passes on the meta device (`workers.profiling.tracing.counter`) count each layer's FLOP, KV cache and
activations. Three sequence lengths fix a polynomial, a batch of two shows what a pass executes once, further passes
check both.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from planner.profile import Tensor
from workers.checkpoint.config import ModelConfig
from workers.collector import uncollected
from workers.profiling.layer_names import Grouping, group_names
from workers.profiling.layer_order import idle_last, in_running_order
from workers.profiling.layer_parts import part_of
from workers.profiling.trace import ZERO, LayerTrace, ModelTrace
from workers.profiling.tracing.counter import Subject
from workers.profiling.tracing.inputs import longest, make_inputs, positions
from workers.profiling.tracing.kv_cache import read_layer
from workers.profiling.tracing.masks import EVERYTHING, Sight
from workers.profiling.tracing.module_tree import idle_layers, layers_of_modules, look_through, modules_of_layers
from workers.profiling.tracing.names import Renamer
from workers.profiling.tracing.places import Places, check_stacks
from workers.profiling.tracing.polynomials import (
    Pass,
    agrees,
    beyond_windows,
    distinct_lengths,
    fit_layer,
    mask_terms,
)
from workers.profiling.tracing.repeats import count
from workers.profiling.tracing.skeleton import NotTraceable, build, first_line, quiet

#: Sequence lengths that fix the polynomial: small, for models that loop over tokens.
_FIT = (16, 40, 72)
_FIT_SHORT = (6, 11, 17)
#: The longest asked length that is counted itself.
_LONGEST_ASKED = 65_536
#: Lengths that chunked scans need not pad.
_FIT_CHUNKED = (256, 512, 1024)
#: Lengths to check at: no multiples of a chunk; the first beyond most windows and tables of positions.
_CHECKS = (10_007, 1153, 509, 97, 29, 23)
_CHECK_LOOPING = 97
#: Not the batch of two that tells what a pass executes once: contrastive heads cost the square of it.
_CHECK_BATCH = 3
# Hooks and the watched cache are the process's: one trace at a time.
_LOCK = threading.Lock()


def trace(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    twins: Sequence[str] = (),
    batch_size: int = 1,
    sequence_length: int = 512,
) -> ModelTrace:
    """Trace the model of `config`.

    Args:
        config: The checkpoint's.
        tensors: The checkpoint's, by name.
        twins: Further names of their bytes.
        batch_size: Where layers that no polynomial describes are counted.
        sequence_length: Likewise.

    Raises:
        NotTraceable: If transformers cannot build or run it without weights.
        InvalidCheckpoint: If the tensors are not those of the config's model.
    """
    with _LOCK, quiet(), uncollected():
        # The model ends with this call, before Python's collector would look through it.
        tracer = _Tracer(config, twins)
        places = tracer.place(tensors)
        try:
            return tracer.run(places, batch_size, sequence_length)
        except NotTraceable as error:
            error.known = {name: each.values for name, each in places.of.items() if each.layer >= 0}
            error.missing = places.missing()
            raise


class _Tracer:
    """The model of one config and its passes."""

    def __init__(self, config: ModelConfig, twins: Sequence[str] = ()) -> None:
        self.config, self.twins = config, twins
        self.model: PreTrainedModel = build(config)
        self.tree = look_through(self.model)
        self.parameters = self.tree.parameters
        for each in self.parameters.values():
            each.requires_grad = False
        self.sizes = {name: each.numel() for name, each in self.parameters.items()}
        self.images = True
        self._group(group_names(self.sizes))

    def _group(self, grouping: Grouping) -> None:
        """Count by these layers from now on."""
        self.grouping = grouping
        self.layer_of = layers_of_modules(self.tree, grouping)
        self.parts: dict[tuple[int, str], str] = {}
        self.subject = Subject(self.tree, self.layer_of, {group.name for group in grouping.groups})

    def place(self, tensors: Mapping[str, Tensor]) -> Places:
        """Where each tensor belongs, checked."""
        self.given = tensors
        rename = Renamer(self.model, {*self.parameters, *self.tree.buffers})
        places = Places(self.tree, tensors, self.grouping, self.layer_of, rename)
        places.filled.update(rename(name)[0] for name in self.twins)
        check_stacks(self.tree, tensors, places, self.grouping, rename)
        return places

    def run(self, places: Places, batch_size: int, sequence_length: int) -> ModelTrace:
        """Count, at several batch sizes and lengths."""
        limit = longest(self.model)
        named = self.grouping
        fits, looping = self._fits(sequence_length, limit)
        if self.grouping is not named:
            places = self.place(self.given)
        counts = fits[0].counts
        idle = idle_layers(self.tree, self.grouping, self.layer_of, self.subject.units, counts.ran) - {*counts.order}
        order = idle_last(counts.order, idle, len(self.grouping.groups))
        # A polynomial says what it was made from at the lengths that it was made of: only others can confirm it.
        fitted = {each.sequence_length for each in fits}
        wanted = (_CHECK_LOOPING, _CHECKS[-1]) if looping else (beyond_windows(fits[0], _CHECKS[0]), *_CHECKS)
        lengths = sorted({min(n, limit or n) for n in wanted} - fitted, reverse=True)
        layers = {at: fit_layer(self.grouping.groups[at], at, order, fits, ()) for at in order}
        wrong, checks = self._check(layers, list(layers), lengths, limit)
        if wrong:
            # What a pass executes once, whatever the batch, shows in a batch of two.
            doubled = [self._pass(2, each.sequence_length) for each in fits[:2]]
            layers |= {at: fit_layer(self.grouping.groups[at], at, order, fits, doubled) for at in wrong}
            wrong, _ = self._check(layers, wrong, lengths, limit, checks)
        reasons = [] if self.images else ["images are not counted: the image part cannot be run without weights"]
        reasons += self._uncounted({at for each in (*fits, *checks) for at in each.counts.order})
        if wrong:
            asked = min(sequence_length, limit or sequence_length)
            reasons += self._chunked(layers, wrong, order, (batch_size, asked), limit)
        if looping or counts.einsum or any(layer.state_bytes for layer in layers.values()):
            self._check_one_token(layers)
        # A mask that hides nothing in a short sequence is not even made: the longest one tells.
        sights = {at: sight for each in (fits[0], *checks) for at, sight in each.sights.items()}
        idle_in = dict.fromkeys(self._beside_text(fits[0]), "text") | dict.fromkeys(idle, "profile")
        modules = modules_of_layers(self.tree, self.grouping, self.layer_of)
        layers = {
            at: replace(layer, idle_in=idle_in.get(at, ""), modules=modules[at]) for at, layer in layers.items()
        }
        layers = {at: replace(layer, mask=mask_terms(layer.parts, sights.get(at))) for at, layer in layers.items()}
        position = {at: place for place, at in enumerate(order)}
        return ModelTrace(
            layers=tuple(layers[at] for at in order),
            tensors=self._tensors(places, position, fits[0]),
            ties=self._ties(places, position),
            missing=places.missing(),
            longest=limit,
            reasons=tuple(reasons),
        )

    def _fits(self, sequence_length: int, limit: int | None) -> tuple[list[Pass], bool]:
        """Three passes that fix the polynomials, and whether the model loops over its tokens.

        The longest is the length that is asked for, so that peaks, which no polynomial describes, are right there.
        """
        shortest = min(limit or _FIT[2], positions(self.model.config) or _FIT[2])
        try:
            return self._fits_at(_FIT if shortest >= _FIT[2] else _FIT_SHORT, sequence_length, limit)
        except NotTraceable:  # a table of positions that no known field tells
            return self._fits_at(_FIT_SHORT, sequence_length, limit)

    def _fits_at(
        self, lengths: tuple[int, int, int], sequence_length: int, limit: int | None
    ) -> tuple[list[Pass], bool]:
        fits = [self._first(lengths[0]), self._pass(1, lengths[1])]
        looping = fits[1].counts.operators > fits[0].counts.operators * 1.2
        asked = min(sequence_length, limit or sequence_length)
        if looping or not lengths[1] < asked <= _LONGEST_ASKED:
            asked = lengths[2]
        try:
            fits.append(self._pass(1, asked))
        except NotTraceable:  # a table of positions ends before
            if asked == lengths[2]:
                raise
            fits.append(self._pass(1, lengths[2]))
        return fits, looping

    def _first(self, length: int) -> Pass:
        """The first pass; it finds out whether images can be run, and when each module runs."""
        first = self._with_images(length)
        grouping = in_running_order(self.grouping, list(first.counts.ran), self.sizes)
        if grouping is self.grouping:
            return first
        self._group(grouping)
        return self._with_images(length)

    def _with_images(self, length: int) -> Pass:
        try:
            return self._pass(1, length, masks=True)
        except NotTraceable as error:
            if "pixel_values" not in make_inputs(self.model, 1, length):
                raise
            self.images = False
            try:
                return self._pass(1, length, masks=True)
            except NotTraceable:  # for want of any inputs, it may be
                self.images = True
                raise error from error.__cause__

    def _pass(self, batch_size: int, sequence_length: int, *, masks: bool = False) -> Pass:
        """Count one pass; without memoised layers if it cannot be done with them."""
        inputs = make_inputs(self.model, batch_size, sequence_length, images=self.images)
        try:
            counts, _ = count(self.subject, inputs, masks=masks)
        except Exception:  # noqa: BLE001 (any code of transformers runs here)
            try:
                inputs = make_inputs(self.model, batch_size, sequence_length, images=self.images)
                counts, _ = count(self.subject, inputs, memoise=False, masks=masks)
            except Exception as error:
                raise NotTraceable(
                    f"transformers cannot run the model without weights: {first_line(error)}"
                ) from error
        parts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for (ran, path), flop in counts.flop.items():
            layer = ran if ran >= 0 else counts.order[0]
            parts[layer][self._part(layer, path)] += flop
        sights: dict[int, Sight] = {}
        for (layer, path), sight in counts.sights.items():
            if layer >= 0 and self._part(layer, path) == "attention":
                sights[layer] = sight if sights.get(layer, sight) == sight else EVERYTHING
        # Twins share what was recorded.
        read = {id(each): read_layer(each) for each in {id(c): c for cs in counts.kept.values() for c in cs}.values()}
        kept = {layer: [read[id(each)] for each in caches] for layer, caches in counts.kept.items()}
        counts.kept.clear()
        return Pass(batch_size, sequence_length, counts, parts, kept, sights)

    def _part(self, layer: int, path: str) -> str:
        """The sub-part of a layer that the module at `path` is of."""
        found = self.parts.get((layer, path))
        if found is None:
            group = self.grouping.groups[layer]
            inside = path[len(group.name) + 1 :] if path.startswith(f"{group.name}.") else path
            found = self.parts[layer, path] = part_of(inside, group.layer_type)
        return found

    def _beside_text(self, counted: Pass) -> set[int]:
        """Layers that a pass of text alone does not run."""
        given = make_inputs(self.model, 1, counted.sequence_length, images=self.images)
        if not {"pixel_values", "input_ids"} <= given.keys():
            return set()
        self.images = False
        try:
            text = self._pass(1, counted.sequence_length)
        except NotTraceable:  # two towers take both or nothing
            return set()
        finally:
            self.images = True
        return set(counted.counts.order) - set(text.counts.order)

    def _uncounted(self, executed: Container[int]) -> list[str]:
        """Say which numbered layers no pass ran, for want of what they read (sound beside text, a film)."""
        idle = [g for at, g in enumerate(self.grouping.groups) if g.number is not None and at not in executed]
        idle = [group for group in idle if self.images or group.layer_type != "vision"]
        if not idle:
            return []
        return [f"{len(idle)} layers are not counted: the pass's text and images do not reach {idle[0].name}, ..."]

    def _check(
        self,
        layers: dict[int, LayerTrace],
        wrong: Sequence[int],
        lengths: Sequence[int],
        limit: int | None,
        checks: Sequence[Pass] | None = None,
    ) -> tuple[list[int], list[Pass]]:
        """Compare polynomials with passes at other lengths; returns the layers that none confirms, and the passes."""
        wrong, done = list(wrong), list(checks or ())
        longest_run: int | None = None
        for length in lengths:
            if not wrong:
                break
            check = next((each for each in done if each.sequence_length == length), None) or self._checked(
                done, length
            )
            if check is None:  # a table of positions ends before
                continue
            for at in list(wrong):
                layer = layers[at]
                if agrees(layer, check, at):
                    wrong.remove(at)
                    # What failed at a longer length holds up to this one.
                    last = limit if longest_run is None else length
                    if longest_run is None and length != lengths[0]:
                        last = positions(self.model.config) or length
                    if last is not None:
                        layers[at] = replace(layer, terms_range=(1, last))
            longest_run = longest_run or length
        return wrong, done

    def _check_one_token(self, layers: dict[int, LayerTrace]) -> None:
        """Take one token out of the range of layers that it costs less or more.

        Some scans take it as generated, and torch makes a sum over it (`einsum`) no matrix product.
        """
        with contextlib.suppress(NotTraceable):
            one = self._pass(_CHECK_BATCH, 1)
            for at, layer in layers.items():
                if not agrees(layer, one, at):
                    layers[at] = replace(layer, terms_range=(2, layer.terms_range[1] if layer.terms_range else None))

    def _checked(self, done: list[Pass], length: int) -> Pass | None:
        """Add a pass of a larger batch; None where a table of positions ends before its length."""
        try:
            done.append(self._pass(_CHECK_BATCH, length, masks=not done))
        except NotTraceable:
            return None
        return done[-1]

    def _chunked(
        self,
        layers: dict[int, LayerTrace],
        wrong: Sequence[int],
        order: Sequence[int],
        at_asked: tuple[int, int],
        limit: int | None,
    ) -> list[str]:
        """Fit anew at lengths that need no padding, and count at the length that is asked for.

        Returns:
            Why a layer stays inexact, if one does.
        """
        batch, length = at_asked
        try:
            fits = [self._pass(1, each) for each in distinct_lengths(_FIT_CHUNKED, limit)]
            asked = self._pass(batch, length)
        except NotTraceable as error:
            return [
                f"FLOP or KV cache of {len(wrong)} layers follow no formula, nor can be counted at {length}: {error}"
            ]
        for at in wrong:
            anew = fit_layer(self.grouping.groups[at], at, order, fits, ())
            layers[at] = replace(
                layers[at],
                terms=anew.terms,
                once=ZERO,
                parts=anew.parts,
                once_parts={},
                kv_fixed=anew.kv_fixed,
                kv_per_token=anew.kv_per_token,
                kv_per_later_token=anew.kv_per_later_token,
                activation=anew.activation,
                peak=anew.peak,
                chunked=True,
                exact={f"{batch}x{length}": asked.exact(at)},
            )
        return []

    def _tensors(
        self, places: Places, position: Mapping[int, int], counted: Pass
    ) -> dict[str, tuple[int, int, float, int]]:
        """Where each tensor belongs in the trace, its parameters, what share a token uses, whether it lies beside."""
        tokens = counted.batch_size * counted.sequence_length
        owners: dict[int, str] = {}
        found = {}
        for name, place in places.of.items():
            share, values = 1.0, place.values
            if place.parameter is not None and values:
                rows, there = counted.counts.gathered.get(place.parameter, (0, 0))
                if there:
                    share = min(1.0, rows / tokens / there)
                # A tied weight that is stored twice counts once, unless the config says that it is not tied.
                owner = owners.setdefault(id(self.parameters[place.parameter]), place.parameter)
                if owner != place.parameter and self.config.flag("tie_word_embeddings") is not False:
                    values = 0
            found[name] = (position.get(place.layer, -1), values, share, int(place.beside))
        return found

    def _ties(self, places: Places, position: Mapping[int, int]) -> tuple[tuple[int, int, str], ...]:
        stored = places.by_parameter()
        by_identity: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            by_identity[id(parameter)].append(name)
        ties: set[tuple[int, int, str]] = set()
        for names in by_identity.values():
            holder = next((name for name in names if name in stored), "")
            its = self.grouping.of.get(holder)
            for name in names:
                mine = self.grouping.of.get(name)
                if name not in stored and mine is not None and its is not None and mine != its:
                    ties.update((position[mine], position[its], tensor) for tensor in stored[holder])
        return tuple(sorted(ties))
