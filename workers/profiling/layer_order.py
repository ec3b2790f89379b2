"""Layers in the order in which they run: where names put a module into a layer that runs at another time, it moves.

A layer is had whole or not at all, and the chain runs each once: a final norm that is called `embedding_norm` (LFM2)
belongs to the head that runs after it, a projection of the embeddings (Gemma 3n) to the embeddings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from workers.profiling.layer_names import Group, Grouping, name_of


def in_running_order(grouping: Grouping, ran: Sequence[str], sizes: Mapping[str, int]) -> Grouping:
    """The grouping in which every layer runs at one time; `grouping` itself where that is so already.

    Args:
        grouping: By names.
        ran: Paths of the modules that a stage has whole or not at all, in the order in which a pass first ran them.
        sizes: Parameter name -> how many values it holds.
    """
    members = _members(grouping.of, set(ran))
    units = [unit for unit in ran if unit in members]
    # Numbered from 1, so that a layer that is new gets a number between those of its neighbours.
    layer_of: dict[str, float] = {
        unit: grouping.of[max(members[unit], key=lambda name: sizes[name])] + 1 for unit in units
    }
    groups: dict[float, Group] = dict(enumerate(grouping.groups, 1))
    while (torn := _torn(units, layer_of, groups)) is not None:
        before, block, after = torn
        beside = next((each for each in (before, after) if each and groups[each].number is None), 0.0)
        if not beside:
            beside = before + 0.5
            while beside in groups:
                beside = (before + beside) / 2
            groups[beside] = replace(groups[layer_of[block[0]]], name="", layer_type="norm")
        layer_of.update(dict.fromkeys(block, beside))
    old: dict[str, float] = {name: layer + 1 for name, layer in grouping.of.items()}
    new = old | {name: layer_of[unit] for unit in units for name in members[unit]}
    return grouping if new == old else _renamed(groups, new, sizes)


def idle_last(ran: Sequence[int], idle: Collection[int], count: int) -> list[int]:
    """Layers as they run, those that a pass does not run last.

    Args:
        ran: Layers in the order in which they ran.
        idle: Those that did not run.
        count: How many layers there are. Others are weights that no module runs: they stay behind what they follow
            by name.
    """
    order = list(ran)
    named = [at for at in range(count) if at not in idle]
    for before, at in zip([None, *named], named, strict=False):
        if at not in order:
            order.insert(0 if before is None else order.index(before) + 1, at)
    return order + sorted(idle)


def _members(names: Iterable[str], units: set[str]) -> dict[str, list[str]]:
    """Unit -> its parameters."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        path = name.rpartition(".")[0]
        while path and path not in units:
            path = path.rpartition(".")[0]
        if path:
            found[path].append(name)
    return found


def _torn(
    units: Sequence[str], layer_of: Mapping[str, float], groups: Mapping[float, Group]
) -> tuple[float, list[str], float] | None:
    """Units that run when the rest of their layer does not, and the layers before and after them (0: none there)."""
    blocks = [(layer, list(block)) for layer, block in groupby(units, key=lambda unit: layer_of[unit])]
    places: dict[float, list[int]] = defaultdict(list)
    for place, (layer, _) in enumerate(blocks):
        places[layer].append(place)
    for layer, its in places.items():
        if len(its) == 1 or groups[layer].number is not None:
            continue
        at = its[0] if groups[layer].layer_type == "head" else its[1]
        return (blocks[at - 1][0] if at else 0), blocks[at][1], (blocks[at + 1][0] if at + 1 < len(blocks) else 0)
    return None


def _renamed(groups: Mapping[float, Group], of: Mapping[str, float], sizes: Mapping[str, int]) -> Grouping:
    """The layers that have parameters left, named by what is in them."""
    members: dict[float, list[str]] = defaultdict(list)
    for name, layer in of.items():
        members[layer].append(name)
    stacks = sorted({group.stack for group in groups.values()})
    taken = {groups[layer].name for layer in members}
    kept: list[Group] = []
    place: dict[float, int] = {}
    for layer in sorted(members):
        group = groups[layer]
        if not any(name == group.name or name.startswith(f"{group.name}.") for name in members[layer]):
            taken.discard(group.name)
            group = replace(group, name=name_of(members[layer], stacks, sizes, taken))
            taken.add(group.name)
        place[layer] = len(kept)
        kept.append(group)
    return Grouping(groups=tuple(kept), of={name: place[layer] for name, layer in of.items()})
