"""What one stage hands to the next: the request's inputs and the tensors that are still needed.

It travels as safetensors, which can hold no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from planner.errors import InvalidInput

_INPUT, _VALUE, _HEADER = "input/", "value/", "fairshard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """A pass through the model that is partly done."""

    #: The model's own inputs (`input_ids`, `attention_mask`, ...): masks and positions are made from them everywhere.
    #: One within a mapping is named `<input>/<key>`.
    inputs: Mapping[str, Tensor]
    #: Results that layers not yet run need, by `<module path>#<call>:<part>`.
    values: Mapping[str, Tensor] = field(default_factory=dict)
    #: Plan and revision that the values belong to; None before the first stage.
    plan_id: str | None = None
    revision: str | None = None
    #: Path of the module that has to run next; None before the first stage.
    next_module: str | None = None
    #: The forward's other arguments (`use_cache`, `logits_to_keep`, ...), as JSON has them.
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: Which pass of its session this is, from 0; None for a pass without a session.
    number: int | None = None
    #: Inputs that begin as in the session's pass before -> how many columns (of the last axis) are not sent again.
    kept: Mapping[str, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The handoff as safetensors; tensors that share their data are sent once."""
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        orders: dict[str, list[int]] = {}
        seen: dict[tuple[object, ...], str] = {}
        named = {_INPUT + name: value for name, value in self.inputs.items()}
        for name, value in sorted((named | {_VALUE + name: value for name, value in self.values.items()}).items()):
            place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
            if value.numel() and place in seen:
                aliases[name] = seen[place]
                continue
            seen[place] = name
            # In the order of memory, which is restored: a GPU's kernels round differently where it is another.
            orders[name] = list(value.dim_order())
            # A copy where need be: safetensors takes neither views of one storage nor holes.
            tensors[name] = value.detach().permute(orders[name]).contiguous().clone()
        head = {
            "plan_id": self.plan_id,
            "revision": self.revision,
            "next_module": self.next_module,
            "settings": dict(self.settings),
            "number": self.number,
            "kept": dict(self.kept),
            "aliases": aliases,
            "orders": {name: order for name, order in orders.items() if order != sorted(order)},
        }
        return save(tensors, metadata={_HEADER: json.dumps(head)})

    @classmethod
    def from_bytes(cls, data: bytes, *, device: torch.device | str = "cpu") -> Handoff:
        """Read what `to_bytes` gave.

        Raises:
            InvalidInput: If it is anything else.
        """
        try:
            length = int.from_bytes(data[:8], "little")
            head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEADER])
            tensors = {name: tensor.to(device) for name, tensor in load(data).items()}
            for name, order in head["orders"].items():
                tensors[name] = tensors[name].permute([order.index(axis) for axis in range(len(order))])
            tensors |= {name: tensors[other] for name, other in head["aliases"].items()}
            plan_id, revision, next_module = (_text(head[key]) for key in ("plan_id", "revision", "next_module"))
            settings, kept = dict(head["settings"]), {name: _count(count) for name, count in head["kept"].items()}
            number = None if head["number"] is None else _count(head["number"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InvalidInput(f"not a handoff between stages: {error!r:.200}") from error
        return cls(
            inputs={name.removeprefix(_INPUT): t for name, t in tensors.items() if name.startswith(_INPUT)},
            values={name.removeprefix(_VALUE): t for name, t in tensors.items() if name.startswith(_VALUE)},
            plan_id=plan_id,
            revision=revision,
            next_module=next_module,
            settings=settings,
            number=number,
            kept=kept,
        )


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def whole_arguments(inputs: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The forward's arguments: settings, and inputs in their places, also within mappings."""
    arguments = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
    for name, value in inputs.items():
        outer, _, key = name.partition("/")
        if key:
            arguments.setdefault(outer, {})[key] = value
        else:
            arguments[name] = value
    return arguments
