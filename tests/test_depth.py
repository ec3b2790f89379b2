from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.depth import VARIABLE

_TESTS = """
import pytest
from hypothesis import given, settings, strategies as st
from support.depth import DEEP, depth, some

@pytest.mark.search
@pytest.mark.parametrize("case", some("ab", shallow="b"))
def test_cases(case):
    pass

@pytest.mark.deep
def test_rare():
    assert DEEP

@given(st.integers())
def test_found(number):
    assert settings().derandomize is (depth(1, 2) == 1)

def test_plain():
    pass
"""


@pytest.mark.parametrize(("deep", "processes", "passed"), [("", 0, 3), ("1", 1, 4)], ids=["shallow", "deep"])
def test_a_deep_run_takes_the_searches_and_what_it_alone_runs(
    tmp_path: Path, deep: str, processes: int, passed: int
) -> None:
    tests = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((tests / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(_TESTS)
    arguments = ["-p", "no:cacheprovider", "-c", str(tests.parent / "pyproject.toml"), "--rootdir", str(tmp_path)]
    if deep:
        arguments += ["-m", "deep or search or hypothesis"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", str(processes), *arguments, str(tmp_path)],
        env=os.environ | {VARIABLE: deep}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"\n{passed} passed" in done.stdout, done.stdout + done.stderr
