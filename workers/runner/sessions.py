"""The runs that this node takes part in: what reaches it is checked, run, and handed on.

A frame is answered when the chain behind it is done. So whoever waits for a node that dies, goes silent or refuses
knows it at once, and tells those before it. The model's output goes straight to the start node.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from planner.errors import Conflict, InvalidInput, LimitExceeded, NotFound
from workers.runner.frame import Frame, pack
from workers.runner.peer import Peer
from workers.runner.route import Holder, Route, holder_of
from workers.runner.stages import Loaded, Stages
from workers.runtime.generation import prepare
from workers.runtime.payload import Handoff
from workers.runtime.session import Session
from workers.settings import RunSettings

logger = logging.getLogger(__name__)

#: A session that its start node does not renew for so long ends, in seconds; it renews three times as often.
LEASE_S = 6.0


class Part:
    """This node's part in one run."""

    def __init__(
        self,
        *,
        run_id: str,
        node_id: str,
        start: str,
        loaded: Loaded,
        core: Any,
        compute: ThreadPoolExecutor,
        settings: RunSettings,
        device: str,
    ) -> None:
        self.run_id, self.node_id, self.start, self.loaded, self.core = run_id, node_id, start, loaded, core
        self.manifest = loaded.stage.manifest
        self.lease_until = time.monotonic() + settings.load_s
        #: In a pass that waits for the nodes behind this one, or computes.
        self.busy = 0
        self._compute, self._settings, self._device = compute, settings, device
        self._peers: dict[str, Peer] = {}
        self._holders: dict[str, Holder] = {}
        self._routes: dict[int, tuple[Any, Route]] = {}
        self._sequence = 0
        self._pass = -1
        self._lock = threading.Lock()
        #: Pass -> what the model gave.
        self._outputs: dict[int, Mapping[str, Tensor]] = {}

    def open(self, nodes: Mapping[str, Any], *, token: str) -> None:
        """Learn who else takes part: `nodes` is node -> {url, units, names}."""
        self._peers = {
            node_id: Peer(node_id, node["url"], token=token, silence_s=self._settings.silence_s)
            for node_id, node in nodes.items()
            if node_id != self.node_id
        }
        self._holders = {
            node_id: Holder(units=frozenset(node["units"]), names=frozenset(node["names"]))
            for node_id, node in nodes.items()
        }
        self.renew()

    def renew(self) -> None:
        """Live for another lease."""
        self.lease_until = time.monotonic() + LEASE_S

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The other nodes of the run."""
        return self._peers

    def close(self) -> None:
        """Free what it holds."""
        if hasattr(self.core, "close"):
            self.core.close()
        for peer in self._peers.values():
            peer.close()

    # -- the start node --------------------------------------------------------------------------------------------
    def run_pass(self, handoff: Handoff) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Run one pass through the chain, from here: the model's output, and what `arrive` answers."""
        self._pass += 1
        self._outputs.clear()
        said = self._visit(handoff, step=1, pass_number=self._pass)
        if self._pass not in self._outputs:
            raise Conflict(f"pass {self._pass} of the run ended without an output")
        return self._outputs.pop(self._pass), said

    # -- every node ------------------------------------------------------------------------------------------------
    def arrive(self, frame: Frame) -> dict[str, Any]:
        """Check a frame, run its step and hand on what comes of it.

        Returns:
            `{spent_s, visits: [{node_id, step, compute_s}], hops: [{from, to, step, bytes, seconds}]}`.

        Raises:
            FairshardError: If it is refused, or a node behind this one fails.
        """
        head = frame.head
        with self._lock:
            self._check(frame)
            self._sequence = head.sequence
            if head.kind == "hop":
                self._pass = head.pass_number
        handoff = Handoff.from_bytes(frame.body, device=self._device)
        self._check_numbers(handoff, head.sender)
        if head.kind == "output":
            self._outputs[head.pass_number] = handoff.values
            return {"spent_s": 0.0, "visits": [], "hops": []}
        flow = self._compute.submit(self.core.arrive, handoff).result()
        self._route(flow.trace).check(
            head.step, handoff, receiver=self.node_id, sender=head.sender, holder=self._holders[self.node_id]
        )
        return self._visit(handoff, step=head.step, pass_number=head.pass_number)

    def _check(self, frame: Frame) -> None:
        head = frame.head
        if not self._holders:
            raise Conflict(f"run {self.run_id} is not open on {self.node_id}")
        due = (self._pass, self._pass + 1) if self.node_id != self.start else (self._pass,)
        expected: dict[str, tuple[Any, bool]] = {
            "plan_id": (self.manifest.plan_id, head.plan_id == self.manifest.plan_id),
            "revision": (self.manifest.revision, head.revision == self.manifest.revision),
            "receiver": (self.node_id, head.receiver == self.node_id),
            "sender": ("a node of the run", head.sender in self._holders and head.sender != self.node_id),
            "pass_number": (" or ".join(map(str, due)), head.pass_number in due),
            "sequence": (f"a number above {self._sequence} (it is replayed)", head.sequence > self._sequence),
            "kind": ("hop", head.kind == "hop" or self.node_id == self.start),
        }
        for name, (wanted, right) in expected.items():
            if not right:
                got = getattr(head, name)
                raise Conflict(
                    f"node {self.node_id} refuses a frame of {head.sender}: {name} {got}, expected {wanted}",
                    details={
                        "field": name,
                        "expected": str(wanted),
                        "got": got,
                        "from": head.sender,
                        "to": self.node_id,
                    },
                )

    def _check_numbers(self, handoff: Handoff, sender: str) -> None:
        for name, value in handoff.values.items():
            if value.is_floating_point() and bool(torch.isnan(value).any()):
                raise InvalidInput(
                    f"what {sender} handed to {self.node_id} is not a number (NaN) in {name}",
                    details={"from": sender, "to": self.node_id, "tensor": name},
                )

    def _route(self, trace: Any) -> Route:
        known = self._routes.get(id(trace))
        if known is None:
            found = Route(
                trace,
                start=self.start,
                holders=self._holders,
                plan_id=self.manifest.plan_id,
                revision=self.manifest.revision,
            )
            # With the trace: another could come to lie at its address.
            known = self._routes[id(trace)] = (trace, found)
        return known[1]

    def _visit(self, handoff: Handoff, *, step: int, pass_number: int) -> dict[str, Any]:
        began = time.monotonic()
        self.busy += 1
        try:
            result, body, compute_s = self._compute.submit(self._run, handoff).result()
            visit = {"node_id": self.node_id, "step": step, "compute_s": compute_s}
            if isinstance(result, Handoff):
                assert result.next_module is not None
                target = holder_of(result.next_module, self._holders)
                if target is None or target == self.node_id:
                    raise Conflict(f"no other node of the run holds {result.next_module}, which comes next")
                said = self._send(body, target, kind="hop", step=step + 1, pass_number=pass_number)
            elif self.node_id == self.start:
                self._outputs[pass_number] = result
                said = {"visits": [], "hops": []}
            else:
                said = self._send(body, self.start, kind="output", step=step + 1, pass_number=pass_number)
        finally:
            self.busy -= 1
        return {
            "spent_s": time.monotonic() - began,
            "visits": [visit, *said["visits"]],
            "hops": said["hops"],
        }

    def _run(self, handoff: Handoff) -> tuple[Any, bytes, float]:
        """In the one thread that computes."""
        began = time.perf_counter()
        result = self.core.step(handoff)
        if isinstance(result, Handoff):
            body = result.to_bytes()
        elif self.node_id == self.start:
            body = b""
        else:
            tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
            body = Handoff(inputs={}, values=tensors).to_bytes()
        return result, body, time.perf_counter() - began

    def _send(self, body: bytes, target: str, *, kind: str, step: int, pass_number: int) -> dict[str, Any]:
        with self._lock:
            self._sequence += 1
            sequence = self._sequence
        pieces = pack(
            body,
            kind=kind,
            run_id=self.run_id,
            plan_id=self.manifest.plan_id,
            revision=self.manifest.revision,
            sender=self.node_id,
            receiver=target,
            pass_number=pass_number,
            step=step,
            sequence=sequence,
        )
        began = time.monotonic()
        said = self._peers[target].send("POST", "/frames", pieces, deadline_s=self._settings.deadline_s)
        took = time.monotonic() - began
        hop = {
            "from": self.node_id,
            "to": target,
            "step": step,
            "bytes": sum(map(len, pieces)),
            "seconds": max(0.0, took - said["spent_s"]),
        }
        return {"visits": said["visits"], "hops": [hop, *said["hops"]]}


