"""The announcement: the start node tells all nodes of a plan what is coming; each says that it is ready, or why not.

It travels through Redis, since machines share nothing else, to the main process of each node's Celery worker: a task
would wait behind a split that takes hours. Both ways are signed as nodes' other words are (`workers.nodes.joining`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from planner.errors import Conflict
from workers.ledger.connection import clock, reachable
from workers.runner.runs import MESSAGE_S, Runs

#: Where it is said, for the signature.
_ANNOUNCED, _ANSWERED = "run announced", "run answered"
#: Seconds that answers are kept; a run collects them at once.
_KEPT_S = 3600


def announce(runs: Runs, body: Mapping[str, Any]) -> None:
    """Tell the nodes in `body["to"]`; `body["from"]` is this one."""
    said = {**body, "signed_at": clock(runs.services.redis)}
    proof = runs.services.joining.prove(body["from"], _ANNOUNCED, said)
    for node_id in body["to"]:
        runs.tell(node_id, {"what": "announcement", "run_id": body["run_id"], "body": said, "proof": proof})


def check_announcement(runs: Runs, message: Mapping[str, Any], *, start_node: str) -> None:
    """Check that the plan's start node has just said this.

    Raises:
        Conflict: If not.
    """
    body, proof = message["body"], message.get("proof")
    if body["from"] != start_node or not runs.services.joining.holds(start_node, _ANNOUNCED, body, proof):
        raise Conflict(
            f"a run of plan {body['plan_id']} was announced by {body['from']!r} without its signature; "
            f"only the plan's start node, {start_node!r}, may",
            details={"run_id": body["run_id"], "from": body["from"], "start_node": start_node},
        )
    age_s = clock(runs.services.redis) - body["signed_at"]
    if abs(age_s) > MESSAGE_S:
        raise Conflict(f"a run was announced {age_s:.0f} s ago; after {MESSAGE_S} s that is void")


def answer(runs: Runs, run_id: str, **said: Any) -> None:
    """Tell the start node: `state` is taken, loading, ready or refused; with `url` and `held`, or `error`."""
    node_id = runs.services.settings.node_id
    body = {"node_id": node_id, "run_id": run_id, **said}
    body["proof"] = runs.services.joining.prove(node_id, _ANSWERED, body)
    redis: Any = runs.services.redis
    with reachable():
        pipeline = redis.pipeline(transaction=True)
        pipeline.rpush(_answers(runs, run_id), json.dumps(body))
        pipeline.expire(_answers(runs, run_id), _KEPT_S)
        pipeline.execute()


def next_answer(runs: Runs, run_id: str, *, timeout_s: float) -> dict[str, Any] | None:
    """What a node answered; None if none did in time, or one that is not what it says it is."""
    redis: Any = runs.services.redis
    with reachable():
        found = redis.blpop([_answers(runs, run_id)], timeout=timeout_s)
    if found is None:
        return None
    body = dict(json.loads(found[1]))
    proof = body.pop("proof", None)
    told = runs.services.joining.holds(str(body.get("node_id")), _ANSWERED, body, proof)
    return body if told and body.get("run_id") == run_id else None


def _answers(runs: Runs, run_id: str) -> str:
    return f"{runs.services.queue.prefix}run:{run_id}:answers"
