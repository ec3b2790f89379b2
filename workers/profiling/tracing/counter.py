"""Counts one pass of a model without weights: FLOP by module, peak memory, and what flows from layer to layer.

FLOP are counted by the table of `torch.utils.flop_counter.FlopCounterMode`; the tests prove a difference of 0. A meta
tensor that is asked for its truth value answers True, since the data that could tell is not there.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from workers.profiling.tracing.masks import Sight
from workers.profiling.tracing.module_tree import Tree, find_units


@dataclass(slots=True)
class Counts:
    """What a pass cost."""

    #: (layer, module path) -> FLOP of the operators that ran directly in that module.
    flop: dict[tuple[int, str], int] = field(default_factory=lambda: defaultdict(int))
    #: Layer -> largest bytes alive beside its weights while it ran.
    peak_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    #: Layers in the order in which they first ran, and the units likewise.
    order: list[int] = field(default_factory=list)
    ran: dict[str, None] = field(default_factory=dict)
    #: Storages that weights had a part in: (layer that made it, last layer that read it, bytes read, whether layers
    #: share it in a mapping).
    flows: list[list[int]] = field(default_factory=list)
    #: Expert parameter's module path -> (rows gathered, rows there are).
    gathered: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Child that was not run -> child of equal cost that was.
    twins: dict[str, str] = field(default_factory=dict)
    #: Bytes of the pass's output tensors.
    output_bytes: int = 0
    #: (layer, module path) -> what the mask that was read there lets see.
    sights: dict[tuple[int, str], Sight] = field(default_factory=dict)
    #: Layer -> the cache layers that it wrote to, and what its modules keep themselves.
    kept: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    operators: int = 0
    #: Whether a sum of products was written as an equation: over one token, torch multiplies and counts no product.
    einsum: bool = False


class Subject:
    """A model and what every pass over it needs to know, found once."""

    def __init__(self, tree: Tree, layer_of: Callable[[str], int | None], layer_names: Collection[str]) -> None:
        self.model = tree.model
        self.units = frozenset(find_units(tree.model, layer_names))
        #: Module path -> layer, or None for containers of several.
        self.layer_of = layer_of
        self.paths = {id(module): path for path, module in tree.modules.items()}
        self.parameters = {id(parameter): name for name, parameter in tree.parameters.items()}
        # A storage has no identity but its address, which lasts as long as the model does.
        self.trained = {each.untyped_storage()._cdata for each in tree.parameters.values()}  # noqa: SLF001
        self.weights = self.trained | {each.untyped_storage()._cdata for each in tree.buffers.values()}  # noqa: SLF001
        #: Children of `ModuleList`s: the module, its path, its place in the list and the list's length.
        self.children = [
            (child, f"{path}.{number}", number, len(module))
            for path, module in tree.modules.items()
            if isinstance(module, nn.ModuleList) and len(module) > 1
            for number, child in enumerate(module)
        ]
        #: Child's path, or what the child is -> a number that children of equal cost share.
        self.structures: dict[Any, int] = {}


_INDEX = torch.ops.aten.index.Tensor
_SCALAR = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 (the operator's name)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of one pass; see `workers.profiling.tracing.repeats.count`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: without torch's guard against it each operator costs a tenth less."""
        return False

    def __init__(self, subject: Subject) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self._subject = subject
        self._stack: list[str] = []
        #: The layer that runs, as the model's grouping numbers it, and as the order of their first runs does.
        self.layer = -1
        self._layer = -1
        self.live = 0
        self.high = 0
        self.kept_bytes = 0
        self._storages: dict[int, list[int]] = {}
        #: Called when a storage dies. (`weakref.finalize` does the same in thrice the time.)
        self._watched: dict[int, weakref.ref[Any]] = {}
        #: Storages of attention masks, and of what was made from them: what they let see, and their last sizes.
        self.masks: dict[int, tuple[Sight, tuple[int, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SCALAR and args[0].is_meta and args[0].dtype is torch.bool:
            return True  # only data could tell
        args = on_meta(args)
        out = func(*args, **kwargs)
        counts = self.counts
        counts.operators += 1
        rule: Any = flop_registry.get(func._overloadpacket)  # noqa: SLF001 (as FlopCounterMode does)
        if rule is not None:
            counts.flop[self.layer, self._stack[-1] if self._stack else ""] += int(rule(*args, **kwargs, out_val=out))
        weighted = False
        if self.masks:
            self._sees(args, out, rule is None)
        for value in args:
            if isinstance(value, Tensor):
                weighted |= self.reads(value)
            elif isinstance(value, (list, tuple)):
                for each in value:
                    if isinstance(each, Tensor):
                        weighted |= self.reads(each)
        if func is _INDEX and self._gathers(args, out):
            return out
        if isinstance(out, Tensor):
            self.makes(out, weighted)
        elif isinstance(out, (list, tuple)):
            for each in out:
                if isinstance(each, Tensor):
                    self.makes(each, weighted)
        return out

    def reads(self, tensor: Tensor) -> bool:
        """Note that the present layer reads `tensor`; whether weights had a part in it."""
        key = tensor.untyped_storage()._cdata  # noqa: SLF001
        if key in self._subject.weights:
            return key in self._subject.trained
        known = self._storages.get(key)
        if known is None or not known[3]:
            return False
        if known[1] < self._layer:
            known[1], known[2] = self._layer, 0
        known[2] = max(known[2], min(tensor.numel() * tensor.element_size(), known[4]))
        return True

    def masked(self, mask: Tensor, sight: Sight) -> None:
        """Note that `mask`, which the pass just made, lets see so much."""
        self.masks[mask.untyped_storage()._cdata] = sight, tuple(mask.shape[-2:])  # noqa: SLF001

    def _sees(self, args: tuple[Any, ...], out: Any, free: bool) -> None:
        """Note masks that an operator reads; what it makes of one, in the same sizes, is a mask as well (a bias)."""
        for value in args:
            known = self.masks.get(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None  # noqa: SLF001
            if known is not None:
                self.counts.sights[self.layer, self._stack[-1] if self._stack else ""] = known[0]
                if free and isinstance(out, Tensor) and out.shape[-2:] == known[1]:
                    self.masks[out.untyped_storage()._cdata] = known  # noqa: SLF001

    def makes(self, tensor: Tensor, weighted: bool) -> None:
        """Note that the present layer makes `tensor`, and whether weights had a part in it."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001
        known = self._storages.get(key)
        if known is not None:
            known[3] |= weighted
            return
        if key in self._subject.weights:
            return
        size = storage.nbytes()
        # [made by, last read by, bytes read, weighted, size, shared]
        self._storages[key] = [self._layer, self._layer, 0, weighted, size, False]
        self.live += size
        self.high = max(self.high, self.live)
        self._watched[key] = weakref.ref(storage, lambda _: self._frees(key))

    def _frees(self, key: int) -> None:
        self._watched.pop(key, None)
        known = self._storages.pop(key, None)
        self.masks.pop(key, None)
        if known is not None:
            self.live -= known[4]
            if known[3] and known[1] > known[0]:
                self.counts.flows.append([*known[:3], known[5]])

    def shares(self, tensor: Tensor) -> None:
        """Note that layers share `tensor` in a mapping (keys and values)."""
        known = self._storages.get(tensor.untyped_storage()._cdata)  # noqa: SLF001
        if known is not None:
            known[5] = True

    def _gathers(self, args: tuple[Any, ...], out: Tensor) -> bool:
        """Whether this copied expert weights for each token, as only `batched_mm` does: note, charge nothing."""
        name = self._subject.parameters.get(id(args[0]))
        if name is None or args[0].ndim < 2 or "expert" not in name:
            return False
        self.counts.gathered[name] = (out.shape[0], args[0].shape[0])
        return True

    def enters(self, module: nn.Module, _: Any) -> None:
        """Forward pre-hook."""
        path = self._subject.paths.get(id(module))
        if path is None:
            path = self._stack[-1] if self._stack else ""
        elif path in self._subject.units:
            self.counts.ran.setdefault(path)
        layer = self._subject.layer_of(path)
        if layer is not None and layer != self.layer:
            self._settle()
            if layer not in self.counts.order:
                self.counts.order.append(layer)
            # Layers are numbered by the order in which they first run, so that "later" is a comparison.
            self._layer = self.counts.order.index(layer)
            self.layer = layer
            self.high = self.live
        self._stack.append(path)

    def inside(self, module: nn.Module) -> bool:
        """Whether `module` is the innermost that runs."""
        return bool(self._stack) and self._stack[-1] == self._subject.paths.get(id(module))

    def leaves(self, *_: Any) -> None:
        """Forward hook."""
        self._stack.pop()

    def _settle(self) -> None:
        """Close the account of the layer that was running."""
        if self._layer >= 0:
            peaks = self.counts.peak_bytes
            peaks[self.layer] = max(peaks[self.layer], self.high - self.kept_bytes)

    def caches(self, cache_layer: Any, grown_bytes: int) -> None:
        """Note that the present layer wrote to the KV cache."""
        self.kept_bytes += grown_bytes
        kept = self.kept_here()
        if not any(each is cache_layer for each in kept):
            kept.append(cache_layer)

    def keeps(self, module: nn.Module, *_: Any) -> None:
        """Forward hook of models with a state: note what of this pass `module` keeps itself, and no cache does."""
        held = {
            name: each
            for name, each in module.__dict__.items()
            if isinstance(each, Tensor) and each.untyped_storage()._cdata in self._storages  # noqa: SLF001
        }
        if held:
            grown = sum(each.numel() * each.element_size() for each in held.values())
            self.caches(SimpleNamespace(recurrent_states=held), grown)

    def kept_here(self) -> list[Any]:
        """The cache layers that the present layer wrote to."""
        return self.counts.kept[self.layer]

    def finish(self, output: Any) -> Counts:
        """Close all accounts after the pass."""
        self._settle()
        for known in self._storages.values():
            if known[3] and known[1] > known[0]:
                self.counts.flows.append([*known[:3], known[5]])
        self._storages, self._watched = {}, {}
        made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        self.counts.output_bytes = sum(leaf.numel() * leaf.element_size() for leaf in made)
        return self.counts


def on_meta(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with real tensors (grids of image patches) made meta where they meet meta tensors."""
    real = [at for at, value in enumerate(args) if isinstance(value, Tensor) and not value.is_meta and value.ndim]
    if not real or not any(leaf.is_meta for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)):
        return args
    return tuple(value.to("meta") if at in real else value for at, value in enumerate(args))
