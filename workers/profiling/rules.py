"""The general rule: FLOP and KV cache from names, shapes and a few well-known config fields.

Used where there is no trace (unknown model_type, code of the repository's own, no torch). Its figures are always
marked `approximate`; parameters and bytes do not depend on it and are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.dtypes import size_bytes
from planner.profile import KvTerms, Tensor
from workers.checkpoint.config import ModelConfig

_EXPERTS = (".experts.", ".mlp.experts_", ".expert.")
#: Architectures whose layers keep no KV cache although nothing in their names says encoder.
_ENCODER_ONLY = ("MaskedLM", "PreTraining", "Classification", "QuestionAnswering", "ForTokenClassification")
_ENCODER_TYPES = ("bert", "electra", "mpnet", "vit", "clip", "siglip", "deit", "swin", "dino", "esm", "nomic")

Terms = tuple[float, float, float]


def keeps_cache(layer_type: str, config: ModelConfig) -> bool:
    """Whether a layer of a stack stores keys and values while it generates."""
    if layer_type != "decoder":
        return False
    architecture = config.architecture or ""
    if architecture.endswith(_ENCODER_ONLY):
        return False
    return "Causal" in architecture or not any(word in (config.model_type or "") for word in _ENCODER_TYPES)


def expert_share(config: ModelConfig) -> float:
    """The part of its expert parameters that one token passes through."""
    experts = config.number(
        "num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_moe_experts"
    )
    chosen = config.number("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")
    if not experts or not chosen or chosen > experts:
        return 1.0
    return chosen / experts


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    return any(word in name for word in _EXPERTS) and "shared" not in name


def layer_terms(
    layer_type: str, tensors: Sequence[Tensor], values: Sequence[int], config: ModelConfig, *, tied_values: int
) -> Terms:
    """FLOP of a layer as [c0, c1, c2]: 2 × active matrix parameters × tokens, and the attention scores.

    Args:
        layer_type: As `Layer.layer_type`.
        tensors: The layer's.
        values: Parameters that each of them holds.
        config: The checkpoint's.
        tied_values: Parameters of a head that are stored elsewhere.
    """
    if layer_type in {"embedding", "unused"}:
        return (0.0, 0.0, 0.0)
    share = expert_share(config)
    active = sum(
        count * (share if is_expert(tensor.name) else 1.0)
        for tensor, count in zip(tensors, values, strict=True)
        if len(tensor.shape) > 1
    )
    scores = 0.0
    if layer_type not in {"head", "norm", "projector"}:
        heads = config.number("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads") or 0
        scores = 4.0 * heads * _head_dim(config, heads)
    return (0.0, 2.0 * (active + tied_values), scores)


def _head_dim(config: ModelConfig, heads: int) -> float:
    given = config.number("head_dim", "v_head_dim")
    if given:
        rope, nope = config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim")
        return (given + rope + nope) / 2 if rope and nope and config.number("v_head_dim") else float(given)
    hidden = config.number("hidden_size", "n_embd", "d_model", "dim")
    return hidden / heads if hidden and heads else 0.0


def kv_terms(number: int, config: ModelConfig, dtype: str) -> KvTerms | None:
    """KV cache of one decoder layer by the usual fields; None where they are missing.

    Args:
        number: The layer's number in its stack.
        config: The checkpoint's.
        dtype: Of the cached values.
    """
    heads = config.number("num_attention_heads", "n_head", "num_heads", "n_heads")
    if not heads:
        return None
    latent, rope = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    if latent and rope:
        per_token = latent + rope
    else:
        groups = config.number("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
        if config.flag("multi_query"):
            groups = 1
        per_token = round(2 * groups * _head_dim(config, heads))
    kinds = config.text.get("layer_types")
    kind = kinds[number] if isinstance(kinds, list) and number < len(kinds) else None
    if kind is not None and "attention" in str(kind) and "linear" in str(kind):
        return None
    window = config.number("sliding_window")
    slides = kind == "sliding_attention" if kind is not None else config.flag("use_sliding_window") is not False
    return KvTerms(
        bytes_per_token=size_bytes((per_token,), dtype) or per_token * 2,
        window_tokens=window if window and slides else None,
    )


def hidden_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of one token's hidden state, 0 where the config does not say."""
    hidden = config.number("hidden_size", "n_embd", "d_model", "dim") or 0
    return size_bytes((hidden,), dtype) or hidden * 2
