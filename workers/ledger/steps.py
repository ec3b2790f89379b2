"""The values that the ledger takes and gives: steps as they are submitted, woken and claimed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

StepState = Literal["waiting", "queued", "running", "done", "failed", "cancelled", "lost"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
#: Job states that nothing changes any more.
ENDED: frozenset[str] = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """A step as its job is submitted with."""

    #: "download", "plan", "split:<node>", ...: unique within the job.
    name: str
    #: Celery task that runs it.
    task: str
    #: Celery queue whose workers may run it.
    queue: str
    #: Steps that must be done first.
    after: tuple[str, ...] = ()
    #: The one node that can run it; None: any consumer of the queue.
    node_id: str | None = None
    #: What the step needs beyond the job's parameters, as JSON.
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wakeup:
    """A message to send: this step may be run."""

    job_id: str
    step: str
    task: str
    queue: str
    #: For the message's readable form only.
    model_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What became of a submit."""

    job_id: str
    #: False: the same submission was unfinished already, and this is its job.
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A step that this process may run until its lease ends."""

    job_id: str
    step: str
    #: Grows with each claim of the step; writes with an older one change nothing.
    fence: int
    #: This attempt, from 1.
    attempt: int
    kind: str
    model_name: str
    #: The job's parameters.
    params: Mapping[str, Any]
    #: The step's own.
    args: Mapping[str, Any]
    #: Nodes that died while they held steps of this job.
    lost_nodes: frozenset[str]


#: Why a step was not claimed: its message is then acknowledged and skipped.
Refusal = Literal["unknown", "done", "closed", "waiting", "busy", "early", "poisoned"]
#: What becomes of a write: "ok", or the reason why it changed nothing.
Standing = Literal["ok", "fenced", "cancelled", "unknown", "done"]
