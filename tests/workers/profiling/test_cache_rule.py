"""The KV cache without a trace: what a trace finds, or said to be not known; never another figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.cases import make as cases
from support.depth import some
from support.models.families import families, folder_of
from support.planning import cluster

from planner.errors import InvalidInput
from planner.kv_dtype import with_kv_bytes
from planner.plan import PlanOptions
from planner.profile import ModelProfile
from planner.strategies.make import make_plan
from planner.wire.read import profile_from_json, profile_to_json
from workers.checkpoint.config import ModelConfig
from workers.downloader import resolve
from workers.generator import generate
from workers.profiling.cache_rule import ALL_SLIDE
from workers.profiling.rules import CHOSEN, EXPERTS, expert_counts
from workers.profiling.tracing.skeleton import quiet

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1,
          "mamba_chunk_size": 8}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
#: Those whose cache is more than keys and values, beside the families.
_HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {
        **_MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2}),
    "bamba": ("BambaForCausalLM", {**_MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1ForCausalLM", {**_MAMBA, "mamba_d_ssm": 64}),
    "lfm2": ("Lfm2ForCausalLM", {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2}),
    "gemma3n_text": ("Gemma3nForCausalLM", {
        "sliding_window": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "vocab_size_per_layer_input": 96, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", _DELTA),
    "nemotron_h": ("NemotronHForCausalLM", {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8,
        "layers_block_type": ["mamba", "attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}),
    "falcon_mamba": ("FalconMambaForCausalLM", {"state_size": 8, "time_step_rank": 4}),
    "olmo_hybrid": ("OlmoHybridForCausalLM", {}),
    "llama4_text": ("Llama4ForCausalLM", {"intermediate_size_mlp": 64, "num_local_experts": 4,
                                          "attention_chunk_size": 8}),
}  # fmt: skip


def _bytes(profile: ModelProfile) -> int | None:
    """The whole cache; None where it is not known."""
    return sum(x.kv_cache_bytes for x in profile.layers) if all(x.kv_known for x in profile.layers) else None


def _compared(folder: Path) -> set[int | None]:
    """What the rule states at lengths within and beyond windows, where it is not what the trace finds."""
    found = resolve(folder)
    exact, ruled = generate(found, sequence_length=24), generate(found, sequence_length=24, compute=False)
    wrong = set()
    for length in (1, 6, 24):
        truth = exact.at(batch_size=2, sequence_length=length)
        rule = ruled.at(batch_size=2, sequence_length=length)
        if _bytes(rule) not in {None, _bytes(truth)}:
            wrong.add(_bytes(rule))
    return wrong


@pytest.mark.parametrize("name", families())
def test_the_rule_states_what_a_trace_finds_or_nothing(name: str) -> None:
    assert _compared(folder_of(name)) == set()


@pytest.mark.parametrize(
    "case",
    some(
        [f"{model_type} {dtype}" for model_type in _HYBRIDS for dtype in ("float32", "bfloat16")],
        shallow={"falcon_h1 bfloat16", "lfm2 float32", "gemma3n_text float32", "qwen3_5_text bfloat16",
                 "nemotron_h bfloat16"},
    ),
)  # fmt: skip
def test_states_are_known_by_their_shapes(case: str, tmp_path: Path) -> None:
    model_type, dtype = case.split()
    architecture, settings = _HYBRIDS[model_type]
    sizes = {k: v for k, v in _SIZES.items() if (model_type, k) != ("nemotron_h", "num_hidden_layers")}
    with quiet():
        config = transformers.CONFIG_MAPPING[model_type](**sizes, **settings)
        model = getattr(transformers, architecture)(config).to(getattr(torch, dtype))
        model.save_pretrained(tmp_path)
    assert _compared(tmp_path) == set()
    assert _bytes(generate(resolve(tmp_path), sequence_length=24, compute=False)) is not None


@pytest.mark.parametrize("case", cases.named("headers-only", "untraceable"))
def test_a_case_states_its_true_cache(tmp_path: Path, case: str) -> None:
    expect = cases.make(case, tmp_path)
    for compute in (False, True) if case.startswith("untraceable") else (False,):
        profile = generate(resolve(tmp_path), sequence_length=24, compute=compute)
        assert profile.total_params == expect["num_params"]
        assert _bytes(profile) == expect["kv_cache_bytes_true"]


def test_experts_that_are_chosen_by_another_name_are_not_all_counted(tmp_path: Path) -> None:
    cases.make("untraceable-longcat-flash", tmp_path)
    profile = generate(resolve(tmp_path), sequence_length=24)
    # The counter on the running model gives 8,878,080 or 8,841,216, by what is routed where; all experts: 12,681,216.
    assert profile.total_compute == pytest.approx(8.86e6, rel=0.05)
    assert "2 of 12 routed experts for each token" in profile.approximate[0]
    assert "KV cache" not in profile.approximate[0]


@pytest.mark.deep
def test_the_names_of_transformers_own_configs_are_read() -> None:
    missing = []
    for model_type in transformers.CONFIG_MAPPING:
        mapped = getattr(transformers.CONFIG_MAPPING[model_type], "attribute_map", {})
        for names, wanted in ((CHOSEN, {"num_experts_per_tok"}), (EXPERTS, {"num_local_experts", "num_experts"})):
            missing += [(model_type, mapped[name]) for name in wanted & mapped.keys() if mapped[name] not in names]
    assert missing == []
    for model_type in ALL_SLIDE:
        with quiet():
            assert not hasattr(transformers.CONFIG_MAPPING[model_type](), "layer_types"), model_type
    assert expert_counts(ModelConfig(values={"num_experts": 8})) is None


def test_a_cache_that_is_not_known_is_null_and_asked_for(tmp_path: Path) -> None:
    profile = generate(resolve(folder_of("t5")), compute=False, sequence_length=24)
    unknown = [layer for layer in profile.layers if not layer.kv_known]
    assert len(unknown) == 3
    assert any(note.startswith("KV cache not known in 3 layers") for note in profile.approximate)
    written = profile_to_json(profile)
    assert [layer["kv_cache_bytes"] for layer in written["layers"]].count(None) == 3
    assert profile_from_json(written) == profile
    machines = cluster([1e12, 1e12], [10**9, 10**9])
    with pytest.raises(InvalidInput, match=r"not known in 3 layers.*--kv-bytes-per-token"):
        make_plan(profile, machines, PlanOptions())
    stated = with_kv_bytes(profile, 100)
    assert sum(layer.kv_cache_bytes for layer in stated.layers) == 2400
    assert sum(x.kv_cache_bytes for x in stated.at(batch_size=2, sequence_length=10).layers) == 2000
    assert any(
        "as stated: 100 bytes a token" in note for note in make_plan(stated, machines, PlanOptions()).approximate
    )
    for wrong, told in ((stated, 1), (profile, -1), (profile, True)):
        with pytest.raises(InvalidInput):
            with_kv_bytes(wrong, told)
    assert dataclasses.replace(profile.layers[0]).kv_known
