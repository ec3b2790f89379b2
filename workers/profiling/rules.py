"""The general rule: FLOP and KV cache from names, shapes and a few well-known config fields.

Used where there is no trace (unknown model_type, code of the repository's own, no torch). Its figures are always
marked `approximate`; parameters and bytes do not depend on it and are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.dtypes import size_bytes
from planner.profile import Tensor
from workers.checkpoint.config import ModelConfig

#: What configs call the same: names that transformers' own config classes map (`attribute_map`), and others.
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "encoder_attention_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "hidden_dim", "embed_dim", "emb_dim")
EXPERTS = (
    "num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_moe_experts",
    "num_routed_experts",
)  # fmt: skip
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
    "experts_per_token", "num_selected_experts",
)  # fmt: skip
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


def expert_counts(config: ModelConfig) -> tuple[int, int] | None:
    """How many routed experts a token passes through, and how many there are; None where the config does not say.

    Those that hand their input on (LongCat-Flash's) are chosen from as well.
    """
    experts, chosen = config.number(*EXPERTS), config.number(*CHOSEN)
    experts = experts and experts + (config.number("zero_expert_num") or 0)
    return (chosen, experts) if experts and chosen and chosen <= experts else None


def expert_share(config: ModelConfig) -> float:
    """The part of its expert parameters that one token passes through; all where that is not known."""
    counts = expert_counts(config)
    return counts[0] / counts[1] if counts else 1.0


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    return any(word in name for word in _EXPERTS) and "shared" not in name


def layer_terms(
    layer_type: str, tensors: Sequence[Tensor], values: Sequence[int], config: ModelConfig, *, attentions: int = 1
) -> Terms:
    """FLOP of a layer as [c0, c1, c2]: 2 × active matrix parameters × tokens, and the attention scores.

    Args:
        layer_type: As `Layer.layer_type`.
        tensors: The layer's.
        values: Parameters that each of them holds.
        config: The checkpoint's.
        attentions: How many of them a layer of a stack has.
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
        heads = config.number(*HEADS) or 0
        scores = 4.0 * heads * head_dim(config, heads) * attentions
    return (0.0, 2.0 * active, scores)


def head_dim(config: ModelConfig, heads: int) -> float:
    """The size of an attention head; 0 where the config does not say."""
    given = config.number("head_dim", "v_head_dim")
    if given:
        rope, nope = config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim")
        return (given + rope + nope) / 2 if rope and nope and config.number("v_head_dim") else float(given)
    hidden = config.number(*HIDDEN)
    return hidden / heads if hidden and heads else 0.0


def hidden_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of one token's hidden state, 0 where the config does not say."""
    hidden = config.number(*HIDDEN) or 0
    return size_bytes((hidden,), dtype) or hidden * 2
