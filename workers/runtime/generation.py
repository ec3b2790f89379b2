"""Text out of a chain of stages: transformers' own `generate`, whose passes go along the chain.

    def send(step: Handoff) -> Mapping[str, Tensor]:      # runs a whole pass, wherever its layers are
        node = start                                      # with a session on each node, opened before
        while True:
            answer = sessions[node].step(step)
            if not isinstance(answer, Handoff):
                return answer
            step, node = answer, holder_of(answer.next_module)

    made = generate(stage, send, {"input_ids": ids}, max_new_tokens=20)
    made.token_ids[0], made.finish_reasons[0]

`stage` gives the model's code and configs; any of the plan's will do, and what it holds is not used here. `Driver` is
the same for several prompts of one session, each of which continues where the last ended. Token ids and logits are
those of the whole model's `generate`, bit for bit. What has no cache (text encoders) goes through `Stage.forward`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from planner.errors import Conflict, InvalidInput
from workers.runtime.caches import Clock, cache_argument, check_generates
from workers.runtime.payload import Handoff
from workers.runtime.session import Session
from workers.runtime.stage import Stage

#: Runs one pass through the whole chain and gives the model's output ("logits").
Send = Callable[[Handoff], Mapping[str, Tensor]]
#: Is told each sequence's new token as it comes; gives the sequences that are to end with it, if any.
OnToken = Callable[[Mapping[int, int]], Collection[int] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a model said."""

    #: The new tokens of each sequence; one that ended does so with the token that ended it.
    token_ids: list[list[int]]
    #: "stop" (an end token, a stop text, `on_token`) or "length" for each.
    finish_reasons: list[str]
    #: Sequences x tokens x vocabulary, if they were asked for.
    logits: Tensor | None = None


def generate(stage: Stage, send: Send, inputs: Mapping[str, Tensor], **options: Any) -> Generated:
    """One prompt's answer; see `Driver.generate` for the options."""
    return Driver(stage, send).generate(inputs, **options)


def prepare(stage: Stage, *, batch: int, length: int, padded: bool = False) -> str:
    """Trace what a prompt of this shape will ask of `stage`, and a token after it, so that the first pass need not.

    Args:
        stage: Any of the plan's.
        batch: Sequences.
        length: Tokens of each.
        padded: Whether they are of unequal length, with padding before the shorter ones.

    Returns:
        Path of the module that runs first: a pass begins at a node that holds it.

    Raises:
        InvalidInput: If the model cannot generate in stages.
    """
    session = Session(stage, batch=batch, length=length + 2)
    ids = torch.ones(batch, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 0] = 0
    generate(stage, session.rehearse, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=2, endless=True)
    return session.first_module


