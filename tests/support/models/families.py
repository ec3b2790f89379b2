"""Small configs of families that `checkpoints` has not, and where their checkpoints are saved."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from support import checkpoints
from support.depth import some

from workers.profiling.tracing.skeleton import quiet

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
    # Its modules keep their states themselves.
    "recurrent_gemma": (
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {**_SIZES, "attention_window_size": 8},
    ),
    # Its four layers are one that is run four times, which is what its checkpoint holds.
    "albert": ("albert", "AlbertForMaskedLM", {**_SIZES, "embedding_size": 16, "num_hidden_groups": 1}),
    "roberta": ("roberta", "RobertaForMaskedLM", {**_SIZES, "max_position_embeddings": 66}),
    "distilbert": ("distilbert", "DistilBertForMaskedLM", {**_LAYERS, "dim": 32, "hidden_dim": 48, "n_layers": 2,
                                                           "n_heads": 4, "max_position_embeddings": 64}),
    "deberta_v2": ("deberta-v2", "DebertaV2Model", {**_SIZES, "relative_attention": True, "position_buckets": 8,
                                                    "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
    # These carry buffers in their checkpoints, but for the second: there the same name is a parameter's.
    "minimax": ("minimax", "MiniMaxForCausalLM", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2,
                                                  "block_size": 16}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {**_SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {**_SIZES, **_MOE, "num_experts": 4, "num_dense_layers": 1, "conv_L_cache": 3,
         "layer_types": ["conv", "full_attention"] * 2},
    ),
    "gemma4": (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {**_SIZES, "sliding_window": 8, "global_head_dim": 8, "num_kv_shared_layers": 2,
         "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "deepseek_v4": (
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        {**_SIZES, "moe_intermediate_size": 16, "num_key_value_heads": 1, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "q_lora_rank": 16, "qk_rope_head_dim": 8, "sliding_window": 8,
         "num_hash_layers": 1,
         "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}},
    ),
    "t5gemma": (
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        {"encoder": {**_SIZES, "sliding_window": 8},
         "decoder": {**_SIZES, "sliding_window": 8, "cross_attention_hidden_size": 32}},
    ),
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
#: Those of `checkpoints` that differ in architecture, and those here.
SAVED = tuple(name for name in checkpoints.NAMES if name not in {"llama_bf16", "llama_deep", "llama_files"})
NAMES = (*SAVED, *FAMILIES)
#: One of each mechanism, for `make test`: the others are built of the same, and `make test-deep` runs them all.
TYPICAL = frozenset(
    {
        "llama",  # grouped heads, rotary positions
        "gemma3",  # tied embeddings, windows in some layers
        "phi3",  # fused projections
        "gpt2_hub",  # transposed weights, learned positions, masks as buffers, names of the base model
        "bloom",  # positions as a bias
        "mixtral",  # experts
        "deepseek_v3",  # latent attention, dense first layers, shared experts
        "gpt_oss",  # sinks
        "gemma4",  # layers that share a cache, inputs for each layer
        "mamba2",  # a chunked scan
        "lfm2_moe",  # convolutions
        "bert_mlm",  # an encoder
        "modernbert",  # windows to both sides
        "t5",  # encoder and decoder
        "whisper",  # sound
        "qwen2_5_vl",  # windows in a picture
    }
)


def families(*, without: Collection[str] = ()) -> list[Any]:
    """The names as a test's parameters: the typical in every run, all in the deep one."""
    return some((name for name in NAMES if name not in without), shallow=TYPICAL - set(without))


@functools.cache
def _parent() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fairshard-families-")


@functools.cache
def folder_of(name: str) -> Path:
    """The folder of family `name`'s checkpoint, with random weights."""
    return checkpoints.checkpoint(name) if name in SAVED else saved(name, *FAMILIES[name])


def saved(name: str, model_type: str, architecture: str, settings: Mapping[str, Any]) -> Path:
    """The folder of a new checkpoint with random weights."""
    folder = Path(_parent().name) / name
    torch.manual_seed(0)
    with quiet():
        config = transformers.CONFIG_MAPPING[model_type](**settings)
        getattr(transformers, architecture)(config).save_pretrained(folder)
    return folder


def load(name: str) -> Any:
    """Family `name`'s model with its weights, as eager PyTorch runs it."""
    folder = folder_of(name)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder)
        model = getattr(transformers, config.architectures[0]).from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval().requires_grad_(False)


def real_inputs(made: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Data for the meta tensors that `workers.profiling.tracing.inputs.make_inputs` made."""
    return {
        key: torch.randint(3, 90, each.shape) if "ids" in key else torch.ones(each.shape, dtype=each.dtype)
        for key, each in made.items()
        if isinstance(each, torch.Tensor)
    }
