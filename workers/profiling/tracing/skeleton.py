"""Builds a model without weights: transformers' own class for a config, on the meta device, at full size.

Only classes that transformers itself ships are used; code of a repository is never run.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from workers.checkpoint.config import QUANTIZATION, ModelConfig

#: Tried in this order where `architectures` names no class that transformers has.
_FALLBACKS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_MAPPING",
)


class NotTraceable(Exception):
    """Why a model cannot be counted exactly; the text becomes an entry of `ModelProfile.approximate`."""

    #: Parameters that each stored tensor holds, as far as the model that cannot be run tells.
    known: Mapping[str, int] = {}
    #: The model's tensors that the checkpoint lacks; None: not known.
    missing: tuple[str, ...] | None = None


def build(config: ModelConfig) -> PreTrainedModel:
    """The model that `config` describes, on the meta device, in evaluation mode.

    Raises:
        NotTraceable: If transformers has no code of its own for it, or that code refuses the config.
    """
    model_type = config.model_type
    if model_type is None:
        raise NotTraceable("config.json names no model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        remote = " (its own code is never run)" if "auto_map" in config.values else ""
        raise NotTraceable(f"transformers {transformers.__version__} does not know model_type {model_type!r}{remote}")
    with quiet():
        try:
            return _build(config, model_type)
        except NotTraceable:
            raise
        except Exception as error:
            raise NotTraceable(f"transformers cannot build the model: {first_line(error)}") from error


def _build(config: ModelConfig, model_type: str) -> PreTrainedModel:
    values = {
        key: value
        for key, value in config.values.items()
        if key not in {"model_type", *QUANTIZATION, "auto_map", "_attn_implementation", "attn_implementation"}
    }
    described = transformers.CONFIG_MAPPING[model_type].from_dict(values)
    model_class = _model_class(config, described)
    with torch.device("meta"), init.no_init_weights():
        # `from_config` of the auto classes would look for the repository's own code first.
        make: Any = model_class._from_config  # noqa: SLF001
        model: PreTrainedModel = make(described, attn_implementation="eager", experts_implementation="batched_mm")
    # Without initial weights transformers leaves out the tying, too.
    model.tie_weights(recompute_mapping=False)
    for module in model.modules():
        module.__dict__["training"] = False
    return model


def _model_class(config: ModelConfig, described: PretrainedConfig) -> type[PreTrainedModel]:
    if config.architecture is not None:
        found = getattr(transformers, config.architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if "auto_map" in config.values and config.architecture is not None:
        raise NotTraceable(f"{config.architecture} is code of the repository, which is never run")
    for name in _FALLBACKS:
        mapping = getattr(transformers.models.auto.modeling_auto, name)
        if type(described) in mapping:
            found = mapping[type(described)]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
    raise NotTraceable(f"transformers has no model class for {config.architecture or config.model_type}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice about configs and missing kernels; what matters raises."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def first_line(error: Exception) -> str:
    """An error's kind and first line, with the next where it ends in a colon; short enough for a reason."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{first} {rest[0]}" if first.endswith(":") and rest else first
    return f"{type(error).__name__}: {text[:240]}"
