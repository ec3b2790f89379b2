"""What each kind of job consists of: its parameters, checked, and its steps. Values only: nothing is sent or stored.

request   download ─ profile ─ publish [─ plan ─ split:<node> ... ─ finish, with `process`]
process   plan ─ split:<node> ... ─ finish           waits for a running request of the same model
delete    forget ─ delete:<node> ...
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import InvalidInput
from planner.limits import check_batch_size, check_sequence_length
from planner.names import check_model_name, check_revision, join_revision, split_revision
from workers.jobs.params import process_params
from workers.ledger.steps import StepSpec

_PROFILE = (
    StepSpec(name="download", task="workers.download", queue="compute"),
    StepSpec(name="profile", task="workers.generate_metadata", queue="compute", after=("download",)),
    StepSpec(name="publish", task="workers.publish_metadata", queue="compute", after=("profile",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job before it is submitted."""

    kind: str
    model_name: str
    params: Mapping[str, Any]
    steps: Sequence[StepSpec]
    #: While a job with this key is unfinished, the same submission gets that job;
    single_flight: str
    #: When a node dies: "replan", "wait" for it, or "skip" its steps.
    on_node_loss: str = "replan"
    #: The job whose end it waits for.
    waits_for: str | None = None


def request(
    model_name: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    batch_size: int = 1,
    sequence_length: int = 512,
    kv_dtype: str | None = None,
    download: str = "headers",
    process: Mapping[str, Any] | None = None,
) -> NewJob:
    """A model profiled, and its metadata published.

    Args:
        model_name: "owner/name".
        revision: Branch, tag or commit; None: the default branch.
        subfolder: The folder of the repository that holds the model; kept as a part of the revision.
        variant: Which of several weights ("bf16"); likewise.
        batch_size: Sequences of one pass.
        sequence_length: Tokens of each.
        kv_dtype: Type of the KV cache ("F16", ...); None: the model's.
        download: "headers", or "full" to fetch the whole checkpoint to the node's cache first.
        process: Options as `process` takes them ({} for the defaults): plan and split as well.

    Raises:
        InvalidInput: If one of them is wrong.
    """
    check_model_name(model_name)
    if revision is not None:
        check_revision(revision)
    revision = join_revision(revision, subfolder=subfolder, variant=variant)
    if download not in {"headers", "full"}:
        raise InvalidInput(f"download must be 'headers' or 'full', got {download!r:.40}")
    planned = None if process is None else process_params(process)
    params = {
        "model_name": model_name,
        "revision": revision,
        "batch_size": check_batch_size(batch_size),
        "sequence_length": check_sequence_length(sequence_length),
        "kv_dtype": kv_dtype,
        "download": download,
        "process": planned,
    }
    return NewJob(
        kind="request",
        model_name=model_name,
        params=params,
        steps=_PROFILE if planned is None else [*_PROFILE, _plan("publish")],
        single_flight=_flight("request", params),
        on_node_loss=planned["on_node_loss"] if planned else "replan",
    )


def process(model_name: str, **options: Any) -> NewJob:
    """A profiled model planned and, with `split`, its shards cut.

    Args:
        model_name: "owner/name".
        options: As `workers.jobs.params.process_params` takes them.

    Raises:
        InvalidInput: If one of them is wrong.
    """
    check_model_name(model_name)
    params = process_params(options) | {"model_name": model_name}
    return NewJob(
        kind="process",
        model_name=model_name,
        params=params,
        steps=[_plan()],
        single_flight=_flight("process", params),
        on_node_loss=params["on_node_loss"],
    )


def from_profile(job: NewJob, *, waits_for: str | None, newest: Mapping[str, Any] | None) -> NewJob:
    """The same planning, of the profile that was the model's newest when it was asked for.

    Args:
        job: Of `process`, without a `metadata_repo`.
        waits_for: The request that makes it, if one is under way.
        newest: Where it lies (`path`, `commit`) otherwise, if that is known.
    """
    if waits_for is not None:
        source: dict[str, Any] = {"waits_for": waits_for}
    elif newest is not None and split_revision(job.params["revision"])[0] is None:
        source = {"profile": {"path": newest["path"], "commit": newest["commit"]}}
    else:
        return job
    params = {**job.params, **source}
    # Whoever asks after a newer one was made wants a plan of that.
    return replace(job, params=params, waits_for=waits_for, single_flight=_flight(job.kind, params))


def delete(plan: Mapping[str, Any], *, alive: Iterable[str]) -> NewJob:
    """A plan forgotten, and its shards deleted by those of its nodes that are `alive`."""
    args = {"plan_id": plan["plan_id"]}
    # Forgotten first: where the store can't be written, the plan stays, and so do its shards.
    steps = [StepSpec(name="forget", task="planner.forget", queue="planner", args=args)]
    # Nodes that are away are not waited for; they keep what they have until `fairshard delete` on them.
    steps += [
        StepSpec(
            name=f"delete:{node_id}",
            task="workers.delete_shards",
            queue=f"node.{node_id}",
            after=("forget",),
            node_id=node_id,
            args=args,
        )
        for node_id in sorted(set(plan["split_plan"]).intersection(alive))
    ]
    return NewJob(
        kind="delete",
        model_name=plan["model_name"],
        params=args | {"model_name": plan["model_name"]},
        steps=steps,
        single_flight=f"delete:{plan['plan_id']}",
        on_node_loss="skip",
    )


def _plan(*after: str) -> StepSpec:
    return StepSpec(name="plan", task="planner.plan", queue="planner", after=after)


def _flight(kind: str, params: Mapping[str, Any]) -> str:
    return f"{kind}:" + json.dumps(params, sort_keys=True, separators=(",", ":"))
