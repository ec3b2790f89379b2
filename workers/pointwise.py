"""What a few operators make of contiguous meta tensors, without torch's own reference code in Python.

Half the time of a pass goes into that code for operators whose result is plain: element-wise ones (of the operands'
common shape, contiguous, of their common dtype) and means. Everything else is left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
#: Of the operands' common dtype.
_ARITHMETIC = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar}
_ARITHMETIC |= {_aten.neg.default, _aten.silu.default, _aten.gelu.default, _aten.sigmoid.default, _aten.relu.default}
_ARITHMETIC |= {_aten.rsqrt.default, _aten.exp.default, _aten.tanh.default, _aten.cos.default, _aten.sin.default}
_COMPARISONS = {_aten.le.Tensor, _aten.lt.Tensor, _aten.ge.Tensor, _aten.gt.Tensor, _aten.ge.Scalar, _aten.gt.Scalar}
_BITS = {_aten.bitwise_and.Tensor, _aten.bitwise_or.Tensor}
_MEAN = _aten.mean.dim
_KNOWN = _ARITHMETIC | _COMPARISONS | _BITS


def pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The operator's result, or None where torch must tell."""
    if func is _MEAN and not kwargs and len(args) == 3:
        return _mean(*args)
    if func not in _KNOWN or kwargs or len(args) > 2:
        return None
    first, *others = args
    shape, dtype = first.shape, first.dtype
    if not (first.is_meta and first.is_contiguous()):
        return None
    for other in others:
        if isinstance(other, Tensor):
            if not (other.is_meta and other.is_contiguous()):
                return None
            if other.shape != shape:
                shape = torch.broadcast_shapes(shape, other.shape)  # type: ignore[no-untyped-call]
        dtype = torch.result_type(first, other)
    if func in _COMPARISONS:
        dtype = torch.bool
    elif not (dtype.is_floating_point if func in _ARITHMETIC else dtype is torch.bool):
        return None
    return torch.empty(shape, dtype=dtype, device="meta")


def _mean(tensor: Tensor, dims: list[int], keepdim: bool) -> Tensor | None:
    if not (tensor.is_meta and tensor.is_contiguous() and tensor.is_floating_point() and dims and keepdim):
        return None
    shape = list(tensor.shape)
    for dim in dims:
        shape[dim] = 1
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
