"""Passes in which equal children of a `ModuleList` run once: the others repeat the recorded result of that one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from workers.profiling.tracing.counter import Counter, Counts, Subject
from workers.profiling.tracing.kv_cache import watch
from workers.profiling.tracing.masks import Sight, watch_masks

_SCALARS = (bool, int, float, str, type(None))
_PLAIN = set(_SCALARS)
#: Attributes that differ between layers that cost the same.
_POSITIONS = {"layer_idx", "layer_index", "layer_id", "layer_number", "idx", "block_idx", "index"}


@dataclass(slots=True)
class _Recorded:
    """What a child's pass cost and made, to be repeated for equal children."""

    path: str
    output: Any
    flop: dict[str, int]
    peak_bytes: int
    gathered: dict[str, tuple[int, int]]
    kept: list[Any]
    sights: dict[str, Sight]


def count(
    subject: Subject, inputs: Mapping[str, Any], *, memoise: bool = True, masks: bool = False
) -> tuple[Counts, Any]:
    """Run a model on `inputs` (meta tensors) and count.

    Args:
        subject: The model.
        inputs: Keyword arguments of its forward.
        memoise: Run repeated children once.
        masks: Find out what attention masks let see as well.

    Returns:
        The counts, and the model's output.
    """
    counter = Counter(subject)
    memo = _Memo(counter, subject)
    watching = watch_masks(counter.masked) if masks else contextlib.nullcontext()
    hooks = [register_module_forward_pre_hook(counter.enters), register_module_forward_hook(counter.leaves)]
    if subject.model._is_stateful:  # noqa: SLF001 (transformers' word for models that keep a state)
        hooks.append(register_module_forward_hook(counter.keeps))
    try:
        if memoise:
            memo.attach()
        with torch.no_grad(), watch(counter.caches), watching, _einsum_noted(counter.counts), counter:
            output = subject.model(**inputs)
        return counter.finish(output), output
    finally:
        for hook in hooks:
            hook.remove()
        memo.detach()


@contextlib.contextmanager
def _einsum_noted(counts: Counts) -> Iterator[None]:
    """Note whether `torch.einsum` is called; what arrives of it are other operators."""
    original = torch.einsum

    def einsum(*args: Any, **kwargs: Any) -> Any:
        counts.einsum = True
        return original(*args, **kwargs)

    torch.einsum = einsum
    try:
        yield
    finally:
        torch.einsum = original


