"""Small real models of many families: real runs on the CPU against the profile of their saved checkpoints.

The profile is made from files alone; the model that transformers loads from the same files then runs with real
weights, its own cache and its own loop over experts, and must agree in every number.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from planner.profile import ModelProfile
from workers.folder import open_folder
from workers.generator import generate
from workers.headers import read_headers
from workers.inputs import make_inputs
from workers.kv import read_layer
from workers.skeleton import quiet

BATCH, LENGTH = 2, 24

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LAYERS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "projection_dim": 16,
}  # fmt: skip

#: name -> (model_type, architecture, settings): families that `checkpoints` has not.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("mistral", "MistralForCausalLM", {**_SIZES, "sliding_window": 8}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _SIZES),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**_SIZES, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2,
                                                 "sliding_window": 8}),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**_SIZES, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "olmoe": ("olmoe", "OlmoeForCausalLM", {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", "GraniteForCausalLM", _SIZES),
    "cohere2": ("cohere2", "Cohere2ForCausalLM", {**_SIZES, "sliding_window": 8}),
    "stablelm": ("stablelm", "StableLmForCausalLM", {**_SIZES, "qk_layernorm": True}),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", _SIZES),
    "gptj": ("gptj", "GPTJForCausalLM", {**_LAYERS, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4,
                                         "n_positions": 64}),
    "opt": ("opt", "OPTForCausalLM", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", "BloomForCausalLM", {**_LAYERS, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": ("falcon", "FalconForCausalLM", {**_LAYERS, "hidden_size": 32, "num_hidden_layers": 3,
                                               "num_attention_heads": 4, "multi_query": True, "alibi": False}),
    "mpt": ("mpt", "MptForCausalLM", {**_LAYERS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "mamba": ("mamba", "MambaForCausalLM", {**_LAYERS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8,
                                            "time_step_rank": 4}),
    "jamba": (
        "jamba",
        "JambaForCausalLM",
        {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
         "use_mamba_kernels": False},
    ),
    "roberta": ("roberta", "RobertaForMaskedLM", {**_SIZES, "max_position_embeddings": 66}),
    "distilbert": ("distilbert", "DistilBertForMaskedLM", {**_LAYERS, "dim": 32, "hidden_dim": 48, "n_layers": 2,
                                                           "n_heads": 4, "max_position_embeddings": 64}),
    "deberta_v2": ("deberta-v2", "DebertaV2Model", {**_SIZES, "relative_attention": True, "position_buckets": 8,
                                                    "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
    "modernbert": ("modernbert", "ModernBertForMaskedLM", {**_SIZES, "local_attention": 8, "cls_token_id": 1,
                                                           "sep_token_id": 2}),
    "whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        {**_LAYERS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
         "max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1},
    ),
    "vit": ("vit", "ViTForImageClassification", {**_VISION, "num_labels": 3}),
    "clip": (
        "clip",
        "CLIPModel",
        {"projection_dim": 16, "vision_config": _VISION,
         "text_config": {**_SIZES, "max_position_embeddings": 24, "projection_dim": 16}},
    ),
    "llava": (
        "llava",
        "LlavaForConditionalGeneration",
        {"image_token_index": 5, "vision_config": {"model_type": "clip_vision_model", **_VISION},
         "text_config": {"model_type": "llama", **_SIZES}},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                           "out_hidden_size": 32, "window_size": 112, "fullatt_block_indexes": [1]},
         "text_config": {**_SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}},
    ),
}  # fmt: skip
_SAVED = tuple(name for name in checkpoints.NAMES if name not in {"llama_bf16", "llama_deep", "llama_files"})
#: Run on real data only: what they look at (grids, image tokens) needs real inputs that `make_inputs` doesn't make.
_NO_REAL_RUN = {"llava", "qwen2_5_vl"}


@functools.cache
def folder_of(name: str, parent: Path) -> Path:
    if name in _SAVED:
        return checkpoints.checkpoint(name)
    model_type, architecture, settings = FAMILIES[name]
    folder = parent / name
    torch.manual_seed(0)
    with quiet():
        config = transformers.CONFIG_MAPPING[model_type](**settings)
        getattr(transformers, architecture)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def profiled(name: str, parent: Path) -> ModelProfile:
    return generate(open_folder(folder_of(name, parent)), batch_size=BATCH, sequence_length=LENGTH)


@pytest.mark.parametrize("name", [*_SAVED, *FAMILIES])
def test_every_tensor_is_in_one_layer_and_every_layer_has_its_own(name: str, saved: Path) -> None:
    folder = folder_of(name, saved)
    profile = profiled(name, saved)
    assert profile.approximate == ()
    placed = [tensor.name for layer in profile.layers for tensor in layer.tensors]
    headers = read_headers(open_folder(folder))
    assert sorted(placed) == sorted(tensor.name for tensor in headers.tensors)
    assert profile.total_bytes == headers.total_bytes
    assert all(layer.layer_type != "unused" for layer in profile.layers)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder)
        model, info = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    # What the loaded model holds below a layer's name, tied weights once, is what the profile says that it has.
    assert profile.total_params == sum(each.numel() for each in model.parameters())
    counted: set[int] = set()
    for layer in sorted(profile.layers, key=lambda each: each.index):
        if not layer.name.rpartition(".")[2].isdecimal():
            continue
        mine = {id(each): each.numel() for each in model.get_submodule(layer.name).parameters()}
        assert layer.num_params == sum(n for key, n in mine.items() if key not in counted), layer.name
        counted |= mine.keys()


@pytest.mark.parametrize("name", [*_SAVED, *(name for name in FAMILIES if name not in _NO_REAL_RUN)])
def test_a_real_run_costs_and_caches_what_the_profile_says(name: str, saved: Path) -> None:
    folder = folder_of(name, saved)
    profile = profiled(name, saved)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder)
        model = getattr(transformers, config.architectures[0]).from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        )
        model.eval().requires_grad_(False)
        inputs = {
            key: torch.randint(3, 90, each.shape) if "ids" in key else torch.ones(each.shape, dtype=each.dtype)
            for key, each in make_inputs(model, BATCH, LENGTH).items()
            if isinstance(each, torch.Tensor)
        }
        taken = {"use_cache": True} if "use_cache" in make_inputs(model, BATCH, LENGTH) else {}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = model(**inputs, **taken)
    assert profile.total_compute == counter.get_total_flops()
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    held = 0
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        for layer in getattr(part, "layers", ()):
            held += read_layer(layer).total_bytes
    assert sum(layer.kv_cache_bytes for layer in profile.layers) == held
    first = next(iter(output.values()))
    assert profile.layers[-1].activation_bytes >= first.numel() * first.element_size()


def test_kv_dtype_shrinks_keys_and_values_but_no_state(saved: Path) -> None:
    wide = generate(open_folder(folder_of("jamba", saved)), sequence_length=LENGTH)
    narrow = generate(open_folder(folder_of("jamba", saved)), sequence_length=LENGTH, kv_dtype="float8_e4m3fn")
    for one, other in zip(wide.layers, narrow.layers, strict=True):
        assert one.kv_terms is None or other.kv_terms is not None
        if one.kv_terms is not None and other.kv_terms is not None:
            assert other.kv_terms.bytes_per_token * 4 == one.kv_terms.bytes_per_token
            assert other.kv_terms.fixed_bytes == one.kv_terms.fixed_bytes


def test_a_window_bounds_the_cache(saved: Path) -> None:
    profile = generate(open_folder(folder_of("mistral", saved)), sequence_length=60)
    layer = profile.layers[1]
    assert layer.kv_terms is not None
    assert layer.kv_terms.window_tokens == 7
    assert layer.kv_cache_bytes == 7 * 2 * 2 * 8 * 4
    assert layer.compute_min is not None
    # 60 queries see at most 8 keys each instead of 60: 1 + ... + 7 + 53 * 8 pairs of 3600; 4 heads of 8 values.
    assert layer.compute_required - layer.compute_min == (3600 - 28 - 53 * 8) * 4 * 4 * 8
