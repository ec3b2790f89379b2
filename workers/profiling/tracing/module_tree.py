"""A model's modules, parameters and buffers by name, collected once for all that ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.profiling.layer_names import Grouping


@dataclass(frozen=True, slots=True)
class Tree:
    """What a model consists of, in the order of its own walk."""

    model: PreTrainedModel
    #: Path -> module; a module that is in several places by its first path only.
    modules: dict[str, nn.Module]
    #: Name -> parameter, under every name that it has.
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]


def look_through(model: PreTrainedModel) -> Tree:
    """Walk `model`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Tree(model, dict(model.named_modules()), parameters, dict(model.named_buffers(remove_duplicate=False)))


def find_units(model: nn.Module, layer_names: Collection[str]) -> tuple[str, ...]:
    """Paths of the model's units: what a stage has whole or not at all, the same on every node of a plan.

    Args:
        model: The whole model, with or without weights.
        layer_names: All layers of the plan: a module that holds one of them inside is divided further.
    """
    inner = {".".join(name.split(".")[:end]) for name in layer_names for end in range(1, name.count(".") + 1)}

    def below(path: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            if next(child.parameters(), None) is None:
                continue
            if isinstance(module, nn.ModuleList) or not (
                here in inner or any(isinstance(part, nn.ModuleList) for part in child.modules())
            ):
                yield here
            else:
                yield from below(here, child)

    return tuple(below("", model))


def layers_of_modules(tree: Tree, grouping: Grouping) -> Callable[[str], int | None]:
    """Module path -> layer: below a numbered layer, that one; else the one that all its parameters are of."""
    owners: dict[str, set[int]] = defaultdict(set)
    for name, layer in grouping.of.items():
        path = name.rpartition(".")[0]
        while path and layer not in owners[path]:  # else all above has it too
            owners[path].add(layer)
            path = path.rpartition(".")[0]
    found: dict[str, int | None] = {}
    for path in tree.modules:  # what is above comes first
        layers = owners.get(path, ())
        found[path] = next(iter(layers)) if len(layers) == 1 else found.get(path.rpartition(".")[0])
    return found.get


def modules_of_layers(
    tree: Tree, grouping: Grouping, layer_of: Callable[[str], int | None]
) -> dict[int, tuple[str, ...]]:
    """The modules that hold each layer's weights; where one lies below another, the deeper says more.

    Args:
        tree: The model.
        grouping: Its layers.
        layer_of: As `layers_of_modules` gives it.
    """
    layers = {name: grouping.of[name] for name in tree.parameters if name in grouping.of}
    for name in tree.buffers:
        path, _, leaf = name.rpartition(".")
        module, at = tree.modules.get(path), layer_of(path)
        if module is not None and leaf not in module._non_persistent_buffers_set:  # noqa: SLF001
            # A buffer of the model itself (a bias of the logits) goes with what comes last.
            layers[name] = len(grouping.groups) - 1 if at is None else at
    found: dict[int, dict[str, None]] = {at: {} for at in range(len(grouping.groups))}
    owner: dict[str, int] = {}
    for name, at in layers.items():
        group = grouping.groups[at]
        path = group.name if name.startswith(f"{group.name}.") else name.rpartition(".")[0]
        found[at].setdefault(path if owner.setdefault(path, at) == at else name)
    return {at: tuple(paths) for at, paths in found.items()}


def idle_layers(
    tree: Tree,
    grouping: Grouping,
    layer_of: Callable[[str], int | None],
    units: Collection[str],
    ran: Collection[str],
) -> set[int]:
    """Layers that a pass did not run although they have modules that could run, with weights of their own.

    Args:
        tree: The model.
        grouping: Its layers.
        layer_of: As `layers_of_modules` gives it.
        units: As `find_units` gives them.
        ran: Those of them that the pass ran.
    """
    running = {layer_of(unit) for unit in ran}
    theirs = {id(tree.parameters[name]) for name, at in grouping.of.items() if at in running}
    own = {at for name, at in grouping.of.items() if id(tree.parameters[name]) not in theirs}
    return {at for unit in units if (at := layer_of(unit)) is not None and at in own - running}
