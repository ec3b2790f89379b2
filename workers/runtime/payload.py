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
from safetensors.torch import load
from torch import Tensor

from planner.errors import InvalidInput

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
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
            orders[name] = list(range(value.ndim)) if value.is_contiguous() else list(value.dim_order())
            # A copy where need be: safetensors has no holes.
            tensors[name] = value.detach().permute(orders[name]).contiguous()
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
        return _safetensors(tensors, {_HEADER: json.dumps(head)})

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


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """As `safetensors.torch.save` would have it, at a fifth of its time for a token's few small tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[Any] = []
    end = 0
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).cpu().numpy().data
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + data.nbytes],
        }
        parts.append(data)
        end += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


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
