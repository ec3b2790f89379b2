"""How many parameters a stored tensor holds where the model's modules are not known: a number only if it is certain.

Where they are known, one rule counts every packing (`workers.profiling.tracing.places`). Here names and shapes must
tell the width of a packed value, as those of the packings that most repositories have do. Scales, zero points and the
like hold no parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from planner.profile import Tensor

#: Suffixes of what lies beside a weight `X`: `X.absmax` of bitsandbytes, `X_scale` of compressed-tensors, ...
_BESIDE_WEIGHT = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", "_scale", "_scale_inv", "_scale_2", "_scales",
    "_zero_point", "_shape", "_g_idx", "_global_scale", "_format",
)  # fmt: skip
#: Names of what lies beside a module's weight: `M.SCB`, `M.scales`, ...
_BESIDE_MODULE = {
    "qzeros", "scales", "g_idx", "SCB", "weight_format", "input_scale", "output_scale", "input_global_scale",
    "input_zero_point", "output_zero_point", "k_scale", "v_scale", "q_scale", "activation_scale", "scb",
    "input_scale_ub", "pre_quant_scale", "qscale_weight", "qscale_act",
}  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64"}
_SMALL = {"F8_E4M3", "F8_E5M2", "I8", "U8", "F4"}
#: Integers that may pack values.
_WORDS = {"I8", "U8", "I16", "U16", "I32", "U32", "F4"}
#: Stored names of a module's packed weight, beside the plain `weight`.
_PACKED = ("qweight", "weight_packed")
#: Methods whose packing names and shapes tell in full.
_KNOWN = {
    "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "fp8", "fbgemm_fp8", "modelopt", "bitnet",
    "auto-round", "intel/auto-round", "eetq",
}  # fmt: skip


def stored_counts(tensors: Iterable[Tensor], quantization: Mapping[str, Any]) -> dict[str, int | None]:
    """The values that each tensor holds, by its name: 0 for what lies beside a weight, None where it is not certain.

    Args:
        tensors: Of the whole checkpoint.
        quantization: What the config says of its packing, empty if it says nothing.
    """
    found = {tensor.name: tensor for tensor in tensors}
    if not quantization and not any(tensor.dtype in _WORDS or tensor.dtype in _SMALL for tensor in found.values()):
        return {name: prod(tensor.shape) for name, tensor in found.items()}
    states = {name.partition(".quant_state.")[0] for name in found if ".quant_state." in name}
    method = str(quantization.get("quant_method", ""))
    told = not quantization or method in _KNOWN
    width = _width_stated(quantization)
    counts = {name: _count(tensor, found, states, width, method) for name, tensor in found.items()}
    # Beside a packed weight, what is not known to be no weight makes the whole module unsure.
    packed = {_module(name) for name, tensor in found.items() if tensor.dtype in _WORDS | _SMALL}
    strange = {name for name, tensor in found.items() if not _plain(name) and (tensor.dtype in _FLOATS or not told)}
    unsure = {_module(name) for name, count in counts.items()
              if count is None or (count and name in strange and (not told or _module(name) in packed))}  # fmt: skip
    return {name: None if _module(name) in unsure and count != 0 else count for name, count in counts.items()}


def about(tensor: Tensor, quantization: Mapping[str, Any]) -> int:
    """The values that a tensor of an unknown packing may hold, for costs that are estimates anyway."""
    if tensor.dtype in _FLOATS:
        return 0
    return tensor.size_bytes * 8 // (_width_stated(quantization) or 4)


def _module(name: str) -> str:
    """The module that a tensor lies in; what a library puts below `weight` counts as its module's."""
    path, _, last = name.rpartition(".")
    return name.partition(".weight.")[0] if ".weight." in name else path or last


def _plain(name: str) -> bool:
    return name.endswith((".weight", ".bias", "_bias"))


def _width_stated(quantization: Mapping[str, Any]) -> int | None:
    """The bits of a packed value if the config states one width for all of them, else None."""
    groups = quantization.get("config_groups")
    weights = [group.get("weights") for group in (groups.values() if isinstance(groups, dict) else ())
               if isinstance(group, dict)]  # fmt: skip
    stated = [each.get("num_bits") for each in weights if isinstance(each, dict)]
    stated += [quantization.get(name) for name in ("bits", "w_bit")]
    widths = {bits for bits in stated if type(bits) is int and 1 <= bits <= 32}
    return next(iter(widths)) if len(widths) == 1 else None


def _width(packed: Tensor, module: str, found: Mapping[str, Tensor]) -> int | None:
    """Bits of the values in a packed weight where its companions' shapes tell them."""
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
    return None


def _count(
    tensor: Tensor, found: Mapping[str, Tensor], states: set[str], stated: int | None, method: str
) -> int | None:
    name, count = tensor.name, prod(tensor.shape)
    module, _, last = name.rpartition(".")
    if last in _PACKED:
        if tensor.dtype != "I32":
            return count * 2 if tensor.dtype == "U8" else None
        width = _width(tensor, module, found)
        # How rows are padded that do not fill a word, and what sparse forms leave out, no header says.
        if width is None and stated and 32 % stated == 0 and f"{module}.meta" not in found:
            width = stated
        return count * 32 // width if width else None
    if name.endswith("_blocks") and f"{name[:-7]}_scales" in found:
        return count * 2
    if (name.endswith("_scales") and f"{name[:-7]}_blocks" in found) or ".quant_state." in name:
        return 0
    if name in states:  # of bitsandbytes, 4 bits a value, stored as any dtype
        return tensor.size_bytes * 2
    if (rest := _beside_or(tensor, found, count)) == 0 or tensor.dtype not in _WORDS:
        return rest
    if tensor.dtype == "U8" and f"{name}_scale_2" in found:
        return count * 2
    if tensor.dtype == "U8" and method == "bitnet" and last == "weight":
        return count * 4
    if tensor.dtype == "I8" and method == "fp8" and (f"{module}.scale" in found or f"{name}_scale_inv" in found):
        return count * 2  # of FP4, two in a byte
    if tensor.dtype == "I8" and method in {"bitsandbytes", "eetq", "compressed-tensors"}:
        return count
    return 0 if len(tensor.shape) < 2 else None


def _beside_or(tensor: Tensor, found: Mapping[str, Tensor], count: int) -> int:
    """0 if the tensor lies beside a weight, else `count`."""
    name = tensor.name
    module, _, last = name.rpartition(".")
    for suffix in _BESIDE_WEIGHT:
        base = name.removesuffix(suffix)
        if base != name and (base in found or f"{base}_packed" in found):
            return 0
    of_weight = any(f"{module}.{stored}" in found for stored in ("weight", *_PACKED))
    if last in {"k_scale", "v_scale", "q_scale"} or (last in _BESIDE_MODULE and of_weight):
        return 0
    # Models have scales of their own, too, but none beside a weight of a byte or less a value.
    weight = found.get(f"{module}.weight")
    return 0 if last == "scale" and weight is not None and weight.dtype in _SMALL else count
