"""Sorts tensor names into layers: finds the numbered stacks, and the layer of each name.

Works on any dotted names: a checkpoint's tensors (for the general rule) or a model's parameters (for a trace, which
then puts the layers in the order in which they ran).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: What a module outside the stacks does, by words in its path. The first pattern that matches wins.
_HEAD = re.compile(
    r"(^|[._])(lm_head|embed_out|score|classifier|qa_outputs|cls|pooler|predictions?|proj_out|output_projection"
    r"|logit_scale|logit_bias|visual_projection|text_projection|lm_scale|head|final_logits_bias|generator|sop_classifier"
    r"|seq_relationship|class_labels_classifier|bbox_predictor|vocab_projector|vocab_transform|vocab_layer_norm"
    r"|mask_predictions|qa_classifier|pre_classifier|dense_head)([._]|$)"
)
_PROJECTOR = re.compile(
    r"(projector|merger|connector|adapter|resampler|qformer|aligner|multi_modal|mm_proj|abstractor)"
)
_EMBEDDING = re.compile(
    r"(emb|wte|wpe|^shared|\.shared|patch|cls_token|class_token|position|pos_|^conv|\.conv\d|stem|tok_|feature_extractor"
    r"|mask_token|register_tokens|pre_layrnorm|pre_norm|ln_pre|layernorm_pre|embedding_hidden_mapping)"
)
_NORM = re.compile(r"(norm|ln_f|ln_post|layrnorm|\bln\b)")
_VISION = re.compile(r"(vision|visual|image|pixel|vit\b|patch)")
_AUDIO = re.compile(r"(audio|speech|wav|acoustic)")
#: Speculative extra layers that a forward pass does not run.
_EXTRA = re.compile(r"(^|\.)(mtp|nextn|eagle)(\.|_|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The names that form one layer."""

    #: Module path.
    name: str
    layer_type: str
    #: Number in its stack, or None outside the stacks.
    number: int | None = None
    #: Path of its stack ("model.layers"), or of the nearest one; "" where none is nearer than others.
    stack: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Layers in execution order and the layer of each name."""

    groups: tuple[Group, ...]
    #: name -> index into `groups`; names of speculative extra layers are left out.
    of: Mapping[str, int]

    @property
    def stacks(self) -> dict[str, int]:
        """Stack path -> how many layers it has."""
        counts: dict[str, int] = defaultdict(int)
        for group in self.groups:
            if group.number is not None:
                counts[group.stack] += 1
        return dict(counts)


def group_names(names: Mapping[str, int]) -> Grouping:
    """Group tensor or parameter names into layers.

    Args:
        names: name -> how many values it holds (the largest names a group outside the stacks).
    """
    kept = [name for name in names if not _EXTRA.search(name)]
    stacks = _find_stacks(kept)
    order = sorted(stacks, key=lambda stack: (_rank(stack), stacks[stack]))
    last = order[-1] if order else ""
    members: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in kept:
        members[_slot(name, order, last)].append(name)
    groups: list[Group] = []
    of: dict[str, int] = {}
    taken = {f"{stack}.{number}" for stack in stacks for slot in members if len(slot) == 3 for number in (slot[2],)}
    for slot in sorted(members):
        group = _group(slot, members[slot], order, names, taken)
        taken.add(group.name)
        of.update(dict.fromkeys(members[slot], len(groups)))
        groups.append(group)
    return Grouping(groups=tuple(groups), of=of)


def layer_type(stack: str) -> str:
    """What the layers of a stack are, by its path."""
    if _VISION.search(stack):
        return "vision"
    if _AUDIO.search(stack):
        return "audio"
    return "encoder" if "encoder" in stack and "decoder" not in stack else "decoder"


def _find_stacks(names: Iterable[str]) -> dict[str, int]:
    """The outermost numbered containers of modules, with the position at which each first appears."""
    stacks: dict[str, int] = {}
    for position, name in enumerate(names):
        parts = name.split(".")
        for at in range(1, len(parts) - 2):
            if parts[at].isdecimal():
                stacks.setdefault(".".join(parts[:at]), position)
                break
    return stacks


def _rank(stack: str) -> int:
    """Vision and audio towers run first, then encoders, then decoders."""
    kind = layer_type(stack)
    if kind in {"vision", "audio"}:
        return 0
    return 1 if kind == "encoder" else 3 if "decoder" in stack else 2


# Slots sort into execution order: (stack's place, 1, number) for a stack's layers, (place, 0) for what runs before
# them, (place, 2) for what runs after; the first stack's place is 0, and (-1,) and (n,) hold what is nearest to none.
def _slot(name: str, order: Sequence[str], last: str) -> tuple[int, ...]:
    for rank, stack in enumerate(order):
        if name.startswith(f"{stack}."):
            number = name[len(stack) + 1 :].partition(".")[0]
            if number.isdecimal() and len(number) < 7:
                return (rank, 1, int(number))
    place = _nearest(name, order)
    module = name.rpartition(".")[0] or name
    final = len(order)
    if _PROJECTOR.search(module):
        return (final - 1, -1) if place is None and final > 1 else (place or 0, 2) if final else (final, 0)
    if _HEAD.search(module):
        return (final, 0) if place is None or order[place] == last else (place, 2)
    if _EMBEDDING.search(name):
        return (0, 0) if place is None else (place, 0)
    if place is None or order[place] == last:
        return (final, 0)
    return (place, 2)


def _nearest(name: str, order: Sequence[str]) -> int | None:
    """The place of the stack that shares the longest path with `name`; None where several do, or none."""
    if len(order) == 1:
        return 0
    parts = name.split(".")
    lengths = []
    for stack in order:
        length = 0
        for mine, its in zip(parts, stack.split("."), strict=False):
            if mine != its:
                break
            length += 1
        lengths.append(length)
    best = max(lengths, default=0)
    return lengths.index(best) if best and lengths.count(best) == 1 else None


def _group(
    slot: tuple[int, ...], members: list[str], order: Sequence[str], sizes: Mapping[str, int], taken: set[str]
) -> Group:
    place = min(max(slot[0], 0), len(order) - 1)
    stack = order[place] if order else ""
    if len(slot) == 3:
        return Group(name=f"{stack}.{slot[2]}", layer_type=layer_type(stack), number=slot[2], stack=stack)
    if slot[0] == len(order):
        kind = "head"
    elif slot[1] == 0:
        kind = "embedding"
    else:
        kind = "projector" if any(_PROJECTOR.search(name) for name in members) else "norm"
    return Group(name=name_of(members, order, sizes, taken), layer_type=kind, stack=stack)


def name_of(members: list[str], order: Sequence[str], sizes: Mapping[str, int], taken: set[str]) -> str:
    """The path that all members share, or that of the largest; never one that holds a stack or ends in a number."""
    paths = [_path(name) for name in members]
    shared = _common(paths)
    largest = _path(max(sorted(members), key=lambda name: (sizes[name], -name.count("."))))
    for path in (shared, largest, *sorted(paths), *sorted(members)):
        if path and path not in taken and not any(f"{stack}.".startswith(f"{path}.") for stack in order):
            return path
    return f"{largest}.rest" if largest else "rest"


def _path(name: str) -> str:
    parts = name.split(".")
    parts = parts[:-1] or parts
    while len(parts) > 1 and parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts)


def _common(paths: list[str]) -> str:
    first, last = min(paths).split("."), max(paths).split(".")
    shared = []
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)
