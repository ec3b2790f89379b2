"""What is written is read back equal; what is read from strangers is checked field by field."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cluster import Cluster, Link, Node
from planner.errors import InvalidCheckpoint, InvalidInput, InvalidMetadata
from planner.explain.words import explain
from planner.plan import PHASES, Plan, PlanOptions
from planner.profile import KvTerms, Layer, MaskTerms, ModelProfile, Tensor
from planner.replan.replanner import replan
from planner.strategies.make import make_plan
from planner.wire import read as wire


def layer(index: int, **changes: Any) -> Layer:
    values: dict[str, Any] = {
        "name": f"model.layers.{index}",
        "index": index,
        "layer_type": "decoder",
        "num_params": 10,
        "active_params": 8,
        "weight_bytes": 40,
        "kv_cache_bytes": 512,
        "activation_bytes": 4096,
        "peak_bytes": 9,
        "compute_required": 1e12 / 3,
        "compute_min": 2e11,
        "compute_terms": (0.0, 5.5, 0.25),
        "once_terms": (1.0, 0.0, 2.5),
        "terms_range": (16, None),
        "kv_terms": KvTerms(fixed_bytes=1, bytes_per_token=2, window_tokens=3),
        "parts": {"attention": 1e11, "mlp": 2e11},
        "part_terms": {"attention": (0.0, 1.5, 0.25), "mlp": (0.0, 4.0, 0.0)},
        "once_part_terms": {"attention": (1.0, 0.0, 2.5)},
        "mask_terms": MaskTerms(flop_per_pair=0.25, behind_tokens=7, ahead_tokens=0, chunk_tokens=16),
        "activation_terms": (0.0, 32.0, 0.0),
        "peak_terms": (1.0, 2.0, 3.0),
        "tensors": (Tensor(name="w", file="sub/model.safetensors", dtype="BF16", shape=(2, 5), begin=100, end=120),),
    }
    return Layer(**{**values, **changes})


def profile(layers: int = 4) -> ModelProfile:
    return ModelProfile(
        model_name="owner/name",
        revision="0123abc",
        model_type="llama",
        architecture="LlamaForCausalLM",
        dtype="BF16",
        batch_size=2,
        sequence_length=128,
        layers=(
            *(layer(index) for index in range(layers - 1)),
            layer(
                layers - 1,
                name="lm_head",
                layer_type="head",
                tied_to="model.layers.0",
                tied_bytes=40,
                tied_tensors=("w",),
                tensors=(),
            ),
        ),
        approximate=("FLOP by the general rule",),
        longest_sequence=4096,
        generated_at="2026-01-02T03:04:05Z",
        node_id="maker",
    )


def cluster() -> Cluster:
    return Cluster(
        nodes=(
            Node(
                node_id="a", flop_per_s=1e12, memory_bytes=10**9, memory_bytes_per_s=1e11, load=0.5, device="Tesla T4"
            ),
            Node(node_id="b", flop_per_s=2.5e12, memory_bytes=10**9),
        ),
        default_link=Link(latency_s=0.001, bytes_per_s=1e9),
        links={("a", "b"): Link(latency_s=0.5, bytes_per_s=None)},
    )


def through_text(obj: Any) -> Any:
    return json.loads(wire.dumps(obj))


def test_a_profile_comes_back_equal() -> None:
    assert wire.profile_from_json(through_text(wire.profile_to_json(profile()))) == profile()


def test_a_cluster_comes_back_equal() -> None:
    assert wire.cluster_from_json(through_text(wire.cluster_to_json(cluster()))) == cluster()
    lone = Cluster(nodes=cluster().nodes)
    assert "links" not in wire.cluster_to_json(lone)
    assert wire.cluster_from_json(wire.cluster_to_json(lone)) == lone


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_plan_comes_back_equal(strategy: str, phase: Any) -> None:
    plan = make_plan(
        profile(9), cluster(), PlanOptions(strategy=strategy, phase=phase), generated_at="2026-01-02T03:04:05Z"
    )
    assert wire.plan_from_json(through_text(wire.plan_to_json(plan))) == plan


def test_a_plan_says_what_it_was_made_for_and_what_its_figures_rest_on() -> None:
    options = PlanOptions(strategy="pipeline", reserve_bytes=7, exclude=frozenset({"a"}))
    plan = make_plan(profile(9), cluster(), options)
    obj = through_text(wire.plan_to_json(plan))
    assert obj["approximate"] == ["FLOP by the general rule"]
    used = wire.cluster_from_json(obj["cluster"])
    again = make_plan(profile(9), used, wire.options_from_json(obj["options"]))
    assert wire.plan_to_json(again) == obj
    assert "proven" not in explain(plan)
    assert "an approximate profile: FLOP by the general rule" in explain(plan)
    counted = make_plan(replace(profile(9), approximate=()), cluster(), options)
    assert (counted.approximate, "proven" in explain(counted)) == ((), True)
    old = {name: value for name, value in obj.items() if name not in {"approximate", "cluster", "options"}}
    assert wire.plan_from_json(old) == replace(plan, approximate=(), cluster=None, options=None)


def test_a_checkpoint_that_lacks_tensors_is_planned_only_if_allowed_and_its_plan_says_so() -> None:
    lost = tuple(f"model.layers.{number}.mlp.up_proj.weight" for number in range(14))
    lacking = replace(profile(9), missing_tensors=lost)
    assert wire.profile_from_json(through_text(wire.profile_to_json(lacking))) == lacking
    with pytest.raises(InvalidCheckpoint) as error:
        make_plan(lacking, cluster())
    assert f"the checkpoint lacks 14 tensors of its model: {', '.join(lost[:12])} and 2 more;" in str(error.value)
    assert "--allow-missing" in str(error.value)
    assert error.value.details["missing_tensors"] == list(lost)
    plan = make_plan(lacking, cluster(), PlanOptions(allow_missing=True))
    assert wire.plan_from_json(through_text(wire.plan_to_json(plan))) == plan
    assert plan.missing_tensors == lost
    assert f"The checkpoint lacks 14 tensors of its model: {lost[0]}" in explain(plan)
    # Re-planned with nothing asked it stays allowed.
    assert replan(plan, lacking, cluster()).plan.missing_tensors == lost
    unchecked = make_plan(profile(9), cluster())
    assert unchecked.missing_tensors is None
    assert "Missing tensors: not checked" in explain(unchecked)
    whole = make_plan(replace(profile(9), missing_tensors=()), cluster())
    assert (whole.missing_tensors, "lacks" in explain(whole), "checked" in explain(whole)) == ((), False, False)


def test_parameters_that_are_not_known_come_back_so_and_are_planned() -> None:
    unknown = layer(0, num_params=None, active_params=None, overhead_bytes=7)
    made = replace(profile(4), layers=(unknown, *profile(4).layers[1:]))
    obj = through_text(wire.profile_to_json(made))
    assert (obj["total_params"], obj["layers"][0]["num_params"]) == (None, None)
    assert obj["overhead_bytes"] == made.overhead_bytes >= 7
    assert wire.profile_from_json(obj) == made
    for phase in PHASES:
        assert make_plan(made, cluster(), PlanOptions(phase=phase)).total_layers == 4


def test_options_come_back_equal_and_defaults_are_left_out() -> None:
    options = PlanOptions(
        strategy="pipeline",
        objective="latency",
        phase="decode",
        time_budget_s=0.5,
        pins={"lm_head": "a"},
        exclude=frozenset({"b", "c"}),
        max_memory_share={"a": 0.5},
        max_compute_share={"a": 0.25},
        reserve_bytes=7,
        count_activations=True,
        use_compute_min=True,
        allow_missing=True,
    )
    assert wire.options_from_json(through_text(wire.options_to_json(options))) == options
    assert wire.options_to_json(PlanOptions()) == {}
    assert wire.options_from_json({}) == PlanOptions()


def test_a_plan_has_the_williw_fields() -> None:
    plan = make_plan(profile(9), cluster())
    obj = wire.plan_to_json(plan)
    assert obj["success"] is True
    assert obj["model_url"] == "https://huggingface.co/owner/name"
    assert obj["metadata"] == {
        "total_layers": 9,
        "total_compute": plan.total_compute,
        "model_type": "llama",
    }
    assert {node["node_id"] for node in obj["selected_nodes"]} == set(obj["split_plan"])
    # GFLOP/s of what is available: half of a's 1e12 is others'.
    assert {node["node_id"]: node["compute_power"] for node in obj["selected_nodes"]} == {"a": 500, "b": 2500}
    for share in obj["split_plan"].values():
        assert set(share) == {"layer_names", "total_compute", "compute_utilization"}
        assert 0 < share["compute_utilization"] <= 1
    assert sum(share["total_compute"] for share in obj["split_plan"].values()) == pytest.approx(plan.total_compute)
    chain = obj["megaphone_plan"]["chain"]
    assert obj["megaphone_plan"]["start_node"] == chain[0]["node_id"]
    assert [hop["step"] for hop in chain] == list(range(1, len(chain) + 1))


def test_writing_and_its_imports_load_neither_marshmallow_nor_numpy_nor_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"{}")
    script = (
        "import sys; from planner import wire; from planner.profile import ModelProfile, Layer;"
        "p = ModelProfile(model_name='a/b', layers=(Layer(name='x', index=0, layer_type='decoder'),));"
        "wire.dumps(wire.profile_to_json(p)); wire.load_file(sys.argv[1]);"
        "print([name for name in ('marshmallow', 'numpy', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- williw metadata


def test_williw_metadata_is_planned_as_it_stands() -> None:
    metadata = {
        "model_name": "gpt2",
        "model_type": "gpt2",
        "layers": [
            {
                "name": "wte.weight",
                "shape": [50257, 768],
                "num_params": 38597376,
                "compute_required": 77194752,
                "layer_type": "embedding",
                "dtype": "torch.float32",
            },
            {"name": "h.0.attn.weight", "shape": [3, 4], "compute_required": 24, "dtype": "BF16"},
            {"name": "h.0.attn.bias", "compute_required": 0.5},
        ],
        "total_compute": 77194776,
        "some_field_of_theirs": {"x": 1},
    }
    read = wire.profile_from_json(metadata)
    assert read.unit == "tensor"
    assert [item.index for item in read.layers] == [0, 1, 2]
    assert [item.weight_bytes for item in read.layers] == [50257 * 768 * 4, 24, 0]
    assert [item.num_params for item in read.layers] == [38597376, 12, None]
    assert [item.layer_type for item in read.layers] == ["embedding", "unknown", "unknown"]
    assert read.total_compute == 77194776.5
    plan = make_plan(read, cluster())
    assert plan.unit == "tensor"
    assert sum(len(names) for names in plan.allocation.values()) == 3


def test_only_names_and_compute_are_required() -> None:
    read = wire.profile_from_json({"model_name": "a/b", "layers": [{"name": "x", "compute_required": 3}]})
    assert (read.batch_size, read.sequence_length, read.revision) == (1, 512, None)
    assert read.layers[0].weight_bytes == 0


def test_weight_bytes_that_are_missing_come_from_the_tensors() -> None:
    obj = wire.profile_to_json(profile())
    del obj["layers"][0]["weight_bytes"]
    assert wire.profile_from_json(obj).layers[0].weight_bytes == 20


def test_fields_of_newer_releases_are_ignored_but_not_a_newer_version() -> None:
    obj = wire.profile_to_json(profile()) | {"new": 1}
    obj["layers"][0]["new"] = {"deep": [1]}
    assert wire.profile_from_json(obj) == profile()
    with pytest.raises(InvalidMetadata, match="schema_version is 2; this release reads up to 1"):
        wire.profile_from_json(obj | {"schema_version": 2})


# --- bad metadata


def change(obj: Any, path: str, value: Any) -> Any:
    """`obj` with the value at "layers.0.name" replaced; `...` removes it."""
    *steps, last = path.split(".")
    at = obj
    for step in steps:
        at = at[int(step)] if isinstance(at, list) else at[step]
    key: Any = int(last) if isinstance(at, list) else last
    if value is ...:
        del at[key]
    else:
        at[key] = value
    return obj


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        ("model_name", ..., "model_name", "is required"),
        ("model_name", "../../etc/passwd", "model_name", "must be 'owner/name'"),
        ("model_name", "a/b/c", "model_name", "must be 'owner/name'"),
        ("model_name", "", "model_name", "1 to 512 printable"),
        ("model_name", "a" * 10_000, "model_name", "a string of 10,000"),
        ("model_name", "a\nb", "model_name", "printable"),
        ("batch_size", 0, "batch_size", "from 1 to 65,536, got 0"),
        ("batch_size", 10**12, "batch_size", "got 1000000000000"),
        ("batch_size", True, "batch_size", "got True"),
        ("sequence_length", 1.5, "sequence_length", "got 1.5"),
        ("sequence_length", "512", "sequence_length", "got '512'"),
        ("unit", "atom", "unit", "one of layer, tensor"),
        ("layers", [], "layers", "1"),
        ("layers", {"name": "x"}, "layers", "list"),
        ("layers.1.name", "model.layers.0", "layers[1].name", "is layers[0]'s name too"),
        ("layers.1.name", ..., "layers[1].name", "is required"),
        ("layers.1.index", 7, "layers[1].index", "must be 1, its position, got 7"),
        ("layers.1.compute_required", ..., "layers[1].compute_required", "is required"),
        ("layers.1.compute_required", math.nan, "layers[1].compute_required", "got nan"),
        ("layers.1.compute_required", math.inf, "layers[1].compute_required", "got inf"),
        ("layers.1.compute_required", -1, "layers[1].compute_required", "got -1"),
        ("layers.1.compute_required", 1e31, "layers[1].compute_required", "got 1e+31"),
        ("layers.1.compute_required", 10**4000, "layers[1].compute_required", "a number of 13288 bits"),
        ("layers.1.compute_required", True, "layers[1].compute_required", "got True"),
        ("layers.1.compute_required", "1e9", "layers[1].compute_required", "got '1e9'"),
        ("layers.1.compute_required", None, "layers[1].compute_required", "must not be null"),
        ("layers.1.compute_required", [1] * 99, "layers[1].compute_required", "a list of 99"),
        ("layers.1.num_params", 2.5, "layers[1].num_params", "whole number"),
        ("layers.1.weight_bytes", 2**61, "layers[1].weight_bytes", "whole number"),
        ("layers.1.compute_terms", [1, 2], "layers[1].compute_terms", "3"),
        ("layers.1.terms_range", [9, 3], "layers[1].terms_range", "[first, last or null]"),
        ("layers.1.kv_terms.window_tokens", 0, "layers[1].kv_terms.window_tokens", "got 0"),
        ("layers.1.parts", {"mlp": -1}, "layers[1].parts.mlp", "got -1"),
        ("layers.3.tied_to", "nobody", "layers[3].tied_to", "no other layer's name"),
        ("layers.3.tied_to", "lm_head", "layers[3].tied_to", "no other layer's name"),
        ("layers.1.tensors.0.file", "../x", "layers[1].tensors[0].file", "below the repository's root"),
        ("layers.1.tensors.0.file", "/etc/passwd", "layers[1].tensors[0].file", "below the repository's root"),
        ("layers.1.tensors.0.file", "a\\b", "layers[1].tensors[0].file", "below the repository's root"),
        ("layers.1.tensors.0.end", 99, "layers[1].tensors[0].end", "must not be before begin (100), got 99"),
        ("layers.1.tensors.0.shape", [1] * 33, "layers[1].tensors[0].shape", "32"),
        ("layers.1.tensors.0", 5, "layers[1].tensors[0]", "must be an object, got 5"),
    ],
)
def test_bad_metadata_is_refused_at_its_field(path: str, value: Any, where: str, message: str) -> None:
    obj = change(wire.profile_to_json(profile()), path, value)
    with pytest.raises(InvalidMetadata) as caught:
        wire.profile_from_json(obj)
    errors = caught.value.details["errors"]
    assert errors[0]["path"] == where
    assert message in errors[0]["message"]
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    json.dumps(caught.value.details)


@pytest.mark.parametrize("obj", [None, [], "x", 5, True, {}, {1: 2}, [[]] * 9])
def test_what_is_no_object_is_refused(obj: Any) -> None:
    for read in (wire.profile_from_json, wire.plan_from_json):
        with pytest.raises(InvalidMetadata):
            read(obj)
    if obj != {}:
        for check in (wire.cluster_from_json, wire.node_from_json, wire.options_from_json):
            with pytest.raises(InvalidInput):
                check(obj)


def test_many_errors_are_counted_and_the_first_ones_shown() -> None:
    obj = wire.profile_to_json(profile(60))
    for item in obj["layers"]:
        item["compute_required"] = -1
    with pytest.raises(InvalidMetadata, match=r"\(and 17 more\)") as caught:
        wire.profile_from_json(obj)
    assert len(caught.value.details["errors"]) == 20


# --- bad plans


def plan_obj() -> dict[str, Any]:
    plan: Plan = make_plan(profile(9), cluster(), PlanOptions(strategy="pipeline"))
    obj: dict[str, Any] = through_text(wire.plan_to_json(plan))
    return obj


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("plan_id", "../x", "plan_id"),
        ("plan_id", ..., "plan_id"),
        ("predicted.gap", math.nan, "predicted.gap"),
        ("predicted.exact", 1, "predicted.exact"),
        ("stages.0.rank", 5, "stages[0]"),
        ("stages.0.start", 1, "stages[0].layer_names"),
        ("stages.0.node_id", "c", "stages[0]"),
        ("stages", [], "stages"),
        ("nodes", [], "nodes"),
        ("nodes.1.node_id", "a", "nodes"),
        ("metadata.total_layers", 8, "split_plan"),
        ("schema_version", 2, "schema_version"),
        ("megaphone_plan.chain", [], "megaphone_plan.chain"),
        ("megaphone_plan.chain.0.next_nodes", ["../b"], "megaphone_plan.chain[0].next_nodes[0]"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(path: str, value: Any, where: str) -> None:
    with pytest.raises(InvalidMetadata) as caught:
        wire.plan_from_json(change(plan_obj(), path, value))
    assert caught.value.details["errors"][0]["path"].startswith(where)


def test_a_layer_on_two_nodes_or_on_none_is_refused() -> None:
    obj = plan_obj()
    first, second = obj["split_plan"].values()
    second["layer_names"].append(first["layer_names"][0])
    with pytest.raises(InvalidMetadata, match=r"is on . and on ."):
        wire.plan_from_json(obj)
    obj = plan_obj()
    next(iter(obj["split_plan"].values()))["layer_names"].pop()
    with pytest.raises(InvalidMetadata, match="holds 8 of 9 layers"):
        wire.plan_from_json(obj)


# --- bad nodes files


@pytest.mark.parametrize(
    ("obj", "where", "message"),
    [
        ({"nodes": []}, "nodes", "1"),
        ({}, "nodes", "is required"),
        ({"nodes": [{"flop_per_s": 1, "memory_bytes": 1}]}, "nodes[0].node_id", "is required"),
        ({"nodes": [{"node_id": "../a", "flop_per_s": 1, "memory_bytes": 1}]}, "nodes[0].node_id", "1 to 64"),
        ({"nodes": [{"node_id": 5, "flop_per_s": 1, "memory_bytes": 1}]}, "nodes[0].node_id", "got 5"),
        ({"nodes": [{"node_id": "a", "flop_per_s": 0, "memory_bytes": 1}]}, "nodes[0].flop_per_s", "above 0"),
        ({"nodes": [{"node_id": "a", "flop_per_s": True, "memory_bytes": 1}]}, "nodes[0].flop_per_s", "got True"),
        ({"nodes": [{"node_id": "a", "flop_per_s": 1, "memory_bytes": -1}]}, "nodes[0].memory_bytes", "got -1"),
        ({"nodes": [{"node_id": "a", "flop_per_s": 1, "memory_bytes": 1.5}]}, "nodes[0].memory_bytes", "got 1.5"),
        ({"nodes": [{"node_id": "a", "flop_per_s": 1, "memory_bytes": 1, "load": 1.1}]}, "nodes[0].load", "got 1.1"),
        (
            {"nodes": [{"node_id": "a", "gpu_usage_percent": 101, "cpu_cores": 1}]},
            "nodes[0].gpu_usage_percent",
            "got 101",
        ),
        (
            {"nodes": [{"node_id": "a", "flop_per_s": 1, "memory_bytes": 1}] * 2},
            "nodes[1].node_id",
            "is nodes[0]'s id too",
        ),
        (
            {
                "nodes": [{"node_id": "a", "flop_per_s": 1, "memory_bytes": 1}],
                "links": {"pairs": [{"from": "a", "to": "b"}]},
            },
            "links.pairs[0].to",
            "'b' is no node of this file",
        ),
        (
            {"nodes": [{"node_id": "a", "flop_per_s": 1, "memory_bytes": 1}], "links": {"bytes_per_s": 0}},
            "links.bytes_per_s",
            "above 0",
        ),
        (
            {
                "nodes": [{"node_id": "a", "flop_per_s": 1, "memory_bytes": 1}],
                "links": {"matrix": {"latency_s": [[0, 1]]}},
            },
            "links.matrix.latency_s",
            "1 rows of 1",
        ),
    ],
)
def test_a_bad_nodes_file_is_refused_at_its_field(obj: Any, where: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.cluster_from_json(obj)
    assert caught.value.details["errors"][0]["path"] == where
    assert message in caught.value.details["errors"][0]["message"]


@pytest.mark.parametrize(
    ("obj", "where", "near"),
    [
        ({"nodes": [{"node_id": "a", "laod": 0.5}]}, "nodes[0].laod", "load"),
        ({"nodes": [{}, {"memory_bytes_per_sec": 1}]}, "nodes[1].memory_bytes_per_sec", "memory_bytes_per_s"),
        ({"nodes": [], "link": {}}, "link", "links"),
        ({"nodes": [], "links": {"latency": 1}}, "links.latency", "latency_s"),
        ({"nodes": [], "links": {"pairs": [{"form": "a"}]}}, "links.pairs[0].form", "from"),
        ({"nodes": [], "links": {"matrix": {"bytes_per_sec": []}}}, "links.matrix.bytes_per_sec", "bytes_per_s"),
        ([{"gpu_nmae": "T4"}], "nodes[0].gpu_nmae", "gpu_name"),
        ([{"colour": "red"}], "nodes[0].colour", None),
    ],
)
def test_a_key_that_a_nodes_file_does_not_know_is_refused_with_the_nearest(
    obj: Any, where: str, near: str | None
) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.cluster_from_json(obj, strict=True)
    (error,) = caught.value.details["errors"]
    assert error["path"] == where
    assert (f"did you mean {near}?" if near else "known are node_id, ") in error["message"]


def test_a_strict_reader_takes_our_nodes_williws_and_announced_ones() -> None:
    williw = {
        "id": "w", "gpu_available": True, "gpu_name": "Tesla T4", "gpu_usage_percent": 20, "cpu_cores": 8,
    }  # fmt: skip
    ours = {"node_id": "a", "flop_per_s": 1e12, "memory_bytes": 1, "memory_bytes_per_s": 1, "load": 0, "device": None}
    said = {**ours, "node_id": "b", "host": "h", "pid": 1, "versions": {}, "state": "idle", "shards": []}
    found = wire.cluster_from_json([williw, ours, said], strict=True)
    assert found == wire.cluster_from_json([williw, ours, said])
    assert [node.node_id for node in found.nodes] == ["w", "a", "b"]
    assert wire.cluster_from_json(wire.cluster_to_json(found), strict=True) == found


def test_bytes_and_rates_have_units_as_on_the_command_line() -> None:
    node = {"node_id": "a", "flop_per_s": 1, "memory_bytes": "80MB", "memory_bytes_per_s": "40 GB/s"}
    links = {"bytes_per_s": "125MB", "pairs": [{"from": "a", "to": "b", "bytes_per_s": "1GiB/s"}]}
    read = wire.cluster_from_json(
        {"nodes": [node, {**node, "node_id": "b", "memory_bytes": "1.5GiB"}], "links": links}
    )
    assert [made.memory_bytes for made in read.nodes] == [80 * 10**6, 3 * 2**29]
    assert read.nodes[0].memory_bytes_per_s == 40e9
    assert (read.link("b", "a").bytes_per_s, read.link("a", "b").bytes_per_s) == (125e6, 2**30)
    for text in ("80XB", "much", "", "-1", "80MB/s", "9e99"):
        with pytest.raises(InvalidInput, match="must be a size such as 2GiB"):
            wire.cluster_from_json([{**node, "memory_bytes": text}])


def test_links_come_as_a_default_pairs_or_a_matrix() -> None:
    nodes = [{"node_id": name, "flop_per_s": 1, "memory_bytes": 1} for name in "abc"]
    read = wire.cluster_from_json(
        {
            "nodes": nodes,
            "links": {
                "latency_s": 0.25,
                "bytes_per_s": 100,
                "matrix": {"bytes_per_s": [[None, 50, None], [20, None, None], [None, None, None]]},
                "pairs": [{"from": "a", "to": "c", "latency_s": 1}, {"from": "c", "to": "b", "bytes_per_s": None}],
            },
        }
    )
    assert read.link("a", "b") == Link(latency_s=0.25, bytes_per_s=50)
    assert read.link("b", "a") == Link(latency_s=0.25, bytes_per_s=20)
    assert read.link("b", "c") == Link(latency_s=0.25, bytes_per_s=100)
    assert read.link("a", "c") == Link(latency_s=1, bytes_per_s=100)
    assert read.link("c", "b") == Link(latency_s=0.25, bytes_per_s=None)
    assert read.link("a", "a") == Link()


def test_links_alone_may_name_nodes_that_are_not_known_yet() -> None:
    read = wire.links_from_json({"latency_s": 1, "pairs": [{"from": "x", "to": "y", "bytes_per_s": 5}]})
    assert (read.nodes, read.link("a", "b")) == ((), Link(latency_s=1))
    assert read.link("x", "y") == Link(latency_s=1, bytes_per_s=5)
    with pytest.raises(InvalidInput, match=r"links\.latency_s must be a number"):
        wire.links_from_json({"latency_s": -1})


def test_options_with_a_typing_error_are_refused() -> None:
    with pytest.raises(InvalidInput, match="stratgy is not a known field"):
        wire.options_from_json({"stratgy": "greedy"})
    for bad in ({"phase": "x"}, {"time_budget_s": 0}, {"max_memory_share": {"a": 2}}, {"exclude": ["../x"]}):
        with pytest.raises(InvalidInput):
            wire.options_from_json(bad)


# --- anything at all

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a/b", "a", "x", "layer", 1, 512, 1e12]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PROFILE_PATHS = [
    "model_name", "schema_version", "revision", "batch_size", "sequence_length", "unit", "approximate", "layers",
    "generated_at", "node_id", "dtype", "layers.0", "layers.0.name", "layers.0.index", "layers.0.compute_required",
    "layers.0.compute_terms", "layers.0.terms_range", "layers.0.kv_terms", "layers.0.parts", "layers.0.tensors",
    "layers.0.tensors.0", "layers.0.tensors.0.shape", "layers.0.tensors.0.begin", "layers.0.tied_to",
    "layers.0.weight_bytes", "layers.0.layer_type",
]  # fmt: skip
PLAN_PATHS = [
    "plan_id", "revision", "unit", "metadata", "metadata.total_layers", "split_plan", "split_plan.a", "stages",
    "stages.0", "stages.0.layer_names", "predicted", "predicted.gap", "nodes", "nodes.0", "nodes.0.reason",
    "megaphone_plan", "megaphone_plan.chain", "megaphone_plan.chain.0", "megaphone_plan.chain.0.check",
    "megaphone_plan.announcement", "generated_at", "time_budget_s", "batch_size",
]  # fmt: skip
NODE_PATHS = [
    "nodes", "nodes.0", "nodes.0.node_id", "nodes.0.flop_per_s", "nodes.0.memory_bytes", "nodes.0.load",
    "nodes.0.device", "links", "links.latency_s", "links.pairs", "links.pairs.0", "links.pairs.0.from",
]  # fmt: skip


@given(st.sampled_from(PROFILE_PATHS), anything)
def test_metadata_with_anything_in_a_field_is_read_or_refused_clearly(path: str, value: Any) -> None:
    obj = change(wire.profile_to_json(profile()), path, value)
    try:
        read = wire.profile_from_json(obj)
    except InvalidMetadata as error:
        json.dumps(error.details)
    else:
        # What was accepted is sound: finite, written and read back as the same.
        assert math.isfinite(read.total_compute)
        assert read.total_bytes >= 0
        assert wire.profile_from_json(through_text(wire.profile_to_json(read))) == read


@given(st.sampled_from(PLAN_PATHS), anything)
def test_a_plan_with_anything_in_a_field_is_read_or_refused_clearly(path: str, value: Any) -> None:
    obj = plan_obj()
    try:
        read = wire.plan_from_json(change(obj, path, value))
    except InvalidMetadata as error:
        json.dumps(error.details)
    else:
        assert sum(len(names) for names in read.allocation.values()) == read.total_layers


@given(st.sampled_from(NODE_PATHS), anything)
def test_a_nodes_file_with_anything_in_a_field_is_read_or_refused_clearly(path: str, value: Any) -> None:
    obj = change(wire.cluster_to_json(cluster()), path, value)
    try:
        read = wire.cluster_from_json(obj)
    except InvalidInput as error:
        json.dumps(error.details)
    else:
        assert wire.cluster_from_json(through_text(wire.cluster_to_json(read))) == read


@given(anything)
def test_anything_at_all_is_refused_and_never_crashes(obj: Any) -> None:
    for read in (wire.profile_from_json, wire.plan_from_json, wire.cluster_from_json, wire.node_from_json):
        with pytest.raises(InvalidInput):
            read(obj)
