"""Other planners on the same instances: what they would give, as the node of each layer (None: they refuse)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.planner_cases import Case
from planner.problem.cost import layer_flop, layer_memory_bytes

Nodes = list[int] | None


def first_rule(case: Case, *, budget_s: float = 1.0) -> Nodes:
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
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory
    from torch import nn

    # The nodes are no devices of this machine, of which it warns for each.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    order = sorted(range(len(case.cluster.nodes)), key=lambda node: -case.cluster.nodes[node].flop_per_s)

    class Block(nn.ParameterList):
        """A decoder layer: its size, not the embedding's, is what the balance leaves room for."""

    # In mebibytes: accelerate walks tensors, whose sizes then stay small; rounding is up, so nothing is overfilled.
    with torch.device("meta"):
        modules = [
            (Block if layer.layer_type == "decoder" else nn.ParameterList)(
                [nn.Parameter(torch.empty(-(-layer_memory_bytes(layer) // 2**20), dtype=torch.int8), False)]
            )
            for layer in case.model.layers
        ]
        model = nn.Module()
        model.layers = nn.ModuleList(modules)
    room: dict[int | str, int] = {at: case.cluster.nodes[node].memory_bytes // 2**20 for at, node in enumerate(order)}
    # It shares memory out evenly only among devices that it is told of: all nodes, in that order.
    classes = ["Block"]
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


def parallax(folder: Path) -> Mapping[str, Callable[[Case], Nodes]]:
    """Parallax's own layer allocator, called from its source in `folder` (a checkout of GradientHQ/parallax).

    It plans equal decoder layers by their mean bytes and reserves memory by ratios, which are set to all of it.
    """
    source = folder / "src" if (folder / "src" / "scheduling").is_dir() else folder
    if not (source / "scheduling" / "layer_allocation.py").is_file():
        raise SystemExit(f"{folder} has no scheduling/layer_allocation.py; give a checkout of GradientHQ/parallax")
    # What it imports beside its allocator needs a GPU's libraries; the allocator uses only the logger.
    stand_ins: dict[str, dict[str, object]] = {
        "parallax_utils": {},
        "parallax_utils.logging_config": {"get_logger": logging.getLogger},
        "parallax_utils.utils": {"bytes_per_element": None, "compute_max_batch_size": None},
    }
    for name, members in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        sys.modules.setdefault(name, module)
    logging.getLogger("scheduling").setLevel(logging.CRITICAL)
    sys.path.append(str(source))

    def water_filling(case: Case) -> Nodes:
        return _parallax_nodes(case, over_all=True)

    def greedy(case: Case) -> Nodes:
        return _parallax_nodes(case, over_all=False)

    return {"Parallax, water-filling over all nodes": water_filling, "Parallax, greedy": greedy}


def _parallax_nodes(case: Case, *, over_all: bool) -> Nodes:
    allocation, info_module, node_module, management = (
        import_module(f"scheduling.{name}") for name in ("layer_allocation", "model_info", "node", "node_management")
    )
    first, *blocks, last = case.model.layers
    size = sum(layer_memory_bytes(block) for block in blocks) / len(blocks)

    class Info(info_module.ModelInfo):  # type: ignore[misc, name-defined]
        """The instance's bytes in place of a formula's."""

        embedding_io_bytes = max(first.weight_bytes, last.weight_bytes, last.tied_bytes)

        def decoder_layer_io_bytes(self, *_: object, **__: object) -> float:
            return size

    info = Info(model_name=case.name, num_layers=len(blocks), head_size=1, tie_embedding=last.tied_to is not None)
    nodes = [
        node_module.Node(
            node_id=str(at),
            hardware=node_module.NodeHardwareInfo(
                node_id=str(at),
                num_gpus=1,
                tflops_fp16=node.available_flop_per_s / 1e12,
                gpu_name="",
                memory_gb=node.memory_bytes / 2**30,
                memory_bandwidth_gbps=(node.memory_bytes_per_s or 1e12) / 1e9,
                device="cuda",
            ),
            model_info=info,
            param_mem_ratio=1.0,
            _force_max_concurrent_requests=True,
        )
        for at, node in enumerate(case.cluster.nodes)
    ]
    able = [node for node in nodes if node.get_decoder_layer_capacity(include_lm_head=over_all) > 0]
    manager = management.NodeManager(initial_nodes=able)
    allocator = allocation.GreedyLayerAllocator(model_info=info, node_management=manager)
    try:
        if over_all:
            allocator.adjust_pipeline_layers(able)
        elif not allocator.allocate_from_standby():
            return None
    except ValueError:
        return None
    # Of several chains the first: the one with the largest nodes.
    stages = sorted((n for n in able if n.start_layer is not None), key=lambda node: node.start_layer)
    held: list[int] = []
    for stage in stages:
        if stage.start_layer == len(held) < len(blocks):
            held += [int(stage.node_id)] * (stage.end_layer - stage.start_layer)
    return [held[0], *held, held[-1]] if len(held) == len(blocks) else None
