"""Bodies and answers of runs."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from planner.limits import MAX_BATCH_SIZE, MAX_SEQUENCE_LENGTH
from planner.wire.fields import Flag, Integer, Number
from web.schemas.answers import answer, mapping, may, text
from web.schemas.bodies import Strict

#: Where a run begins; one of them.
SOURCES = ("prompt", "messages", "token_ids", "inputs")
_LONGEST_TEXT = 2**20


def content(**options: Any) -> fields.String:
    """A field of what a person wrote."""
    return fields.String(validate=validate.Length(1, _LONGEST_TEXT), **options)


class MessageIn(Strict):
    """One message of a conversation."""

    role = fields.String(required=True, validate=validate.Length(1, 64))
    content = content(required=True)


class RunIn(Strict):
    """POST /api/plans/<id>/runs."""

    prompt = content(metadata={"description": "Text to go on from."})
    messages = fields.List(
        fields.Nested(MessageIn),
        validate=validate.Length(1, 10_000),
        metadata={"description": "A conversation; the tokenizer's own chat template makes a prompt of it."},
    )
    token_ids = fields.List(
        fields.List(Integer(high=2**31 - 1), validate=validate.Length(1, MAX_SEQUENCE_LENGTH)),
        validate=validate.Length(1, MAX_BATCH_SIZE),
        metadata={"description": "Sequences of token ids."},
    )
    inputs = fields.Dict(
        keys=fields.String(),
        metadata={"description": "The model's own inputs as lists: one pass, whose outputs are the answer."},
    )
    max_new_tokens = Integer(
        low=1, high=MAX_SEQUENCE_LENGTH, metadata={"description": "Default 256, or as many as the context takes."}
    )
    temperature = Number(high=100.0, metadata={"description": "0 (default): the likeliest token each time."})
    top_p = Number(positive=True, high=1.0, metadata={"description": "Draw among the likeliest of so much together."})
    top_k = Integer(high=2**31 - 1, metadata={"description": "Draw among so many of the likeliest; 0: among all."})
    seed = Integer(high=2**53, metadata={"description": "The same seed draws the same tokens."})
    stop = fields.List(
        fields.String(validate=validate.Length(1, 1024)),
        validate=validate.Length(max=16),
        metadata={"description": "Texts at which a sequence ends; they are not part of the answer."},
    )
    stream = Flag(metadata={"description": "Server-sent events: loading, running, tokens, ..., ended."})
    logits = Flag(metadata={"description": "The logits of each new token as well."})

    @validates_schema
    def begins_somewhere(self, data: dict[str, Any], **_: Any) -> None:
        """Exactly one source is named."""
        if sum(name in data for name in SOURCES) != 1:
            raise ValidationError(f"exactly one of {', '.join(SOURCES)} is required", "prompt")


STATES = ("queued", "loading", "running", "done", "failed", "cancelled")
RunOut = answer(
    "RunOut",
    "A run. Once it is done: `token_ids` (the new ones of each sequence), `text` and `finish_reason` (stop or "
    "length; lists where there are several sequences), `timings` and `checks`; `outputs` where inputs were given; "
    "`nodes` for a deployment. `error` if it failed.",
    run_id=text(),
    plan_id=text(),
    model_name=text(),
    state=text(choices=STATES),
    created_at=text(),
    timings=may(mapping()),
    checks=may(mapping()),
    nodes=may(mapping()),
)
UndeployedOut = answer("UndeployedOut", "What was undeployed.", plan_id=text())
