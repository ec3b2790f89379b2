"""How deep the tests search: `make test` where faults were found before, `make test-deep` much further."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import pytest

_T = TypeVar("_T")

#: "1": search deeply. `make test-deep` sets it.
VARIABLE = "FAIRSHARD_TEST_DEEP"
DEEP = os.environ.get(VARIABLE) == "1"


def depth(shallow: _T, deep: _T) -> _T:
    """What a search of random cases counts to; mark its test `search`, so that `make test-deep` runs it too.

    Tests under Hypothesis need no mark.
    """
    return deep if DEEP else shallow


def some(values: Iterable[Any], *, shallow: Collection[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: those of `shallow` in every run, the others in the deep one alone."""
    every = list(values)
    assert set(shallow) <= set(every), f"no such parameters: {sorted(set(shallow) - set(every))}"
    return [value if value in shallow else pytest.param(value, marks=pytest.mark.deep) for value in every]
