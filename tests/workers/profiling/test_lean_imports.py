"""A process that starts lean traces the same, and has the real modules as soon as it asks for more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.depth import depth
from support.models.architectures import PUBLISHED, as_stored
from torch.fx.experimental import symbolic_shapes

from workers.checkpoint.config import ModelConfig
from workers.profiling.trace import to_json
from workers.profiling.tracing.lean_imports import _STAND_INS, KNOWN_VERSIONS, _minor, _StandIn, start_lean
from workers.profiling.tracing.skeleton import build
from workers.profiling.tracing.tracer import trace

TRACED = (
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "google/gemma-3-4b-it",
    "deepseek-ai/DeepSeek-V3",
    "google-t5/t5-large",
    "google-bert/bert-large-uncased",
    "openai-community/gpt2",
    "openai/whisper-large-v3",
    "google/siglip-so400m-patch14-384",
)

_TRACE = """
import json, sys
from workers.profiling.tracing.lean_imports import start_lean
assert start_lean()
from test_lean_imports import traces
made = traces(sys.argv[1:])
loaded = [name for name in ("torch.distributed.tensor", "torch._inductor", "scipy", "accelerate")
          if sys.modules.get(name) is not None]
print(json.dumps([made, loaded]))
"""

_MORE = """
import torch
from workers.profiling.tracing.lean_imports import start_lean
assert start_lean()
import transformers.masking_utils
held = torch._dynamo, sys.modules["sympy"]
assert {type(each).__name__ for each in held} == {"_StandIn"}
with transformers.masking_utils.TransformGetItemToIndex():
    pass
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false
assert sympy.Symbol("x") - sympy.Symbol("x") == 0
assert [held[0].disable, held[1].Basic] == [sys.modules["torch._dynamo"].disable, sympy.Basic]
assert guard_or_false.__module__ == ShapeEnv.__module__ == "torch.fx.experimental.symbolic_shapes"
"""


def traces(names: list[str]) -> dict[str, Any]:
    made = {}
    for name in names:
        values = PUBLISHED[name]
        config = ModelConfig(values=values, model_type=values["model_type"], architecture=values["architectures"][0])
        made[name] = to_json(trace(config, as_stored(build(config))))
    return made


def run(code: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    paths = [str(Path(__file__).parents[3]), str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(env or {})},
    ).stdout


@pytest.mark.search
def test_a_lean_process_traces_the_same_and_imports_none_of_it() -> None:
    # Plain, with experts and a delta rule, with pictures; the others ask transformers for nothing else.
    names = depth(TRACED[:3], TRACED)
    made, loaded = json.loads(run(_TRACE, *names))
    assert not loaded  # experts' products ask for sympy, and for nothing else
    assert made == json.loads(json.dumps(traces(list(names))))


@pytest.mark.deep
def test_what_else_is_asked_of_a_stand_in_the_real_module_answers() -> None:
    run(_MORE)


@pytest.mark.filterwarnings("ignore:guard_size_oblivious will be removed")
@pytest.mark.parametrize("name", sorted(_STAND_INS["torch.fx.experimental.symbolic_shapes"]))
def test_stand_ins_answer_as_the_real_functions_where_sizes_are_plain(name: str) -> None:
    stand_in, real = _STAND_INS["torch.fx.experimental.symbolic_shapes"][name], getattr(symbolic_shapes, name)
    if name in {"sym_and", "sym_or"}:
        cases: list[tuple[Any, ...]] = [
            (one, other, third) for one in (True, False) for other in (True, False) for third in (True, False)
        ]
    elif name == "sym_eq":
        cases = [(2, 3), (2, 2), ((2, 3), [2, 3]), ([2], (2, 1)), ((), ()), ((1, 2), (2, 1))]
    elif name in {"guard_int", "guarding_hint_or_throw", "has_guarding_hint", "is_nested_int"}:
        cases = [(0,), (1,), (7,)]
    else:
        cases = [(True,), (False,)]
    for case in cases:
        assert (found := stand_in(*case)) == real(*case)
        assert type(found) is type(real(*case))


def test_a_process_that_has_transformers_is_left_alone() -> None:
    assert not start_lean()
    assert not any(isinstance(sys.modules.get(name), _StandIn) for name in _STAND_INS)
    assert sys.modules.get("scipy", "unset") is not None


def test_the_installed_versions_are_known() -> None:
    # A new pin of torch or transformers fails here, until the tests of this file passed with it.
    assert all(_minor(package) in known for package, known in KNOWN_VERSIONS.items())


_OFF = """
import sys
from workers.profiling.tracing import lean_imports
lean_imports.KNOWN_VERSIONS = {**lean_imports.KNOWN_VERSIONS, **dict.fromkeys(sys.argv[1:], frozenset({"1.0"}))}
assert not lean_imports.start_lean()
assert not {"transformers", "scipy", *lean_imports._STAND_INS} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    ("unknown", "lean"),
    [(["torch"], ""), (["transformers"], ""), ([], "0")],
    ids=["torch", "transformers", "setting"],
)
def test_it_switches_itself_off_for_unknown_versions_and_by_the_setting(unknown: list[str], lean: str) -> None:
    run(_OFF, *unknown, env={"FAIRSHARD_LEAN": lean})
