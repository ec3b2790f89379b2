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
from workers.runtime.stage import Stage, load_stage
from workers.splitter import split

#: Not to be run in stages at all (`test_stage.py` has why), or not with images.
_NOT_IN_STAGES: dict[str, str] = {}


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
    some(
        (name for name in newer.NAMES if name not in _NOT_IN_STAGES),
        shallow={"gemma4", "lfm2_moe", "clip", "t5", "gpt2_hub"},
    ),
)
def test_the_chain_that_runs_is_the_plans(name: str, tmp_path: Path) -> None:
    plan, stages = planned(name, tmp_path)
    model = whole(newer.folder_of(name))
    chains = {True: [hop.node_id for hop in plan.megaphone.chain]}
    chains[False] = list(plan.megaphone.text_chain) or chains[True]
    for images in (True, False):
        inputs = inputs_of(model, images=images and name not in _NO_IMAGES)
        assert ran(stages, model, inputs) == chains["pixel_values" in inputs or not plan.megaphone.text_chain]
