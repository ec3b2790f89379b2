"""Plans that leave and come back: edited, pinned, and as accelerate's device map."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from accelerate import init_empty_weights
from accelerate.utils import check_device_map
from support.checkpoints import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from planner.cluster import Cluster, Node
from planner.errors import Conflict, Infeasible, InvalidInput, InvalidMetadata
from planner.kv_dtype import with_kv_dtype
from planner.plan import PlanOptions
from planner.profile import KvTerms, Layer, ModelProfile
from planner.strategies.imported import device_map, import_plan
from planner.strategies.make import make_plan
from planner.wire import read as wire
from planner.wire.documents import dumps_yaml, loads_yaml
from workers.downloader import resolve
from workers.generator import generate

MODEL = ModelProfile(
    model_name="owner/name",
    revision="0123abc",
    dtype="BF16",
    layers=tuple(
        Layer(name=f"l{index}", index=index, layer_type="decoder", compute_required=1e9, weight_bytes=100)
        for index in range(6)
    ),
)
CLUSTER = Cluster(
    nodes=(
        Node(node_id="a", flop_per_s=1e9, memory_bytes=400),
        Node(node_id="b", flop_per_s=2e9, memory_bytes=400),
        Node(node_id="c", flop_per_s=1e6, memory_bytes=150),
    )
)


def exported() -> dict[str, Any]:
    plan = make_plan(MODEL, CLUSTER, PlanOptions(strategy="pipeline"), generated_at="2026-01-02T03:04:05Z")
    obj: dict[str, Any] = json.loads(wire.dumps(wire.plan_to_json(plan)))
    return obj


def test_a_plan_survives_json_and_yaml() -> None:
    plan = wire.plan_from_json(exported())
    assert import_plan(loads_yaml(dumps_yaml(exported()))) == plan
    assert import_plan(exported(), MODEL) == plan
    assert import_plan(exported(), MODEL, CLUSTER).allocation == plan.allocation


def test_an_edited_plan_is_made_anew_from_who_holds_what() -> None:
    obj = exported()
    # Two layers each: a and b take from each other, whatever the stages in the file still say.
    obj["split_plan"] = {
        "a": {"layer_names": ["l4", "l0", "l1"]},
        "b": {"layer_names": ["l5", "l2", "l3"]},
        "c": {"layer_names": []},
    }
    plan = import_plan(obj, MODEL, CLUSTER)
    assert plan.allocation == {"a": ("l0", "l1", "l4"), "b": ("l2", "l3", "l5")}
    assert [(stage.node_id, stage.start, stage.end) for stage in plan.stages] == [
        ("a", 0, 2), ("b", 2, 4), ("a", 4, 5), ("b", 5, 6),
    ]  # fmt: skip
    assert plan.predicted.bottleneck_s == pytest.approx(3.0)  # three layers at 1 GFLOP/s
    assert plan.plan_id != exported()["plan_id"]
    assert plan.strategy == "pipeline"
    assert import_plan(json.loads(wire.dumps(wire.plan_to_json(plan)))) == plan


def test_an_edited_plan_is_refused_where_nothing_can_check_it() -> None:
    obj = exported()
    stage = obj["stages"][0]
    other = obj["stages"][1]
    stage["node_id"], other["node_id"] = other["node_id"], stage["node_id"]
    shares = obj["split_plan"]
    shares[stage["node_id"]], shares[other["node_id"]] = shares[other["node_id"]], shares[stage["node_id"]]
    with pytest.raises(InvalidMetadata, match="was edited: what it says now has the id"):
        import_plan(obj)
    with pytest.raises(InvalidMetadata, match="was edited"):
        import_plan(obj, MODEL)
    assert import_plan(obj, MODEL, CLUSTER).plan_id != exported()["plan_id"]


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ({"a": ["l0", "l1", "l2"], "b": ["l3", "l4"]}, InvalidInput, "1 of 6 layers on no node: l5"),
        ({"a": ["l0", "l1", "l2"], "b": ["l2", "l3", "l4", "l5"]}, InvalidInput, "'l2' twice, on a and on b"),
        ({"a": ["l0", "l1", "l2"], "b": ["l3", "l4", "l5", "l6"]}, InvalidInput, "a layer 'l6' on b that"),
        ({"a": ["l0", "l1", "l2"], "d": ["l3", "l4", "l5"]}, InvalidInput, "node 'd' cannot hold layers"),
        ({"a": ["l0", "l1"], "b": ["l2", "l3"], "c": ["l4", "l5"]}, Infeasible, "c"),
        ({"a": ["l0", "l1", "l2", "l3", "l4"], "b": ["l5"]}, Infeasible, "a"),
    ],
)
def test_an_edited_plan_that_cannot_be_is_refused(
    shares: dict[str, list[str]], error: type[Exception], message: str
) -> None:
    obj = exported()
    obj["split_plan"] = {node: {"layer_names": names} for node, names in shares.items()}
    with pytest.raises(error, match=message):
        import_plan(obj, MODEL, CLUSTER)


def test_an_edited_plan_must_meet_the_time_budget_that_is_asked_for() -> None:
    with pytest.raises(Infeasible):
        import_plan(exported(), MODEL, CLUSTER, PlanOptions(time_budget_s=0.001))


def test_a_plan_is_pinned_to_its_model_and_revision() -> None:
    other = ModelProfile(model_name="owner/name", revision="fff", layers=MODEL.layers)
    with pytest.raises(Conflict, match="is for revision 0123abc of owner/name, this is fff"):
        import_plan(exported(), other)
    with pytest.raises(Conflict, match="is for revision 0123abc"):
        import_plan(exported(), other, CLUSTER)
    stranger = ModelProfile(model_name="owner/other", revision="0123abc", layers=MODEL.layers)
    with pytest.raises(Conflict, match="is for owner/name, this is owner/other"):
        import_plan(exported(), stranger)


# --- accelerate


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen2", "phi3", "gemma2"])
def test_accelerate_accepts_the_device_map(name: str) -> None:
    folder = checkpoint(name)
    profile = generate(resolve(folder), compute=False)
    half = profile.total_bytes * 3 // 4
    cluster = Cluster(nodes=tuple(Node(node_id=node, flop_per_s=1e12, memory_bytes=half + 10**6) for node in "ab"))
    plan = make_plan(profile, cluster, PlanOptions(strategy="pipeline"))
    found = device_map(plan, profile)
    assert set(found.values()) == set(range(len(plan.allocation)))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    check_device_map(model, found)  # raises ValueError where a parameter has no device
    modules = dict(model.named_modules())
    assert set(found) <= set(modules)


def test_devices_can_be_named() -> None:
    plan = wire.plan_from_json(exported())
    names = {"a": "cpu", "b": "cuda:1"}
    found = device_map(plan, MODEL, names)
    assert set(found) == {f"l{index}" for index in range(6)}
    for node, layers in plan.allocation.items():
        assert {found[name] for name in layers} == {names[node]}
    with pytest.raises(InvalidInput, match="no device is named for node"):
        device_map(plan, MODEL, {"a": 0})


# --- the KV cache at another dtype


def test_the_kv_cache_scales_with_its_dtype_and_fixed_states_do_not() -> None:
    terms = KvTerms(fixed_bytes=100, bytes_per_token=8, window_tokens=10)
    layers = (
        Layer(name="x", index=0, layer_type="decoder", kv_cache_bytes=180, kv_terms=terms),
        Layer(name="y", index=1, layer_type="decoder", kv_cache_bytes=33),
    )
    profile = ModelProfile(model_name="a/b", dtype="BF16", batch_size=1, sequence_length=64, layers=layers)
    half = with_kv_dtype(profile, "F8_E4M3")
    assert [layer.kv_cache_bytes for layer in half.layers] == [100 + 4 * 10, 17]
    assert with_kv_dtype(profile, "float32").layers[0].kv_cache_bytes == 100 + 16 * 10
    assert with_kv_dtype(profile, "torch.bfloat16") == profile
    # Beyond a window, and where what was counted is not what the terms say.
    terms = KvTerms(bytes_per_token=16, window_tokens=4, bytes_per_later_token=2)
    layer = replace(profile.layers[0], kv_terms=terms, kv_cache_bytes=terms.bytes_at(1, 10) + 8)
    (wide,) = with_kv_dtype(replace(profile, batch_size=1, sequence_length=10, layers=(layer,)), "F32").layers
    assert wide.kv_cache_bytes == 2 * (4 * 16 + 6 * 2) + 16
    with pytest.raises(InvalidInput, match="is not known"):
        with_kv_dtype(profile, "F7")
    with pytest.raises(InvalidInput, match="dtype is U8, from which the dtype of its KV cache does not follow"):
        with_kv_dtype(ModelProfile(model_name="a/b", dtype="U8", layers=layers), "F16")
