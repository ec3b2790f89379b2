"""Sessions: one request's caches on one node, so that each pass brings only what is new.

    prepare(stage, batch=1, length=12)               # optional, at the announcement: traces what will be asked
    session = Session(stage, batch=1, length=12 + 100)
    session.memory_bytes                             # what its caches take on this node when they are full
    answer = session.step(handoff)                   # a Handoff for the node that holds `answer.next_module`,
                                                     # or, from the last, {"logits": those of each last position}
    session.close()

A session is known to its node by whatever the caller keeps it under; a handoff says only which pass it belongs to
(`Handoff.number`, from 0). A node may be visited several times in one pass. Sessions of one stage may take turns, and
be used from any thread: a stage runs one visit at a time. After an error a session is over, and says so.
`workers.runtime.generation` makes the passes, and has `prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from planner.errors import Conflict, InvalidInput
from workers.runtime.caches import (
    Clock,
    RealCache,
    bytes_at,
    cache_argument,
    cache_parts,
    check_generates,
    layers_of,
    make_cache,
)
from workers.runtime.payload import Handoff, whole_arguments
from workers.runtime.stage import Stage
from workers.runtime.visits import Flow
from workers.runtime.weights import filler


@dataclass(frozen=True, slots=True, kw_only=True)
class _First:
    """A session's first pass, as it was traced."""

    flow: Flow
    #: The cache after it, on the meta device.
    cache: Any
    #: The inputs' names and shapes.
    inputs: Mapping[str, Tensor]
    #: Tells it from others of the same kind, whatever its length.
    kind: Any
    #: Tokens of each sequence.
    tokens: int


