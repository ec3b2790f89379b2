"""Shards of a checkpoint cut by simple rules, run as a chain, and the undivided model to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.cluster import Cluster, Node
from planner.plan import PlanOptions
from planner.profile import ModelProfile
from planner.strategies.make import plan_for
from workers.downloader import resolve
from workers.generator import generate
from workers.runtime.payload import Handoff
from workers.runtime.stage import Stage
from workers.splitter import split


def contiguous(profile: ModelProfile, parts: int) -> dict[str, tuple[int, ...]]:
    """Layers [0, n) cut into `parts` runs of nearly equal length."""
    count = len(profile.layers)
    bounds = [round(count * at / parts) for at in range(parts + 1)]
    return {f"n{at}": tuple(range(bounds[at], bounds[at + 1])) for at in range(parts)}


def scattered(profile: ModelProfile, parts: int) -> dict[str, tuple[int, ...]]:
    """Any layer anywhere: dealt out like cards."""
    return {f"n{at}": tuple(range(at, len(profile.layers), parts)) for at in range(parts)}


def cut(source: Path, target: Path, allocation: Any, parts: int, *, exact: bool = False) -> list[Path]:
    """The shards of a plan that gives each node its layers, of the exact profile or of the general one."""
    found = resolve(source)
    profile = generate(found, compute=exact)
    # Who holds what is given: how large T5's cache is, which the general rule does not know, does not matter.
    profile = replace(profile, layers=tuple(replace(layer, kv_known=True) for layer in profile.layers))
    nodes = tuple(Node(node_id=f"n{at}", flop_per_s=1e12, memory_bytes=2**40) for at in range(parts))
    plan = plan_for(profile, Cluster(nodes=nodes), PlanOptions(), allocation(profile, parts))
    for node in plan.allocation:
        split(found, profile, plan, node_id=node, output=target / node)
    return [target / node for node in plan.allocation]


def chain(stages: Sequence[Stage], inputs: Mapping[str, Tensor], *, device: str = "cpu") -> tuple[Any, list[str]]:
    """The output, and which node ran at each step; each handoff goes over the wire."""
    step, ran = Handoff(inputs=inputs), []
    while True:
        stage = next(s for s in stages if step.next_module is None or step.next_module in s.held)
        ran.append(stage.manifest.node_id)
        assert len(ran) < 60
        result = stage(step)
        if not isinstance(result, Handoff):
            return result, ran
        step = Handoff.from_bytes(result.to_bytes(), device=device)


def whole(source: Path, **options: Any) -> Any:
    import transformers

    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(source, **options).eval()


def example(model: Any, *, length: int = 11, batch: int = 2) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch, length), generator=made)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5].contiguous()
    return inputs


def tensors(output: Any) -> dict[str, Tensor]:
    found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    assert found
    return found


def assert_equal(found: Any, expected: Any) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert {"logits", "logits_per_text", "last_hidden_state"} & ours.keys()
    for name, value in ours.items():
        assert not value.isnan().any(), name
        assert torch.equal(value, theirs[name]), name
