"""config.json as fairshard reads it: whole, with every size checked before anything is computed from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.errors import InvalidCheckpoint
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.choice.modules import model_folder

_MAX_CONFIG_BYTES = 16_000_000
#: Fields that size a model; what must be a whole number, and at most this much, before a model is built from it.
_LIMITS = {
    "num_hidden_layers": 10_000,
    "num_layers": 10_000,
    "n_layer": 10_000,
    "n_layers": 10_000,
    "num_decoder_layers": 10_000,
    "encoder_layers": 10_000,
    "decoder_layers": 10_000,
    "hidden_size": 2**22,
    "n_embd": 2**22,
    "d_model": 2**22,
    "intermediate_size": 2**26,
    "num_attention_heads": 2**16,
    "n_head": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**20,
    "vocab_size": 2**28,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_routed_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "image_size": 2**20,
    # transformers writes a dictionary of so many names.
    "num_labels": 2**17,
}
#: The most layers, or parts that repeat as they do, under one name in all.
_MOST_REPEATED = 10_000
#: Names that count them (not: "layers_block_type", "fullatt_block_indexes").
_REPEATED = re.compile(r"(?:.*_)?(?:layers?|blocks|stages|repeats|depths?|block_sizes)")
#: Those whose lists count, too; others list which layers are of a kind.
_REPEATED_LISTS = re.compile(r"num_.*|(?:.*_)?(?:repeats|depths?|block_sizes)")
_MAY_BE_ZERO = {
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_layers",
    "num_labels",
}
#: Where configs say how their weights are packed (MLX: `quantization`).
QUANTIZATION = ("quantization_config", "quantization", "compression_config")
_ARCHITECTURE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A checked config.json."""

    #: As written; empty if the checkpoint has none.
    values: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    #: First entry of `architectures`.
    architecture: str | None = None

    @property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config` or its kin, at the top or in the language model's part; else an empty mapping."""
        places = (part.get(name) for part in (self.values, self.text) for name in QUANTIZATION)
        return next((found for found in places if isinstance(found, dict) and found), {})

    @property
    def text(self) -> Mapping[str, Any]:
        """The part that describes the language model: `text_config` or its kin, else all."""
        for name in ("text_config", "llm_config", "language_config", "thinker_config"):
            found = self.values.get(name)
            if isinstance(found, dict):
                return found
        return self.values

    def number(self, *names: str) -> int | None:
        """The first of the fields that is there as a whole number, in the language model's part or at the top."""
        for part in (self.text, self.values):
            for name in names:
                value = part.get(name)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    def flag(self, name: str) -> bool | None:
        """The field if it is there as true or false, at the top or in the language model's part."""
        for part in (self.values, self.text):
            value = part.get(name)
            if isinstance(value, bool):
                return value
        return None


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """Read and check config.json, where the model's lies; an empty one if the checkpoint has none.

    Raises:
        InvalidCheckpoint: If it is no JSON object, or a size in it is of a wrong type, negative or beyond any model.
    """
    name = f"{model_folder(checkpoint)}config.json"
    file = checkpoint.files.get(name)
    if file is None:
        return ModelConfig()
    if file.size_bytes > _MAX_CONFIG_BYTES:
        raise InvalidCheckpoint(f"config.json is {file.size_bytes:,} bytes; at most {_MAX_CONFIG_BYTES:,} are read")
    return parse_config(checkpoint.read(name))


def parse_config(data: bytes) -> ModelConfig:
    """Parse and check config.json's bytes; see `read_config`.

    Raises:
        InvalidCheckpoint: Likewise.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_hook=_special_float)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"config.json is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise InvalidCheckpoint(f"config.json must be a JSON object, got {type(values).__name__}")
    model_type = values.get("model_type")
    if model_type is not None and not (isinstance(model_type, str) and len(model_type) <= 100):
        raise InvalidCheckpoint(f"config.json: model_type must be a short text, got {str(model_type)[:80]!r}")
    for path, part in _parts(values, "", 0):
        _check_sizes(part, path)
        _check_repeated(part, path)
    return ModelConfig(values=values, model_type=model_type, architecture=_architecture(values))


def _special_float(value: dict[str, Any]) -> Any:
    """Read what transformers writes where JSON has no number: {"__float__": "Infinity"}."""
    if value.keys() == {"__float__"} and value["__float__"] in {"Infinity", "-Infinity", "NaN"}:
        return float(value["__float__"])
    return value


def _architecture(values: Mapping[str, Any]) -> str | None:
    found = values.get("architectures")
    if found is None or found == []:
        return None
    if isinstance(found, list) and isinstance(found[0], str) and _ARCHITECTURE.fullmatch(found[0]):
        return found[0]
    raise InvalidCheckpoint(f"config.json: architectures must be a list of class names, got {str(found)[:80]!r}")


def _parts(values: Mapping[str, Any], path: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and the configs nested in it, with their paths."""
    yield path, values
    for name, value in values.items():
        if isinstance(value, dict) and depth < 4 and name.endswith(("config", "cfg")):
            yield from _parts(value, f"{path}{name}.", depth + 1)


def _check_sizes(part: Mapping[str, Any], path: str) -> None:
    for name, largest in _LIMITS.items():
        value = part.get(name)
        # Some architectures state a value per layer, or one for each of their parts.
        stated = list(value.values()) if isinstance(value, dict) and value else value
        for each in stated if isinstance(stated, list) and len(stated) <= 10_000 else (value,):
            if each is None:
                continue
            least = 0 if name in _MAY_BE_ZERO else 1
            if isinstance(each, bool) or not isinstance(each, int) or not least <= each <= largest:
                raise InvalidCheckpoint(
                    f"config.json: {path}{name} must be a whole number from {least} to {largest:,}, "
                    f"got {str(each)[:60]!r}",
                    details={"field": f"{path}{name}", "smallest": least, "largest": largest},
                )


def _check_repeated(part: Mapping[str, Any], path: str) -> None:
    for name, value in part.items():
        stated = list(value.values()) if isinstance(value, dict) else value
        if not _REPEATED.fullmatch(name) or (
            isinstance(stated, list) and not (name in _LIMITS or _REPEATED_LISTS.fullmatch(name))
        ):
            continue
        total = sum(each for each in (stated if isinstance(stated, list) else [stated])
                    if isinstance(each, int) and each > 0)  # fmt: skip
        if total > _MOST_REPEATED:
            raise InvalidCheckpoint(
                f"config.json: {path}{name} must be at most {_MOST_REPEATED:,} in all, got {str(total)[:60]}",
                details={"field": f"{path}{name}", "largest": _MOST_REPEATED},
            )
