"""Which parts of a model need which others: one pass on the meta device that follows where each tensor comes from.

A model is cut into units (an embedding, one layer of a stack, a norm, a head: what a stage has whole or not at all)
and the code between them, which every stage runs for itself. The trace lists each call of a unit with the results of
other units that reached its arguments, through whatever code between. From that alone follows what a stage can
compute, and what it must hand on: no code per architecture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from workers.runtime.caches import CachePart, Watch, cache_parts

#: A result: `<module path>#<call>:<part>`; a weight that the code between uses directly: `=<name>`; a buffer
#: likewise: `~<name>`, which the model makes for itself where the checkpoint has none.
Key = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a unit."""

    path: str
    #: Which call of this unit in the pass, from 0.
    number: int
    #: Results that its arguments depend on.
    needs: frozenset[Key]
    #: How (output, what it told others through mappings) is built from its parts (a pytree's structure).
    structure: Any
    #: Its parts: meta tensors, `CachePart`s, or plain values.
    parts: tuple[Any, ...]
    #: Whether the result is one tensor and nothing else.
    plain: bool = False

    def key(self, part: int) -> Key:
        """The name of one part of the result."""
        return f"{self.path}#{self.number}:{part}"

    @property
    def keys(self) -> tuple[Key, ...]:
        """The names of all parts that are tensors."""
        return tuple(self.key(at) for at, part in enumerate(self.parts) if isinstance(part, Tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A pass: its calls in order, and what its output needs."""

    calls: tuple[Call, ...]
    output_needs: frozenset[Key]
    #: Unit's path -> places of the cache's layers (`workers.runtime.caches.layers_of`) that it wrote to.
    wrote: Mapping[str, frozenset[int]] = field(default_factory=dict)
    #: What modules keep between passes themselves, as (module path, attribute).
    attributes: tuple[tuple[str, str], ...] = ()
    #: Those attributes' values after the pass.
    states: tuple[Any, ...] = ()
    #: What the model returned, on the meta device.
    output: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What a stage does in one visit."""

    #: Calls that it runs, as (path, number), in order.
    compute: tuple[tuple[str, int], ...]
    #: Results that have to be handed on; empty if the pass ends here.
    hand_on: frozenset[Key]
    #: The first call that remains; None if the pass ends here.
    next_module: str | None


def trace(model: nn.Module, units: Collection[str], inputs: Mapping[str, Any], *, cache: Any = None) -> Trace:
    """Run `model` (on the meta device) on inputs of the given shapes and record the calls of its units.

    Args:
        model: The whole model.
        units: Paths of its units.
        inputs: The forward's arguments.
        cache: The cache among them, if the pass has one: the output that counts is then the logits.

    Raises:
        Exception: Whatever the model raises where it asks for values that a meta tensor has not.
    """
    follower = _Follower(model)
    counts: dict[str, int] = defaultdict(int)
    calls: list[Call] = []
    watch = Watch(cache)
    places = {id(part): CachePart(at) for at, part in enumerate(cache_parts(cache))}
    wrote: dict[str, frozenset[int]] = defaultdict(frozenset)
    kept = {path: dict(module.__dict__) for path, module in model.named_modules()} if cache is not None else {}

    def recorded(path: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = counts[path]
        counts[path] += 1
        needs = follower.origins((args, kwargs, [dict(shared) for shared in _shared(args, kwargs)]))
        before = _state((args, kwargs))
        with follower.paused():
            output, told = observed(run, args, kwargs)
        parts, structure = pytree.tree_flatten((output, told))
        _refuse_side_effects(path, before, _state((args, kwargs)), parts)
        wrote[path] |= watch.changed()
        call = Call(
            path=path,
            number=number,
            needs=needs,
            structure=structure,
            parts=tuple(places.get(id(part), part) for part in parts),
            plain=isinstance(output, Tensor) and len(parts) == 1,
        )
        calls.append(call)
        for at, part in enumerate(parts):
            if isinstance(part, Tensor):
                follower.add(part, frozenset({call.key(at)}))
        return output

    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with calling(model, units, recorded), torch.no_grad(), _Truth(), follower:
        output = model(**meta)
    if cache is None:
        return Trace(calls=tuple(calls), output_needs=follower.origins(output))
    attributes = _changed(model, kept)
    return Trace(
        calls=tuple(calls),
        output_needs=follower.origins(output["logits"]),
        wrote=wrote,
        attributes=tuple(attributes),
        states=tuple(attributes.values()),
        output=output,
    )


def _changed(model: nn.Module, before: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """The tensors that modules now keep and did not before; they are put back as they were."""
    found = {}
    for path, module in model.named_modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and before[path].get(name) is not value:
                found[path, name] = value
                module.__dict__[name] = before[path].get(name)
    return found


def observed(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Run a unit: its output, and what it put into each mapping among its arguments (Gemma's shared keys)."""
    shared = _shared(args, kwargs)
    before = [dict(mapping) for mapping in shared]
    output = run(*args, **kwargs)
    told = [
        {name: value for name, value in mapping.items() if name not in old or old[name] is not value}
        for mapping, old in zip(shared, before, strict=True)
    ]
    return output, told


def replayed(call: Call, parts: Collection[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do with these parts of its result what the unit would have done: return its output, fill the mappings."""
    output, told = pytree.tree_unflatten(parts, call.structure)
    for mapping, entries in zip(_shared(args, kwargs), told, strict=True):
        mapping.update(entries)
    return output


def _shared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[MutableMapping[Any, Any]]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]


def _state(value: Any) -> dict[int, tuple[Any, int]]:
    """The leaves of arguments by identity, with how often each tensor was written to."""
    leaves = pytree.tree_leaves(value)
    return {id(x): (x, x._version if isinstance(x, Tensor) else 0) for x in leaves}  # noqa: SLF001


def _refuse_side_effects(path: str, before: Any, after: Any, parts: list[Any]) -> None:
    """Refuse a unit that writes to its arguments: units on other nodes would not see it."""
    own = {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}  # noqa: SLF001
    for key, (leaf, version) in after.items():
        if key in before and before[key][1] == version:
            continue
        if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in own:  # noqa: SLF001
            continue
        if not any(leaf is part for part in parts):
            raise NotImplementedError(f"{path} writes to its arguments, which stages on other nodes would not see")


def plan_visit(
    found: Trace,
    ready: Collection[Key],
    can: Callable[[str], bool],
    layer_of: Callable[[str], str | None] = lambda path: path,
) -> Visit:
    """What a stage does next, given the results it has (`ready`) and what it holds (`can`).

    Layers have their turns in the order of their first calls, as in the plan: a stage runs none ahead of others' even
    if nothing stops it, or the request would go another way than its chain.

    Args:
        found: The pass.
        ready: Results that are here.
        can: Whether a unit's weights, or single ones, are here.
        layer_of: The plan's layer that a unit is of; None: of none by name, it may run as soon as it can.
    """
    by_key = {key: call for call in found.calls for key in call.keys}
    known = set(ready) | {key for key in _weights(found) if can(key)}
    turns: dict[str, int] = {}
    for at, call in enumerate(found.calls):
        turns.setdefault(layer_of(call.path) or call.path, at)

    def remaining() -> list[Call]:
        needed, wanted = set(), [key for key in found.output_needs if key not in known]
        while wanted:
            call = by_key.get(wanted.pop())
            if call is not None and id(call) not in needed:
                needed.add(id(call))
                wanted += [key for key in call.needs if key not in known]
        return [call for call in found.calls if id(call) in needed]

    compute = []
    others = len(found.calls)
    for call in remaining():
        layer = layer_of(call.path)
        turn = turns[layer or call.path]
        if not can(call.path) or not all(key in known or key[0] == "~" for key in call.needs):
            others = min(others, turn)
        elif layer is None or turn < others:
            compute.append((call.path, call.number))
            known.update(call.keys)
    left = remaining()
    lacking = [key for key in found.output_needs if key[0] == "=" and key not in known]
    if not left and not lacking:
        return Visit(compute=tuple(compute), hand_on=frozenset(), next_module=None)
    wanted = found.output_needs.union(*(call.needs for call in left))
    return Visit(
        compute=tuple(compute),
        hand_on=frozenset(wanted & known),
        next_module=left[0].path if left else lacking[0][1:],
    )


def _weights(found: Trace) -> set[Key]:
    return {key for needs in (found.output_needs, *(c.needs for c in found.calls)) for key in needs if key[0] in "=~"}


Runner = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def calling(model: nn.Module, units: Collection[str], runner: Runner) -> Iterator[None]:
    """Within, each unit's forward goes through `runner(path, forward, args, kwargs)`."""
    wrapped = []
    try:
        for path in units:
            unit = model.get_submodule(path)
            if "forward" in unit.__dict__:
                continue  # one module under two paths

            def call(*args: Any, _path: str = path, _run: Callable[..., Any] = unit.forward, **kwargs: Any) -> Any:
                return runner(_path, _run, args, kwargs)

            unit.__dict__["forward"] = call
            wrapped.append(unit)
        yield
    finally:
        for unit in wrapped:
            del unit.__dict__["forward"]


class _Truth(TorchFunctionMode):
    """Answers what only data could tell: a meta tensor asked whether it is true says yes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers which results and weights each tensor was made from, views and in-place writes included.

    Tensors are told apart by storage: a view shares its base's origins, which may be more than its own, never less.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins: dict[int, frozenset[Key]] = {}
        #: Keeps every storage, or a new one could come to lie at an old one's address.
        self._storages: list[Any] = []
        self._on = True
        for name, weight in model.state_dict(keep_vars=True).items():
            self.add(weight, frozenset({("=" if isinstance(weight, nn.Parameter) else "~") + name}))

    def add(self, tensor: Tensor, origins: frozenset[Key]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 (a storage's only identity)
        if key not in self._origins:
            self._storages.append(storage)
        self._origins[key] = self._origins.get(key, frozenset()) | origins

    def origins(self, value: Any) -> frozenset[Key]:
        """Of all tensors in `value`."""
        found: frozenset[Key] = frozenset()
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                found |= self._origins.get(leaf.untyped_storage()._cdata, frozenset())  # noqa: SLF001
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within a unit nothing is followed: only what comes out counts."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._on:
            origins = self.origins((args, kwargs))
            if origins:
                for leaf in pytree.tree_leaves(output):
                    if isinstance(leaf, Tensor):
                        self.add(leaf, origins)
        return output
