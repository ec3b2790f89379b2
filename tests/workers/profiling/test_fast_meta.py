"""The short cuts for meta tensors give what torch makes of real ones: shape, dtype and layout in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from workers.profiling.tracing.fast_meta import pointwise

_aten = torch.ops.aten
_SHAPES = [(2, 3, 4, 5), (2, 3, 1, 5), (1, 3, 4, 5), (4, 5), (4, 1), (1,), (), (3, 3, 3, 3), (2, 1, 4, 1), (2, 2, 3)]
_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A meta tensor: contiguous, permuted, cut out of a larger one, or repeated along a dimension."""
    sizes = shape if shape is not None else draw(st.sampled_from(_SHAPES))
    kind = dtype or draw(st.sampled_from(_DTYPES))
    order = draw(st.permutations(range(len(sizes))))
    step = draw(st.integers(1, 2))
    inner = [sizes[at] * step if place == len(sizes) - 1 else sizes[at] for place, at in enumerate(order)]
    whole = torch.empty(inner, dtype=kind, device="meta")[..., ::step] if sizes else torch.empty((), device="meta")
    made = whole.permute([order.index(at) for at in range(len(sizes))]).to(kind)
    return made.expand(sizes) if draw(st.booleans()) else made[:1].expand(sizes) if sizes else made


