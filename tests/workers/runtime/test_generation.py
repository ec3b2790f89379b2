"""Tokens out of a chain: whatever the plan, those of the whole model's `generate`, and its logits, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.depth import some
from support.models.families import NAMES, folder_of
from support.stage_cases import contiguous, cut, scattered, whole
from torch import Tensor

from workers.runtime.generation import generate
from workers.runtime.payload import Handoff
from workers.runtime.session import Session
from workers.runtime.stage import Stage
from workers.splitter import load_stage

#: What generates; "t5gemma" and "whisper" have drivers of their own, "minimax" a cache of its own.
ENCODERS = {"bert", "bert_mlm", "albert", "roberta", "distilbert", "deberta_v2", "modernbert", "vit", "clip"}
OTHERS = {"whisper", "t5gemma", "minimax", "llava", "qwen2_5_vl"}
FAMILIES = [name for name in NAMES if name not in ENCODERS | OTHERS]


class Chain:
    """Stages in one process, each handoff over the wire."""

    def __init__(self, stages: Sequence[Stage], *, batch: int, length: int) -> None:
        self.stages = stages
        self.sessions: list[Session] = [Session(stage, batch=batch, length=length) for stage in stages]
        #: Bytes of the handoffs of each pass.
        self.sent: list[list[int]] = []

    def send(self, step: Handoff) -> Mapping[str, Tensor]:
        self.sent.append([])
        at = 0
        while True:
            answer = self.sessions[at].step(step)
            if not isinstance(answer, Handoff):
                output: Mapping[str, Tensor] = answer
                return output
            wire = answer.to_bytes()
            self.sent[-1].append(len(wire))
            step = Handoff.from_bytes(wire)
            at = next(n for n, stage in enumerate(self.stages) if step.next_module in stage.held)


def prompt(batch: int = 2, length: int = 7, pad: int = 2) -> dict[str, Tensor]:
    """Sequences of unequal length."""
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def expected(model: Any, inputs: Mapping[str, Any], new: int) -> tuple[Tensor, Tensor]:
    made = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.stack(made.logits, dim=1)
    return made.sequences[:, -logits.shape[1] :], logits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TYPICAL = {"llama", "gemma3", "mixtral", "mamba", "t5"}


@pytest.mark.parametrize("dealt", [contiguous, scattered])
@pytest.mark.parametrize("name", some(FAMILIES, shallow=TYPICAL))
def test_a_chain_says_what_the_whole_model_says(name: str, dealt: Callable[..., Any], tmp_path: Path) -> None:
    new = 6
    stages = [load_stage(shard) for shard in cut(folder_of(name), tmp_path, dealt, 3)]
    inputs = prompt()
    chain = Chain(stages, batch=2, length=7 + new)
    made = generate(stages[0], chain.send, inputs, max_new_tokens=new, logits=True)
    tokens, logits = expected(whole(folder_of(name)), inputs, new)
    assert made.logits is not None
    assert torch.equal(made.logits, logits)
    for row, said in enumerate(made.token_ids):
        assert said == tokens[row, : len(said)].tolist()
    # One trace for the prompt's shape and one for all tokens after it.
    assert all(len(stage._flows) == 2 for stage in stages)
    # What travels for a token does not grow with the tokens before it.
    if name not in {"t5", "gemma4"}:  # position biases, and keys that layers share
        assert max(chain.sent[-1]) <= max(chain.sent[1]) + 16
