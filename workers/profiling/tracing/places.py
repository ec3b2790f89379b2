"""What each stored tensor is to the model, and which of the model's tensors nobody stored.

One rule for every quantisation. A tensor that has a parameter's name and size is that parameter. What else is stored
for a module's parameter is its packed form: it counts as many parameters as the module has, whatever the packing. Of
several such tensors the largest is the packed form; the others (scales, zero points, codebooks) lie beside it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod

from torch import nn

from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.profiling.layer_names import Grouping
from workers.profiling.tracing.module_tree import Tree
from workers.profiling.tracing.names import Renamer, Template, joined, split

_PLAIN = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}
#: The fewest bits that a packed parameter takes: sparse and vector quantisations go below one.
_LEAST_BITS = 0.25
#: Elements of a packed form over those of its parameter, at most: an element holds a value or more, but kernels pad.
_PADDED = 1.5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs."""

    #: Layer of the grouping, or -1.
    layer: int
    #: Parameter of the module tree that it becomes, is a part of or lies beside; None: none.
    parameter: str | None = None
    #: Parameters that it holds; 0 for buffers and what lies beside.
    values: int = 0
    #: Whether it lies beside a parameter's packed form.
    beside: bool = False


@dataclass(slots=True)
class _Source:
    """What is stored under one name of an unquantised checkpoint."""

    name: str
    #: The pattern of the conversion that makes the parameter of it and others; None: it becomes it as it is.
    pattern: str | None
    exact: Tensor | None = None
    near: list[Tensor] = field(default_factory=list)

    @property
    def stored(self) -> list[Tensor]:
        """Its tensors."""
        return self.near if self.exact is None else [self.exact, *self.near]

    @property
    def plain(self) -> bool:
        """Whether it is stored unpacked, as far as its dtypes tell."""
        return self.exact is not None and self.exact.dtype in _PLAIN

    def packed_form(self, count: int) -> Tensor | None:
        """The tensor that packs `count` values: what has the parameter's name, else the largest that can; or None."""
        integers = any(each.dtype not in _PLAIN for each in self.stored)
        # A codebook may be larger than a small layer's codes, and is floating.
        by_size = sorted(self.near, key=lambda each: (-each.size_bytes * (1 + (each.dtype not in _PLAIN)), each.name))
        for each in [self.exact] if self.exact else by_size:
            elements = prod(each.shape)
            enough = each.size_bytes * 8 >= count * _LEAST_BITS
            if elements == count or (integers and elements <= count * _PADDED and enough):
                return each
        return None