class Driver:
    """Generates along a chain; each further prompt continues the same sequences without a new prefill."""

    def __init__(self, stage: Stage, send: Send) -> None:
        self._stage, self._send = stage, send
        self._argument = cache_argument(stage.model)
        check_generates(stage.model, stage.manifest.model_name)
        self._clock = Clock(stage.model)
        self._defaults: Any = stage.model.generation_config
        self._number = 0
        self._inputs: dict[str, Tensor] = {}
        self._prompt: Tensor | None = None
        self._busy = False
        #: Tokens of each sequence that went along the chain, and that are to have gone when the next pass is done.
        self._fed, self._due = 0, 0
        #: The model's code with a forward that goes along the chain; everything else is shared with the stage.
        self._model: Any = copy.copy(stage.model)

        @functools.wraps(type(stage.model).forward)  # `generate` asks its signature
        def forward(**arguments: Any) -> CausalLMOutput:
            return self._forward(arguments)

        self._model.__dict__["forward"] = forward
        # Sessions do that to their models: this one is never run.
        self._model.__dict__["_optimize_model_for_decode"] = nullcontext
        #: All tokens so far, those of the prompts too.
        self.token_ids: Tensor | None = None

    @torch.no_grad()
    def generate(
        self,
        inputs: Mapping[str, Tensor],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | torch.Generator | None = None,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        on_token: OnToken | None = None,
        logits: bool = False,
        endless: bool = False,
    ) -> Generated:
        """Let the model go on after a prompt.

        Args:
            inputs: `input_ids` (sequences x tokens), and with sequences of unequal length `attention_mask`, the
                padding before them. A further prompt brings only its own tokens.
            max_new_tokens: At most so many for each sequence.
            temperature: 0 takes the likeliest token each time.
            top_p: Draw only among the likeliest tokens that together are so probable.
            top_k: Draw only among so many of the likeliest tokens; 0: among all.
            seed: The same seed draws the same tokens, whatever else runs in the process; a generator is drawn from
                as it is, and left where the last token left it.
            stop: Texts at which a sequence ends; needs the tokenizer.
            tokenizer: The model's.
            on_token: See `OnToken`. What it raises ends the session, too; a sequence that it ends can be continued.
            logits: Give the logits of each token, too.
            endless: Let no token end a sequence.

        Raises:
            Conflict: If an earlier answer failed, or is being made.
            InvalidInput: If ids are out of the vocabulary, or there are more tokens than the model's context has.
        """
        ids = inputs["input_ids"]
        self._check(ids, max_new_tokens)
        if self._busy:
            raise Conflict("an answer of this session failed or is being made; begin a new session")
        self._busy = True
        given: dict[str, Any] = dict(inputs)
        if self.token_ids is not None:
            given |= self._continued(inputs)
            ids = given["input_ids"]
        self._due = ids.shape[1]
        if self._model.config.is_encoder_decoder:
            # It is run in the first pass; `generate` itself needs not know its output.
            hollow = torch.zeros((), dtype=torch.float32).expand(*ids.shape, 1)
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=hollow)
            self._prompt, self._due = ids, 1
        given[str(self._argument)] = self._clock.cache
        watch = _Watcher(ids.shape[0], self._ends(endless), stop, tokenizer, on_token)
        processors = LogitsProcessorList(_warpers(temperature, top_k, top_p, seed))
        made = self._model.generate(
            **given,
            generation_config=self._settings(max_new_tokens, endless, logits),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        self.token_ids = made.sequences
        if self._prompt is None:
            # A sequence that ended before the others is padded; later prompts must not see that.
            said = watch.mask(made.sequences.shape[1] - ids.shape[1])
            self._seen = torch.cat([given_mask(given, ids), said], dim=1)
        self._busy = False
        stacked = torch.stack(made.logits, dim=1) if logits else None
        return Generated(token_ids=watch.token_ids, finish_reasons=watch.reasons, logits=stacked)

    def _continued(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tokens so far and the new prompt's: `generate` leaves out what the cache has."""
        if self._model.config.is_encoder_decoder:
            raise InvalidInput("a model with an encoder reads one prompt; begin a new session for the next")
        assert self.token_ids is not None
        ids = inputs["input_ids"]
        if ids.shape[0] != self.token_ids.shape[0]:
            raise InvalidInput(f"{ids.shape[0]} sequences cannot continue {self.token_ids.shape[0]}")
        mask = torch.cat([self._seen, given_mask(inputs, ids)], dim=1)
        return {"input_ids": torch.cat([self.token_ids, ids], dim=1), "attention_mask": mask}

    def _settings(self, max_new_tokens: int, endless: bool, logits: bool) -> Any:
        settings = copy.deepcopy(self._defaults)
        settings.update(
            do_sample=False, num_beams=1, num_return_sequences=1, temperature=1.0, top_p=1.0, top_k=50,
            use_cache=True, max_new_tokens=max_new_tokens, max_length=None, return_dict_in_generate=True,
            output_logits=logits,
        )  # fmt: skip
        if settings.pad_token_id is None and self._ends(False):
            settings.pad_token_id = min(self._ends(False))  # what `generate` would take, but for a word about it
        if endless:
            settings.eos_token_id = None
        return settings

    def _ends(self, endless: bool) -> frozenset[int]:
        named = self._defaults.eos_token_id
        if endless or named is None:
            return frozenset()
        return frozenset(named if isinstance(named, list) else [named])

    def _check(self, ids: Tensor, more: int) -> None:
        config = self._model.config.get_text_config()
        if ids.ndim != 2 or not ids.numel():
            raise InvalidInput(f"input_ids have shape {list(ids.shape)}, not sequences x tokens")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            raise InvalidInput(f"token ids reach from {low} to {high}; the vocabulary has {config.vocab_size}")
        context = getattr(config, "max_position_embeddings", None)
        there = 0 if self.token_ids is None else self.token_ids.shape[1]
        if context is not None and there + ids.shape[1] + more > context:
            raise InvalidInput(
                f"{there + ids.shape[1]} tokens and {more} new ones are more than the model's context of {context}"
            )

    def _forward(self, arguments: Mapping[str, Any]) -> CausalLMOutput:
        """The model's forward, run by the chain."""
        tensors: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for name, value in arguments.items():
            if value is self._clock.cache or name == "encoder_outputs":
                continue
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, dict):
                tensors |= {f"{name}/{key}": each for key, each in value.items() if isinstance(each, Tensor)}
                settings[name] = {key: None for key, each in value.items() if each is None}
            elif value is not None:
                settings[name] = value
        name = "input_ids" if self._prompt is None else "decoder_input_ids"
        # Where a cache does not know its length, `generate` leaves nothing out.
        tensors[name] = tensors[name][:, self._fed - self._due :]
        self._fed, self._due = self._due, self._due + 1
        if self._number == 0 and self._prompt is not None:
            tensors["input_ids"] = self._prompt
        kept = {name: count for name, value in tensors.items() if (count := self._same(name, value)) is not None}
        output = self._send(
            Handoff(
                inputs={name: value[..., kept.get(name, 0) :] for name, value in tensors.items()},
                settings=settings,
                number=self._number,
                kept=kept,
            )
        )
        self._inputs = tensors
        self._number += 1
        self._clock.advance(tensors[name].shape[1])
        return CausalLMOutput(logits=output["logits"])

    def _same(self, name: str, value: Tensor) -> int | None:
        """How many columns of an input are those of the pass before; None if it does not begin so."""
        before = self._inputs.get(name)
        if before is None or before.ndim != value.ndim or before.shape[-1] > value.shape[-1]:
            return None
        count = before.shape[-1]
        if "mask" not in name or before.shape[:-1] != value.shape[:-1] or not torch.equal(before, value[..., :count]):
            return None
        return count


def given_mask(inputs: Mapping[str, Any], ids: Tensor) -> Tensor:
    """The attention mask among the inputs, or that of a prompt without padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(ids) if mask is None else mask


def _warpers(
    temperature: float, top_k: int, top_p: float, seed: int | torch.Generator | None
) -> list[LogitsProcessor]:
    """As `generate(do_sample=True)` orders them; the draw at the end."""
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise InvalidInput(f"temperature {temperature}, top_p {top_p} or top_k {top_k} is out of range")
    if temperature == 0:
        return []
    warpers: list[LogitsProcessor] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return [*warpers, _Draw(seed)]


class _Draw(LogitsProcessor):
    """Draws from a generator of its own, and leaves only what was drawn: the process' own may serve others."""

    def __init__(self, seed: int | torch.Generator | None) -> None:
        self._generator = seed if isinstance(seed, torch.Generator) else torch.Generator()
        if seed is None:
            self._generator.seed()
        elif isinstance(seed, int):
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator).to(scores.device)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


