"""A model's modules, parameters and buffers by name, collected once for all that ask."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel


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
