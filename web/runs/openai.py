"""OpenAI's API, as its clients speak it: /v1/models, /v1/completions, /v1/chat/completions, /v1/embeddings.

A model is one that has a plan here: the deployed one, else the newest. Fields that clients send and that change
nothing are let pass; what would change the answer and isn't there is refused by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from flask import Blueprint, Flask, Response, jsonify, request

from planner.errors import InvalidInput, Unavailable
from planner.wire.documents import loads_json
from web.audit import changed
from web.errors import Refused
from web.runs.waiting import ended, failed, streamed
from web.services import services
from workers.ledger.steps import ENDED

blp = Blueprint("openai", __name__, url_prefix="/v1")

#: What is not there, and the values that mean that it is not asked for.
_NOT_THERE: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "tools": ([],), "functions": ([],), "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "audio": (), "dimensions": (),
}  # fmt: skip
_LONGEST_TEXT = 2**20


def _body(*needed: str) -> dict[str, Any]:
    if not request.is_json:
        raise Refused("the body must be application/json", status=400, code="invalid_json")
    said = loads_json(request.get_data(cache=True), source="the body")
    if not isinstance(said, dict):
        raise InvalidInput("the body must be a JSON object")
    for name in ("model", *needed):
        if said.get(name) in (None, "", []):
            raise InvalidInput(f"{name} is required", details={"param": name})
    for name, harmless in _NOT_THERE.items():
        if said.get(name) is not None and said[name] not in harmless:
            raise InvalidInput(f"{name} is not supported here", details={"param": name})
    return said


def _number(said: dict[str, Any], name: str, low: float, high: float, *, whole: bool = False) -> Any:
    value = said.get(name)
    right = type(value) is int or (type(value) is float and not whole)
    if value is not None and not (right and low <= value <= high):
        kind = "whole number" if whole else "number"
        raise InvalidInput(
            f"{name} must be a {kind} from {low:g} to {high:g}, got {value!r:.50}", details={"param": name}
        )
    return value


def _options(said: dict[str, Any]) -> dict[str, Any]:
    """How to go on, as a run takes it."""
    most = said.get("max_completion_tokens")
    said = {**said, "max_tokens": said.get("max_tokens") if most is None else most}
    stop = said.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > 16
        or not all(isinstance(s, str) and 0 < len(s) <= 1024 for s in stop)
    ):
        raise InvalidInput("stop must be a text or a list of up to 16", details={"param": "stop"})
    found = {
        "max_new_tokens": _number(said, "max_tokens", 1, 16_777_216, whole=True),
        "temperature": _number(said, "temperature", 0, 2),
        "top_p": _number(said, "top_p", 1e-9, 1),
        "top_k": _number(said, "top_k", 0, 2**31 - 1, whole=True),
        "seed": _number(said, "seed", -(2**63), 2**63 - 1, whole=True),
    }
    found = {name: value for name, value in found.items() if value is not None}
    if "seed" in found:
        found["seed"] %= 2**53
    return {"temperature": 1.0, **found, "stop": stop}


def _submit(said: dict[str, Any], run: dict[str, Any]) -> str:
    runs = services().jobs.runs
    if not isinstance(said["model"], str):
        raise InvalidInput("model must be a text", details={"param": "model"})
    plan = runs.plan_of(said["model"])
    run_id = runs.submit(plan, run)
    changed("run", plan_id=plan["plan_id"], run_id=run_id)
    return run_id


def _done(run_id: str) -> dict[str, Any]:
    """What came of the run.

    Raises:
        Refused: If it failed.
        Unavailable: If it takes longer than this service waits; the run ends.
    """
    made = services()
    view = ended(run_id, timeout_s=made.web.max_wait_s)
    if view["state"] not in ENDED:
        made.jobs.runs.cancel(run_id)
        raise Unavailable(
            f"the answer takes longer than {made.web.max_wait_s:g} s (FAIRSHARD_MAX_WAIT_S), or all places to wait "
            "are taken: ask for fewer tokens, or stream",
            details={"run_id": run_id},
        )
    if view["state"] != "done":
        raise failed(view)
    return dict(view["result"])


def _usage(result: dict[str, Any]) -> dict[str, int]:
    completion = sum(map(len, result["token_ids"]))
    prompt = int(result["prompt_tokens"])
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _answer(
    said: dict[str, Any],
    run: dict[str, Any],
    *,
    prefix: str,
    kind: str,
    whole: Callable[..., Any],
    part: Callable[..., Any],
) -> Response:
    """Run it, and answer in one piece or in many.

    Args:
        said: The body.
        run: The request of the run.
        prefix: Of the answer's id.
        kind: The answer's `object`; its pieces' is `<kind>.chunk` for chats.
        whole: (index, text, finish reason) -> a choice.
        part: The same for a piece; the text is None in the first and the last.
    """
    run_id = _submit(said, run)
    head = {"id": f"{prefix}-{run_id}", "created": int(time.time()), "model": said["model"]}
    if not said.get("stream"):
        result = _done(run_id)
        texts, reasons = result["text"], result["finish_reason"]
        texts, reasons = ([texts], [reasons]) if isinstance(texts, str) else (texts, reasons)
        choices = [whole(at, text, reason) for at, (text, reason) in enumerate(zip(texts, reasons, strict=True))]
        return jsonify({**head, "object": kind, "choices": choices, "usage": _usage(result)})
    chunk = {**head, "object": f"{kind}.chunk" if kind.startswith("chat") else kind}
    with_usage = bool((said.get("stream_options") or {}).get("include_usage"))

    def lines(event: dict[str, Any]) -> Iterator[str]:
        def line(choices: list[Any], **more: Any) -> str:
            return f"data: {json.dumps({**chunk, 'choices': choices, **more})}\n\n"

        if event["event"] == "running" and kind.startswith("chat"):
            yield line([part(0, None, None)])
        elif event["event"] == "tokens":
            yield from (line([part(at, text, None)]) for at, text in enumerate(event["text"]) if text)
        elif event["event"] == "ended" and event["state"] == "done":
            result = event["result"]
            reasons = result["finish_reason"]
            for at, reason in enumerate([reasons] if isinstance(reasons, str) else reasons):
                yield line([part(at, "", reason)])
            if with_usage:
                yield line([], usage=_usage(result))
            yield "data: [DONE]\n\n"
        elif event["event"] == "ended":
            error = event.get("error") or {"message": f"the run is {event['state']}", "code": "cancelled"}
            said = {"message": error["message"], "type": "server_error", "param": None, "code": error["code"]}
            yield f"data: {json.dumps({'error': said})}\n\n"

    return streamed(run_id, lines)


@blp.get("/models")
def list_models() -> Response:
    """The models that have a plan here."""
    found: dict[str, Any] = {}
    for plan in services().jobs.plans(limit=500):
        found.setdefault(plan["model_name"], _model(plan["model_name"], plan.get("generated_at")))
    return jsonify(object="list", data=list(found.values()))


@blp.get("/models/<path:model>")
def show_model(model: str) -> Response:
    """One of them."""
    return jsonify(_model(model, services().jobs.runs.plan_of(model).get("generated_at")))


def _model(name: str, made_at: str | None) -> dict[str, Any]:
    created = int(datetime.fromisoformat(made_at).timestamp()) if made_at else 0
    return {"id": name, "object": "model", "created": created, "owned_by": "fairshard"}


@blp.post("/completions")
def completions() -> Response:
    """Go on after one prompt or several."""
    said = _body("prompt")
    prompt = said["prompt"]
    if isinstance(prompt, str):
        source: dict[str, Any] = {"prompt": prompt}
    elif isinstance(prompt, list) and all(isinstance(each, str) and each for each in prompt):
        source = {"prompt": prompt}
    elif isinstance(prompt, list) and all(type(each) is int and 0 <= each < 2**31 for each in prompt):
        source = {"token_ids": [prompt]}
    elif isinstance(prompt, list) and all(
        isinstance(row, list) and row and all(type(each) is int and 0 <= each < 2**31 for each in row)
        for row in prompt
    ):
        source = {"token_ids": prompt}
    else:
        raise InvalidInput("prompt must be a text, token ids, or a list of either", details={"param": "prompt"})

    def choice(at: int, text: str | None, reason: str | None) -> dict[str, Any]:
        return {"index": at, "text": text or "", "logprobs": None, "finish_reason": reason}

    options = {"max_new_tokens": 16, **_options(said)}  # OpenAI's default
    return _answer(said, source | options, prefix="cmpl", kind="text_completion", whole=choice, part=choice)


@blp.post("/chat/completions")
def chat() -> Response:
    """The assistant's next message."""
    said = _body("messages")
    run = {"messages": _messages(said["messages"]), **_options(said)}

    def whole(at: int, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": at, "message": message, "logprobs": None, "finish_reason": reason}

    def part(at: int, text: str | None, reason: str | None) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
        return {"index": at, "delta": delta, "logprobs": None, "finish_reason": reason}

    return _answer(said, run, prefix="chatcmpl", kind="chat.completion", whole=whole, part=part)


def _messages(said: Any) -> list[dict[str, str]]:
    found = []
    for message in said if isinstance(said, list) else [said]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(
            isinstance(each, dict) and each.get("type") == "text" for each in content
        ):
            content = "".join(str(each.get("text", "")) for each in content)
        if not isinstance(content, str) or len(content) > _LONGEST_TEXT or not isinstance(message.get("role"), str):
            raise InvalidInput(
                "messages must be a list of {role, content}, each content a text", details={"param": "messages"}
            )
        found.append({"role": message["role"], "content": content})
    return found


@blp.post("/embeddings")
def embeddings() -> Response:
    """A vector for each text: the mean of the encoder's last hidden states, of length 1."""
    said = _body("input")
    given = said["input"]
    if said.get("encoding_format") not in (None, "float", "base64"):
        raise InvalidInput("encoding_format must be float or base64", details={"param": "encoding_format"})
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
        raise InvalidInput("input must be a text or a list of texts", details={"param": "input"})
    result = _done(_submit(said, {"prompt": texts, "embed": True}))
    data = [
        {"object": "embedding", "index": at, "embedding": _encoded(vector, said.get("encoding_format"))}
        for at, vector in enumerate(result["embeddings"])
    ]
    tokens = int(result["prompt_tokens"])
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return jsonify(object="list", data=data, model=said["model"], usage=usage)


def _encoded(vector: list[float], form: str | None) -> Any:
    if form != "base64":
        return vector
    import array
    import base64
    import sys

    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def init_app(app: Flask) -> None:
    """Answer OpenAI's clients, too."""
    app.register_blueprint(blp)