class Session:
    """A request's caches on this node, for up to `length` tokens of each of `batch` sequences.

    Raises:
        InvalidInput: If the model cannot generate in stages.
    """

    def __init__(self, stage: Stage, *, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        #: Tokens of each sequence whose passes have begun.
        self.tokens = 0
        self._stage = stage
        self._argument = cache_argument(stage.model)
        check_generates(stage.model, stage.manifest.model_name)
        self._clock = Clock(stage.model)
        self._real: RealCache | None = None
        self._first: _First | None = None
        self._number = -1
        self._news = 0
        self._flow: Flow | None = None
        self._inputs: dict[str, Tensor] = {}
        self._states: dict[tuple[str, str], Any] = {}
        self._over: str | None = None

    def step(self, step: Handoff) -> Any:
        """Run what this node holds and can run now of a pass.

        Returns:
            A `Handoff` for the node that holds what is to run next, or {"logits": tensor} after the last layer, for
            each sequence's last position.

        Raises:
            Conflict: If the session is over, or the handoff is of another plan, of no pass that is due, or for
                another node.
            InvalidInput: If there are more tokens than the session was opened for, the model cannot be divided, or a
                value is not a number.
        """
        with self._stage.lock:
            if self._over is not None:
                raise Conflict(f"the session is over: {self._over}")
            try:
                arguments = self._arrive(step)
                assert self._real is not None
                assert self._flow is not None
                with self._own_states(), self._as_generate():
                    answer = self._stage.visit(self._flow, step, arguments, (self._real, self._clock.cache))
            except Exception as error:
                self._end(f"it failed in pass {step.number}: {error}")
                raise
            return answer if isinstance(answer, Handoff) else {"logits": answer["logits"][:, -1:].contiguous()}

    def arrive(self, step: Handoff) -> Flow:
        """Begin the pass, unless it has begun here; run nothing: whoever wants to check what came sees what is due.

        Raises:
            Conflict, InvalidInput: As `step`.
        """
        with self._stage.lock:
            if self._over is not None:
                raise Conflict(f"the session is over: {self._over}")
            self._arrive(step)
            assert self._flow is not None
            return self._flow

    def rehearse(self, step: Handoff) -> dict[str, Tensor]:
        """Trace the pass, run nothing; zeros for the logits."""
        with self._stage.lock:
            self._arrive(step)
            assert self._flow is not None
            logits = self._flow.trace.output["logits"]
            return {"logits": torch.zeros(logits[:, -1:].shape, dtype=logits.dtype)}

    def close(self) -> None:
        """Free its memory; a second call does nothing."""
        with self._stage.lock:
            self._end("it was closed")

    @property
    def first_module(self) -> str:
        """Path of the module that runs first in a pass; known once the prompt's shape was traced."""
        assert self._flow is not None
        return self._flow.trace.calls[0].path

    @property
    def memory_bytes(self) -> int:
        """Bytes that its caches take on this node at `length` tokens; known once the prompt's shape was traced."""
        first = self._first or self._stage.bases.get((self.batch,))
        if first is None:
            return 0
        layers, own = layers_of(first.cache), len(cache_parts(first.cache)[-1].layers)
        crossing = self._stage.model.config.is_encoder_decoder
        # What crosses over to the encoder does not grow.
        grown: int = sum(
            bytes_at(layers[place], first.tokens, first.tokens if crossing and place >= own else self.length)
            for place in self._held(first)
        )
        trace = first.flow.trace
        for (path, _), value in zip(trace.attributes, trace.states, strict=True):
            grown += value.nbytes if self._stage.has(path) else 0
        return grown

    @property
    def held_bytes(self) -> int:
        """Bytes that its caches take on this node now."""
        states: int = sum(value.nbytes for value in self._states.values() if isinstance(value, Tensor))
        return states + (0 if self._real is None else self._real.nbytes)

    def _end(self, reason: str) -> None:
        self._over = self._over or reason
        self._real, self._inputs, self._states = None, {}, {}

    def _arrive(self, step: Handoff) -> dict[str, Any]:
        """Begin the pass, unless this is a further visit in it; the model's arguments."""
        if step.number == self._number + 1:
            self._begin(step)
        elif step.number != self._number or self._number < 0:
            due = f"pass {self._number + 1}" if self._number < 0 else f"pass {self._number} or {self._number + 1}"
            raise Conflict(f"the handoff is of pass {step.number}; due is {due}")
        arguments = whole_arguments(self._inputs, step.settings)
        assert self._argument is not None
        arguments[self._argument] = self._clock.cache
        assert self._first is not None
        if self._number and self._stage.model.config.is_encoder_decoder:
            arguments["encoder_outputs"] = self._encoded(self._stage.model.device)
        return arguments

    def _begin(self, step: Handoff) -> None:
        if self._number >= 0:
            self._clock.advance(self._news)
        inputs = dict(step.inputs)
        for name, count in step.kept.items():
            before = self._inputs.get(name)
            if name not in inputs or before is None or before.shape[-1] < count:
                raise InvalidInput(f"pass {step.number} keeps {count} columns of {name}, which are not here")
            inputs[name] = torch.cat([before[..., :count], inputs[name]], dim=-1)
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if ids is None or ids.ndim != 2 or ids.shape[0] != self.batch:
            raise InvalidInput(f"pass {step.number} brings no token ids for {self.batch} sequences")
        news = ids.shape[1]
        if self.tokens + news > self.length:
            raise InvalidInput(f"{self.tokens} + {news} tokens are more than the {self.length} of this session")
        self._number += 1
        self._news, self._inputs = news, inputs
        self.tokens += news
        if self._first is None:
            self._first = self._trace_first(inputs, step.settings)
            self._flow = self._first.flow
            self._real = RealCache(self._stage.model, self._held(self._first))
            # A module's state as it is before any pass.
            self._states = {
                place: self._stage.model.get_submodule(place[0]).__dict__.get(place[1])
                for place in self._flow.trace.attributes
                if self._stage.has(place[0])
            }
        else:
            self._flow = self._trace_next(step, inputs)
        assert self._real is not None
        self._real.begin(news)

    def _trace_first(self, inputs: Mapping[str, Tensor], settings: Mapping[str, Any]) -> _First:
        shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))
        key = ("first", shapes, repr(sorted(settings.items())))
        known: _First | None = self._stage.firsts.get(key)
        if known is not None:
            return known
        cache = make_cache(self._stage.whole)
        arguments = whole_arguments(inputs, settings) | {str(self._argument): cache}
        flow = self._stage.flow(key, arguments, cache=cache)
        kind = (self.batch, tuple((name, value.ndim, value.dtype) for name, value in sorted(inputs.items())))
        shaped = {name: value.to("meta") for name, value in inputs.items()}
        first = _First(flow=flow, cache=cache, inputs=shaped, kind=kind, tokens=self.tokens)
        self._stage.firsts[key] = first
        self._stage.bases[(self.batch,)] = first
        return first

    def _trace_next(self, step: Handoff, inputs: Mapping[str, Tensor]) -> Flow:
        """The flow of a later pass: one for all that bring as many new tokens, however many were before."""
        first = self._first
        assert first is not None
        # What grows is as long as it was in the first pass, and what this pass adds.
        grown = {name: value.shape[-1] - step.kept[name] for name, value in inputs.items() if name in step.kept}
        shapes = tuple(
            (name, grown.get(name, tuple(value.shape)), value.dtype) for name, value in sorted(inputs.items())
        )
        key = ("next", first.kind, shapes, repr(sorted(step.settings.items())))
        if (known := self._stage.known(key)) is not None:
            return known
        cache = deepcopy(first.cache)
        shaped = dict(inputs)
        for name, more in grown.items():
            base = first.inputs.get(name, inputs[name][..., : first.tokens])
            shaped[name] = torch.empty((*base.shape[:-1], base.shape[-1] + more), dtype=base.dtype, device="meta")
        arguments = whole_arguments(shaped, step.settings) | {str(self._argument): cache}
        if self._stage.model.config.is_encoder_decoder:
            arguments["encoder_outputs"] = self._encoded("meta")
        states = zip(first.flow.trace.attributes, first.flow.trace.states, strict=True)
        return self._stage.flow(key, arguments, cache=cache, states=tuple(states))

    def _held(self, first: _First) -> frozenset[int]:
        """Places of the cache's layers that the units of this node write to."""
        trace, held = first.flow.trace, self._stage.held
        mine = frozenset().union(*(places for path, places in trace.wrote.items() if path in held))
        others = frozenset().union(*(places for path, places in trace.wrote.items() if path not in held))
        if mine & others:
            raise InvalidInput(
                f"layers of {self._stage.manifest.model_name} on different nodes write to the same cache, so they "
                f"cannot generate text in stages; let them be on one node"
            )
        return mine

    def _encoded(self, device: Any) -> BaseModelOutput:
        """The encoder's output as later passes are given it: its shape, no memory; its use shows in the output."""
        assert self._first is not None
        like = self._first.flow.trace.output["encoder_last_hidden_state"]
        hollow = torch.full((), filler(like.dtype), dtype=like.dtype, device=device).expand(like.shape)
        return BaseModelOutput(last_hidden_state=hollow)

    def _as_generate(self) -> AbstractContextManager[None]:
        """What `generate` does to a model while it decodes: experts run in another way on a GPU."""
        model: Any = self._stage.model
        decodes = self._number > 0 and self._news == 1
        return model._optimize_model_for_decode() if decodes else nullcontext()  # noqa: SLF001

    @contextmanager
    def _own_states(self) -> Iterator[None]:
        """Within, modules that keep states themselves have this session's."""
        places = [(self._stage.model.get_submodule(path).__dict__, name) for path, name in self._states]
        kept = [attributes.get(name) for attributes, name in places]
        try:
            for (attributes, name), value in zip(places, self._states.values(), strict=True):
                attributes[name] = value
            yield
            self._states = {
                place: attributes[name] for place, (attributes, name) in zip(self._states, places, strict=True)
            }
        finally:
            for (attributes, name), value in zip(places, kept, strict=True):
                attributes[name] = value
