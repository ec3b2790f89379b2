"""Tokens out of a chain: whatever the plan, those of the whole model's `generate`, and its logits, bit for bit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support.depth import some
from support.models.families import NAMES, folder_of
from support.stage_cases import contiguous, cut, scattered, whole
from torch import Tensor

from planner.errors import Conflict, InvalidInput
from workers.runtime.generation import Driver, generate, prepare
from workers.runtime.payload import Handoff
from workers.runtime.session import Session
from workers.runtime.stage import Stage
from workers.splitter import load_stage

#: What generates nothing; what is refused; what is asked with more than text.
ENCODERS = {"bert", "bert_mlm", "albert", "roberta", "distilbert", "deberta_v2", "modernbert", "vit", "clip"}
OTHERS = {"whisper", "minimax", "llava", "qwen2_5_vl"}
FAMILIES = [name for name in NAMES if name not in ENCODERS | OTHERS]


class Chain:
    """Stages in one process, each handoff over the wire."""

    def __init__(self, stages: Sequence[Stage], *, batch: int, length: int) -> None:
        self.stages = stages
        self.start = 0
        self.sessions: list[Session] = [Session(stage, batch=batch, length=length) for stage in stages]
        #: Bytes of the handoffs of each pass.
        self.sent: list[list[int]] = []

    def send(self, step: Handoff) -> Mapping[str, Tensor]:
        self.sent.append([])
        at = self.start
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
        **inputs, max_new_tokens=new, do_sample=False, use_cache=True, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    logits = torch.stack(made.logits, dim=1)
    return made.sequences[:, -logits.shape[1] :], logits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DEALT = {"contiguous": contiguous, "scattered": scattered}
#: Grouped heads; windows; states; an encoder.
TYPICAL = {"llama contiguous", "llama scattered", "gemma3 scattered", "mamba contiguous", "t5 scattered"}


@pytest.mark.parametrize("case", some((f"{name} {how}" for name in FAMILIES for how in DEALT), shallow=TYPICAL))
def test_a_chain_says_what_the_whole_model_says(case: str, tmp_path: Path) -> None:
    name, how = case.split()
    dealt = DEALT[how]
    new = 6
    stages = [load_stage(shard) for shard in cut(folder_of(name), tmp_path, dealt, 3)]
    inputs = prompt()
    chain = Chain(stages, batch=2, length=7 + new)
    first = prepare(stages[0], batch=2, length=7, padded=True)
    chain.start = next(at for at, stage in enumerate(stages) if first in stage.held)
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Stage], Any]:
    """Its layers dealt out like cards, and the whole of it."""
    shards = cut(folder_of("llama"), tmp_path_factory.mktemp("llama"), scattered, 3)
    return [load_stage(shard) for shard in shards], whole(folder_of("llama"))


def test_a_prompt_goes_on_where_the_last_one_ended(llama: tuple[list[Stage], Any]) -> None:
    stages, model = llama
    chain = Chain(stages, batch=1, length=40)
    driver = Driver(stages[0], chain.send)
    first, second = torch.tensor([[5, 17, 3, 44]]), torch.tensor([[9, 9, 60]])
    driver.generate({"input_ids": first}, max_new_tokens=5, endless=True)
    ours = driver.generate({"input_ids": second}, max_new_tokens=4, endless=True, logits=True)
    # Only the last token of before and the new ones went along the chain.
    assert max(chain.sent[5]) < max(chain.sent[0]) + 32

    options = {"do_sample": False, "use_cache": True, "eos_token_id": None, "return_dict_in_generate": True}
    before = model.generate(first, max_new_tokens=5, **options)
    theirs = model.generate(
        torch.cat([before.sequences, second], dim=1), past_key_values=before.past_key_values, max_new_tokens=4,
        output_logits=True, **options,
    )  # fmt: skip
    assert ours.logits is not None
    assert torch.equal(ours.logits, torch.stack(theirs.logits, dim=1))
    assert ours.token_ids == theirs.sequences[:, -4:].tolist()
    assert torch.equal(driver.token_ids, theirs.sequences)  # type: ignore[arg-type]


def test_what_is_drawn_is_what_generate_draws_whatever_else_draws(llama: tuple[list[Stage], Any]) -> None:
    stages, model = llama
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(11)
    theirs = model.generate(**prompt(), do_sample=True, use_cache=True, max_new_tokens=8, **settings)[:, 7:]
    chain = Chain(stages, batch=2, length=20)

    def send(step: Handoff) -> Mapping[str, Tensor]:
        torch.rand(3)
        return chain.send(step)

    ours = generate(stages[0], send, prompt(), max_new_tokens=8, seed=11, **settings)
    for row, said in enumerate(ours.token_ids):
        assert said == theirs[row, : len(said)].tolist()
    with pytest.raises(InvalidInput, match="top_p 0"):
        generate(stages[0], send, prompt(), max_new_tokens=8, temperature=1.0, top_p=0.0)


def test_where_an_answer_ends(llama: tuple[list[Stage], Any]) -> None:
    import transformers

    stages, _ = llama
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("llama"))
    seen: list[dict[int, int]] = []

    def on_token(new: Mapping[int, int]) -> set[int]:
        seen.append(dict(new))
        return {0} if len(seen) == 2 else set()

    def ask(**options: Any) -> Any:
        chain = Chain(stages, batch=2, length=20)
        return generate(stages[0], chain.send, prompt(), max_new_tokens=5, endless=True, **options)

    ended = ask(on_token=on_token)
    assert [len(said) for said in ended.token_ids] == [2, 5]
    assert ended.finish_reasons == ["stop", "length"]
    assert [sorted(new) for new in seen] == [[0, 1], [0, 1], [1], [1], [1]]
    text = f"w{ended.token_ids[1][2]} w{ended.token_ids[1][3]}"
    stopped = ask(stop=[text], tokenizer=tokenizer)
    assert stopped.finish_reasons[1] == "stop"
    assert stopped.token_ids[1] == ended.token_ids[1][:4]
    with pytest.raises(InvalidInput, match="need the model's tokenizer"):
        ask(stop=["w3"])

    def fails(_: Mapping[int, int]) -> None:
        raise KeyboardInterrupt

    driver = Driver(stages[0], Chain(stages, batch=2, length=20).send)
    with pytest.raises(KeyboardInterrupt):
        driver.generate(prompt(), max_new_tokens=5, on_token=fails)
    with pytest.raises(Conflict, match="begin a new session"):
        driver.generate(prompt(), max_new_tokens=5)


def test_wrong_prompts_and_handoffs_are_refused_with_the_numbers(llama: tuple[list[Stage], Any]) -> None:
    stages, _ = llama

    def ask(ids: Any, new: int = 3, length: int = 20) -> Any:
        chain = Chain(stages, batch=1, length=length)
        return generate(stages[0], chain.send, {"input_ids": torch.tensor(ids)}, max_new_tokens=new)

    with pytest.raises(InvalidInput, match="reach from 3 to 160; the vocabulary has 160"):
        ask([[3, 160]])
    with pytest.raises(InvalidInput, match="more than the model's context of 128"):
        ask([[3] * 120], new=9)
    with pytest.raises(InvalidInput, match=r"0 \+ 7 tokens are more than the 6 of this session"):
        ask([[3] * 7], length=6)
    with pytest.raises(InvalidInput, match="no token ids for 1 sequences"):
        ask([[3, 4], [5, 6]])
    with pytest.raises(InvalidInput, match="not sequences x tokens"):
        ask([[]])

    def session() -> Session:
        return Session(stages[0], batch=1, length=9)

    settings = {"use_cache": True, "logits_to_keep": 1, "return_dict": True}
    step = Handoff(inputs={"input_ids": torch.tensor([[3, 4]])}, settings=settings, number=0)
    one = session()
    answer = one.step(step)
    assert isinstance(answer, Handoff)
    # A further visit of this pass may come, or the next pass; nothing else.
    with pytest.raises(Conflict, match="is of pass 2; due is pass 0 or 1"):
        one.step(replace(step, number=2))
    with pytest.raises(Conflict, match="over: it failed in pass 2"):
        one.step(step)
    with pytest.raises(InvalidInput, match="keeps 5 columns of attention_mask, which are not here"):
        session().step(
            replace(step, inputs={**step.inputs, "attention_mask": torch.ones(1, 2)}, kept={"attention_mask": 5})
        )
    wrong = replace(answer, values={key: value * float("nan") for key, value in answer.values.items()})
    with pytest.raises(InvalidInput, match=r"model\.embed_tokens#0:0, which was handed on, .* \(NaN\)"):
        Session(stages[1], batch=1, length=9).step(wrong)
    with pytest.raises(Conflict, match="of plan other"):
        Session(stages[1], batch=1, length=9).step(replace(answer, plan_id="other"))
    closed = session()
    closed.step(step)
    closed.close()
    closed.close()
    assert closed.held_bytes == 0
    with pytest.raises(Conflict, match="over: it was closed"):
        closed.step(step)


@pytest.mark.parametrize("name", some(["gemma3", "recurrent_gemma", "t5", "jamba"], shallow={"recurrent_gemma"}))
def test_sessions_take_turns_on_a_stage_and_their_memory_is_known_before(name: str, tmp_path: Path) -> None:
    stages = [load_stage(shard) for shard in cut(folder_of(name), tmp_path, contiguous, 2)]
    prompts = [prompt(batch=2), prompt(batch=1, length=5, pad=0), prompt(batch=2, length=7)]
    chains = [Chain(stages, batch=len(each["input_ids"]), length=20) for each in prompts]
    for each in prompts:
        for stage in stages:
            prepare(stage, batch=len(each["input_ids"]), length=each["input_ids"].shape[1])
    planned = [[session.memory_bytes for session in chain.sessions] for chain in chains]

    def ask(at: int) -> Any:
        return generate(stages[0], chains[at].send, prompts[at], max_new_tokens=9, logits=True, endless=True).logits

    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(ask, range(3)))
    model = whole(folder_of(name))
    for each, answer in zip(prompts, answers, strict=True):
        made = model.generate(
            **each, max_new_tokens=9, do_sample=False, use_cache=True, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert torch.equal(answer, torch.stack(made.logits, dim=1))
    for chain, known in zip(chains, planned, strict=True):
        for session, most in zip(chain.sessions, known, strict=True):
            assert session.held_bytes <= session.memory_bytes == most
        assert sum(session.held_bytes for session in chain.sessions) > 0.4 * sum(known)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("whisper", "in a way of its own"), ("minimax", "a cache of its own"), ("bert", "generates no text")],
)
def test_what_cannot_generate_is_refused_before_its_weights_are_loaded(
    name: str, reason: str, tmp_path: Path
) -> None:
    shard = cut(folder_of(name), tmp_path, contiguous, 1)[0]
    stage = load_stage(shard)
    for file in shard.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InvalidInput, match=reason):
        load_stage(shard, generates=True)
    with pytest.raises(InvalidInput, match=reason):
        Session(stage, batch=1, length=5)
    with pytest.raises(InvalidInput, match=reason):
        Driver(stage, lambda _: {})


_THERE: dict[str, Any] = {}


def _open(shard: Path, length: int) -> tuple[list[str], str]:
    """In another process: load a stage and open a session; what it holds, and what runs first."""
    torch.set_num_threads(1)
    stage = load_stage(shard, generates=True)
    first = prepare(stage, batch=2, length=7, padded=True)
    _THERE["session"] = Session(stage, batch=2, length=length)
    return sorted(stage.held), first


def _step(wire: bytes) -> tuple[str | None, bytes]:
    """In another process: a visit; where to go next, and the handoff or the logits."""
    answer = _THERE["session"].step(Handoff.from_bytes(wire))
    if isinstance(answer, Handoff):
        return answer.next_module, answer.to_bytes()
    return None, save({"logits": answer["logits"]})


@pytest.fixture(scope="module")
def others() -> Iterator[list[ProcessPoolExecutor]]:
    """Three processes of their own."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in range(3)]


@pytest.mark.parametrize("case", some((f"{name} {how}" for name in FAMILIES for how in DEALT), shallow=()))
def test_processes_of_their_own_say_what_the_whole_model_says(
    case: str, others: list[ProcessPoolExecutor], tmp_path: Path
) -> None:
    name, how = case.split()
    shards = cut(folder_of(name), tmp_path, DEALT[how], 3)
    opened = [process.submit(_open, shard, 13) for process, shard in zip(others, shards, strict=True)]
    held = [each.result()[0] for each in opened]

    def send(step: Handoff) -> Mapping[str, Tensor]:
        following: str | None = opened[0].result()[1]
        wire = step.to_bytes()
        while following is not None:
            at = next(number for number, names in enumerate(held) if following in names)
            following, wire = others[at].submit(_step, wire).result()
        return load(wire)

    stage = load_stage(shards[0])
    made = generate(stage, send, prompt(), max_new_tokens=6, logits=True)
    _, logits = expected(whole(folder_of(name)), prompt(), 6)
    assert made.logits is not None
    assert torch.equal(made.logits, logits)
