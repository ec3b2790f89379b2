"""What a decoder layer keeps for each sequence, from its tensors' names and shapes and what the config plainly says.

It is exact where it answers: attention by its projections' shapes, latent attention, convolutions and recurrences by
theirs. Whatever it does not recognise, or what the config leaves open, is not known, and then it gives no figure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from planner.dtypes import size_bytes
from planner.profile import KvTerms, Tensor
from workers.checkpoint.config import ModelConfig
from workers.profiling.rules import HEADS, head_dim

#: Attention to another sequence, compressed or indexed keys, decays of recurrences that are not counted here.
_FOREIGN = re.compile(
    r"encoder_attn|EncDec|cross|indexer|compress|time_|rg_lru|lru\b|slope|decay|retention|sconv|conv_step|memory_",
    re.IGNORECASE,
)
_KEYS = re.compile(r"(?P<at>.*?\b)(?:k_proj|key_proj|key|wk|k_lin)\.(?P<leaf>\w+)")
_FUSED = re.compile(
    r"(?P<at>.*?\b)(?:qkv_proj|qkv|query_key_value|c_attn|Wqkv|wqkv|W_pack|att_proj|in_proj_qkv)\.(?P<leaf>\w+)"
)
_LATENT = re.compile(r"(?P<at>.*?\b)(?:kv_a_proj_with_mqa|kv_a_proj)\.(?P<leaf>\w+)")
_VALUE_OF = {"k_proj": "v_proj", "key_proj": "value_proj", "key": "value", "wk": "wv", "k_lin": "v_lin"}
#: What a layer consists of that keeps nothing.
_STATELESS = re.compile(
    r"mlp|ffn|feed_forward|expert|moe|norm|gate|router|(?:^|\.)ln|fc\d|dense|up_proj|down_proj|bias$|scale|residual"
)
_RECURRENT = re.compile(r"A_log|dt_|conv|linear_attn|mamba|mixer\.D$|ssm|delta")
_WHOLE = {"full_attention", "attention", "global", "global_attention", "full", "hybrid"}
_SLIDING = {"sliding_attention", "sliding", "local", "local_attention", "hybrid_sliding", "sliding_window"}
#: Architectures that slide in every layer, whose configs therefore name no layer types.
ALL_SLIDE = frozenset(
    {
        "ministral3", "mistral", "mixtral", "phi3", "phi4_multimodal", "phimoe", "qwen3_moe", "qwen3_omni_moe_text",
        "qwen3_vl_moe_text", "starcoder2",
    }
)  # fmt: skip
_PLAIN = {"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"}


class NotKnown(Exception):
    """Why the cache of a layer is not known, in a few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """A decoder layer's tensors by their names within it."""

    number: int
    tensors: Mapping[str, Tensor]

    def attentions(self) -> int:
        """How many attentions it has."""
        return len({match["at"] for name in self.tensors for rule in (_KEYS, _FUSED, _LATENT)
                    if (match := rule.fullmatch(name))})  # fmt: skip


def cache_terms(layer: LayerTensors, config: ModelConfig, *, dtype: str, kv_dtype: str) -> KvTerms | None:
    """The cache of a decoder layer; None where it keeps nothing.

    Args:
        layer: The layer.
        config: The checkpoint's.
        dtype: That the model computes in.
        kv_dtype: Of the cached keys and values.

    Raises:
        NotKnown: If it does not follow from all this.
    """
    foreign = next((name for name in layer.tensors if _FOREIGN.search(name)), None)
    if foreign is not None:
        raise NotKnown(f"{foreign} keeps something that the rule does not know")
    values = 0 if _shared(layer, config) else _attention_values(layer, config)
    fixed = _state_bytes(layer, config, dtype)
    if not values and not fixed:
        odd = next((name for name in layer.tensors if not _STATELESS.search(name)), None)
        if odd is not None and not _shared(layer, config):
            raise NotKnown(f"{odd} is nothing that the rule knows")
        return None
    kind = _kind(layer.number, config)
    if fixed and not values:
        window = None
    elif kind is None or kind in _WHOLE | _SLIDING | {"chunked_attention"}:
        window = _window(kind, layer.number, config)
    else:
        raise NotKnown(f"layers of type {kind!r} keep something that the rule does not know")
    return KvTerms(
        fixed_bytes=fixed, bytes_per_token=size_bytes((values,), kv_dtype) or values * 2, window_tokens=window
    )


