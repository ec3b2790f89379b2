"""One visit of a pass to a stage: the layers that it holds run, and what others made stands in for theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planner.errors import InvalidInput
from workers.runtime.caches import CachePart, RealCache, cache_parts
from workers.runtime.dataflow import Call, Trace, Visit, observed, plan_visit, replayed
from workers.runtime.weights import filler

Place = tuple[str, int]
Run = Callable[..., Any]


class Stop(Exception):
    """The last call of this visit has run."""


class Units:
    """A model's units, whose forwards go through a visit while it runs."""

    def __init__(self, model: nn.Module, paths: Collection[str]) -> None:
        self._runner: Runner
        self._through: dict[int, tuple[dict[str, Any], Run]] = {}
        for path in paths:
            unit = model.get_submodule(path)
            self._through.setdefault(
                id(unit), (unit.__dict__, self._call(path, unit.forward))
            )  # maybe under two paths

    def _call(self, path: str, run: Run) -> Run:
        return lambda *args, **kwargs: self._runner(path, run, args, kwargs)

    @contextmanager
    def running(self, runner: Runner) -> Iterator[None]:
        """Within, each call of a unit is the runner's."""
        self._runner = runner
        for attributes, call in self._through.values():
            attributes["forward"] = call
        try:
            yield
        finally:
            for attributes, _ in self._through.values():
                del attributes["forward"]


class Flow:
    """A trace, and what a stage does in each visit of such a pass; found once."""

    def __init__(self, found: Trace, can: Callable[[str], bool], layer_of: Callable[[str], str | None]) -> None:
        self.trace = found
        self.calls: Mapping[Place, Call] = {(call.path, call.number): call for call in found.calls}
        self._can, self._layer_of = can, layer_of
        self._visits: dict[frozenset[str], Todo] = {}

    def visit(self, ready: Collection[str]) -> Todo:
        """What to do, given these results."""
        key = frozenset(ready)
        if key not in self._visits:
            visit = plan_visit(self.trace, key, self._can, self._layer_of)
            handed: dict[Place, list[tuple[int, str]]] = defaultdict(list)
            for place in visit.compute:
                call = self.calls[place]
                for at in range(len(call.parts)):
                    if call.key(at) in visit.hand_on:
                        handed[place].append((at, call.key(at)))
            last = visit.compute[-1] if visit.next_module and visit.compute else None
            self._visits[key] = Todo(visit, frozenset(visit.compute), dict(handed), last)
        return self._visits[key]


@dataclass(frozen=True, slots=True)
class Todo:
    """A visit, as its runner looks things up in it."""

    visit: Visit
    compute: frozenset[Place]
    #: Call -> which parts of its result are handed on, and under which names.
    handed: Mapping[Place, list[tuple[int, str]]]
    #: The call after which the visit ends; None if the pass does.
    last: Place | None


class Runner:
    """Runs or replays each call of a unit in one visit."""

    def __init__(
        self,
        flow: Flow,
        todo: Todo,
        ready: Mapping[str, Tensor],
        device: torch.device,
        caches: tuple[RealCache, Any] | None = None,
    ) -> None:
        self.made: dict[str, Tensor] = {}
        self._real: RealCache | None
        self._clock: Any
        self._calls, self._todo, self._ready, self._device = flow.calls, todo, ready, device
        self._real, self._clock = caches if caches is not None else (None, None)
        self._counts: dict[str, int] = {}
        #: (identity, version) -> (what is copied, so that its identity stays its own; the copy).
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._hollow: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, path: str, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in the place of the unit's forward."""
        number = self._counts.get(path, 0)
        self._counts[path] = number + 1
        place = (path, number)
        call = self._calls.get(place)
        if call is None:
            raise InvalidInput(f"{path} ran more often than in the trace: its calls depend on the data")
        if place not in self._todo.compute:
            if call.plain:
                return self._part(call.key(0), call.parts[0])
            parts = [self._part(call.key(at), part) for at, part in enumerate(call.parts)]
            return replayed(call, parts, args, kwargs)
        if self._real is not None:
            args = tuple(self._real.exchange(value, self._clock) for value in args)
            kwargs = {name: self._real.exchange(value, self._clock) for name, value in kwargs.items()}
        output, told = observed(run, args, kwargs)
        if place in self._todo.handed:
            parts = [output] if call.plain else pytree.tree_leaves((output, told))
            self.made |= {key: self._copy(parts[at]) for at, key in self._todo.handed[place]}
        if place == self._todo.last:
            raise Stop
        if self._real is not None and not call.plain:
            return self._real.returned(output, self._clock)
        return output

    def _part(self, key: str, part: Any) -> Any:
        if isinstance(part, CachePart):
            return cache_parts(self._clock)[part.number]
        if not isinstance(part, Tensor):
            return part
        if key in self._ready:
            return self._copy(self._ready[key])
        # Real memory, unlike weights that are not here: models write to hidden states in place. One for all of a
        # shape: nothing that counts depends on what is in it.
        kind = (part.shape, part.dtype)
        if kind not in self._hollow:
            self._hollow[kind] = torch.full(part.shape, filler(part.dtype), dtype=part.dtype, device=self._device)
        return self._hollow[kind]

    def _copy(self, value: Tensor) -> Tensor:
        """A copy that in-place code between the layers cannot reach; the same one for the same value."""
        place = (id(value), value._version)  # noqa: SLF001 (how often it was written to)
        if place not in self._copies:
            self._copies[place] = (value, value.clone())
        return self._copies[place][1]
