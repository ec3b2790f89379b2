"""Other planners on the same instances: what they would give, as the node of each layer (None: they refuse)."""

from __future__ import annotations

from typing import Any

from benchmarks.planner_cases import Case
from planner.cost import layer_flop, layer_memory_bytes

Nodes = list[int] | None


def seed_rule(case: Case, *, budget_s: float = 1.0) -> Nodes:
    """Layers by FLOP, most first, each to the node with most FLOP left of `budget_s`; memory is not looked at."""
    left = [node.available_flop_per_s * budget_s for node in case.cluster.nodes]
    flop = [layer_flop(layer, case.model) for layer in case.model.layers]
    nodes = [0] * len(flop)
    for at in sorted(range(len(flop)), key=lambda at: -flop[at]):
        best = max(range(len(left)), key=lambda node: left[node])
        if left[best] < flop[at]:
            return None
        nodes[at] = best
        left[best] -= flop[at]
    return nodes


def largest_remainder_by_memory(case: Case) -> Nodes:
    """Contiguous, layers in proportion to memory (exo's ring): floors first, the rest to the largest remainders."""
    memory = [node.memory_bytes for node in case.cluster.nodes]
    layers = len(case.model.layers)
    exact = [layers * size / sum(memory) for size in memory]
    counts = [int(part) for part in exact]
    order = sorted(range(len(memory)), key=lambda node: counts[node] - exact[node])
    for node in order[: layers - sum(counts)]:
        counts[node] += 1
    by_size = sorted(range(len(memory)), key=lambda node: -memory[node])
    return [node for node in by_size for _ in range(counts[node])]


def accelerate_map(case: Case) -> Nodes:
    """accelerate's `infer_auto_device_map` after `get_balanced_memory`, fastest node first."""
    import logging

    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory
    from torch import nn

    # The nodes are no devices of this machine, of which it warns for each.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    order = sorted(range(len(case.cluster.nodes)), key=lambda node: -case.cluster.nodes[node].flop_per_s)
    # In mebibytes: accelerate walks tensors, whose sizes then stay small; rounding is up, so nothing is overfilled.
    with torch.device("meta"):
        modules = [
            nn.ParameterList(
                [nn.Parameter(torch.empty(-(-layer_memory_bytes(layer) // 2**20), dtype=torch.int8), False)]
            )
            for layer in case.model.layers
        ]
        model = nn.Module()
        model.layers = nn.ModuleList(modules)
    room: dict[int | str, int] = {at: case.cluster.nodes[node].memory_bytes // 2**20 for at, node in enumerate(order)}
    classes = ["ParameterList"]
    try:
        balanced = get_balanced_memory(model, max_memory=dict(room), no_split_module_classes=classes)
        mapping = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=classes)
    except Exception:  # noqa: BLE001  (a rival's crash is a refusal)
        return None
    nodes = []
    for at in range(len(modules)):
        device: Any = next(
            (mapping[name] for name in (f"layers.{at}", f"layers.{at}.0", "layers", "") if name in mapping), None
        )
        if not isinstance(device, int):
            return None
        nodes.append(order[device])
    return nodes
