"""`generate` end to end: from files to a profile, its cache, its fallbacks and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.depth import depth
from support.models.memory import Memory

from planner.errors import InvalidCheckpoint, InvalidInput
from planner.profile import ModelProfile
from workers.checkpoint.config import parse_config
from workers.checkpoint.folder import open_folder
from workers.generator import generate
from workers.profiling.tracing.skeleton import build, quiet


def costs(profile: ModelProfile) -> ModelProfile:
    """The profile without when it was made."""
    return replace(profile, generated_at=None)


def packed(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A safetensors file of zeros."""
    width = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1, "F8_E8M0": 1}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = width[dtype]
        for each in shape:
            size *= each
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(end)


def memory(config: dict[str, Any], tensors: dict[str, tuple[str, list[int]]]) -> Memory:
    return Memory({"config.json": json.dumps(config).encode(), "model.safetensors": packed(tensors)})


LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def llama_tensors(layers: int = 2) -> dict[str, tuple[str, list[int]]]:
    tensors: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [32, 16])}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": ("BF16", [16, 16]),
            f"{prefix}.self_attn.k_proj.weight": ("BF16", [8, 16]),
            f"{prefix}.self_attn.v_proj.weight": ("BF16", [8, 16]),
            f"{prefix}.self_attn.o_proj.weight": ("BF16", [16, 16]),
            f"{prefix}.mlp.gate_proj.weight": ("BF16", [24, 16]),
            f"{prefix}.mlp.up_proj.weight": ("BF16", [24, 16]),
            f"{prefix}.mlp.down_proj.weight": ("BF16", [16, 24]),
            f"{prefix}.input_layernorm.weight": ("BF16", [16]),
            f"{prefix}.post_attention_layernorm.weight": ("BF16", [16]),
        }
    return tensors | {"model.norm.weight": ("BF16", [16]), "lm_head.weight": ("BF16", [32, 16])}


IN_LAYER = 16 * 16 * 2 + 8 * 16 * 2 + 24 * 16 * 3 + 32