class _Watcher(StoppingCriteria):
    """Sees each token as it comes, and says which sequences end with it."""

    def __init__(
        self, count: int, ends: frozenset[int], stop: Sequence[str], tokenizer: Any, on_token: OnToken | None
    ) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(count)]
        self.reasons = ["length"] * count
        self._live = dict.fromkeys(range(count))
        self._ends, self._stop, self._tokenizer, self._on_token = ends, stop, tokenizer, on_token
        if stop and tokenizer is None:
            raise InvalidInput("stop texts need the model's tokenizer")

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        last = input_ids[:, -1].tolist()
        new = {row: last[row] for row in self._live}
        for row, token in new.items():
            self.token_ids[row].append(token)
        ended = {row for row, token in new.items() if token in self._ends or self._stops(row)}
        if self._on_token is not None:
            ended |= set(self._on_token(new) or ()) & new.keys()
        for row in ended:
            self.reasons[row] = "stop"
            del self._live[row]
        return torch.tensor([row not in self._live for row in range(len(last))], device=input_ids.device)

    def mask(self, length: int) -> Tensor:
        """Which of the `length` tokens after the prompt each sequence said, and which are padding."""
        return torch.tensor([[1] * len(said) + [0] * (length - len(said)) for said in self.token_ids])

    def _stops(self, row: int) -> bool:
        if not self._stop:
            return False
        # The text's end is decoded from as many tokens as it can have characters, and some before them.
        text = self._tokenizer.decode(self.token_ids[row][-max(map(len, self._stop)) - 8 :])
        return any(each in text for each in self._stop)
