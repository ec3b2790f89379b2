"""How many parameters a stored tensor really holds, when a quantisation packed them.

A packed tensor counts the values it encodes; scales, zero points and the like are overhead: bytes, no parameters.
The formats are told by the suffixes that their writers use, so that no quantisation library is needed.
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
}  # fmt: skip
#: Stored names of a module's packed weight, beside the plain `weight`.
_PACKED = ("qweight", "weight_packed")
#: Methods whose packing the suffixes below tell in full.
_KNOWN = {
    "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "fp8", "fbgemm_fp8", "modelopt", "bitnet",
    "auto-round", "intel/auto-round", "eetq", "quanto",
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
    return method if method and method not in _KNOWN else None


def _hints(name: str) -> bool:
    return name.endswith((".qweight", ".weight_packed", "_blocks", ".SCB", "_scale_inv")) or ".quant_state." in name


def _bits(quantization: Mapping[str, Any]) -> int:
    """Bits of a packed weight; 4 where the config does not say."""
    places: list[Any] = [quantization.get("bits"), quantization.get("w_bit")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        places.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return next((bits for bits in places if isinstance(bits, int) and 1 <= bits <= 32), 4)


def _stored(tensor: Tensor, found: Mapping[str, Tensor], states: set[str], bits: int, method: str) -> Stored:
    name, count = tensor.name, prod(tensor.shape)
    module, _, last = name.rpartition(".")
    if last in _PACKED:
        per_value = 32 if tensor.dtype == "I32" else 8
        width = bits if tensor.dtype == "I32" else 4
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
    if tensor.dtype == "U8":
        if name in states or f"{name}_scale_2" in found:
            return Stored(name, count * 2)
        if method == "bitnet" and last == "weight":
            return Stored(name, count * 4)
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
    return None
