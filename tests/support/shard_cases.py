"""Profiles and plans for tests of shards, made from headers alone, and a look at tensors by the real safetensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.plan import Megaphone, Plan, Prediction
from planner.profile import Layer, ModelProfile, Tensor
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.headers import read_headers

_NUMBERED = re.compile(r"(.*?\.\d+)\.")


def layer_of(tensor: str) -> str:
    """The layer that a tensor's name belongs to: up to the first number, else all but its last part."""
    found = _NUMBERED.match(f"{tensor}.")
    return found[1] if found else tensor.rpartition(".")[0]


def profile_of(checkpoint: Checkpoint, *, unused: Sequence[str] = (), tied: str | None = None) -> ModelProfile:
    """A profile whose layers are what `layer_of` says.

    Args:
        checkpoint: Whose headers to read.
        unused: Tensors that no layer uses.
        tied: A layer `lm_head` without tensors, tied to the layer of this name.
    """
    grouped: dict[str, list[Tensor]] = {}
    for tensor in read_headers(checkpoint).tensors:
        grouped.setdefault("unused" if tensor.name in unused else layer_of(tensor.name), []).append(tensor)
    last = grouped.pop("unused", None)
    layers = [
        Layer(
            name=name,
            index=index,
            layer_type="decoder",
            weight_bytes=sum(t.size_bytes for t in tensors),
            compute_required=1.0,
            tensors=tuple(tensors),
        )
        for index, (name, tensors) in enumerate(grouped.items())
    ]
    if tied is not None:
        size = next(layer.weight_bytes for layer in layers if layer.name == tied)
        layers.append(Layer(name="lm_head", index=len(layers), layer_type="head", tied_to=tied, tied_bytes=size))
    if last:
        layers.append(Layer(name="unused", index=len(layers), layer_type="unused", tensors=tuple(last)))
    return ModelProfile(model_name=checkpoint.model_name, revision=checkpoint.revision, layers=tuple(layers))


def plan_of(profile: ModelProfile, allocation: Mapping[str, Sequence[str]], *, plan_id: str = "plan") -> Plan:
    """A plan of just this allocation."""
    return Plan(
        plan_id=plan_id,
        model_name=profile.model_name,
        revision=profile.revision,
        model_type=None,
        unit="layer",
        strategy="greedy",
        objective="throughput",
        phase="prefill",
        batch_size=1,
        sequence_length=8,
        time_budget_s=1.0,
        total_compute=profile.total_compute,
        total_layers=len(profile.layers),
        allocation={node: tuple(names) for node, names in allocation.items()},
        stages=(),
        predicted=Prediction(bottleneck_s=1, latency_s=1, lower_bound_s=1, gap=0, exact=True),
        nodes=(),
        megaphone=Megaphone(start_node=next(iter(allocation)), chain=()),
    )


def dealt(profile: ModelProfile, nodes: Sequence[str], *, plan_id: str = "plan") -> Plan:
    """A plan that deals the layers (but not what is unused) to `nodes` in contiguous parts."""
    names = [layer.name for layer in profile.layers if layer.layer_type != "unused"]
    size = -(-len(names) // len(nodes))
    parts = {node: names[i * size : (i + 1) * size] for i, node in enumerate(nodes)}
    return plan_of(profile, {node: part for node, part in parts.items() if part}, plan_id=plan_id)


def raw_tensors(*folders: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor in folders, read by the real safetensors' Rust code."""
    from safetensors import deserialize

    read: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = deserialize

    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            for name, info in read(path.read_bytes()):
                value = (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
                assert found.setdefault(name, value) == value, f"{name} differs between shards"
    return found
