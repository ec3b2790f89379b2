"""One counted pass of a weightless model: FLOP by module path, peaks, and what flows from layer to layer.

FLOP are those of `torch.utils.flop_counter.FlopCounterMode` (its registry; the tests prove a difference of 0), with
two additions: a meta tensor asked for its truth value says yes, and repeated children of a `ModuleList` run once.
"""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from workers.kv import watch

_SCALARS = (bool, int, float, str, type(None))
#: Attributes that differ between layers that cost the same.
_POSITIONS = {"layer_idx", "layer_index", "layer_id", "layer_number", "idx", "block_idx", "index"}


@dataclass(slots=True)
class Counts:
    """What a pass cost."""

    #: (layer, module path) -> FLOP of the operators that ran directly in that module.
    flop: dict[tuple[int, str], int] = field(default_factory=lambda: defaultdict(int))
    #: Layer -> largest bytes alive beside its weights while it ran.
    peak_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    #: Layers in the order in which they first ran.
    order: list[int] = field(default_factory=list)
    #: Storages that weights had a part in: (layer that made it, last layer that read it, bytes read).
    flows: list[list[int]] = field(default_factory=list)
    #: Expert parameter's module path -> (rows gathered, rows there are).
    gathered: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Child that was not run -> child of equal cost that was.
    twins: dict[str, str] = field(default_factory=dict)
    #: Bytes of the pass's output tensors.
    output_bytes: int = 0
    #: Layer -> the cache layers that it wrote to.
    kept: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    operators: int = 0


@dataclass(slots=True)
class _Recorded:
    """A child's pass, to be repeated for its twins."""

    path: str
    output: Any
    flop: dict[str, int]
    peak_bytes: int
    operators: int
    gathered: dict[str, tuple[int, int]]
    kept: list[Any]