def _kind(number: int, config: ModelConfig) -> str | None:
    for name in ("layer_types", "layers_block_type"):
        kinds = config.text.get(name)
        if isinstance(kinds, list) and number < len(kinds):
            return str(kinds[number])
    return None


def _shared(layer: LayerTensors, config: ModelConfig) -> bool:
    """Whether the layer uses the keys and values of an earlier one."""
    modes = config.text.get("kv_sharing_modes")
    if isinstance(modes, list) and layer.number < len(modes):
        return bool(modes[layer.number] == "reuse")
    shared = config.number("num_kv_shared_layers") or 0
    layers = config.number("num_hidden_layers", "num_layers", "n_layer", "n_layers") or 0
    return shared > 0 and layer.number >= layers - shared


def _window(kind: str | None, number: int, config: ModelConfig) -> int | None:
    """Tokens that the layer keeps; None: all.

    transformers drops the oldest so that, with the next token, the window is full.
    """
    chunk = config.number("attention_chunk_size")
    window = config.number("sliding_window", "sliding_window_size", "attention_window_size")
    if kind in _WHOLE:
        return None
    if kind is not None:
        size = chunk if kind == "chunked_attention" else window
        if not size:
            raise NotKnown(f"the config names no window of its {kind} layers")
        return size - 1
    if chunk:
        raise NotKnown("the config does not say which layers attend in chunks")
    if not window or config.flag("use_sliding_window") is False:
        return None
    pattern = config.number("sliding_window_pattern", "_sliding_window_pattern")
    if pattern:
        return window - 1 if (number + 1) % pattern else None
    if config.text.get("model_type", config.model_type) in ALL_SLIDE:
        return window - 1
    raise NotKnown("the config does not say which layers slide")


def _attention_values(layer: LayerTensors, config: ModelConfig) -> int:
    """Keys and values of one token, in numbers."""
    total = 0
    seen: set[str] = set()
    # A weight's own shape tells more than those of its scales.
    for name, tensor in sorted(layer.tensors.items(), key=lambda item: not item[0].endswith(".weight")):
        for rule, count in ((_LATENT, _latent), (_KEYS, _split), (_FUSED, _fused)):
            match = rule.fullmatch(name)
            if match is None or match["leaf"] in {"bias", "scale"} or match["at"] in seen:
                continue
            if _RECURRENT.search(name):
                break
            seen.add(match["at"])
            total += count(layer, name, tensor, config)
            break
    return total


def _latent(_: LayerTensors, name: str, tensor: Tensor, config: ModelConfig) -> int:
    latent, rope = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    plain = name.endswith(".weight") and _is_plain(tensor)
    if not latent or not rope or (plain and tensor.shape[0] != latent + rope):
        raise NotKnown("the config does not size its latent attention")
    return latent + rope


def _split(layer: LayerTensors, name: str, tensor: Tensor, config: ModelConfig) -> int:
    """Keys and values of projections of their own."""
    path, _, leaf = name.rpartition(".")
    above, dot, last = path.rpartition(".")
    value = layer.tensors.get(f"{above}{dot}{_VALUE_OF.get(last, '')}.{leaf}")
    if value is None:
        raise NotKnown(f"{name} has no values beside it")
    if leaf == "weight" and _is_plain(tensor) and _is_plain(value):
        return tensor.shape[0] + value.shape[0]
    return 2 * _groups(config)[0] * _dim(config)


