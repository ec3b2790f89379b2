"""Inputs for a counted pass: meta tensors of the right shapes, by the names of `forward`'s arguments.

The workload is B sequences of S tokens; an encoder-decoder reads S and writes S; a model of images gets one image of
its own size for each sequence, whose tokens are among the S; a model of sound gets its full window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.profiling.tracing.skeleton import NotTraceable


def make_inputs(
    model: PreTrainedModel, batch_size: int, sequence_length: int, *, images: bool = True
) -> dict[str, Any]:
    """Keyword arguments for `model`'s forward.

    Args:
        model: On the meta device.
        batch_size: Sequences.
        sequence_length: Tokens in each.
        images: Give a model of text and images its images.

    Raises:
        NotTraceable: If the forward takes nothing that is known here.
    """
    taken = _arguments(type(model).forward)
    config = model.config
    inputs: dict[str, Any] = {}
    sequence_length = min(sequence_length, longest(model) or sequence_length)
    tokens = torch.empty(batch_size, sequence_length, dtype=torch.long, device="meta")
    if "input_ids" in taken:
        inputs["input_ids"] = tokens
        if "attention_mask" in taken:
            inputs["attention_mask"] = torch.empty_like(tokens)
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = tokens.clone()
    if "input_features" in taken and "input_ids" not in inputs:
        inputs["input_features"] = _features(config, batch_size, model.dtype)
    if "input_values" in taken and "input_ids" not in inputs:
        inputs["input_values"] = torch.zeros(batch_size, 16_000, dtype=model.dtype, device="meta")
    if "pixel_values" in taken and images:
        inputs.update(_images(model, taken, batch_size, tokens))
    if "use_cache" in taken:
        inputs["use_cache"] = True
    if not {"input_ids", "decoder_input_ids", "input_features", "input_values", "pixel_values"} & inputs.keys():
        raise NotTraceable(f"{type(model).__name__} takes no text, image or sound: {', '.join(list(taken)[:6])}")
    return inputs


@cache
def _arguments(forward: Callable[..., Any]) -> Mapping[str, Any]:
    """What a class's forward takes, by name."""
    return dict(list(inspect.signature(forward).parameters.items())[1:])


def longest(model: PreTrainedModel) -> int | None:
    """Tokens that the model takes at most; None where it refuses none.

    The text towers of dual encoders and the decoders of speech models have a table of positions and no more.
    """
    taken = _arguments(type(model).forward)
    config = model.config
    limit: int | None = None
    if "pixel_values" in taken and "decoder_input_ids" not in taken and not hasattr(model, "lm_head"):
        limit = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)
    elif "input_features" in taken:
        limit = getattr(config, "max_target_positions", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _features(config: Any, batch_size: int, dtype: torch.dtype) -> Tensor:
    """A spectrogram of the encoder's full window."""
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
    length = 2 * (getattr(config, "max_source_positions", None) or 1500)
    return torch.zeros(batch_size, bins, length, dtype=dtype, device="meta")


def _images(model: PreTrainedModel, taken: Mapping[str, Any], batch_size: int, tokens: Tensor) -> dict[str, Any]:
    """One image of the model's own size for each sequence."""
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    if "image_grid_thw" in taken:
        return _patches(vision, batch_size, model.dtype) | _positions(taken, tokens)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(vision, "num_channels", None) or 3
    pixels = torch.zeros(batch_size, channels, height, width, dtype=model.dtype, device="meta")
    if "image_sizes" in taken and config.model_type.startswith("llava_"):
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * batch_size)}
    return {"pixel_values": pixels}


def _patches(vision: Any, batch_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """An image cut into patches, for models that take any size: 448 × 448 pixels."""
    patch, frames = vision.patch_size, getattr(vision, "temporal_patch_size", 2)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    merge = getattr(vision, "spatial_merge_size", 2)
    side = 448 // patch // merge * merge
    values = channels * frames * patch * patch
    return {
        "pixel_values": torch.zeros(batch_size * side * side, values, dtype=dtype, device="meta"),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch_size),
    }


def _positions(taken: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Positions in time, height and width, which are otherwise found by looking at the tokens."""
    return (
        {"position_ids": torch.zeros(3, *tokens.shape, dtype=torch.long, device="meta")}
        if "position_ids" in taken
        else {}
    )


def positions(config: Any) -> int | None:
    """How long the config's tables of positions are."""
    for name in ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None