def run(code: str, *arguments: str) -> Any:
    """Run `code` in a fresh interpreter; what it prints is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, timeout=240
    )
    return json.loads(done.stdout)


_IMPORTS = """
import json, sys
from pathlib import Path
from workers.downloader import resolve
from workers.generator import generate
cache = Path(sys.argv[2]) if sys.argv[2] else None
profile = generate(resolve(Path(sys.argv[1])), compute=cache is not None, cache_dir=cache)
heavy = ["torch", "transformers", "numpy", "marshmallow", "huggingface_hub", "safetensors"]
print(json.dumps([[m for m in heavy if m in sys.modules], profile.total_compute, list(profile.approximate)]))
"""


def test_without_compute_nothing_heavy_is_imported() -> None:
    loaded, flop, approximate = run(_IMPORTS, str(checkpoints.checkpoint("llama")), "")
    assert loaded == []
    assert flop > 0
    assert "general rule" in approximate[0]


def test_a_cached_trace_needs_no_torch(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint("gemma2")
    traced = generate(open_folder(folder), cache_dir=tmp_path)
    loaded, flop, approximate = run(_IMPORTS, str(folder), str(tmp_path))
    assert (loaded, flop, approximate) == ([], traced.total_compute, [])


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("sys.modules['torch'] = None", "torch and transformers are not installed: torch is missing"),
        (
            "import transformers.core_model_loading as m; del m.rename_source_key",
            "the installed torch and transformers cannot be used: cannot import name 'rename_source_key'",
        ),
    ],
)
def test_a_profile_without_a_torch_that_traces_says_what_is_wrong(before: str, reason: str, tmp_path: Path) -> None:
    _, flop, approximate = run(f"import sys; {before}{_IMPORTS}", str(checkpoints.checkpoint("llama")), str(tmp_path))
    assert flop > 0
    assert any(each.startswith(reason) for each in approximate), approximate


@pytest.mark.parametrize("name", ["deepseek_v3", "t5", "bert_mlm"])
def test_a_cached_profile_is_the_traced_one_at_any_batch_and_length(name: str, tmp_path: Path) -> None:
    checkpoint = open_folder(checkpoints.checkpoint(name))
    generate(checkpoint, batch_size=1, sequence_length=100, cache_dir=tmp_path)
    for batch, length in ((1, 100), (3, 7), (1, 128)):
        cached = generate(checkpoint, batch_size=batch, sequence_length=length, cache_dir=tmp_path)
        fresh = generate(checkpoint, batch_size=batch, sequence_length=length)
        for one, other in zip(cached.layers, fresh.layers, strict=True):
            # The peak is a maximum, no polynomial: exact where it was traced.
            assert replace(one, peak_bytes=0, peak_terms=None) == replace(other, peak_bytes=0, peak_terms=None)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_polynomial_cannot_tell_is_traced_again_and_kept(tmp_path: Path) -> None:
    checkpoint = open_folder(checkpoints.checkpoint("mamba2"))
    first = generate(checkpoint, sequence_length=50, cache_dir=tmp_path)
    second = generate(checkpoint, sequence_length=75, cache_dir=tmp_path)
    assert second.layers[1].terms_range == (75, 75)
    assert costs(generate(checkpoint, sequence_length=50, cache_dir=tmp_path)) == costs(first)
    assert costs(generate(checkpoint, sequence_length=75)) == costs(second)


@pytest.mark.parametrize(("batch", "length"), [(1, 9), (8, 24)])
def test_what_a_polynomial_cannot_tell_is_said_of_another_batch_or_length(batch: int, length: int) -> None:
    profile = generate(open_folder(checkpoints.checkpoint("mamba2")), sequence_length=24)
    assert profile.approximate == ()
    asked = profile.at(batch_size=batch, sequence_length=length)
    (reason,) = asked.approximate
    assert "counted at 24 tokens" in reason
    assert asked.at(batch_size=1, sequence_length=24).approximate == (reason,)


def test_beyond_a_models_positions_the_costs_are_said_to_be_extrapolated() -> None:
    checkpoint = open_folder(checkpoints.checkpoint("bert_mlm"))
    profile = generate(checkpoint, sequence_length=24)
    (reason,) = profile.at(batch_size=2, sequence_length=10_000).approximate
    assert "extrapolated" in reason
    assert generate(checkpoint, sequence_length=10_000).approximate == (reason,)
    assert profile.at(batch_size=2, sequence_length=32).approximate == ()


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    checkpoint = open_folder(checkpoints.checkpoint("llama"))
    fresh = generate(checkpoint, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    for damage in (b"", b"{}", b'{"layers": [{}], "tensors": {}, "reasons": []}', file.read_bytes()[:100]):
        file.write_bytes(damage)
        assert costs(generate(checkpoint, cache_dir=tmp_path)) == costs(fresh)


def test_at_answers_what_generate_does() -> None:
    checkpoint = open_folder(checkpoints.checkpoint("gemma3"))
    one = generate(checkpoint, batch_size=1, sequence_length=64).at(batch_size=4, sequence_length=21)
    other = generate(checkpoint, batch_size=4, sequence_length=21)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.compute_required, a.kv_cache_bytes) == (b.compute_required, b.kv_cache_bytes)


def test_exact_numbers_of_a_small_llama() -> None:
    profile = generate(memory(LLAMA, llama_tensors()), batch_size=2, sequence_length=10)
    assert profile.approximate == ()
    assert [layer.name for layer in profile.layers] == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head",
    ]  # fmt: skip
    layer = profile.layers[1]
    assert layer.num_params == layer.active_params == IN_LAYER
    assert layer.weight_bytes == 2 * IN_LAYER
    # 2 FLOP for each weight of a matrix and token; scores and their sum: 2 heads, 8 values, S² pairs, twice.
    assert layer.compute_required == 2 * 2 * 10 * (IN_LAYER - 32) + 2 * 4 * 16 * 100
    assert layer.compute_min == 2 * 2 * 10 * (IN_LAYER - 32) + 2 * 4 * 16 * 55
    assert layer.parts == {"attention": 2 * 2 * 10 * 768 + 2 * 4 * 16 * 100, "mlp": 2 * 2 * 10 * 1152}
    assert layer.kv_cache_bytes == 2 * 10 * 2 * 8 * 2
    assert layer.activation_bytes == 2 * 10 * 16 * 2
    assert profile.layers[-1].compute_required == 2 * 2 * 10 * 32 * 16


def test_unknown_and_remote_models_get_the_general_rule_and_no_code_runs(tmp_path: Path) -> None:
    for values, says in (
        ({"model_type": "brand_new", "auto_map": {"AutoModel": "evil.Evil"}}, "its own code is never run"),
        ({"architectures": ["EvilModel"], "auto_map": {"AutoModel": "evil.EvilModel"}}, "never run"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_act": "no_such_function"}, "cannot"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        (folder / "config.json").write_text(json.dumps({**LLAMA, **values}))
        (folder / "model.safetensors").write_bytes(packed(llama_tensors()))
        profile = generate(open_folder(folder), sequence_length=10)
        assert any(says in reason for reason in profile.approximate), profile.approximate
        assert profile.total_params == 2 * IN_LAYER + 2 * 32 * 16 + 16
        assert profile.layers[1].compute_required > 0
        assert not (tmp_path / "ran").exists()


def test_layers_that_config_and_checkpoint_disagree_about_are_named() -> None:
    for compute in (True, False):
        with pytest.raises(InvalidCheckpoint, match=r"model\.layers\.2"):
            generate(memory(LLAMA, llama_tensors(layers=3)), compute=compute)
        with pytest.raises(InvalidCheckpoint, match=r"model\.layers\.1"):
            generate(memory(LLAMA, llama_tensors(layers=1)), compute=compute)


def test_a_tensor_of_another_size_than_the_configs_is_named() -> None:
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = ("BF16", [16, 16])
    with pytest.raises(InvalidCheckpoint, match=r"layers\.1\.mlp\.up_proj\.weight holds 256 values.*384"):
        generate(memory(LLAMA, tensors))


def test_what_no_layer_uses_comes_last_and_nothing_is_lost() -> None:
    config = {**LLAMA, "num_nextn_predict_layers": 1}
    tensors = llama_tensors(layers=3) | {"extra.thing": ("F32", [5]), "mtp.layers.0.fc.weight": ("F32", [2, 2])}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", [4])
    for compute in (True, False):
        profile = generate(memory(config, tensors), compute=compute)
        assert sorted(t.name for layer in profile.layers for t in layer.tensors) == sorted(tensors)
        last = profile.layers[-1]
        assert (last.name, last.layer_type, last.compute_required) == ("unused", "unused", 0)
        assert {t.name for t in last.tensors} >= {"mtp.layers.0.fc.weight", "model.layers.2.input_layernorm.weight"}
        # A buffer costs bytes and is no parameter.
        assert profile.layers[1].num_params == IN_LAYER
        assert profile.layers[1].weight_bytes == 2 * IN_LAYER + 16


def test_tied_weights_count_once_even_if_stored_twice() -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    once = llama_tensors()
    del once["lm_head.weight"]
    for tensors, tied_to in ((once, "model.embed_tokens"), (llama_tensors(), None)):
        profile = generate(memory(config, tensors))
        assert profile.total_params == 2 * IN_LAYER + 32 * 16 + 16
        assert profile.layers[-1].tied_to == tied_to


@pytest.mark.parametrize(
    ("model_type", "name", "params"),
    [
        ("deepseek_v4", "model.layers.0.ffn.gate.bias", 0),
        ("inkling_mm_model", "model.llm.layers.0.mlp.gate.bias", 0),
        ("qwen9", "model.layers.0.mlp.gate.bias", 4),
        ("hy_v3", "model.layers.0.mlp.expert_bias", 0),
        ("afmoe", "model.layers.0.mlp.expert_bias", 4),
        ("mistral_large4", "lerope.alpha", 0),
        ("apertus", "model.layers.0.mlp.act_fn.beta", 0),
    ],
)
def test_what_balances_and_scales_is_a_buffer_by_its_name_where_it_is_one(
    model_type: str, name: str, params: int
) -> None:
    tensors: dict[str, tuple[str, list[int]]] = {name: ("F32", [4]), "model.layers.0.a.weight": ("F32", [2, 2])}
    profile = generate(memory({"model_type": model_type, "num_hidden_layers": 1}, tensors), compute=False)
    assert profile.total_params == 4 + params


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("ibert", "IBertForMaskedLM"),
        ("rt_detr", "RTDetrForObjectDetection"),
        ("d_fine", "DFineForObjectDetection"),
        ("encodec", "EncodecModel"),
        ("mimi", "MimiModel"),
        ("gemma4_audio", "Gemma4AudioModel"),
        # Its batch norms are trained.
        ("mobilenet_v2", "MobileNetV2ForImageClassification"),
    ],
)
def test_frozen_and_observed_values_are_buffers_without_a_trace(
    model_type: str, architecture: str, tmp_path: Path
) -> None:
    config = json.dumps({"model_type": model_type, "architectures": [architecture]})
    with quiet():
        model = build(parse_config(config.encode()))
    (tmp_path / "config.json").write_text(config)
    header, end = {}, 0
    for name, each in model.state_dict().items():
        begin, end = end, end + each.nbytes
        dtype = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}[each.dtype]
        header[name] = {"dtype": dtype, "shape": list(each.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)  # its values take no room
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert header.keys() > parameters.keys()
    profile = generate(open_folder(tmp_path), compute=False)
    assert profile.total_params == sum(each.numel() for each in parameters.values())


def test_experts_of_two_values_a_byte_are_parameters_by_name_alone() -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {experts: ("I8", [2, 8, 4]), f"{experts}_scale_inv": ("F8_E8M0", [2, 8, 1])}
    config = {"model_type": "new", "num_hidden_layers": 1, "quantization_config": {"quant_method": "fp8"}}
    assert generate(memory(config, tensors), compute=False).total_params == 2 * 8 * 8


def test_mxfp4_experts_have_their_true_parameters() -> None:
    config = {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 32,
        "num_local_experts": 4, "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    mlp = "model.layers.0.mlp"
    attention = "model.layers.0.self_attn"
    tensors: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("BF16", [32, 64]),
        f"{mlp}.experts.gate_up_proj_blocks": ("U8", [4, 128, 2, 16]),
        f"{mlp}.experts.gate_up_proj_scales": ("U8", [4, 128, 2]),
        f"{mlp}.experts.gate_up_proj_bias": ("BF16", [4, 128]),
        f"{mlp}.experts.down_proj_blocks": ("U8", [4, 64, 2, 16]),
        f"{mlp}.experts.down_proj_scales": ("U8", [4, 64, 2]),
        f"{mlp}.experts.down_proj_bias": ("BF16", [4, 64]),
        f"{mlp}.router.weight": ("BF16", [4, 64]),
        f"{mlp}.router.bias": ("BF16", [4]),
        "model.layers.0.input_layernorm.weight": ("BF16", [64]),
        "model.layers.0.post_attention_layernorm.weight": ("BF16", [64]),
        f"{attention}.sinks": ("BF16", [2]),
        "model.norm.weight": ("BF16", [64]),
        "lm_head.weight": ("BF16", [32, 64]),
    }
    for name, rows, columns in (("q", 64, 64), ("k", 32, 64), ("v", 32, 64), ("o", 64, 64)):
        tensors |= {f"{attention}.{name}_proj.weight": ("BF16", [rows, columns]),
                    f"{attention}.{name}_proj.bias": ("BF16", [rows])}  # fmt: skip
    experts = 4 * 128 * 64 + 4 * 64 * 64 + 4 * 128 + 4 * 64
    rest = 2 * 64 * 64 + 2 * 32 * 64 + 64 + 32 + 32 + 64 + 2 + 2 * 64 + 4 * 64 + 4
    for compute in (True, False):
        profile = generate(memory(config, tensors), compute=compute)
        assert profile.layers[1].num_params == experts + rest
        assert profile.layers[1].active_params == experts // 2 + rest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a whole number from 1"),
        ({"num_hidden_layers": {"language": 2, "vision": -1}}, "num_hidden_layers must be a whole number from 1"),
        ({"num_hidden_layers": {}}, "num_hidden_layers must be a whole number from 1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"hidden_size": 10**15}, "hidden_size must be a whole number"),
        ({"num_labels": 20_000_000}, "num_labels must be a whole number from 0 to 131,072"),
        ({"depths": [5_000, 5_001]}, "depths must be at most 10,000 in all, got 10001"),
        ({"vision_config": {"num_block_repeats": [10**9]}}, "vision_config.num_block_repeats must be at most"),
        ({"num_hidden_groups": 3, "num_decoder_blocks": 10**6}, "num_decoder_blocks must be at most"),
        ({"num_layers": [9_999, 9_999]}, "num_layers must be at most 10,000 in all"),
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"text_config": {"num_attention_heads": -4}}, "text_config.num_attention_heads"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": ["../../evil"]}, "architectures must be a list"),
        ({"model_type": ["llama"]}, "model_type must be a short text"),
    ],
)
def test_bad_config_values_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidCheckpoint) as error:
        generate(memory({**LLAMA, **change}, llama_tensors()))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "stated",
    # As LXMERT states its depths; as models of compressed attention, which have no such dimension.
    # And as those that list which layers are of a kind.
    [
        {"num_hidden_layers": {"language": 9, "vision": 5}},
        {"text_config": {"head_dim": 0}},
        {"mlp_only_layers": list(range(200)), "layers_block_type": ["mamba"], "depths": [2, 2, 18, 2]},
    ],
)
def test_sizes_are_read_as_architectures_state_them(stated: dict[str, Any]) -> None:
    assert parse_config(json.dumps(stated).encode()).values == stated


@pytest.mark.parametrize("data", [b"", b"[]", b"nonsense", b'{"a":' * 100_000, b"\xff\xfe", b"3"])
def test_a_config_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        generate(Memory({"config.json": data, "model.safetensors": packed(llama_tensors())}))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=depth(100, 3000), deadline=None)
@given(st.dictionaries(st.sampled_from([*sorted(LLAMA), "text_config", "quantization_config", "dtype"]), _JSON))
def test_fuzz_any_config_is_read_or_refused(change: dict[str, Any]) -> None:
    try:
        config = parse_config(json.dumps({**LLAMA, **change}).encode())
        profile = generate(memory({**LLAMA, **change}, llama_tensors()), compute=False)
    except InvalidCheckpoint:
        return
    assert config.architecture is None or isinstance(config.architecture, str)
    assert profile.total_bytes == sum(
        layer.weight_bytes for layer in generate(memory(LLAMA, llama_tensors()), compute=False).layers
    )


@settings(max_examples=depth(20, 400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["hidden_act", "rope_scaling", "rope_theta", "rms_norm_eps", "head_dim", "attention_bias",
                         "pad_token_id", "max_position_embeddings", "num_key_value_heads", "layer_types"]),
        _JSON, min_size=1, max_size=2,
    )
)  # fmt: skip
def test_fuzz_any_config_is_traced_refused_or_flagged(change: dict[str, Any]) -> None:
    try:
        profile = generate(memory({**LLAMA, **change}, llama_tensors()), sequence_length=8)
    except InvalidCheckpoint:
        return
    assert profile.approximate or profile.layers[1].compute_required > 0


def test_without_config_the_headers_still_tell_parameters_and_bytes() -> None:
    profile = generate(Memory({"model.safetensors": packed(llama_tensors())}))
    assert profile.total_params == 2 * IN_LAYER + 2 * 32 * 16 + 16
    assert profile.approximate


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"batch_size": 10**12}, {"sequence_length": -1}, {"kv_dtype": "float3"}],
)
def test_impossible_workloads_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        generate(memory(LLAMA, llama_tensors()), **wrong)


_GROWTH = """
import gc, json, sys
from pathlib import Path
from workers.downloader import resolve
from workers.generator import generate
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
checkpoint = resolve(Path(sys.argv[1]))
sizes = []
for round in range(4):
    for length in range(12):
        generate(checkpoint, sequence_length=20 + length)
    gc.collect()
    sizes.append((resident(), len(gc.get_objects())))
print(json.dumps(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.deep
def test_one_process_profiles_many_models_without_growing() -> None:
    sizes = run(_GROWTH, str(checkpoints.checkpoint("llama")))
    assert sizes[3][0] - sizes[1][0] < 8 * 2**20, sizes
    assert sizes[3][1] - sizes[1][1] < 2_000, sizes


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("llama_tied", "model.embed_tokens.weight"),
        ("bert_mlm", "bert.embeddings.word_embeddings.weight"),
        ("bart", "model.shared.weight"),
        ("t5", "shared.weight"),
        ("gpt2", "transformer.wte.weight"),
    ],
)
@pytest.mark.parametrize("compute", [True, False])
def test_a_tied_head_names_the_tensor_it_needs(name: str, tied: str, compute: bool) -> None:
    profile = generate(open_folder(checkpoints.checkpoint(name)), compute=compute)
    head = profile.layers[-1]
    assert head.layer_type == "head"
    assert head.tied_tensors == (tied,)
    (stored,) = [t for layer in profile.layers for t in layer.tensors if t.name == tied]
    assert head.tied_bytes == stored.size_bytes
    assert next(layer for layer in profile.layers if stored in layer.tensors).name == head.tied_to