def _fused(_: LayerTensors, name: str, tensor: Tensor, config: ModelConfig) -> int:
    """Keys and values of a projection that makes the queries as well."""
    heads, size = config.number(*HEADS) or 0, _dim(config)
    for groups in _groups(config):
        if not (name.endswith(".weight") and _is_plain(tensor)) or (heads + 2 * groups) * size in tensor.shape:
            return 2 * groups * size
    raise NotKnown(f"{name} has another size than the config's heads")


def _groups(config: ModelConfig) -> list[int]:
    """How many heads keys may have, as the config says first."""
    heads = config.number(*HEADS)
    if not heads:
        raise NotKnown("the config does not say how many heads there are")
    found = config.number("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_groups")
    return [1, heads] if config.flag("multi_query") else [found or heads, heads]


def _dim(config: ModelConfig) -> int:
    odd = next((name for name in ("global_head_dim", "v_head_dim") if config.number(name)), None)
    size = head_dim(config, config.number(*HEADS) or 0)
    if odd is not None or not size or size != int(size):
        raise NotKnown(f"the config does not give heads one size{f': {odd}' if odd else ''}")
    return int(size)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its shape is that of the weight itself, and not of what it is packed in."""
    return tensor.dtype in _PLAIN and len(tensor.shape) == 2


def _state_bytes(layer: LayerTensors, config: ModelConfig, dtype: str) -> int:
    """Bytes of convolution and recurrent states; these are kept in float32 whatever the model's dtype."""
    recurrent = {name: tensor for name, tensor in layer.tensors.items() if _RECURRENT.search(name)}
    if not recurrent:
        return 0
    weights = [tensor for name, tensor in recurrent.items() if re.search(r"conv(?:1d)?\.weight$", name)]
    if not weights or any(len(tensor.shape) != 3 or tensor.shape[1] != 1 for tensor in weights):
        raise NotKnown(f"{next(iter(recurrent))} is of a recurrence that the rule does not know")
    conv = sum(prod(tensor.shape) for tensor in weights)
    kept = size_bytes((conv,), dtype) or conv * 2
    decays = [tensor for name, tensor in recurrent.items() if name.endswith("A_log")]
    if not decays:
        if not all(
            re.search(r"(?:^|\.)conv\.conv\.(?:weight|bias)$|conv\.(?:in|out)_proj", name) for name in recurrent
        ):
            raise NotKnown(f"{next(iter(recurrent))} is of a recurrence that the rule does not know")
        return kept
    return kept + 4 * _recurrent_values(layer, decays[0], [tensor.shape[0] for tensor in weights], config)


def _recurrent_values(layer: LayerTensors, decay: Tensor, channels: Sequence[int], config: ModelConfig) -> int:
    """Numbers of a recurrent state: Mamba's, Mamba 2's or the gated delta rule's."""
    if len(decay.shape) == 2:
        return prod(decay.shape)
    key, value = config.number("linear_key_head_dim"), config.number("linear_value_head_dim")
    keys, heads = config.number("linear_num_key_heads"), config.number("linear_num_value_heads")
    if key and value and keys and heads:
        if sum(channels) != 2 * keys * key + heads * value or prod(decay.shape) != heads:
            raise NotKnown("the sizes of its linear attention are not those of the config")
        return heads * key * value
    size = config.number("mamba_d_state", "ssm_state_size", "state_size")
    out = next((t for name, t in layer.tensors.items() if name.endswith("out_proj.weight") and _is_plain(t)), None)
    norm = next((t for name, t in layer.tensors.items() if re.search(r"(?:mamba|mixer)\.norm\.weight$", name)), None)
    inner = out.shape[1] if out is not None else norm.shape[0] if norm is not None else None
    if not size or not inner or len(channels) != 1 or (channels[0] - inner) % (2 * size) or channels[0] <= inner:
        raise NotKnown("the config does not size its recurrent state")
    return inner * size