class OnePass:
    """A model that generates nothing: one pass, no caches."""

    def __init__(self, stage: Any) -> None:
        self.arrive, self._stage = stage.arrive, stage
        self.memory_bytes = 0

    def step(self, handoff: Handoff) -> Any:
        """As `Session.step`; the output is the model's own."""
        return self._stage(handoff)


class Sessions:
    """All runs of this node; what its server's requests reach (`workers.runner.server`)."""

    def __init__(self, stages: Stages, *, node_id: str, token: str, settings: RunSettings) -> None:
        self.stages = stages
        self._node_id, self._token, self._settings = node_id, token, settings
        #: All computing is done in one thread: torch's helpers belong to the thread that calls them, and the model's
        #: caches are nobody else's meanwhile.
        self._compute = ThreadPoolExecutor(1, "compute")
        self._lock = threading.Lock()
        self._parts: dict[str, Part] = {}

    def make(
        self, run_id: str, plan_id: str, *, start: str, batch: int, prompt: int, more: int, padded: bool
    ) -> Part:
        """Load the stage, trace what will be asked of it and make the run's session; open it with `open`.

        Args:
            run_id: The run.
            plan_id: Its plan.
            start: The start node.
            batch: Sequences.
            prompt: Tokens of each.
            more: New tokens of each; 0: one pass without caches.
            padded: Whether the sequences are of unequal length.

        Raises:
            FairshardError: If it cannot be, or does not fit.
        """
        with self._lock:
            if run_id in self._parts:
                return self._parts[run_id]
            if len(self._parts) >= self._settings.max_sessions:
                raise LimitExceeded(
                    f"node {self._node_id} takes part in {len(self._parts)} runs, as many as it may "
                    "(FAIRSHARD_MAX_SESSIONS): wait for the end of one",
                    details={"runs": len(self._parts), "setting": "FAIRSHARD_MAX_SESSIONS"},
                )
        loaded = self.stages.load(plan_id, run_id)
        try:
            core = self._compute.submit(self._core, loaded, batch, prompt, more, padded).result()
            self.stages.reserve(run_id, core.memory_bytes)
        except BaseException:
            self.stages.release(run_id)
            raise
        part = Part(
            run_id=run_id,
            node_id=self._node_id,
            start=start,
            loaded=loaded,
            core=core,
            compute=self._compute,
            settings=self._settings,
            device=self.stages.device,
        )
        with self._lock:
            self._parts[run_id] = part
        return part

    def _core(self, loaded: Loaded, batch: int, prompt: int, more: int, padded: bool) -> Any:
        stage = loaded.stage
        if not more:
            return OnePass(stage)
        prepare(stage, batch=batch, length=prompt, padded=padded)
        return Session(stage, batch=batch, length=prompt + more)

    def part(self, run_id: str) -> Part:
        """The run's part here.

        Raises:
            NotFound: If there is none.
        """
        with self._lock:
            part = self._parts.get(run_id)
        if part is None:
            raise NotFound(
                f"node {self._node_id} takes no part in run {run_id:.64}: it has ended, or was never announced here",
                details={"run_id": run_id, "node_id": self._node_id},
            )
        return part

    @property
    def count(self) -> int:
        """How many runs there are."""
        return len(self._parts)

    # -- the server's requests -------------------------------------------------------------------------------------
    def frame(self, frame: Frame) -> dict[str, Any]:
        """As `workers.runner.server.Sessions`."""
        part = self.part(frame.head.run_id)
        said = part.arrive(frame)
        part.renew()
        return said

    def open(self, run_id: str, said: dict[str, Any]) -> dict[str, Any]:
        """As `workers.runner.server.Sessions`; `said` is {nodes}."""
        try:
            self.part(run_id).open(said["nodes"], token=self._token)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"a session cannot be opened so: {error!r:.200}") from None
        return {"node_id": self._node_id}

    def renew(self, run_id: str) -> dict[str, Any]:
        """As `workers.runner.server.Sessions`."""
        self.part(run_id).renew()
        return {"node_id": self._node_id}

    def end(self, run_id: str) -> dict[str, Any]:
        """As `workers.runner.server.Sessions`."""
        with self._lock:
            part = self._parts.pop(run_id, None)
        if part is not None:
            part.close()
            logger.info("run %s has ended here", run_id)
        self.stages.release(run_id)
        return {"node_id": self._node_id}

    def sweep(self) -> int:
        """End sessions whose start node went silent; how many are left."""
        now = time.monotonic()
        with self._lock:
            late = [run_id for run_id, part in self._parts.items() if part.lease_until < now and not part.busy]
        for run_id in late:
            logger.warning("run %s ends here: its start node went silent", run_id)
            self.end(run_id)
        return self.count
