"""Maps a checkpoint's tensor names to the model's parameters, by transformers' own conversion tables.

`get_model_conversion_mapping` and `rename_source_key` are semi-private: the tests save a checkpoint of every family
and compare, so that a change there is seen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from planner.errors import InvalidCheckpoint
from workers.profiling.layer_names import Grouping
from workers.profiling.tracing.module_tree import Tree

#: A name's pieces between the dots; None for a number.
_Template = tuple[str | None, ...]
#: Stands for numbers while a template is renamed; no model has so many layers.
_FIRST_MARK = 810_001


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs."""

    #: Layer of the grouping, or -1.
    layer: int
    #: Parameter of the module tree that it becomes (part of), or None.
    parameter: str | None
    #: Whether it becomes that parameter just as it is.
    alone: bool


class Renamer:
    """Renames tensor names as transformers would when it loads them into `model`."""

    def __init__(self, model: PreTrainedModel, known: Container[str]) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = known
        self._templates: dict[_Template, tuple[str, bool] | None] = {}

    def __call__(self, name: str) -> tuple[str, bool]:
        """The name in the module tree, and whether a conversion (fusing, splitting, ...) makes it.

        92,000 names follow a few dozen patterns: each pattern is renamed once, with marks for its numbers.
        """
        pieces = name.split(".")
        numbers = [piece for piece in pieces if piece.isdecimal()]
        template = tuple([None if piece.isdecimal() else piece for piece in pieces])
        if template not in self._templates:
            self._templates[template] = self._learn(name, template, numbers)
        known = self._templates[template]
        renamed, converted = self._rename(name) if known is None else (_filled(known[0], numbers), known[1])
        renamed = self._with_prefix(renamed)
        if renamed not in self._known and name in self._known:
            # As transformers' loader: an old name's renaming hit a name that is right already.
            return self._with_prefix(name), False
        return renamed, converted

    def _learn(self, name: str, template: _Template, numbers: list[str]) -> tuple[str, bool] | None:
        """The renamed template with marks for numbers, or None if the numbers themselves matter."""
        marks = iter(range(_FIRST_MARK, _FIRST_MARK + len(numbers)))
        marked, converted = self._rename(".".join([str(next(marks)) if each is None else each for each in template]))
        if (_filled(marked, numbers), converted) != self._rename(name):
            return None
        return marked, converted

    def _rename(self, name: str) -> tuple[str, bool]:
        renamed, pattern = rename_source_key(name, self._renamings, self._converters)
        return renamed, pattern is not None

    def _with_prefix(self, name: str) -> str:
        """Add or strip the base model's prefix, as `rename_source_key` does."""
        prefix = self._prefix
        if not prefix:
            return name
        if name.startswith(prefix):
            stripped = name.removeprefix(prefix)[1:]
            if stripped in self._known:
                return stripped
        return f"{prefix}.{name}" if f"{prefix}.{name}" in self._known else name


def _filled(marked: str, numbers: list[str]) -> str:
    for at, number in enumerate(numbers):
        marked = marked.replace(str(_FIRST_MARK + at), number)
    return marked


def place_tensors(
    tree: Tree,
    names: Iterable[str],
    grouping: Grouping,
    layer_of: Callable[[str], int | None],
    rename: Renamer,
) -> dict[str, Place]:
    """Find each tensor's layer and parameter.

    A tensor that becomes no parameter belongs to the layer whose module its name is below (a buffer), else to none.
    """
    prefix = tree.model.base_model_prefix
    places: dict[str, Place] = {}
    for name in names:
        target, converted = rename(name)
        layer = grouping.of.get(target)
        if layer is not None:
            places[name] = Place(layer, target, not converted)
            continue
        found = None
        for name_there in (target, f"{prefix}.{target}"):
            path = name_there.rpartition(".")[0]
            while path and path not in tree.modules:
                path = path.rpartition(".")[0]
            found = layer_of(path) if path and found is None else found
        if found is None and target in tree.buffers:
            # A buffer of the model itself (a bias of the logits) goes with what comes last.
            found = len(grouping.groups) - 1
        places[name] = Place(-1 if found is None else found, None, alone=False)
    return places


def check_sizes(parameters: Mapping[str, Any], tensors: Mapping[str, int], places: Mapping[str, Place]) -> None:
    """Check that tensors hold as many values as the parameters that they become.

    Raises:
        InvalidCheckpoint: If one does not; the message says which.
    """
    for name, place in places.items():
        if place.parameter is None or not place.alone or not tensors[name]:
            continue
        wanted = parameters[place.parameter].numel()
        if tensors[name] != wanted:
            raise InvalidCheckpoint(
                f"tensor {name} holds {tensors[name]:,} values, but config.json makes "
                f"{place.parameter} {tuple(parameters[place.parameter].shape)}, {wanted:,} values",
                details={"tensor": name, "values": tensors[name], "config_values": wanted},
            )


def check_stacks(
    tree: Tree,
    names: Iterable[str],
    places: Mapping[str, Place],
    grouping: Grouping,
    rename: Renamer,
) -> None:
    """Check that every numbered layer of the model has tensors, and that the checkpoint has no further ones.

    Raises:
        InvalidCheckpoint: If they differ, unless the model's class expects the surplus (multi-token prediction).
    """
    # A layer all of whose weights are tied has none of its own to be stored.
    stored = {id(tree.parameters[place.parameter]) for place in places.values() if place.parameter is not None}
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
        if places[name].layer >= 0 or any(pattern.search(name) for pattern in expected):
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