class _Memo:
    """Replaces the forward of a `ModuleList`'s children by one that repeats an equal child's recorded result."""

    def __init__(self, counter: Counter, subject: Subject) -> None:
        self._counter = counter
        self._recorded: dict[Any, _Recorded] = {}
        self._subject = subject
        self._structures = subject.structures
        self._wrapped: list[nn.Module] = []

    def attach(self) -> None:
        config = getattr(self._subject.model, "config", None)
        for child, path, number, length in self._subject.children:
            if "forward" not in child.__dict__:
                self._wrap(child, path, (config, number, length))

    def detach(self) -> None:
        for child in self._wrapped:
            del child.__dict__["forward"]
        self._wrapped.clear()

    def _wrap(self, child: nn.Module, path: str, place: tuple[Any, int, int]) -> None:
        forward = child.forward
        self._wrapped.append(child)

        def memoised(*args: Any, **kwargs: Any) -> Any:
            if self._counter.inside(child):
                return self._call(forward, child, path, place, args, kwargs)
            # Some models call it past its hooks.
            self._counter.enters(child, None)
            try:
                return self._call(forward, child, path, place, args, kwargs)
            finally:
                self._counter.leaves()

        child.__dict__["forward"] = memoised

    def _call(  # noqa: PLR0917 (what a forward is called with, and where)
        self,
        forward: Any,
        child: nn.Module,
        path: str,
        place: tuple[Any, int, int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        counter = self._counter
        inputs: list[Tensor] = []
        # Looking at tensors here asks nothing of the modes that the model's own code runs under.
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            structure = self._structures.get(path)
            if structure is None:
                described = _structure(child, _entries(*place))
                structure = self._structures[path] = self._structures.setdefault(described, len(self._structures))
            signature = _signature(_without_position(forward, args, kwargs), inputs)
            masks = [counter.masks.get(each.untyped_storage()._cdata) for each in inputs] if counter.masks else ()  # noqa: SLF001
            key = (structure, signature, tuple(masks))
            recorded = self._recorded.get(key)
            if recorded is not None:
                return self._repeat(recorded, path, inputs)
        flop_before = dict(counter.counts.flop)
        gathered = dict(counter.counts.gathered)
        live, high = counter.live - counter.kept_bytes, counter.high
        sights_before = set(counter.counts.sights)
        kept_before = {id(each) for each in counter.kept_here()}
        counter.high = counter.live
        # Whether it reads all that others share with it or not: a stage hands on the whole mapping.
        for tensor in _in_mappings(args, kwargs):
            counter.reads(tensor)
        output = forward(*args, **kwargs)
        for tensor in _in_mappings(args, kwargs):
            counter.shares(tensor)
        counts = counter.counts
        places = {id(tensor): at for at, tensor in enumerate(inputs)}
        self._recorded[key] = _Recorded(
            path=path,
            output=_describe(output, places),
            flop={
                place[1].removeprefix(path): flop - flop_before.get(place, 0)
                for place, flop in counts.flop.items()
                if flop != flop_before.get(place, 0)
            },
            peak_bytes=counter.high - counter.kept_bytes - live,
            gathered={n[len(path) :]: g for n, g in counts.gathered.items() if gathered.get(n) != g},
            kept=[each for each in counter.kept_here() if id(each) not in kept_before],
            sights={n[1].removeprefix(path): s for n, s in counts.sights.items() if n not in sights_before},
        )
        counter.high = max(high, counter.high)
        return output

    def _repeat(self, recorded: _Recorded, path: str, inputs: list[Tensor]) -> Any:
        counter, counts = self._counter, self._counter.counts
        for tensor in inputs:
            counter.reads(tensor)
        for name, flop in recorded.flop.items():
            counts.flop[counter.layer, path + name] += flop
        for name, rows in recorded.gathered.items():
            counts.gathered[path + name] = rows
        for name, sight in recorded.sights.items():
            counts.sights[counter.layer, path + name] = sight
        counts.twins[path] = recorded.path
        counter.kept_here().extend(recorded.kept)
        counter.high = max(counter.high, counter.live + recorded.peak_bytes)
        return _rebuild(recorded.output, inputs, counter)


def _entries(config: Any, number: int, length: int) -> tuple[Any, ...]:
    """What the config says of this one of `length` layers (`layer_types` and the like)."""
    if config is None:
        return ()
    return tuple(
        (name, str(value[number]))
        for name, value in config.__dict__.items()
        if isinstance(value, (list, tuple)) and len(value) == length
    )


def _structure(module: nn.Module, entries: Any) -> Any:
    """What a module is: classes, parameter shapes and settings of all its parts, without its position."""
    found: list[Any] = [entries]
    _settings(module, "", found)
    return tuple(found)


def _settings(module: nn.Module, path: str, found: list[Any]) -> None:
    found.append((path, type(module)))
    for name, value in module.__dict__.items():
        if name[0] != "_" and (type(value) in _PLAIN or _is_setting(value)) and name not in _POSITIONS:
            found.append((name, tuple(value) if isinstance(value, list) else value))
    for kept in (module._parameters, module._buffers):  # noqa: SLF001 (parameters() would recurse)
        for name, tensor in kept.items():
            found.append((name, None if tensor is None else (tensor.shape, tensor.dtype)))
    for name, child in module._modules.items():  # noqa: SLF001
        if child is not None:
            _settings(child, f"{path}.{name}", found)


def _is_setting(value: Any) -> bool:
    """Whether an attribute is a scalar or several (a convolution's stride)."""
    return isinstance(value, _SCALARS) or (
        isinstance(value, (list, tuple)) and all(isinstance(each, _SCALARS) for each in value)
    )


def _in_mappings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors in those arguments that children can put something into."""
    mappings = [dict(each) for each in (*args, *kwargs.values()) if isinstance(each, MutableMapping)]
    return [leaf for leaf in pytree.tree_leaves(mappings) if isinstance(leaf, Tensor)] if mappings else []


@cache
def _argument_names(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _without_position(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments without a layer's own number, which some models hand to each layer."""
    names = _argument_names(getattr(forward, "__func__", forward)) if args else ()
    return (
        [None if name in _POSITIONS else value for name, value in zip_longest(names[: len(args)], args)],
        {name: value for name, value in kwargs.items() if name not in _POSITIONS},
    )


def _signature(value: Any, inputs: list[Tensor]) -> Any:
    """A hashable description of arguments; their tensors are appended to `inputs`."""
    if isinstance(value, Tensor):
        inputs.append(value)
        return (tuple(value.shape), value.dtype, value.stride())
    if isinstance(value, MutableMapping):
        return tuple((name, _signature(each, inputs)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return (type(value), *(_signature(each, inputs) for each in value))
    if isinstance(value, _SCALARS):
        return value
    return (type(value), id(value))


@dataclass(slots=True)
class _Made:
    """A tensor that a child made: how to make its like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class _Given:
    """A tensor that a child handed through."""

    place: int


def _describe(output: Any, places: Mapping[int, int]) -> Any:
    """A child's output with its tensors described; `places` tells which of them are among its inputs."""

    def described(tensor: Tensor) -> _Made | _Given:
        if id(tensor) in places:
            return _Given(places[id(tensor)])
        return _Made(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    return pytree.tree_map_only(Tensor, described, output)


def _rebuild(described: Any, inputs: list[Tensor], counter: Counter) -> Any:
    """An output like the one described, for a twin with these inputs."""

    def made(part: _Made) -> Tensor:
        with torch._C._DisableTorchDispatch():  # noqa: SLF001 (no operator of the model's)
            tensor = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device="meta")
        counter.makes(tensor, weighted=True)
        return tensor

    whole = pytree.tree_map_only(_Given, lambda part: inputs[part.place], described)
    return pytree.tree_map_only(_Made, made, whole)
