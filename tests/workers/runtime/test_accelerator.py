"""What only a machine with a GPU can show: what it measures of itself, and stages on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoints import checkpoint
from support.stage_cases import assert_equal, chain, contiguous, cut, example, whole
from torch import Tensor

from planner.devices import variants
from workers.nodes import probe as node
from workers.runtime.generation import generate
from workers.runtime.payload import Handoff
from workers.runtime.session import Session
from workers.splitter import load_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def test_a_card_is_measured_within_what_its_vendor_states() -> None:
    found = node.measure()
    cards = variants(found["device"], memory_bytes=torch.cuda.get_device_properties(0).total_memory)
    assert any(0.4 * card.rate("BF16") < found["flop_per_s"] <= card.rate("BF16") for card in cards)
    assert any(0.5 * (card.memory_bytes_per_s or 0) < found["memory_bytes_per_s"] for card in cards)
    assert all(found["memory_bytes_per_s"] <= (card.memory_bytes_per_s or 0) for card in cards)
    assert 0 < found["memory_bytes"] < torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "gemma2", "gpt2", "bert", "mixtral", "mamba2", "t5"])
def test_a_chain_of_stages_on_a_card_is_the_whole_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    stages = [load_stage(shard, device="cuda") for shard in cut(checkpoint(name), tmp_path, contiguous, 3)]
    assert all(p.device.type == "cuda" for stage in stages for p in stage.parameters())
    model = whole(checkpoint(name)).cuda()
    inputs = {key: value.cuda() for key, value in example(model).items()}
    output, _ = chain(stages, inputs, device="cuda")
    with torch.no_grad():
        assert_equal(output, model(**inputs))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "mamba2", "t5"])
def test_a_chain_on_a_card_says_what_the_whole_model_says(name: str, tmp_path: Path) -> None:
    stages = [load_stage(shard, device="cuda") for shard in cut(checkpoint(name), tmp_path, contiguous, 3)]
    sessions = [Session(stage, batch=2, length=13) for stage in stages]
    ids = torch.randint(3, 90, (2, 7), device="cuda", generator=torch.Generator("cuda").manual_seed(5))

    def send(step: Handoff) -> Mapping[str, Tensor]:
        at = 0
        while True:
            answer = sessions[at].step(step)
            if not isinstance(answer, Handoff):
                output: Mapping[str, Tensor] = answer
                return output
            step = Handoff.from_bytes(answer.to_bytes(), device="cuda")
            at = next(number for number, stage in enumerate(stages) if step.next_module in stage.held)

    made = generate(stages[0], send, {"input_ids": ids}, max_new_tokens=6, logits=True)
    theirs = (
        whole(checkpoint(name))
        .cuda()
        .generate(
            ids, max_new_tokens=6, do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True
        )
    )
    assert made.logits is not None
    assert torch.equal(made.logits, torch.stack(theirs.logits, dim=1))