def real(value: Any) -> Any:
    """The like of it with data. (torch's own code for meta tensors lays repeated operands out otherwise.)"""
    if isinstance(value, list):
        return [real(each) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def same(func: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether there was a short cut; it is what torch gives."""
    short = pointwise(func, args, kwargs)
    if short is None:
        return False
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    wanted = func(*(real(each) for each in args), **kwargs)
    assert (short.shape, short.dtype, short.is_meta) == (wanted.shape, wanted.dtype, True)
    # A step along a dimension of one is never taken.
    steps = zip(wanted.shape, short.stride(), wanted.stride(), strict=True)
    assert all(mine == its for size, mine, its in steps if size > 1)
    return True


@settings(max_examples=300, deadline=None)
@given(
    func=st.sampled_from([_aten.add.Tensor, _aten.mul.Tensor, _aten.sub.Tensor, _aten.div.Tensor, _aten.le.Tensor]),
    one=tensors(),
    other=st.one_of(tensors(), st.sampled_from([2, 0.5])),
)
def test_of_two_operands(func: Any, one: torch.Tensor, other: Any) -> None:
    assume(isinstance(other, torch.Tensor) or func is not _aten.le.Tensor)
    try:
        func(real(one), real(other))
    except RuntimeError:
        # Their shapes don't fit; or torch refuses to subtract truths, which no model that runs does.
        assert pointwise(func, (one, other), {}) is None or func is _aten.sub.Tensor
        return
    same(func, one, other)


@settings(max_examples=100, deadline=None)
@given(func=st.sampled_from([_aten.neg.default, _aten.silu.default, _aten.exp.default]), one=tensors())
def test_of_one_operand(func: Any, one: torch.Tensor) -> None:
    assert same(func, one) or not one.is_floating_point()


@settings(max_examples=100, deadline=None)
@given(condition=tensors(dtype=torch.bool), one=tensors(), other=tensors())
def test_choices(condition: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    try:
        real(condition) | real(one).bool() | real(other).bool()
    except RuntimeError:
        assert pointwise(_aten.where.self, (condition, one, other), {}) is None
        return
    same(_aten.where.self, condition, one, other)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=st.sampled_from(_SHAPES[:6]), dim=st.integers(-1, 1))
def test_concatenations(data: st.DataObject, shape: tuple[int, ...], dim: int) -> None:
    dim = min(dim, len(shape) - 1)
    parts = [data.draw(tensors(shape=shape, dtype=torch.float32)) for _ in range(2)]
    same(_aten.cat.default, parts, dim)
    assert same(_aten.cat.default, [torch.empty(0, device="meta"), torch.empty(shape, device="meta")], dim)


@pytest.mark.parametrize("kwargs", [{}, {"dtype": torch.float32}, {"dtype": torch.int32, "pin_memory": False}])
def test_ranges(kwargs: dict[str, Any]) -> None:
    assert same(_aten.arange.default, 7, device=torch.device("meta"), **kwargs)
    assert pointwise(_aten.arange.default, (7,), kwargs) is None
    assert pointwise(_aten.arange.default, (7.5,), {"device": torch.device("meta")}) is None


def test_what_does_not_fit_is_left_to_torch_to_refuse() -> None:
    one, other = torch.empty(2, 3, device="meta"), torch.empty(2, 4, device="meta")
    assert pointwise(_aten.add.Tensor, (one, other), {}) is None
    assert pointwise(_aten.cat.default, ([one, other],), {}) is None
    assert pointwise(_aten.add.Tensor, (torch.ones(2), one), {}) is None


@settings(max_examples=100, deadline=None)
@given(data=st.data(), batch=st.sampled_from([(), (2,)]))
def test_products(data: st.DataObject, batch: tuple[int, ...]) -> None:
    func = _aten.bmm.default if batch else _aten.mm.default
    one = data.draw(tensors(shape=(*batch, 3, 4), dtype=torch.float32))
    assert same(func, one, data.draw(tensors(shape=(*batch, 4, 5), dtype=torch.float32)))
    assert pointwise(func, (one, data.draw(tensors(shape=(*batch, 3, 5), dtype=torch.float32))), {}) is None
    assert pointwise(func, (one, data.draw(tensors(shape=(*batch, 4, 5), dtype=torch.bfloat16))), {}) is None


@settings(max_examples=50, deadline=None)
@given(one=tensors(dtype=torch.float32), dim=st.integers(-1, 3))
def test_shares(one: torch.Tensor, dim: int) -> None:
    if -one.ndim <= dim < one.ndim:
        assert same(_aten._softmax.default, one, dim, False) or not one.is_contiguous()
    else:
        assert pointwise(_aten._softmax.default, (one, dim, False), {}) is None
    assert pointwise(_aten._softmax.default, (one, dim, True), {}) is None


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_look_ups(shape: tuple[int, ...]) -> None:
    short = pointwise(_aten.embedding.default, tuple(torch.empty(s, device="meta") for s in ((7, 5), shape)), {})
    wanted = _aten.embedding.default(torch.empty(7, 5), torch.zeros(shape, dtype=torch.long))
    assert short is not None
    assert (short.shape, short.stride(), short.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert pointwise(_aten.embedding.default, (torch.empty(7, 5), torch.zeros(shape, dtype=torch.long)), {}) is None


@settings(max_examples=200, deadline=None)
@given(
    one=tensors(),
    kwargs=st.sampled_from(
        [{}, {"dtype": torch.bfloat16}, {"dtype": torch.int64, "memory_format": torch.preserve_format}]
    ),
    plain=st.booleans(),
)
def test_copies(one: torch.Tensor, kwargs: dict[str, Any], plain: bool) -> None:
    if plain:
        assert same(_aten.clone.default, one, memory_format=torch.contiguous_format)
    assert same(_aten._to_copy.default, one, **kwargs) == one.is_contiguous()
    assert pointwise(_aten._to_copy.default, (one,), {"layout": torch.strided}) is None
    assert pointwise(_aten.clone.default, (torch.ones(2),), {}) is None


def test_values_by_their_numbers() -> None:
    table = torch.empty(3, 7, dtype=torch.bool, device="meta")
    rows, columns = torch.arange(3)[:, None, None, None], torch.arange(7)[None, None, None, :]
    for one, other in ((rows, columns), (columns % 3, rows), (rows[:, 0, 0, 0], rows[:, 0, 0, 0]), (rows, rows[0])):
        short = pointwise(_aten.index.Tensor, (table, [one.to("meta"), other.to("meta")]), {})
        wanted = torch.zeros(3, 7, dtype=torch.bool)[one, other]
        assert short is not None
        assert (short.shape, short.dtype, short.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    there = rows.to("meta")
    for indices in ([there], [there, None], [None, there], [there, there.bool()], [there, there.expand(3, 1, 2, 1)]):
        assert pointwise(_aten.index.Tensor, (table, indices), {}) is None
    assert pointwise(_aten.index.Tensor, (table, [there[:, 0, 0, 0], columns[0, 0, 0].to("meta")]), {}) is None


def test_a_product_is_given_its_shape_in_place() -> None:
    made = torch.empty(6, 4, device="meta")
    seen = pointwise(_aten._unsafe_view.default, (made, [2, 3, 4]), {})
    assert seen is not None
    assert seen.shape == (2, 3, 4)
    assert seen.untyped_storage()._cdata == made.untyped_storage()._cdata
