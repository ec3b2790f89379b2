"""Jobs as users see them: the ledger's hashes and streams as JSON, and batches of jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from planner.errors import NotFound
from workers.ledger.connection import reachable


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
        "task_id": fields.get("task_id") or None,
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


def batch_state(counts: Mapping[str, int]) -> str:
    """The state of a batch whose entries have these."""
    if counts.keys() & {"queued", "running"}:
        return "queued" if counts.keys() == {"queued"} else "running"
    for state in ("failed", "cancelled"):
        if state in counts:
            return state
    return "done"


#: Of 1,000 jobs of a list, newest first, from `begin` on: the ids of those with the wanted state, model and kind
#: ("": any); before them where to go on, -1: nowhere. On the server: fetching what isn't wanted is slower. In parts:
#: nobody else is served meanwhile.
_FIND = """
local begin, found = tonumber(ARGV[1]), {-1}
local ids = redis.call('ZREVRANGE', KEYS[1], begin, begin + 999)
if #ids == 1000 then found[1] = begin + 1000 end
for _, id in ipairs(ids) do
  local has = redis.call('HMGET', KEYS[2] .. id, 'state', 'model_name', 'kind')
  local fits = has[1]
  for place = 1, 3 do
    if ARGV[place + 1] ~= '' and has[place] ~= ARGV[place + 1] then fits = false end
  end
  if fits then found[#found + 1] = id end
  if #found > tonumber(ARGV[5]) then break end
end
return found
"""
#: The states of the jobs of these ids, "" where there is none.
_STATES = """
local states = {}
for place, id in ipairs(ARGV) do states[place] = redis.call('HGET', KEYS[1] .. id, 'state') or '' end
return states
"""


class Views:
    """Jobs and what happened in them, as JSON: what users ask of the ledger."""

    def __init__(self, redis: Redis, *, prefix: str) -> None:
        """Read what lies below `prefix` in `redis`."""
        #: Any: redis-py types each answer as bytes or str; this client decodes, so it is str.
        self.redis: Any = redis
        self.prefix = prefix
        self._find: Any = redis.register_script(_FIND)
        self._states: Any = redis.register_script(_STATES)

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as JSON.

        `{job_id, kind, state, step, steps: [{name, state, attempts, progress: {done, total, what, rate_per_s, eta_s,
        waits_until} | null, error: {code, message, details} | null, node_id, task_id, started_at, ended_at}],
        model_name, params, error, result, submitter, batch_id, waits_for, created_at, started_at, ended_at}`; times
        are RFC 3339 in UTC or null.

        Raises:
            NotFound: If there is no such job.
        """
        with reachable():
            fields = self.redis.hgetall(f"{self.prefix}job:{job_id}")
            if not fields:
                raise no_job(job_id)
            names = fields.get("steps", "").split()
            pipeline = self.redis.pipeline(transaction=False)
            for name in names:
                pipeline.hgetall(f"{self.prefix}step:{job_id}:{name}")
            steps = pipeline.execute()
        return {
            **job_view(job_id, fields),
            "steps": [step_view(name, found) for name, found in zip(names, steps, strict=True)],
        }

    def states_of(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The states of those of the jobs that Redis knows; of thousands in a few round trips."""
        states: list[str] = []
        with reachable():
            for at in range(0, len(job_ids), 1000):
                states += self._states(keys=[f"{self.prefix}job:"], args=list(job_ids[at : at + 1000]))
        return {job_id: state for job_id, state in zip(job_ids, states, strict=True) if state}

    def brief(self, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`{state, step, error}` of those of the jobs that Redis knows, by id, in one round trip."""
        with reachable():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hmget(f"{self.prefix}job:{job_id}", "state", "step", "error")
            found = pipeline.execute()
        return {
            job_id: {"state": state, "step": step or None, "error": parsed(error)}
            for job_id, (state, step, error) in zip(job_ids, found, strict=True)
            if state
        }

    def jobs(
        self,
        *,
        state: str | None = None,
        model_name: str | None = None,
        kind: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """Jobs as JSON, newest first, without their `steps` (see `job`)."""
        listed = "unfinished" if state in {"queued", "running"} else f"jobs:{state}" if state else "jobs"
        wanted = [state or "", model_name or "", kind or ""]
        ids: list[str] = []
        begin = 0
        with reachable():
            while len(ids) < offset + limit and begin >= 0:
                begin, *found = self._find(
                    keys=[f"{self.prefix}{listed}", f"{self.prefix}job:"],
                    args=[begin, *wanted, offset + limit - len(ids)],
                )
                ids += found
            ids = ids[offset : offset + limit]
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hgetall(f"{self.prefix}job:{job_id}")
            hashes = pipeline.execute()
        return [job_view(job_id, fields) for job_id, fields in zip(ids, hashes, strict=True) if fields]

    def events(self, job_id: str, *, after: str = "0", limit: int = 100) -> list[tuple[str, dict[str, Any]]]:
        """What happened in a job after the event of id `after`: `(event id, {event, at, step, ...})`, oldest first.

        Events are "submitted", "claimed", "progress", "step", "retry", "lost" and, last, "ended". Never blocks: poll.
        """
        with reachable():
            entries = self.redis.xrange(f"{self.prefix}events:{job_id}", min=f"({after}", count=limit)
        return [(str(event_id), event_view(fields)) for event_id, fields in entries]


def no_job(job_id: str) -> NotFound:
    """The error for a job that nobody knows."""
    return NotFound(f"there is no job {job_id[:64]!r}: it never was, or it ended longer ago than jobs are kept")
