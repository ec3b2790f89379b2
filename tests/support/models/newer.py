"""Small configs of the other published architectures (`architectures.PUBLISHED`) and of newer ones."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from support.models import families
from support.models.families import FAMILIES

_MISTRAL = FAMILIES["mistral"][2]
_SIZES: dict[str, Any] = {name: value for name, value in _MISTRAL.items() if name != "sliding_window"}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_PICTURE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_LAYERS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
          "mamba_chunk_size": 8}  # fmt: skip

#: name -> (model_type, architecture, settings): the published ones that `checkpoints` and `FAMILIES` have not.
PUBLISHED_TOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3_pictures": (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"mm_tokens_per_image": 4, "image_token_index": 5, "text_config": {**_SIZES, "sliding_window": 8},
         "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_PICTURE}},
    ),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", _SIZES),
    "llama4": (
        "llama4",
        "Llama4ForConditionalGeneration",
        {"image_token_index": 5,
         "text_config": {**_SIZES, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
                         "attention_chunk_size": 8},
         "vision_config": {**_PICTURE, "vision_output_dim": 32, "projector_input_dim": 32,
                           "projector_output_dim": 32}},
    ),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", _SIZES),
    "zamba2": (
        "zamba2",
        "Zamba2ForCausalLM",
        {**_SIZES, "num_hidden_layers": 6, "attention_head_dim": 16, "mamba_d_state": 8, "mamba_ngroups": 1,
         "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 2, "adapter_rank": 4,
         "layers_block_type": ["mamba", "hybrid"] * 3, "use_shared_attention_adapter": False,
         "num_key_value_heads": 4, "hybrid_layer_ids": [1, 3, 5]},
    ),
    "flan_t5": (
        "t5",
        "T5ForConditionalGeneration",
        {**_LAYERS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
         "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
    ),
    "deberta": ("deberta", "DebertaModel", {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                                            "position_biased_input": False, "type_vocab_size": 0}),
    "siglip": ("siglip", "SiglipModel", {"vision_config": _PICTURE,
                                         "text_config": {**_SIZES, "max_position_embeddings": 24,
                                                         "projection_size": 32}}),
    "phi": ("phi", "PhiForCausalLM", _SIZES),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {**_SIZES, **_MOE, "num_key_value_heads": 4, "first_k_dense_replace": 1, "kv_lora_rank": 16,
         "q_lora_rank": None, "n_routed_experts": 4, "n_shared_experts": 1, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 8, "v_head_dim": 8, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
}  # fmt: skip
#: Likewise, architectures of the last two years.
NEWER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3n": (
        "gemma3n_text",
        "Gemma3nForCausalLM",
        {**_SIZES, "sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
         "laurel_rank": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
         "activation_sparsity_pattern": [0.0] * 4},
    ),
    "embedding_gemma2": (
        "embedding_gemma2_text",
        "EmbeddingGemma2TextModel",
        {**_SIZES, "sliding_window": 8, "hidden_size_per_layer_input": 8, "embedding_dim": 16,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "lfm2": ("lfm2", "Lfm2ForCausalLM", {**_SIZES, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2}),
    "dinov3": ("dinov3_vit", "DINOv3ViTModel", {**_PICTURE, "num_register_tokens": 2}),
    "qwen3_5": (
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        {**_SIZES, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {**_SIZES, **_MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16,
         "layer_types": ["mamba", "attention"] * 2, "layers_block_type": ["mamba", "attention"] * 2},
    ),
    "bamba": ("bamba", "BambaForCausalLM", {**_SIZES, **_MAMBA, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", "FalconH1ForCausalLM", {**_SIZES, **_MAMBA, "mamba_d_ssm": 64}),
    "nemotron_h": (
        "nemotron_h",
        "NemotronHForCausalLM",
        {**_SIZES, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8,
         "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "hybrid_override_pattern": "M*-M"},
    ),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", _SIZES),
    "hunyuan": ("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", _SIZES),
    "ernie4_5": ("ernie4_5", "Ernie4_5ForCausalLM", _SIZES),
    "exaone4": ("exaone4", "Exaone4ForCausalLM", {**_SIZES, "sliding_window": 8}),
    "olmo3": ("olmo3", "Olmo3ForCausalLM", {**_SIZES, "sliding_window": 8}),
    "apertus": ("apertus", "ApertusForCausalLM", _SIZES),
    "seed_oss": ("seed_oss", "SeedOssForCausalLM", _SIZES),
    "arcee": ("arcee", "ArceeForCausalLM", _SIZES),
    "helium": ("helium", "HeliumForCausalLM", _SIZES),
    "vaultgemma": ("vaultgemma", "VaultGemmaForCausalLM", {**_SIZES, "sliding_window": 8}),
    "dots1": (
        "dots1",
        "Dots1ForCausalLM",
        {**_SIZES, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1},
    ),
    "minimax_m2": ("minimax_m2", "MiniMaxM2ForCausalLM", {**_SIZES, **_MOE, "num_local_experts": 4}),
    "glm4": ("glm4", "Glm4ForCausalLM", _SIZES),
    "ministral3": ("ministral3", "Ministral3ForCausalLM", _SIZES),
    "qwen3_vl": (
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**_SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
         "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                           "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}},
    ),
    "gemma4_pictures": (
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {"text_config": {**FAMILIES["gemma4"][2]},
         "vision_config": {**_PICTURE, "head_dim": 8, "num_key_value_heads": 4}, "audio_config": None},
    ),
}  # fmt: skip
NAMES = (*families.NAMES, *PUBLISHED_TOO, *NEWER)


@functools.cache
def folder_of(name: str) -> Path:
    """The folder of a checkpoint of `NAMES`, with random weights."""
    if name in families.NAMES:
        return families.folder_of(name)
    return families.saved(name, *(PUBLISHED_TOO | NEWER)[name])
