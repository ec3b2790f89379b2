"""How many bits a value of a named dtype takes, by safetensors' names and torch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "I4": 4, "U4": 4,
}  # fmt: skip

#: torch's name -> safetensors' name.
_TORCH = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "int": "I32", "uint64": "U64", "int64": "I64", "long": "I64", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "float32": "F32", "float": "F32", "float64": "F64", "double": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float4_e2m1fn_x2": "F4",
}  # fmt: skip


#: Bits that a value takes, by safetensors' own name of the dtype.
SAFETENSORS_BITS: Mapping[str, int] = _BITS


def bits(name: str) -> int | None:
    """Bits that a value takes, by safetensors' own name of the dtype; None if it is not known."""
    return _BITS.get(name)


def canonical(dtype: str) -> str | None:
    """Safetensors' name of `dtype` ("torch.bfloat16", "bfloat16", "BF16"), or None if it is not known."""
    name = dtype.removeprefix("torch.")
    return name if name in _BITS else _TORCH.get(name.lower())


def size_bytes(shape: Sequence[int], dtype: str) -> int | None:
    """Bytes of a dense tensor, or None if the dtype is not known."""
    name = canonical(dtype)
    return None if name is None else -(-prod(shape) * _BITS[name] // 8)
