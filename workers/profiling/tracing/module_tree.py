"""A model's modules, parameters and buffers by name, collected once for all that ask."""

from __future__ import annotations

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
