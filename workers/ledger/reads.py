"""What the ledger knows, read without changing it: jobs, events, results, what runs, what nodes have to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from redis import Redis

from planner.errors import NotFound
from workers.ledger.connection import reachable
from workers.ledger.views import event_view, job_view, step_view

#: Bounds of the histogram of steps' durations, in seconds; the same as in ledger.lua.
STEP_BOUNDS_S = ("0.1", "0.5", "2", "10", "60", "300", "1800", "7200", "+Inf")
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
end
return found
"""


class LedgerReads:
    """The half of `workers.ledger.ledger.Ledger` that only looks."""

    def __init__(self, redis: Redis, *, prefix: str = "fairshard:") -> None:
        """Read what lies below `prefix` in `redis`."""
        #: Any: redis-py types each answer as bytes or str; this client decodes, so it is str.
        self.redis: Any = redis
        self.prefix = prefix
        self._find: Any = redis.register_script(_FIND)

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as JSON.

        `{job_id, kind, state, step, steps: [{name, state, attempts, progress: {done, total, what, rate_per_s, eta_s,
        waits_until} | null, error: {code, message, details} | null, node_id, started_at, ended_at}], model_name,
        params, error, result, submitter, batch_id, waits_for, created_at, started_at, ended_at}`; times are RFC 3339
        in UTC or null.

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
        listed = "unfinished" if state in {"queued", "running"} else "jobs"
        wanted = [state or "", model_name or "", kind or ""]
        ids: list[str] = []
        begin = 0
        with reachable():
            while len(ids) < offset + limit and begin >= 0:
                begin, *found = self._find(
                    keys=[f"{self.prefix}{listed}", f"{self.prefix}job:"], args=[begin, *wanted]
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

    def metrics(self) -> dict[str, float]:
        """Counters and gauges by name: jobs_<state>_total, steps_<state>_total, jobs_unfinished, steps_due, ..."""
        with reachable():
            pipeline = self.redis.pipeline(transaction=False)
            pipeline.hgetall(f"{self.prefix}counters")
            pipeline.zcard(f"{self.prefix}unfinished")
            pipeline.zcard(f"{self.prefix}due")
            counters, unfinished, due = pipeline.execute()
        return {name: float(value) for name, value in counters.items()} | {
            "jobs_unfinished": float(unfinished),
            "steps_due": float(due),
        }

    def step_seconds(self) -> dict[str, tuple[list[tuple[str, int]], float]]:
        """How long steps that were done took: kind of step -> (`(at most seconds, how many)` up to "+Inf", sum)."""
        with reachable():
            found = self.redis.hgetall(f"{self.prefix}counters:step_seconds")
        counted: dict[str, dict[str, int]] = {}
        for field, value in found.items():
            kind, _, bound = field.partition(" ")
            counted.setdefault(kind, {})[bound] = int(value)
        result = {}
        for kind, buckets in counted.items():
            total_ms = buckets.pop("ms")
            sums = accumulate(buckets.get(bound, 0) for bound in STEP_BOUNDS_S)
            result[kind] = (list(zip(STEP_BOUNDS_S, sums, strict=True)), total_ms / 1000)
        return result

    def running_request(self, model_name: str) -> str | None:
        """The newest unfinished request for the model, or None."""
        with reachable():
            found = self.redis.zrevrange(f"{self.prefix}requests:{model_name}", 0, 0)
        return str(found[0]) if found else None

    def states(self, job_ids: Sequence[str]) -> list[str | None]:
        """The jobs' states in one round trip, of ended ones for 30 days; None where Redis knows no such job."""
        with reachable():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hget(f"{self.prefix}job:{job_id}", "state")
                pipeline.get(f"{self.prefix}over:{job_id}")
            found = pipeline.execute()
        return [state or over for state, over in zip(found[::2], found[1::2], strict=True)]

    def result(self, job_id: str, step: str) -> dict[str, Any] | None:
        """What a step of the job was committed with; None if it was not."""
        with reachable():
            text = self.redis.hget(f"{self.prefix}step:{job_id}:{step}", "result")
        return json.loads(text) if text else None

    def job_result(self, job_id: str) -> dict[str, Any]:
        """The job's result so far; {} if there is none."""
        with reachable():
            text = self.redis.hget(f"{self.prefix}job:{job_id}", "result")
        return json.loads(text) if text else {}

    def running(self) -> list[tuple[str, str, str]]:
        """(job, step, worker) of the steps that run now."""
        with reachable():
            found = self.redis.hgetall(f"{self.prefix}running")
        return [(*member.split("|", 1), owner.partition("#")[0]) for member, owner in found.items()]

    def nodes_in_use(self) -> frozenset[str]:
        """Nodes that alone can run some unfinished step."""
        with reachable():
            return frozenset(self.redis.smembers(f"{self.prefix}nodes_in_use"))

    def plans_wanted(self, node_id: str) -> frozenset[str]:
        """Plans of which the node has a shard to cut."""
        with reachable():
            members = self.redis.smembers(f"{self.prefix}at:{node_id}")
            pipeline = self.redis.pipeline(transaction=False)
            for member in members:
                pipeline.hget(f"{self.prefix}step:{member.replace('|', ':', 1)}", "args")
            found = [json.loads(text) for text in pipeline.execute() if text]
        return frozenset(args["plan_id"] for args in found if "plan_id" in args)


def no_job(job_id: str) -> NotFound:
    """The error for a job that nobody knows."""
    return NotFound(f"there is no job {job_id[:64]!r}: it never was, or it ended longer ago than jobs are kept")
