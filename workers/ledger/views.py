"""The ledger's hashes as the JSON that users see."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def instant(milliseconds: str | None) -> str | None:
    """A time of the ledger as RFC 3339 in UTC."""
    if not milliseconds:
        return None
    moment = datetime.fromtimestamp(float(milliseconds) / 1000.0, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parsed(text: str | None) -> Any:
    """The JSON value of a field; None where it is absent or empty."""
    return json.loads(text) if text else None


def step_view(name: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """A step's hash as JSON."""
    return {
        "name": name,
        "state": fields.get("state", "waiting"),
        "attempts": int(fields.get("attempts") or 0),
        "progress": parsed(fields.get("progress")),
        "error": parsed(fields.get("error")),
        "node_id": fields.get("node_id") or None,
        "started_at": instant(fields.get("started_at")),
        "ended_at": instant(fields.get("ended_at")),
    }


def job_view(job_id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """A job's hash as JSON, without its steps."""
    return {
        "job_id": job_id,
        "kind": fields["kind"],
        "state": fields["state"],
        "step": fields.get("step") or None,
        "model_name": fields["model_name"],
        "params": parsed(fields.get("params")) or {},
        "error": parsed(fields.get("error")),
        "result": parsed(fields.get("result")),
        "submitter": fields.get("submitter") or None,
        "batch_id": fields.get("batch_id") or None,
        "waits_for": fields.get("waits_for") or None,
        "created_at": instant(fields.get("created_at")),
        "started_at": instant(fields.get("started_at")),
        "ended_at": instant(fields.get("ended_at")),
    }


def event_view(fields: Mapping[str, str]) -> dict[str, Any]:
    """A stream entry as JSON."""
    view: dict[str, Any] = {"at": instant(fields.get("at"))}
    for name, value in fields.items():
        if name in {"error", "progress"}:
            view[name] = parsed(value)
        elif name == "attempts":
            view[name] = int(value)
        elif name != "at":
            view[name] = value or None
    return view


def accepted_view(job_id: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A job as the journal's entry has it: nothing of it has run yet, or nothing shall (`cancelled_at`)."""
    names = [step["name"] for step in entry["steps"]]
    cancelled = "cancelled" if entry.get("cancelled_at") else ""
    fields = {
        "kind": entry["kind"],
        "state": cancelled or "queued",
        "step": names[0],
        "model_name": entry["model_name"],
        "params": json.dumps(entry["params"]),
        "batch_id": entry.get("batch_id") or "",
        "submitter": entry.get("submitter") or "",
        "waits_for": entry.get("waits_for") or "",
        "created_at": str(entry["created_at"]),
        "ended_at": str(entry.get("cancelled_at") or ""),
    }
    steps = [
        step_view(
            step["name"],
            {
                "state": cancelled or ("waiting" if step.get("after") or fields["waits_for"] else "queued"),
                "node_id": step.get("node_id") or "",
                "ended_at": fields["ended_at"],
            },
        )
        for step in entry["steps"]
    ]
    return {**job_view(job_id, fields), "steps": steps}


def batch_view(batch_id: str, record: Mapping[str, Any], views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch's record as JSON, each of its jobs as its view says."""
    jobs: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for entry, view in zip(record["jobs"], views, strict=True):
        jobs.append(
            {
                "model_name": entry["model_name"],
                "job_id": entry["job_id"],
                "state": view["state"],
                "step": view["step"],
                "error": view["error"],
            }
        )
        counts[view["state"]] = counts.get(view["state"], 0) + 1
    return {
        "batch_id": batch_id,
        "state": _batch_state(counts),
        "counts": counts,
        "created_at": datetime.fromtimestamp(record["created_at"], tz=UTC).isoformat(timespec="seconds"),
        "jobs": jobs,
    }


def failed_view(error: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a batch shows of an entry that has no job."""
    return {"state": "failed", "step": None, "error": error}


def _batch_state(counts: Mapping[str, int]) -> str:
    if counts.keys() & {"queued", "running"}:
        return "queued" if counts.keys() == {"queued"} else "running"
    for state in ("failed", "cancelled"):
        if state in counts:
            return state
    return "done"
