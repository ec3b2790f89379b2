"""Which part of a layer a module belongs to (attention, MLP, router, ...), by its name."""

from __future__ import annotations

import re
from functools import lru_cache

_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("cross_attention", re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)),
    ("router", re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")),
    ("shared_experts", re.compile(r"shared_expert|shared_mlp")),
    ("experts", re.compile(r"(^|\.)experts(\.|$)")),
    ("state_space", re.compile(r"(^|\.)(mixer|mamba|ssm|linear_attn|temporal_block|mamba_decoder)(\.|$)")),
    ("norm", re.compile(r"(norm|(^|\.)ln_?\w*)$", re.IGNORECASE)),
    (
        "attention",
        re.compile(
            r"attn|attention|(^|\.)(q|k|v|o|out|query|key|value|qkv|c_attn)_?(proj|lin)?(\.|$)", re.IGNORECASE
        ),
    ),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_forward|feedforward|fc\d|densereludense|intermediate|output|dense|moe", re.IGNORECASE
        ),
    ),
)
#: Layers outside the stacks are one part each.
_WHOLE = {"embedding", "head", "norm", "projector"}


@lru_cache(maxsize=4096)
def part_of(path: str, layer_type: str) -> str:
    """The sub-part of a layer that the module at `path` (within the layer) belongs to."""
    if layer_type in _WHOLE:
        return layer_type
    for part, pattern in _RULES:
        if pattern.search(path):
            return part
    return "other"
