"""How many parameters a stored tensor of a quantised checkpoint holds.

A packed tensor counts as many parameters as the values that it encodes. Scales, zero points and the like are
overhead: they count as bytes only.

Formats are recognised by the suffixes of their tensors' names, without their libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from planner.profile import Tensor

#: Suffixes of overhead beside a weight `X`: `X.absmax` of bitsandbytes, `X_scale` of compressed-tensors, ...
_BESIDE_WEIGHT = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    "_scale",
    "_scale_inv",
    "_scale_2",
    "_scales",
    "_zero_point",
    "_shape",
    "_g_idx",
    "_global_scale",
    "_format",
)
#: Names of overhead beside a module's weight: `M.SCB`, `M.scales`, ...
_BESIDE_MODULE = {
    "qzeros", "scales", "g_idx", "SCB", "weight_format", "input_scale", "output_scale", "input_global_scale",
    "input_zero_point", "output_zero_point", "k_scale", "v_scale", "q_scale", "activation_scale", "scb",
    "input_scale_ub", "pre_quant_scale", "qscale_weight", "qscale_act",
}  # fmt: skip
_SMALL = {"F8_E4M3", "F8_E5M2", "I8", "U8", "F4"}
#: Stored names of a module's packed weight, beside the plain `weight`.
_PACKED = ("qweight", "weight_packed")
#: Methods whose packing the suffixes below tell in full.
_KNOWN = {
    "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "fp8", "fbgemm_fp8", "modelopt", "bitnet",
    "auto-round", "intel/auto-round", "eetq",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """What a stored tensor is to the model."""

    #: Name of the parameter that it encodes or accompanies, as an unquantised checkpoint spells it.
    logical: str
    #: Values that it encodes; 0 for overhead.
    values: int


def logical_tensors(tensors: Iterable[Tensor], quantization: Mapping[str, Any]) -> dict[str, Stored]:
    """What each tensor is, by its stored name.

    Args:
        tensors: Of the whole checkpoint.
        quantization: config.json's `quantization_config`, empty if it has none.
    """
    found = {tensor.name: tensor for tensor in tensors}
    if not quantization and not any(_hints(name) for name in found):
        return {name: Stored(name, prod(tensor.shape)) for name, tensor in found.items()}
    bits = _bits(quantization)
    method = str(quantization.get("quant_method", ""))
    states = {name.partition(".quant_state.")[0] for name in found if ".quant_state." in name}
    return {name: _stored(tensor, found, states, bits, method) for name, tensor in found.items()}


def unknown_method(quantization: Mapping[str, Any]) -> str | None:
    """The name of the quantisation if its packing is not known here, else None."""
    method = str(quantization.get("quant_method", ""))[:60] if quantization else ""
    if quantization.get("checkpoint_format") == "marlin" or quantization.get("is_marlin_format"):
        return f"{method} (marlin)"
    widths = _group_bits(quantization)
    # Which group a weight is of and how its rows are padded, no header says.
    if len(widths) > 1 or any(32 % bits for bits in widths):
        return f"{method} ({', '.join(map(str, sorted(widths)))} bits)"
    return method if method and method not in _KNOWN else None


def _hints(name: str) -> bool:
    return name.endswith((".qweight", ".weight_packed", "_blocks", ".SCB", "_scale_inv")) or ".quant_state." in name


def _bits(quantization: Mapping[str, Any]) -> int:
    """Bits of a packed weight; 4 where the config does not say."""
    places = (quantization.get("bits"), quantization.get("w_bit"), *_group_bits(quantization))
    return next((bits for bits in places if isinstance(bits, int) and 1 <= bits <= 32), 4)


def _group_bits(quantization: Mapping[str, Any]) -> set[int]:
    """The widths of weights that the groups of compressed-tensors state."""
    groups = quantization.get("config_groups")
    weights = [group.get("weights") for group in (groups.values() if isinstance(groups, dict) else ())
               if isinstance(group, dict)]  # fmt: skip
    stated = [each.get("num_bits") for each in weights if isinstance(each, dict)]
    return {bits for bits in stated if isinstance(bits, int) and 1 <= bits <= 32}


def _width(packed: Tensor, module: str, found: Mapping[str, Tensor], bits: int) -> int:
    """Bits of the values in a packed weight: its own, where its companions' shapes tell them; else `bits`."""
    scales, zeros, order = (found.get(f"{module}.{name}") for name in ("scales", "qzeros", "g_idx"))
    pairs: list[tuple[int, int]] = []
    if len(packed.shape) == 2:
        # GPTQ packs rows, one entry of g_idx for each unpacked one; zeros are packed like AWQ's columns.
        if order is not None and len(order.shape) == 1:
            pairs.append((packed.shape[0], order.shape[0]))
        if scales is not None and len(scales.shape) == 2:
            pairs.append((packed.shape[1], scales.shape[1]))
            if zeros is not None and len(zeros.shape) == 2 and scales.shape[1] == packed.shape[1]:
                pairs.append((zeros.shape[1], scales.shape[1]))
    for words, values in pairs:
        if values and words * 32 % values == 0 and 1 <= words * 32 // values <= 16:
            return words * 32 // values
    return bits


def _stored(tensor: Tensor, found: Mapping[str, Tensor], states: set[str], bits: int, method: str) -> Stored:
    name, count = tensor.name, prod(tensor.shape)
    module, _, last = name.rpartition(".")
    if last in _PACKED:
        per_value = 32 if tensor.dtype == "I32" else 8
        width = _width(tensor, module, found, bits) if tensor.dtype == "I32" else 4
        return Stored(f"{module}.weight", count * per_value // width)
    if name.endswith("_blocks") and f"{name[:-7]}_scales" in found:
        return Stored(name[:-7], count * 2)
    if name.endswith("_scales") and f"{name[:-7]}_blocks" in found:
        return Stored(name[:-7], 0)
    if ".quant_state." in name:
        return Stored(name.partition(".quant_state.")[0], 0)
    weight = _accompanied(name, module, last, found)
    if weight is not None:
        return Stored(weight, 0)
    if name in states:  # of bitsandbytes, 4 bits a value, stored as any dtype
        return Stored(name, tensor.size_bytes * 2)
    if tensor.dtype == "U8":
        if f"{name}_scale_2" in found:
            return Stored(name, count * 2)
        if method == "bitnet" and last == "weight":
            return Stored(name, count * 4)
    if tensor.dtype == "I8" and method == "fp8" and (f"{module}.scale" in found or f"{name}_scale_inv" in found):
        return Stored(name, count * 2)  # of FP4, two in a byte
    return Stored(name, count)


def _accompanied(name: str, module: str, last: str, found: Mapping[str, Tensor]) -> str | None:
    """The weight that `name` is overhead of, if it is."""
    for suffix in _BESIDE_WEIGHT:
        base = name.removesuffix(suffix)
        if base != name:
            if base in found:
                return base
            if f"{base}_packed" in found:
                return base
    if last in _BESIDE_MODULE:
        for stored in ("weight", *_PACKED):
            if f"{module}.{stored}" in found:
                return f"{module}.weight"
        if last in {"k_scale", "v_scale", "q_scale"}:
            return f"{module}.{last}"
    # Models have scales of their own, too, but none beside a weight of a byte or less a value.
    weight = found.get(f"{module}.weight")
    if last == "scale" and weight is not None and weight.dtype in _SMALL:
        return weight.name
    return None