class Truth(TorchFunctionMode):
    """Answers what only data could tell: whether a meta tensor is true."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asked = func is Tensor.__bool__ or (func is Tensor.item and args[0].dtype is torch.bool)
        if asked and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of one pass; see `count`."""

    def __init__(self, model: nn.Module, layer_of: Callable[[str], int | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
        # A storage has no identity but its address, which lasts as long as the model does.
        self._trained = {each.untyped_storage()._cdata for each in model.parameters()}  # noqa: SLF001
        self._weights = self._trained | {each.untyped_storage()._cdata for each in model.buffers()}  # noqa: SLF001
        self._layer_of = layer_of
        self._stack: list[str] = []
        #: The layer that runs, as the model's grouping numbers it, and as the order of their first runs does.
        self.layer = -1
        self._layer = -1
        self._live = 0
        self._high = 0
        self._kept_bytes = 0
        self._storages: dict[int, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        args = on_meta(args)
        out = func(*args, **kwargs)
        counts = self.counts
        counts.operators += 1
        packet = func._overloadpacket  # noqa: SLF001 (as FlopCounterMode does)
        rule = flop_registry.get(packet)
        if rule is not None:
            counts.flop[self.layer, self._stack[-1] if self._stack else ""] += rule(*args, **kwargs, out_val=out)
        weighted = False
        for value in args:
            if isinstance(value, Tensor):
                weighted |= self._reads(value)
            elif isinstance(value, (list, tuple)):
                for each in value:
                    if isinstance(each, Tensor):
                        weighted |= self._reads(each)
        if packet is torch.ops.aten.index and self._gathers(args, out):
            return out
        if isinstance(out, Tensor):
            self._makes(out, weighted)
        elif isinstance(out, (list, tuple)):
            for each in out:
                if isinstance(each, Tensor):
                    self._makes(each, weighted)
        return out

    def _reads(self, tensor: Tensor) -> bool:
        """Note that the present layer reads `tensor`; whether weights had a part in it."""
        key = tensor.untyped_storage()._cdata  # noqa: SLF001
        if key in self._weights:
            return key in self._trained
        known = self._storages.get(key)
        if known is None or not known[3]:
            return False
        if known[1] < self._layer:
            known[1], known[2] = self._layer, 0
        known[2] = max(known[2], min(tensor.numel() * tensor.element_size(), known[4]))
        return True

    def _makes(self, tensor: Tensor, weighted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001
        known = self._storages.get(key)
        if known is not None:
            known[3] |= weighted
            return
        if key in self._weights:
            return
        size = storage.nbytes()
        # [made by, last read by, bytes read, weighted, size]
        self._storages[key] = [self._layer, self._layer, 0, weighted, size]
        self._live += size
        self._high = max(self._high, self._live)
        weakref.finalize(storage, self._frees, key)

    def _frees(self, key: int) -> None:
        known = self._storages.pop(key, None)
        if known is not None:
            self._live -= known[4]
            if known[3] and known[1] > known[0]:
                self.counts.flows.append(known[:3])

    def _gathers(self, args: tuple[Any, ...], out: Tensor) -> bool:
        """Whether this copied expert weights for each token, as only `batched_mm` does: note, charge nothing."""
        name = self._parameters.get(id(args[0]))
        if name is None or args[0].ndim < 2 or "expert" not in name:
            return False
        self.counts.gathered[name] = (out.shape[0], args[0].shape[0])
        return True

    def enters(self, module: nn.Module, _: Any) -> None:
        """Forward pre-hook."""
        path = self._paths.get(id(module))
        if path is None:
            path = self._stack[-1] if self._stack else ""
        layer = self._layer_of(path)
        if layer is not None and layer != self.layer:
            self._settle()
            if layer not in self.counts.order:
                self.counts.order.append(layer)
            # Layers are numbered by the order in which they first run, so that "later" is a comparison.
            self._layer = self.counts.order.index(layer)
            self.layer = layer
            self._high = self._live
        self._stack.append(path)

    def leaves(self, *_: Any) -> None:
        """Forward hook."""
        self._stack.pop()

    def _settle(self) -> None:
        """Close the account of the layer that was running."""
        if self._layer >= 0:
            peaks = self.counts.peak_bytes
            peaks[self.layer] = max(peaks[self.layer], self._high - self._kept_bytes)

    def caches(self, cache_layer: Any, grown_bytes: int) -> None:
        """Note that the present layer wrote to the KV cache."""
        self._kept_bytes += grown_bytes
        kept = self.kept_here()
        if not any(each is cache_layer for each in kept):
            kept.append(cache_layer)

    def kept_here(self) -> list[Any]:
        """The cache layers that the present layer wrote to."""
        return self.counts.kept[self.layer]

    def finish(self, output: Any) -> Counts:
        """Close all accounts after the pass."""
        self._settle()
        for known in self._storages.values():
            if known[3] and known[1] > known[0]:
                self.counts.flows.append(known[:3])
        self._storages = {}
        self.counts.output_bytes = sum(t.numel() * t.element_size() for t in tensors_in(output))
        return self.counts


def on_meta(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with real tensors (grids of image patches) made meta where they meet meta tensors."""
    real = [at for at, value in enumerate(args) if isinstance(value, Tensor) and not value.is_meta and value.ndim]
    if not real or not any(value.is_meta for value in tensors_in(args)):
        return args
    return tuple(value.to("meta") if at in real else value for at, value in enumerate(args))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def count(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layer_of: Callable[[str], int | None],
    memoise: bool = True,
    structures: dict[Any, int] | None = None,
) -> tuple[Counts, Any]:
    """Run `model` on `inputs` (meta tensors) and count.

    Args:
        model: On the meta device.
        inputs: Keyword arguments of its forward.
        layer_of: Module path -> layer, or None for containers of several.
        memoise: Run children of equal cost once.
        structures: What was learned of the model's children, to be handed to its next pass.

    Returns:
        The counts, and the model's output.
    """
    counter = Counter(model, layer_of)
    memo = _Memo(counter, {} if structures is None else structures) if memoise else None
    hooks = [register_module_forward_pre_hook(counter.enters), register_module_forward_hook(counter.leaves)]
    try:
        if memo is not None:
            memo.attach(model)
        with torch.no_grad(), watch(counter.caches), Truth(), counter:
            output = model(**inputs)
        return counter.finish(output), output
    finally:
        for hook in hooks:
            hook.remove()
        if memo is not None:
            memo.detach()


class _Memo:
    """Replaces the forward of a `ModuleList`'s children by one that repeats what a twin did."""

    def __init__(self, counter: Counter, structures: dict[Any, int]) -> None:
        self._counter = counter
        self._recorded: dict[Any, _Recorded] = {}
        self._structures = structures
        self._wrapped: list[nn.Module] = []

    def attach(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) > 1:
                for number, child in enumerate(module):
                    if "forward" not in child.__dict__:
                        self._wrap(child, f"{path}.{number}", _entries(config, number, len(module)))

    def detach(self) -> None:
        for child in self._wrapped:
            del child.__dict__["forward"]
        self._wrapped.clear()

    def _wrap(self, child: nn.Module, path: str, entries: Any) -> None:
        forward = child.forward
        self._wrapped.append(child)

        def memoised(*args: Any, **kwargs: Any) -> Any:
            return self._call(forward, child, path, entries, args, kwargs)

        child.__dict__["forward"] = memoised

    def _call(  # noqa: PLR0917 (what a forward is called with, and where)
        self, forward: Any, child: nn.Module, path: str, entries: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        counter = self._counter
        inputs: list[Tensor] = []
        structure = self._structures.get(path)
        if structure is None:
            described = _structure(child, entries)
            structure = self._structures[path] = self._structures.setdefault(described, len(self._structures))
        key = (structure, _signature(_without_position(forward, args, kwargs), inputs))
        recorded = self._recorded.get(key)
        if recorded is not None:
            return self._repeat(recorded, path, inputs)
        flop_before = dict(counter.counts.flop)
        operators, gathered = counter.counts.operators, dict(counter.counts.gathered)
        live, high = counter._live - counter._kept_bytes, counter._high  # noqa: SLF001 (one mechanism in two classes)
        kept_before = {id(each) for each in counter.kept_here()}
        counter._high = counter._live  # noqa: SLF001
        output = forward(*args, **kwargs)
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
            peak_bytes=counter._high - counter._kept_bytes - live,  # noqa: SLF001
            operators=counts.operators - operators,
            gathered={n[len(path) :]: g for n, g in counts.gathered.items() if gathered.get(n) != g},
            kept=[each for each in counter.kept_here() if id(each) not in kept_before],
        )
        counter._high = max(high, counter._high)  # noqa: SLF001
        return output

    def _repeat(self, recorded: _Recorded, path: str, inputs: list[Tensor]) -> Any:
        counter, counts = self._counter, self._counter.counts
        for tensor in inputs:
            counter._reads(tensor)  # noqa: SLF001
        for name, flop in recorded.flop.items():
            counts.flop[counter.layer, path + name] += flop
        for name, rows in recorded.gathered.items():
            counts.gathered[path + name] = rows
        counts.twins[path] = recorded.path
        counter.kept_here().extend(recorded.kept)
        counter._high = max(counter._high, counter._live + recorded.peak_bytes)  # noqa: SLF001
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
    parts: list[Any] = [entries]
    for path, part in module.named_modules():
        parts.append((path, type(part)))
        for name, value in part.__dict__.items():
            if name in _POSITIONS or name.startswith("_"):
                continue
            if isinstance(value, _SCALARS):
                parts.append((name, value))
        for name, parameter in part._parameters.items():  # noqa: SLF001 (parameters() would recurse)
            parts.append((name, None if parameter is None else (tuple(parameter.shape), parameter.dtype)))
        for name, buffer in part._buffers.items():  # noqa: SLF001
            parts.append((name, None if buffer is None else (tuple(buffer.shape), buffer.dtype)))
    return tuple(parts)


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
    if isinstance(value, dict):
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
    weighted: bool


@dataclass(slots=True)
class _Given:
    """A tensor that a child handed through."""

    place: int


def _describe(output: Any, places: Mapping[int, int]) -> Any:
    if isinstance(output, Tensor):
        if id(output) in places:
            return _Given(places[id(output)])
        return _Made(tuple(output.shape), output.stride(), output.dtype, weighted=True)
    if isinstance(output, dict):
        return type(output), {name: _describe(value, places) for name, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output), [_describe(value, places) for value in output]
    return output


def _rebuild(described: Any, inputs: list[Tensor], counter: Counter) -> Any:
    if isinstance(described, _Made):
        tensor = torch.empty_strided(described.shape, described.stride, dtype=described.dtype, device="meta")
        counter._makes(tensor, described.weighted)  # noqa: SLF001
        return tensor
    if isinstance(described, _Given):
        return inputs[described.place]
    if isinstance(described, tuple) and len(described) == 2 and isinstance(described[0], type):
        kind, values = described
        if isinstance(values, dict):
            return kind(**{name: _rebuild(value, inputs, counter) for name, value in values.items()})
        return kind(_rebuild(value, inputs, counter) for value in values)
    return described
