"""Publishing: both files in one commit, found again in our form and the williw form, no commit for what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hub.server import TestHub
from huggingface_hub import HfApi

from planner.errors import InvalidMetadata, NotFound
from planner.profile import Layer, ModelProfile, Tensor
from planner.wire.read import dumps
from workers.metadata_store.base import MetadataStore
from workers.metadata_store.open import open_store
from workers.network.retry import RetryPolicy
from workers.uploader import latest_profile, load_plan, load_profile, publish, publish_plan

QUICK = RetryPolicy(attempts=4, first_s=0.01, longest_s=0.05, connect_s=5, stall_s=5)


@pytest.fixture(params=["folder", "hub"])
def store(request: pytest.FixtureRequest, tmp_path: Path, hub: TestHub) -> MetadataStore:
    if request.param == "folder":
        return open_store(tmp_path / "store")
    return open_store("own/meta", token=hub.token, policy=QUICK)


def profile(name: str = "own/model", revision: str = "c0ffee", **changes: object) -> ModelProfile:
    tensor = Tensor(name="a.weight", file="model.safetensors", dtype="F32", shape=(2, 3), begin=100, end=124)
    layer = Layer(
        name="a",
        index=0,
        layer_type="decoder",
        num_params=6,
        weight_bytes=24,
        compute_required=12.0,
        tensors=(tensor,),
    )
    made = ModelProfile(
        model_name=name, revision=revision, layers=(layer,), generated_at="2025-01-01T00:00:00Z", node_id="n1"
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_profile_is_published_under_both_names_and_read_back_by_commit(store: MetadataStore) -> None:
    first = publish(profile(), store)
    assert first.store == store.spec
    assert first.path == "profiles/own/model/c0ffee/b1-s512.json"
    assert store.list() == ["own_model_metadata.json", first.path]
    later = publish(profile(architecture="Other"), store)
    assert load_profile(store, first.path, first.commit) == profile()
    assert load_profile(store, later.path, later.commit).architecture == "Other"
    assert load_profile(store, "own_model_metadata.json", first.commit) == profile()


def test_another_kv_dtype_has_a_path_of_its_own(store: MetadataStore) -> None:
    own = publish(profile(dtype="BF16"), store, kv_dtype="bfloat16")
    other = publish(profile(dtype="BF16", architecture="Other"), store, kv_dtype="float8_e4m3fn")
    assert (own.path, other.path) == (
        "profiles/own/model/c0ffee/b1-s512.json",
        "profiles/own/model/c0ffee/b1-s512-kvF8_E4M3.json",
    )
    assert load_profile(store, own.path) == profile(dtype="BF16")


def test_the_same_profile_made_again_is_no_news(store: MetadataStore) -> None:
    first = publish(profile(), store)
    again = publish(profile(generated_at="2026-06-06T06:06:06Z", node_id="n2"), store)
    assert again == first
    assert load_profile(store, again.path).node_id == "n1"


def test_the_root_file_is_the_newest_profile(store: MetadataStore) -> None:
    publish(profile(), store)
    publish(profile(revision="beef"), store)
    assert latest_profile(store, "own/model").revision == "beef"
    assert latest_profile(store, "own/model", revision="c0ffee").revision == "c0ffee"
    # Publishing an older one again makes it the newest: the root file follows.
    publish(profile(), store)
    assert latest_profile(store, "own/model").revision == "c0ffee"
    with pytest.raises(NotFound, match="0ld"):
        latest_profile(store, "own/model", revision="0ld")


def test_two_models_that_share_a_root_file_do_not_mix(store: MetadataStore) -> None:
    publish(profile("a/b_c"), store)
    publish(profile("a_b/c"), store)
    assert latest_profile(store, "a/b_c").model_name == "a/b_c"
    assert latest_profile(store, "a_b/c").model_name == "a_b/c"


def test_a_williw_clients_own_upload_is_found(hub: TestHub) -> None:
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("own/meta")
    uploaded = {
        "model_name": "own/model",
        "layers": [{"name": "a.weight", "shape": [2, 3], "dtype": "torch.float32", "compute_required": 12}],
    }
    content = json.dumps(uploaded).encode()
    api.upload_file(path_or_fileobj=content, path_in_repo="own_model_metadata.json", repo_id="own/meta")
    found = latest_profile(open_store("own/meta", token=hub.token, policy=QUICK), "own/model")
    assert [layer.weight_bytes for layer in found.layers] == [24]
    assert found.unit == "tensor"


def test_what_is_no_metadata_is_named(store: MetadataStore) -> None:
    store.write({"own_model_metadata.json": b"[1, 2", "list.json": b"[]"}, message="m")
    for path in ("own_model_metadata.json", "list.json"):
        with pytest.raises(InvalidMetadata):
            load_profile(store, path)
    with pytest.raises(InvalidMetadata, match="own_model_metadata"):
        latest_profile(store, "own/model")
    with pytest.raises(NotFound, match="own/other"):
        latest_profile(store, "own/other")


def test_a_damaged_root_file_is_replaced_by_the_next_publish(store: MetadataStore) -> None:
    store.write({"own_model_metadata.json": b"{"}, message="m")
    publish(profile(), store)
    assert latest_profile(store, "own/model") == profile()


def test_a_plan_is_published_and_read_back(store: MetadataStore) -> None:
    from planner.cluster import Cluster, Node
    from planner.strategies.make import make_plan

    cluster = Cluster(nodes=(Node(node_id="n1", flop_per_s=1e9, memory_bytes=10**9),))
    plan = make_plan(profile(), cluster, generated_at="2025-01-01T00:00:00Z")
    first = publish_plan(plan, store)
    assert first.path == f"plans/{plan.plan_id}.json"
    assert load_plan(store, plan.plan_id) == load_plan(store, plan.plan_id, first.commit) == plan
    assert publish_plan(replace(plan, generated_at="2026-01-01T00:00:00Z"), store) == replace(first, again=True)
    with pytest.raises(NotFound):
        load_plan(store, "missing")


def test_progress_is_told(store: MetadataStore) -> None:
    told: list[tuple[int, int | None]] = []
    publish(profile(), store, progress=lambda done, total, /, *, what="": told.append((done, total)))
    size = len(dumps({})) and told[0][1]
    assert told[0] == (0, size)
    assert told[-1] == (size, size)
