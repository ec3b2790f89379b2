"""A model's modules, parameters and buffers by name, collected once: walking 32 layers takes a millisecond."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Tree:
    """What a model consists of, in the order of its own walk."""

    model: PreTrainedModel
    #: Path -> module; a module that is in several places by its first path only.
    modules: dict[str, nn.Module] = field(default_factory=dict)
    #: Name -> parameter, under every name that it has.
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def look_through(model: PreTrainedModel) -> Tree:
    """Walk `model`."""
    tree = Tree(model)
    _visit(model, "", tree, set())
    return tree


def _visit(module: nn.Module, path: str, tree: Tree, seen: set[int]) -> None:
    prefix = f"{path}." if path else ""
    if id(module) not in seen:
        seen.add(id(module))
        tree.modules[path] = module
    for name, parameter in module._parameters.items():  # noqa: SLF001 (what the public walks read, too)
        if parameter is not None:
            tree.parameters[prefix + name] = parameter
    for name, buffer in module._buffers.items():  # noqa: SLF001
        if buffer is not None:
            tree.buffers[prefix + name] = buffer
    for name, child in module._modules.items():  # noqa: SLF001
        if child is not None:
            _visit(child, prefix + name, tree, seen)
