"""What a few operators make of meta tensors, without torch's own reference code in Python.

Half the time of a pass goes into that code for operators whose result is plain: element-wise ones (of the operands'
common shape and dtype, laid out as they are), products, means, shares, look-ups, copies, concatenations and ranges.
Everything else is left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
#: Of the operands' common dtype.
_ARITHMETIC = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar}
_ARITHMETIC |= {_aten.neg.default, _aten.silu.default, _aten.gelu.default, _aten.sigmoid.default, _aten.relu.default}
_ARITHMETIC |= {_aten.rsqrt.default, _aten.exp.default, _aten.tanh.default, _aten.cos.default, _aten.sin.default}
#: Of whole numbers as well.
_WHOLE = {_aten.add.Tensor, _aten.mul.Tensor, _aten.where.self}
_COMPARISONS = {_aten.le.Tensor, _aten.lt.Tensor, _aten.ge.Tensor, _aten.gt.Tensor, _aten.ge.Scalar, _aten.gt.Scalar}
_BITS = {_aten.bitwise_and.Tensor, _aten.bitwise_or.Tensor}
_MEAN, _CAT, _ARANGE, _WHERE = _aten.mean.dim, _aten.cat.default, _aten.arange.default, _aten.where.self
_SHARES, _LOOK_UP = _aten._softmax.default, _aten.embedding.default  # noqa: SLF001 (the operator's name)
_PRODUCTS = {_aten.mm.default, _aten.bmm.default}
_COPIES = {_aten.clone.default, _aten._to_copy.default}  # noqa: SLF001
_INDEX, _RESHAPED = _aten.index.Tensor, _aten._unsafe_view.default  # noqa: SLF001
_META = torch.device("meta")
_ELEMENTWISE = _ARITHMETIC | _COMPARISONS | _BITS | {_WHERE}
# By identity: torch hashes an operator in Python.
_OTHERS = {_MEAN, _CAT, _ARANGE, _SHARES, _LOOK_UP, _INDEX, _RESHAPED}
_KINDS = {id(func): kind for kind in (_ELEMENTWISE, _PRODUCTS, _COPIES, _OTHERS) for func in kind}


def pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The operator's result, or None where torch must tell."""
    kind = _KINDS.get(id(func))
    if kind is None:
        return None
    if func is _ARANGE:
        return _arange(args[0], kwargs)
    if kind is _COPIES:
        return _copy(args[0], **kwargs)
    if kwargs:
        return None
    if kind is _ELEMENTWISE:
        return _elementwise(func, args)
    if kind is _PRODUCTS:
        return _product(*args)
    if func is _CAT:
        return _cat(*args)
    if func is _LOOK_UP:
        return _look_up(*args[:2])
    if func is _INDEX:
        return _index(*args)
    if func is _RESHAPED:
        return args[0].view(args[1])  # type: ignore[no-any-return]
    if len(args) != 3:
        return None
    return _shares(*args) if func is _SHARES else _mean(*args)


