"""What the names of weight files say: the loader's own names, variants, adapters."""

from __future__ import annotations

import re

#: In the order in which transformers' loader looks for them; each may have an index instead.
PLAIN = ("model.safetensors", "pytorch_model.bin")
#: `model.bf16.safetensors`, `model.safetensors.index.bf16.json`, as `save_pretrained(variant="bf16")` writes them,
#: and their shards, which either of two conventions names
#: (`model.bf16-00001-of-00002`, `model-00001-of-00002.bf16`).
_NUMBER = r"-\d{5}-of-\d{5}"
_VARIANT = r"(?P<variant>[A-Za-z0-9_][A-Za-z0-9_-]*?)"
_VARIANTS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?:model|pytorch_model)\.{_VARIANT}(?P<number>{_NUMBER})?\.(?:safetensors|bin)",
        rf"(?:model|pytorch_model)(?P<number>{_NUMBER})\.{_VARIANT}\.(?:safetensors|bin)",
        rf"(?:model\.safetensors|pytorch_model\.bin)\.index\.{_VARIANT}(?P<number>)\.json",
    )
)


def variant_of(name: str) -> str | None:
    """The variant that a weight file or index of a folder is of, or None."""
    for pattern in _VARIANTS:
        match = pattern.fullmatch(name)
        if match:
            return match["variant"]
    return None


def plain_name(name: str) -> str:
    """What the loader calls a variant's file where no variant is asked for; its shards keep their names."""
    variant = variant_of(name)
    for plain in PLAIN:
        stem, suffix = plain.rsplit(".", 1)
        if name == f"{stem}.{variant}.{suffix}":
            return plain
        if name == f"{plain}.index.{variant}.json":
            return f"{plain}.index.json"
    return name


def is_adapter(name: str) -> bool:
    """Whether it is a weight file of an adapter, not of a model."""
    return name.startswith(("adapter_model", "adapter.")) or "lora_weights" in name
