"""Device maps name modules as the module tree does, and every parameter comes to lie where its layer is."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from accelerate.utils import check_device_map
from support.depth import some
from support.models import newer

from planner.cluster import Cluster, Node
from planner.plan import PlanOptions
from planner.strategies.imported import device_map
from planner.strategies.make import plan_for
from workers.downloader import resolve
from workers.generator import generate
from workers.profiling.tracing.skeleton import quiet


@pytest.mark.parametrize("name", some(newer.NAMES, shallow={"vit", "dinov3", "llava", "t5", "clip"}))
def test_every_parameter_comes_to_lie_where_the_plan_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What follows the loading moves weights on the CPU away again, to bring them when they are needed.
    monkeypatch.setattr(transformers.modeling_utils, "accelerate_dispatch", lambda *_: None)
    folder = newer.folder_of(name)
    profile = generate(resolve(folder))
    held: dict[str, tuple[int, ...]] = {
        node: tuple(layer.index for layer in profile.layers if layer.index % 2 == at) for at, node in enumerate("ab")
    }
    nodes = tuple(Node(node_id=node, flop_per_s=1e12, memory_bytes=2**40) for node in held)
    plan = plan_for(profile, Cluster(nodes=nodes), PlanOptions(), held)
    found = device_map(plan, profile, {"a": "cpu", "b": "meta"})
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder)
        kind: Any = getattr(transformers, config.architectures[0])
        model = kind.from_pretrained(folder, device_map=found)
    check_device_map(model, found)
    assert set(found) <= {path for path, _ in model.named_modules()}
    layers = {path: layer for layer in profile.layers for path in layer.module_paths}
    for parameter, its in model.named_parameters():
        path = parameter
        while path and path not in layers:
            path = path.rpartition(".")[0]
        assert its.device.type == ("cpu", "meta")[layers[path].index % 2], parameter