def _elementwise(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    operands = [each for each in args if isinstance(each, Tensor)]
    if not all(each.is_meta for each in operands) or not isinstance(args[0], Tensor) or len(args) > 3:
        return None
    # What decides the dtype: not the condition of a choice.
    typed = args[1:] if func is _WHERE else args
    dtype = common = torch.result_type(*typed) if len(typed) == 2 else args[0].dtype
    if func in _COMPARISONS:
        dtype = torch.bool
    elif not (dtype is torch.bool if func in _BITS else dtype.is_floating_point or func in _WHOLE):
        return None
    shape: tuple[int, ...] | None = tuple(args[0].shape)
    plain = True
    for each in operands:
        plain = plain and each.is_contiguous()
        if shape is not None and each.shape != shape:
            shape = _broadcast(shape, tuple(each.shape))
    if shape is None:
        return None
    if plain:
        return torch.empty(shape, dtype=dtype, device="meta")
    if any(each.dtype != common and each.ndim for each in typed if isinstance(each, Tensor)):
        return None  # it is copied first, and the copy may lie otherwise
    order = _layout(shape, tuple((tuple(each.shape), each.stride()) for each in operands))
    return torch.empty_permuted(shape, order, dtype=dtype, device="meta")


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The common shape; None where there is none."""
    if len(one) < len(other):
        one, other = other, one
    shape = list(one)
    for at, size in enumerate(other, start=len(one) - len(other)):
        if shape[at] == 1:
            shape[at] = size
        elif size not in {1, shape[at]}:
            return None
    return tuple(shape)


@lru_cache(maxsize=256)
def _layout(shape: tuple[int, ...], operands: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int]:
    """Dimensions from the outermost in memory to the innermost, as torch orders an element-wise result's.

    The operands' strides decide, the first's first; a dimension along which one is repeated says nothing.
    """
    strides = []
    for sizes, steps in operands:
        missing = len(shape) - len(sizes)
        repeated = zip(sizes, steps, shape[missing:], strict=True)
        strides.append([0] * missing + [0 if size != wanted else step for size, step, wanted in repeated])
    order = list(reversed(range(len(shape))))
    for at in range(1, len(order)):
        moving = at
        for before in reversed(range(at)):
            inner, outer = order[before], order[moving]
            wrong = _inside_out(shape, strides, inner, outer)
            if wrong > 0:
                order[before], order[moving] = outer, inner
                moving = before
            elif wrong < 0:
                break
    return order[::-1]


def _inside_out(shape: tuple[int, ...], strides: Sequence[Sequence[int]], inner: int, outer: int) -> int:
    """1 if `outer` belongs inside `inner`, -1 if not, 0 if nothing tells."""
    for steps in strides:
        if not steps[inner] or not steps[outer]:
            continue
        if steps[inner] != steps[outer]:
            return 1 if steps[inner] > steps[outer] else -1
        if shape[inner] > shape[outer]:
            return 1
    return 0


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    # A cache that holds nothing yet is an empty list of numbers, of whatever it is put before.
    filled = [each for each in tensors if each.shape != (0,)]
    if not filled or not all(each.is_meta and each.dtype == filled[0].dtype for each in tensors):
        return None
    shape, total = list(filled[0].shape), 0
    for each in filled:
        sizes = list(each.shape)
        # Images whose channels are innermost in memory stay so.
        if len(sizes) != len(shape) or (len(sizes) > 3 and not _channels_outside(each)):
            return None
        total += sizes[dim]
        sizes[dim] = shape[dim]
        if sizes != shape:
            return None
    shape[dim] = total
    return torch.empty(shape, dtype=filled[0].dtype, device="meta")


def _channels_outside(tensor: Tensor) -> bool:
    return tensor.shape[1] > 1 and (tensor.is_contiguous() or tensor.stride(-1) == 1) and tensor.shape[-1] > 1


def _arange(end: Any, kwargs: dict[str, Any]) -> Tensor | None:
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    dtype = given.pop("dtype", torch.int64)
    if type(end) is not int or end < 0 or given != {"device": _META}:
        return None
    return torch.empty((end,), dtype=dtype, device="meta")


def _product(one: Tensor, other: Tensor) -> Tensor | None:
    """Of two matrices, or of several pairs."""
    sizes, others = one.shape, other.shape
    if not (one.is_meta and other.is_meta and one.dtype == other.dtype) or len(sizes) != len(others):
        return None
    if sizes[:-2] != others[:-2] or sizes[-1] != others[-2]:
        return None
    return torch.empty((*sizes[:-1], others[-1]), dtype=one.dtype, device="meta")


def _copy(
    tensor: Tensor, *, memory_format: Any = None, dtype: torch.dtype | None = None, **given: Any
) -> Tensor | None:
    """A copy, of another dtype it may be."""
    if given or not tensor.is_meta or not (memory_format is torch.contiguous_format or tensor.is_contiguous()):
        return None
    if memory_format not in {None, torch.contiguous_format, torch.preserve_format}:
        return None
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")


def _index(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    """Values by their numbers along every dimension."""
    if len(indices) != tensor.ndim or not tensor.is_meta:
        return None
    shape: tuple[int, ...] | None = ()
    for each in indices:
        if each is None or not each.is_meta or each.dtype is not torch.int64 or not each.is_contiguous():
            return None
        shape = _broadcast(shape, tuple(each.shape)) if shape is not None else None
    return None if shape is None else torch.empty(shape, dtype=tensor.dtype, device="meta")


def _look_up(table: Tensor, rows: Tensor) -> Tensor | None:
    """Rows of a table by their numbers."""
    if not (table.is_meta and rows.is_meta) or table.ndim != 2:
        return None
    return torch.empty((*rows.shape, table.shape[1]), dtype=table.dtype, device="meta")


def _shares(tensor: Tensor, dim: int, widened: bool) -> Tensor | None:
    """A softmax."""
    if widened or not (tensor.is_meta and tensor.is_contiguous() and -tensor.ndim <= dim < tensor.ndim):
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _mean(tensor: Tensor, dims: list[int], keepdim: bool) -> Tensor | None:
    if not (tensor.is_meta and tensor.is_contiguous() and tensor.is_floating_point() and dims and keepdim):
        return None
    shape = list(tensor.shape)
    for dim in dims:
        shape[dim] = 1
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
