"""The chain that runs is the plan's: one layer a node, so that every order of layers but the true one shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.depth import some
from support.models import newer
from support.models.families import real_inputs
from support.stage_cases import assert_equal, chain, whole
from torch import Tensor

from planner.cluster import Cluster, Node
from planner.plan import Plan, PlanOptions
from planner.strategies.make import make_plan, plan_for
from workers.downloader import resolve
from workers.generator import generate
from workers.profiling.tracing.inputs import make_inputs
from workers.profiling.tracing.skeleton import quiet
from workers.runtime.payload import Handoff
from workers.runtime.stage import Stage, load_stage
from workers.runtime.weights import switch_caches_off
from workers.splitter import split

#: Not to be run in stages with images: what their code looks at, a trace has not.
_NO_IMAGES = {"llava", "qwen2_5_vl", "gemma3_pictures", "llama4", "qwen3_vl", "gemma4_pictures"}


def planned(name: str, target: Path) -> tuple[Plan, list[Stage]]:
    """A node for each layer, as a plan and as stages."""
    found = resolve(newer.folder_of(name))
    profile = generate(found, batch_size=2, sequence_length=11)
    held = {f"n{at}": (at,) for at in range(len(profile.layers))}
    nodes = tuple(Node(node_id=node_id, flop_per_s=1e12, memory_bytes=2**40) for node_id in held)
    plan = plan_for(profile, Cluster(nodes=nodes), PlanOptions(), held)
    for node_id in held:
        split(found, profile, plan, node_id=node_id, output=target / node_id)
    return plan, [load_stage(target / node_id) for node_id in held]


def inputs_of(model: Any, *, images: bool) -> dict[str, Tensor]:
    made = make_inputs(model, 2, 11, images=images)
    return {name: each for name, each in (made | real_inputs(made)).items() if isinstance(each, Tensor)}


def ran(stages: list[Stage], model: Any, inputs: dict[str, Tensor]) -> list[str]:
    """The nodes by which a request went; its output is the whole model's."""
    output, nodes = chain(stages, inputs)
    with quiet(), torch.no_grad():
        assert_equal(output, model(**inputs))
    return nodes


@pytest.mark.parametrize(
    "name",
    some(newer.NAMES, shallow={"gemma4", "lfm2_moe", "clip", "t5", "qwen2_5_vl"}),
)
def test_the_chain_that_runs_is_the_plans(name: str, tmp_path: Path) -> None:
    plan, stages = planned(name, tmp_path)
    model = whole(newer.folder_of(name))
    switch_caches_off(model)  # as stages do: with one, some kernels round otherwise (GPT-J)
    steps = [hop.node_id for hop in plan.megaphone.chain]
    if name in _NO_IMAGES:
        steps = list(plan.megaphone.text_chain) or steps
    assert ran(stages, model, inputs_of(model, images=name not in _NO_IMAGES)) == steps


def test_layers_that_share_keys_and_values_run_in_a_row_and_hand_on_what_the_plan_says(tmp_path: Path) -> None:
    found = resolve(newer.folder_of("gemma4"))
    profile = generate(found, batch_size=2, sequence_length=11)
    nodes = tuple(Node(node_id=node, flop_per_s=1e12, memory_bytes=profile.total_bytes * 3 // 4) for node in "ab")
    plan = make_plan(profile, Cluster(nodes=nodes), PlanOptions(strategy="pipeline"))
    for node in nodes:
        split(found, profile, plan, node_id=node.node_id, output=tmp_path / node.node_id)
    stages = [load_stage(tmp_path / hop.node_id) for hop in plan.megaphone.chain]
    model = whole(newer.folder_of("gemma4"))
    assert ran(stages, model, inputs_of(model, images=False)) == [hop.node_id for hop in plan.megaphone.chain]
    assert len(plan.megaphone.chain) == 2, "with the projection of its embeddings beside the head it came back"
    # Two kinds of attention, keys and values, two heads of eight numbers in float32, which the last two layers read.
    carried = {layer.name: layer.shared_kv_bytes_per_token for layer in profile.layers}
    assert carried == {name: 256 * (name in {"model.layers.1", "model.layers.2"}) + 128 * (name == "model.layers.0")
                       for name in carried}  # fmt: skip
    after = plan.megaphone.chain[0].layer_names[-1]
    assert plan.megaphone.chain[0].shared_kv_bytes == 22 * carried[after]
    step = stages[0](Handoff(inputs=inputs_of(model, images=False)))
    shared = [each for name, each in step.values.items() if ".layers." in name and not name.endswith(":0")]
    assert sum(each.numel() * 4 for each in shared) == 22 * carried[after]