class Places:
    """The places of a checkpoint's tensors in a model.

    Raises:
        InvalidCheckpoint: If a tensor does not fit the config's model.
    """

    def __init__(
        self,
        tree: Tree,
        tensors: Mapping[str, Tensor],
        grouping: Grouping,
        layer_of: Callable[[str], int | None],
        rename: Renamer,
    ) -> None:
        self._tree, self._grouping, self._layer_of, self._rename = tree, grouping, layer_of, rename
        #: By the tensors' names, in their order.
        self.of: dict[str, Place] = dict.fromkeys(tensors, Place(-1))
        #: Parameter -> what it is made of, by the name that an unquantised checkpoint has.
        self._sources: dict[str, dict[str, _Source]] = defaultdict(dict)
        #: Parameters and buffers that the checkpoint fills.
        self.filled: set[str] = set()
        self._absentees: list[str] = []
        self._gather(tensors)
        for target, sources in self._sources.items():
            self._fill(target, sources)

    def _gather(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            target, pattern = self._rename(name)
            if target in self._grouping.of:
                source = self._sources[target].setdefault(name, _Source(name, pattern))
                source.exact = tensor
                continue
            if target in self._tree.buffers:
                self.filled.add(target)
            elif (owner := self._owner(name)) is not None:
                parameter, logical, pattern = owner
                self._sources[parameter].setdefault(logical, _Source(logical, pattern)).near.append(tensor)
                continue
            self.of[name] = Place(self._buffers_layer(target))

    def _owner(self, name: str) -> tuple[str, str, str | None] | None:
        """The parameter that a tensor is stored for, the name that it has unquantised, and its conversion.

        That is the longest beginning of the tensor's name that names one (`X.weight_scale`, `X_blocks`), or the
        weight of the module that it lies in (`X.qweight`).
        """
        path, _, last = name.rpartition(".")
        pieces = last.split("_")
        tried = [f"{path}.{'_'.join(pieces[:count])}" for count in range(len(pieces) - 1, 0, -1) if path]
        while path:
            tried += [path, f"{path}.weight"]
            if path in self._tree.modules:
                break
            path = path.rpartition(".")[0]
        for logical in tried:
            found, pattern = self._rename(logical)
            if found in self._grouping.of and logical != name:
                return found, logical, pattern
        return None

    def _buffers_layer(self, target: str) -> int:
        """The layer of what becomes no parameter: that whose module its name is below, else none."""
        found = None
        for name in (target, f"{self._tree.model.base_model_prefix}.{target}"):
            path = name.rpartition(".")[0]
            while path and path not in self._tree.modules:
                path = path.rpartition(".")[0]
            found = self._layer_of(path) if path and found is None else found
        if found is None and target in self._tree.buffers:
            # A buffer of the model itself (a bias of the logits) goes with what comes last.
            found = len(self._grouping.groups) - 1
        return -1 if found is None else found

    def _fill(self, target: str, sources: Mapping[str, _Source]) -> None:
        """Place what a parameter is made of."""
        converted = [source for source in sources.values() if source.pattern is not None]
        for source in sources.values():
            if source.pattern is None:
                self._alone(target, source)
        if not converted:
            return
        made = self._made(target, converted[0].pattern)
        self.filled.update(made)
        whole = sum(self._tree.parameters[each].numel() for each in made)
        values = {s.name: prod(s.exact.shape) for s in converted if s.exact is not None and s.plain}
        packed = [source for source in converted if source.name not in values]
        complete = not packed and sum(values.values()) >= whole
        absent = [] if complete else self._absent(target, converted)
        self._absentees += absent
        if packed:
            left = whole * len(converted) // (len(converted) + len(absent)) - sum(values.values())
            forms = [source.packed_form(left // len(packed)) or source.exact or source.near[0] for source in packed]
            ends = [left * end // max(1, size) for size in (sum(each.size_bytes for each in forms),)
                    for end in accumulate(each.size_bytes for each in forms)]  # fmt: skip
            for source, form, begin, end in zip(packed, forms, [0, *ends], ends, strict=False):
                self._place(target, source, form, max(0, end - begin))
        elif not complete and not absent:
            self._absentees.append(target)
        for name, count in values.items():
            self._place(target, sources[name], sources[name].exact, count)

    def _alone(self, target: str, source: _Source) -> None:
        """Place what becomes one parameter as it is: that, its packed form, or neither."""
        exact, count = source.exact, self._tree.parameters[target].numel()
        if exact is not None and prod(exact.shape) in {0, count}:
            self._place(target, source, exact, prod(exact.shape))
            return
        form = source.packed_form(count) if count else None
        if form is None and exact is not None:
            shape = tuple(self._tree.parameters[target].shape)
            raise InvalidCheckpoint(
                f"tensor {exact.name} holds {prod(exact.shape):,} values, but config.json makes "
                f"{target} {shape}, {count:,} values",
                details={"tensor": exact.name, "values": prod(exact.shape), "config_values": count},
            )
        self._place(target, source, form, count)

    def _place(self, target: str, source: _Source, form: Tensor | None, values: int) -> None:
        layer = self._grouping.of[target]
        for tensor in source.near if form is source.exact else source.stored:
            self.of[tensor.name] = Place(layer, target, beside=True)
        if form is not None:
            self.of[form.name] = Place(layer, target, values)
            self.filled.add(target)

    def _made(self, target: str, pattern: str | None) -> list[str]:
        """The parameters that one conversion makes."""
        return [name for name in self._rename.made(target, pattern) if name in self._tree.parameters]

    def by_parameter(self) -> Mapping[str, list[str]]:
        """Parameter -> the tensors that are stored for it."""
        stored: dict[str, list[str]] = defaultdict(list)
        for name, place in self.of.items():
            if place.parameter is not None:
                stored[place.parameter].append(name)
        return stored

    def missing(self) -> tuple[str, ...]:
        """What transformers' loader would call missing: it is in no file, tied to nothing, and not ignored."""
        tree = self._tree
        tied: dict[int, list[str]] = defaultdict(list)
        for name, each in tree.parameters.items():
            tied[id(each)].append(name)
        there = {name for names in tied.values() if not self.filled.isdisjoint(names) for name in names} | self.filled
        patterns = [re.compile(each) for each in tree.model._keys_to_ignore_on_load_missing or ()]  # noqa: SLF001
        wanted = [*tree.parameters, *_persistent(tree.modules)]
        lacking = [n for n in wanted if n not in there and not any(each.search(n) for each in patterns)]
        return tuple(sorted({*lacking, *self._absentees}))

    @cached_property
    def _kinds(self) -> Mapping[Template, set[Template]]:
        """Template of a parameter -> those of the names that it is converted from, anywhere in the model."""
        kinds: dict[Template, set[Template]] = defaultdict(set)
        for target, sources in self._sources.items():
            kinds[split(target)[0]].update(split(s.name)[0] for s in sources.values() if s.pattern is not None)
        return kinds

    def _absent(self, target: str, sources: Sequence[_Source]) -> list[str]:
        """Names that an unquantised checkpoint has for the same parameter beside those that are there."""
        numbers = [split(source.name)[1] for source in sources]
        some = numbers[0]
        if len({len(each) for each in numbers}) > 1:
            return []
        varying = [at for at in range(len(some)) if len({each[at] for each in numbers}) > 1]
        if len(some) > len(split(target)[1]) and not varying:
            varying = [len(some) - 1]
        wanted = [some]
        if varying:
            # One of each number: experts that are stored one by one and run as one parameter.
            experts = self._tree.parameters[target].shape[0]
            if len(varying) > 1 or max(int(each[varying[0]]) for each in numbers) >= experts:
                return []
            wanted = [[*some[: varying[0]], str(n), *some[varying[0] + 1 :]] for n in range(experts)]
        there = {source.name for source in sources}
        kinds = [kind for kind in self._kinds[split(target)[0]] if kind.count(None) == len(some)]
        return [name for kind in kinds for each in wanted if (name := joined(kind, each)) not in there]


def check_stacks(tree: Tree, names: Iterable[str], places: Places, grouping: Grouping, rename: Renamer) -> None:
    """Check that every numbered layer of the model has tensors, and that the checkpoint has no further ones.

    Raises:
        InvalidCheckpoint: If they differ, unless the model's class expects the surplus (multi-token prediction).
    """
    # A layer all of whose weights are tied has none of its own to be stored.
    stored = {id(tree.parameters[name]) for name in places.filled if name in tree.parameters}
    filled = {
        grouping.of[name] for name, each in tree.parameters.items() if name in grouping.of and id(each) in stored
    }
    missing = [group for at, group in enumerate(grouping.groups) if group.number is not None and at not in filled]
    if missing:
        depth = grouping.stacks[missing[0].stack]
        raise InvalidCheckpoint(
            f"config.json makes {depth} layers {missing[0].stack}.*, but the checkpoint has no tensor for "
            f"{len(missing)} of them: {', '.join(group.name for group in missing[:5])}",
            details={"stack": missing[0].stack, "config_layers": depth, "missing": [g.name for g in missing[:20]]},
        )
    expected = [re.compile(pattern) for pattern in tree.model._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001
    extra = getattr(tree.model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0
    surplus: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if places.of[name].layer >= 0 or any(pattern.search(name) for pattern in expected):
            continue
        target = rename(name)[0]
        for stack, depth in grouping.stacks.items():
            number = target[len(stack) + 1 :].partition(".")[0] if target.startswith(f"{stack}.") else ""
            if number.isdecimal() and int(number) >= depth + extra:
                surplus[stack].add(int(number))
    if surplus:
        stack, numbers = min(surplus.items())
        depth = grouping.stacks[stack]
        raise InvalidCheckpoint(
            f"the checkpoint has {stack}.{min(numbers)}, but config.json makes only {depth} layers there "
            f"({len(numbers)} too many)",
            details={"stack": stack, "config_layers": depth, "surplus": sorted(numbers)[:20]},
        )


def _persistent(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the buffers that checkpoints hold."""
    for path, module in modules.items():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None and name not in module._non_persistent_buffers_set:  # noqa: SLF001
                yield f"{path}.{name}" if path else name
