"""A ledger whose clock the test sets: the script's own text, with its one look at the clock replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

import workers.ledger.ledger
from workers.ledger.ledger import Ledger
from workers.ledger.steps import StepSpec, Wakeup

_SOURCE = Path(workers.ledger.ledger.__file__).with_name("ledger.lua").read_text("utf-8")
_LOOK = "redis.call('TIME')"


class Clocked:
    """A ledger, the messages that it sent, and the clock it goes by."""

    def __init__(self, client: redis.Redis, **options: Any) -> None:
        client.flushall()
        self.client: Any = client
        self.sent: list[Wakeup] = []
        self.ledger = Ledger(client, wake=self._wake, **options)
        assert _SOURCE.count(_LOOK) == 1
        source = _SOURCE.replace(_LOOK, "{redis.call('GET', 'test-clock'), '0'}")
        self.ledger._script = client.register_script(source)
        self.now_s = 1_000_000
        self.advance(0)

    def _wake(self, wakeups: Sequence[Wakeup]) -> None:
        self.sent.extend(wakeups)

    def advance(self, seconds: int) -> None:
        """Let the clock jump."""
        self.now_s += seconds
        self.client.set("test-clock", self.now_s)

    def taken(self) -> list[str]:
        """The steps that messages were sent for, and forget the messages."""
        steps = [wakeup.step for wakeup in self.sent]
        self.sent.clear()
        return steps


def chain(*names: str) -> list[StepSpec]:
    """Steps, each after the one before."""
    return [
        StepSpec(name=name, task=f"test.{name}", queue="compute", after=names[i - 1 : i])
        for i, name in enumerate(names)
    ]


def splits(*nodes: str) -> list[StepSpec]:
    """What the plan step adds: one split a node, and the finish after all."""
    steps = [
        StepSpec(name=f"split:{n}", task="workers.split", queue=f"node.{n}", node_id=n, after=("plan",))
        for n in nodes
    ]
    after = tuple(step.name for step in steps)
    return [*steps, StepSpec(name="finish", task="planner.finish", queue="planner", after=after)]
