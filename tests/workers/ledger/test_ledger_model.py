"""Any interleaving of users, workers, messages, crashes, clock jumps and dying nodes, against a model of the ledger.

What is checked after each step: the counters and indices agree with the steps; no outcome counts twice; nobody gets
a step whose lease another holds, nor more often than its attempts. And at the end, once workers work again: every job
is done exactly once, failed with its reason, or cancelled, and nothing of it is left behind.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.depth import DEEP, depth
from support.ledger_clock import Clocked, chain, splits
from support.running import RedisProcess

from planner.errors import InvalidInput, LimitExceeded, Unavailable
from workers.ledger.steps import ENDED, Claimed, StepSpec, Wakeup

NODES = ("a", "b", "c")
OPEN = {"waiting", "queued", "running"}
#: What becomes of an attempt; nobody looks, or the reconciler does.
FATES = ("fails", "vanishes", "vanishes unseen")
LEASE_S = 15
ATTEMPTS = 3
#: A due time further off than this was written before the clock was set back.
FAR_S = 600
_server: list[RedisProcess] = []


class LedgerMachine(RuleBasedStateMachine):
    """Users, workers and accidents."""

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.clocked = Clocked(_server[0].client(), lease_s=LEASE_S, max_attempts=ATTEMPTS, job_ttl_s=10**9)
        self.ledger = self.clocked.ledger
        self.jobs: list[str] = []
        #: Messages on their way: any may be lost, doubled or late.
        self.messages: list[Wakeup] = []
        #: (job, step, fence) of commits that counted.
        self.counted: set[tuple[str, str, int]] = set()
        #: Jobs that someone cancelled, or that had a reason to fail.
        self.ended_early: set[str] = set()
        #: Jobs that wait for a node that dies.
        self.patient: set[str] = set()
        self.dead_nodes: set[str] = set()
        self.owners = self.submissions = 0
        #: (job, step) -> the fence that holds it, and until when.
        self.leases: dict[tuple[str, str], tuple[int, int]] = {}
        #: (job, step) -> claims that count against it.
        self.attempts: Counter[tuple[str, str]] = Counter()
        #: (job, step) -> not before; a failed step's message may be doubled.
        self.not_before: dict[tuple[str, str], int] = {}
        #: (job, step) -> the latest fence that was seen; they only grow.
        self.fences: dict[tuple[str, str], int] = {}

    def teardown(self) -> None:
        self.finish_everything()
        self.clocked.client.close()

    def collect(self) -> None:
        self.messages += self.clocked.sent
        self.clocked.sent.clear()

    @initialize()
    def start(self) -> None:
        self.clocked.advance(1)

    # -- users -------------------------------------------------------------------------------------------------------
    @precondition(lambda self: len(self.jobs) < 5)
    @rule(
        kind=st.sampled_from(["both", "request", "process", "process", "delete"]),
        flight=st.sampled_from([None, "x", "y"]),
        model=st.sampled_from(["m/1", "m/2"]),
        policy=st.sampled_from(["replan", "wait"]),
        limit=st.sampled_from([None, None, 2]),
    )
    def submit(self, kind: str, flight: str | None, model: str, policy: str, limit: int | None) -> None:
        names = {"request": ("download", "publish"), "both": ("download", "publish", "plan"), "process": ("plan",)}
        if kind == "delete":
            steps = [
                StepSpec(name=f"delete:{n}", task="workers.delete_shards", queue=f"node.{n}", node_id=n)
                for n in NODES
            ]
            policy = "skip"
        else:
            steps = chain(*names[kind])
        unfinished = {job_id for job_id in self.jobs if self.ledger.views.job(job_id)["state"] not in ENDED}
        self.submissions += 1
        try:
            given = self.ledger.submit(
                "request" if kind == "both" else kind,
                model_name=model,
                params={},
                steps=steps,
                single_flight=flight and f"{kind}:{flight}:{model}",
                waits_for=self.ledger.running_request(model) if kind == "process" else None,
                submitter="ann",
                # The same in every run, or failures could not be shrunk.
                job_id=f"{self.submissions:032x}",
                on_node_loss=policy,
                max_queued=limit,
            )
        except LimitExceeded:
            assert limit is not None
            assert len(unfinished) >= limit
            return
        if given.created:
            self.jobs.append(given.job_id)
            self.patient |= {given.job_id} if policy == "wait" else set()
        else:
            assert given.job_id in unfinished
        self.collect()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.jobs:
            job_id = data.draw(st.sampled_from(self.jobs))
            if self.ledger.cancel(job_id):
                self.ended_early.add(job_id)
                self.let_go(job_id)
            self.collect()

    def let_go(self, job_id: str, *steps: str) -> None:
        """Nobody holds these steps any more (none named: none of the job's)."""
        for key in [key for key in self.leases if key[0] == job_id and (not steps or key[1] in steps)]:
            del self.leases[key]

    def start_over(self, job_id: str, *steps: str) -> None:
        """The steps were put anew: nobody holds them, and their attempts count from nothing."""
        self.let_go(job_id, *steps)
        for step in steps:
            self.attempts.pop((job_id, step), None)
            self.not_before.pop((job_id, step), None)

    # -- workers -----------------------------------------------------------------------------------------------------
    def claim(self, wakeup: Wakeup) -> Claimed | None:
        self.owners += 1
        key, now = (wakeup.job_id, wakeup.step), self.clocked.now_s
        claimed = self.ledger.claim(wakeup.job_id, wakeup.step, owner=f"w{self.owners}@h#1")
        self.collect()
        held = key in self.leases and self.leases[key][1] > now
        if isinstance(claimed, str):
            assert claimed != "busy" or held
            if claimed == "poisoned":
                assert self.attempts[key] == ATTEMPTS
                self.ended_early.add(wakeup.job_id)
                self.let_go(wakeup.job_id)
            return None
        assert not held, (wakeup, self.leases[key], now)
        assert self.not_before.pop(key, now) <= now
        self.attempts[key] += 1
        assert claimed.attempt == self.attempts[key] <= ATTEMPTS
        assert claimed.fence > self.fences.get(key, 0)
        self.fences[key] = claimed.fence
        self.leases[key] = (claimed.fence, now + LEASE_S)
        return claimed

    @precondition(lambda self: self.messages)
    @rule(
        target=claims,
        data=st.data(),
        fate=st.sampled_from(["delivered", "delivered", "delivered", "doubled", "lost"]),
    )
    def message(self, data: st.DataObject, fate: str) -> Any:
        wakeup = self.messages.pop(data.draw(st.integers(0, len(self.messages) - 1)))
        if fate == "lost":
            return multiple()
        if fate == "doubled":
            self.messages.append(wakeup)
        claimed = self.claim(wakeup)
        return claimed if claimed is not None else multiple()

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), steps=st.integers(1, 4))
    def work(self, data: st.DataObject, steps: int) -> None:
        """Some steps as they should go, so that walks get somewhere."""
        for _ in range(steps):
            if self.messages:
                claimed = self.claim(self.messages.pop(data.draw(st.integers(0, len(self.messages) - 1))))
                if claimed is not None:
                    assert self.commit_it(claimed) == "ok"
                    self.counted.add((claimed.job_id, claimed.step, claimed.fence))

    @rule(claimed=claims)
    def renew(self, claimed: Claimed) -> None:
        standing = self.ledger.renew(claimed, progress={"done": 1, "total": 2, "what": ""})
        view = self.ledger.views.job(claimed.job_id)
        if standing == "cancelled":
            assert view["state"] == "cancelled"
        key = (claimed.job_id, claimed.step)
        if standing == "ok":
            # A lease that ran out, and that nobody took, may be renewed all the same: its holder lives.
            assert self.fences[key] == claimed.fence
            assert self.lease(*key) == self.clocked.now_s + LEASE_S
            self.leases[key] = (claimed.fence, self.clocked.now_s + LEASE_S)
        else:
            assert self.leases.get(key, (0, 0))[0] != claimed.fence, (standing, claimed)

    def commit_it(self, claimed: Claimed) -> str:
        add, drop = [], []
        before = self.ledger.result(claimed.job_id, "plan") or {}
        if claimed.step == "plan":
            alive = [n for n in NODES if n not in self.dead_nodes] or list(NODES[:1])
            chosen = alive[: 1 + (claimed.fence % len(alive))]
            add = splits(*chosen)
            drop = [f"split:{n}" for n in before.get("nodes", []) if n not in chosen]
            result: dict[str, Any] = {"nodes": chosen, "by": claimed.fence}
        else:
            result = {"by": claimed.fence}
        standing = self.ledger.commit(claimed, result, add=add, drop=drop, job_result={"last": claimed.step})
        self.collect()
        if standing == "ok" and before != (self.ledger.result(claimed.job_id, "plan") or {}):
            self.start_over(claimed.job_id, *(step.name for step in add), *drop)
            states = {step["name"]: step["state"] for step in self.ledger.views.job(claimed.job_id)["steps"]}
            assert not {states[name] for name in drop} & OPEN, (drop, states)
        if standing == "ok":
            self.let_go(claimed.job_id, claimed.step)
        return standing

    @rule(claimed=claims)
    def commit(self, claimed: Claimed) -> None:
        key = (claimed.job_id, claimed.step, claimed.fence)
        before = self.clocked.client.hmget(f"fairshard:step:{claimed.job_id}:{claimed.step}", "state", "fence")
        committed = self.clocked.client.hget("fairshard:counters", "steps_done_total")
        standing = self.commit_it(claimed)
        if before == ["running", str(claimed.fence)]:
            assert standing == "ok"
            assert key not in self.counted
            self.counted.add(key)
        elif before == ["done", str(claimed.fence)] and key in self.counted:
            # A repeated call answers as the first did (unless the job was cancelled since), and changes nothing.
            assert standing in {"ok", "cancelled"}
            assert self.clocked.client.hget("fairshard:counters", "steps_done_total") == committed
        else:
            assert standing != "ok", (before, claimed)

    @rule(claimed=claims, final=st.booleans(), delay=st.sampled_from([0, 5]))
    def fail(self, claimed: Claimed, final: bool, delay: int) -> None:
        error = InvalidInput("bad") if final else Unavailable("away")
        outcome = self.ledger.fail(claimed, error, delay_s=delay, final=final)
        if outcome == "failed":
            assert final or claimed.attempt == ATTEMPTS
            self.ended_early.add(claimed.job_id)
            self.let_go(claimed.job_id)
        elif outcome == "retry":
            assert not final
            assert claimed.attempt < ATTEMPTS
            self.let_go(claimed.job_id, claimed.step)
            self.not_before[claimed.job_id, claimed.step] = self.clocked.now_s + delay
        self.collect()

    @precondition(lambda self: self.messages)
    @rule(fates=st.sampled_from([*([fate] * (ATTEMPTS + 1) for fate in FATES), [*FATES, *FATES]]))
    def poison(self, fates: list[str]) -> None:
        """A step that fails, or takes its worker with it, again and again."""
        for wakeup in self.messages:
            if self.ledger.views.job(wakeup.job_id)["state"] not in ENDED and self.claim(wakeup) is not None:
                break
        else:
            return
        self.time_passes(seconds=16)
        for fate in fates:
            claimed = self.claim(wakeup)
            if claimed is not None and fate == "fails":
                self.fail(claimed, final=False, delay=5)
                # The message, doubled: too early.
                self.claim(wakeup)
            if fate == "vanishes unseen":
                self.time_passes(seconds=16)
            else:
                self.reconcile(seconds=16, limit=500)

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), first=st.sampled_from(["commit", "renew", "fail", "defer"]))
    def comes_back_late(self, data: st.DataObject, first: str) -> None:
        """A worker is silent for so long that another has its step, and then goes on as if nothing had been."""
        wakeup = data.draw(st.sampled_from(self.messages))
        late = self.claim(wakeup)
        if late is None:
            return
        self.time_passes(seconds=6)
        self.renew(late)
        self.reconcile(seconds=16, limit=500)
        other = self.claim(wakeup)
        rest = {"final": False, "delay": 0} if first == "fail" else {}
        getattr(self, first)(late, **rest)
        if other is not None:
            self.renew(other)
            assert self.lease(other.job_id, other.step) == self.clocked.now_s + LEASE_S

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), node=st.sampled_from(NODES), begun=st.booleans())
    def loses_a_node_while_it_splits(self, data: st.DataObject, node: str, begun: bool) -> None:
        """Everything goes well until the shards are cut; then a node dies, and the others go on."""
        for _ in range(12):
            wakeups = [wakeup for wakeup in self.messages if begun or not wakeup.step.startswith("split:")]
            if not wakeups:
                break
            wakeup = data.draw(st.sampled_from(wakeups))
            self.messages.remove(wakeup)
            claimed = self.claim(wakeup)
            if claimed is not None and not wakeup.step.startswith("split:"):
                self.commit(claimed)
        self.node_dies(node=node)
        self.work(data=data, steps=4)

    @rule(claimed=claims)
    def defer(self, claimed: Claimed) -> None:
        if self.ledger.defer(claimed) == "ok":
            self.handed_back(claimed.job_id, claimed.step)
        self.collect()

    def handed_back(self, job_id: str, step: str) -> None:
        self.let_go(job_id, step)
        self.attempts[job_id, step] -= 1

    @rule(claimed=claims)
    def worker_stops(self, claimed: Claimed) -> None:
        if self.ledger.hand_back(claimed.job_id, claimed.step, owner=f"w{self.owners}@h"):
            self.handed_back(claimed.job_id, claimed.step)
        self.collect()

    # -- accidents ---------------------------------------------------------------------------------------------------
    @precondition(lambda self: self.messages)
    @rule()
    def all_messages_are_lost(self) -> None:
        self.messages.clear()

    @rule(seconds=st.sampled_from([1, 6, 16, 700]))
    def time_passes(self, seconds: int) -> None:
        self.clocked.advance(seconds)

    @rule(seconds=st.sampled_from([60, 86400]))
    def clock_is_set_back(self, seconds: int) -> None:
        self.clocked.advance(-seconds)

    @rule(seconds=st.sampled_from([0, 6, 16, 700]), limit=st.sampled_from([2, 500]))
    def reconcile(self, seconds: int, limit: int) -> None:
        self.clocked.advance(seconds)
        now = self.clocked.now_s
        # Written before the clock was set back: due now.
        for member in self.clocked.client.zrangebyscore("fairshard:due", f"({1000 * (now + FAR_S)}", "+inf"):
            job_id, _, name = member.partition("|")
            self.not_before.pop((job_id, name), None)
        self.ledger.wake_overdue(limit=limit)
        self.collect()
        latest = self.clocked.client.zrange("fairshard:due", -1, -1, withscores=True)
        assert limit == 2 or not latest or latest[0][1] <= 1000 * (now + FAR_S)
        far = {key for key, (_, until) in self.leases.items() if until > now + FAR_S}
        mended = {key: (self.leases[key][0], now + LEASE_S) for key in far if self.lease(*key) == now + LEASE_S}
        assert len(mended) == len(far) or limit == 2
        self.leases |= mended
        for job_id, step in list(self.leases):
            # Taken from whoever was silent for too long; nobody else loses anything.
            if self.lease(job_id, step) is None:
                assert self.leases[job_id, step][1] <= now
                del self.leases[job_id, step]

    def lease(self, job_id: str, step: str) -> int | None:
        """Until when the step is somebody's, as the ledger sees it."""
        state, lease = self.clocked.client.hmget(f"fairshard:step:{job_id}:{step}", "state", "lease")
        return int(lease) // 1000 if state == "running" else None

    @rule(node=st.sampled_from(NODES))
    def node_dies(self, node: str) -> None:
        self.dead_nodes.add(node)
        self.ledger.lose_node(node)
        for job_id, step in list(self.leases):
            if self.lease(job_id, step) is None:
                # Its own step, and no other: or the step of a job that has nothing left to do.
                assert step.endswith(f":{node}") or self.ledger.views.job(job_id)["state"] in ENDED
                self.let_go(job_id, step)
        for job_id in self.jobs:
            if job_id not in self.patient:
                steps = self.ledger.views.job(job_id)["steps"]
                assert not [s for s in steps if s["name"].endswith(f":{node}") and s["state"] in OPEN], steps
            if (job_id, "plan") in self.attempts and self.reopened(job_id):
                self.attempts[job_id, "plan"] = 0
        self.collect()

    def reopened(self, job_id: str) -> bool:
        """Whether the plan is to be made again, and nobody does yet."""
        key = f"fairshard:step:{job_id}:plan"
        state, result, attempts = self.clocked.client.hmget(key, "state", "result", "attempts")
        return state == "queued" and bool(result) and attempts == "0"

    @rule(node=st.sampled_from(NODES))
    def node_returns(self, node: str) -> None:
        self.dead_nodes.discard(node)

    # -- what always holds
    @invariant()
    def indices_agree_with_the_steps(self) -> None:
        client = self.clocked.client
        due = set(client.zrange("fairshard:due", 0, -1))
        expected: set[str] = set()
        for job_id in self.jobs:
            view = self.ledger.views.job(job_id)
            states = {step["name"]: step["state"] for step in view["steps"]}
            spent = [
                step["name"] for step in view["steps"] if step["state"] == "queued" and step["attempts"] >= ATTEMPTS
            ]
            assert not spent, (job_id, spent)
            open_steps = sum(state in OPEN for state in states.values())
            assert int(client.hget(f"fairshard:job:{job_id}", "open")) == open_steps, (job_id, states)
            if view["state"] in ENDED:
                assert open_steps == 0, (job_id, view["state"], states)
            else:
                assert open_steps > 0, (job_id, view["state"], states)
                expected |= {f"{job_id}|{name}" for name, state in states.items() if state in {"queued", "running"}}
                # Something is due, or the job waits for another that is not over.
                held = client.hget(f"fairshard:job:{job_id}", "held")
                assert {"queued", "running"} & set(states.values()) or (
                    held and self.ledger.views.job(held)["state"] not in ENDED
                ), (job_id, states)
            if view["state"] == "failed":
                assert view["error"]["message"]
        assert due == expected
        unfinished = {job_id for job_id in self.jobs if self.ledger.views.job(job_id)["state"] not in ENDED}
        assert set(client.zrange("fairshard:unfinished", 0, -1)) == unfinished
        assert int(client.hget("fairshard:submitters", "ann") or 0) == len(unfinished)
        assert set(client.hvals("fairshard:flight")) <= unfinished

    def finish_everything(self) -> None:
        """Workers work, and the reconciler passes: everything comes to its end."""
        self.dead_nodes.clear()
        for _ in range(400):
            while self.messages:
                claimed = self.claim(self.messages.pop())
                if claimed is not None:
                    self.commit_it(claimed)
            if all(self.ledger.views.job(job_id)["state"] in ENDED for job_id in self.jobs):
                break
            self.reconcile(seconds=700, limit=500)
        for job_id in self.jobs:
            view = self.ledger.views.job(job_id)
            note(f"{job_id}: {view['state']}")
            assert view["state"] in ENDED, view
            if view["state"] == "done":
                assert {step["state"] for step in view["steps"]} <= {"done", "lost"}
                last = view["steps"][-1]
                assert last["state"] == "done" or view["kind"] == "delete"
        left = set(self.clocked.client.scan_iter("fairshard:*"))
        kept = ("fairshard:job:", "fairshard:step:", "fairshard:events:", "fairshard:over:", "fairshard:jobs:")
        assert {key for key in left if not key.startswith(kept)} <= {
            "fairshard:jobs", "fairshard:ended", "fairshard:counters", "fairshard:counters:step_seconds",
        }  # fmt: skip


@pytest.mark.search
@pytest.mark.timeout(depth(300, 1200))
def test_no_interleaving_loses_or_doubles_a_job(tmp_path: Path) -> None:
    examples = int(os.environ.get("LEDGER_EXAMPLES", depth("30", "1000")))
    with RedisProcess(tmp_path) as process:
        _server[:] = [process]
        run_state_machine_as_test(
            LedgerMachine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=80,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                derandomize=not DEEP and "LEDGER_EXAMPLES" not in os.environ,
                # Making a failing walk short can take longer than a test may; LEDGER_SHRINK has it done.
                phases=list(Phase) if "LEDGER_SHRINK" in os.environ else [Phase.explicit, Phase.generate],
            ),
        )
