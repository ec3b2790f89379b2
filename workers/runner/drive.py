"""The start node's part: announce the run to all, collect who is ready, run the passes, say what comes of it.

A run is refused as a whole: one node that is not there, or cannot, and no pass begins. Whatever ends it, each node is
told to forget it; one that cannot be told forgets it when its lease runs out.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from planner.errors import Cancelled, Conflict, FairshardError, InvalidInput, Unavailable, from_code
from workers.runner.announcement import announce, next_answer
from workers.runner.runs import BEAT_S, LOADING_S, Runs, error_json
from workers.runner.sessions import LEASE_S, Part, Sessions
from workers.runner.stages import Loaded
from workers.runner.text import Stream, Text
from workers.runtime.generation import Driver
from workers.runtime.payload import Handoff
from workers.settings import RunSettings

logger = logging.getLogger(__name__)

#: A node that said nothing for so long before it is ready is dead: its worker's answer, then the runner's beats.
_FIRST_WORD_S, _START_S = 3.0, 60.0
#: Numbers in one answer's outputs or logits, at most: they pass through Redis as JSON.
_MOST_NUMBERS = 2_000_000
#: New tokens where nobody says how many.
_TOKENS = 256


class Run:
    """One run, led from here; `lead` does all of it and never raises."""

    def __init__(
        self, runs: Runs, sessions: Sessions, *, run_id: str, url: str, token: str, settings: RunSettings
    ) -> None:
        self._runs, self._sessions, self.run_id, self._url, self._token = runs, sessions, run_id, url, token
        self._settings = settings
        self._me = runs.services.settings.node_id
        self._stop: FairshardError | None = None
        self._ended = threading.Event()
        self._part: Part | None = None
        #: The other nodes to which the run was announced.
        self._told: list[str] = []
        #: How long this node may be silent before it is taken for dead.
        self._patience_s = LOADING_S
        #: Of each pass: seconds, and what the nodes say of it.
        self._passes: list[tuple[float, dict[str, Any]]] = []

    def lead(self) -> None:
        """Lead the run to its end."""
        threading.Thread(target=self._beat, name=f"beat {self.run_id[:8]}", daemon=True).start()
        try:
            result = self._lead()
        except Cancelled as error:
            self._end("cancelled", error=error_json(error))
        except FairshardError as error:
            self._end("failed", error=error_json(error))
        except Exception as error:
            logger.exception("run %s failed", self.run_id)
            self._end("failed", error=error_json(error))
        else:
            self._end("done", result=result)
        finally:
            self._ended.set()
            self._forget()

    def _end(self, state: str, **said: Any) -> None:
        try:
            self._runs.end(self.run_id, state, **said)
        except FairshardError as error:
            logger.warning("nobody could be told that run %s is %s: %s", self.run_id, state, error)

    def _beat(self) -> None:
        """Say that this node lives, hear whether the run is to end, and renew the other nodes' leases."""
        renewed = time.monotonic()
        while not self._ended.wait(BEAT_S):
            try:
                reason = self._runs.beat(self.run_id, for_s=self._patience_s)
            except FairshardError:
                continue  # Redis may come back; if not, the next token finds out
            if reason is not None:
                self._stop = Cancelled("the run was cancelled" if reason == "cancelled" else f"the run is {reason}")
            if time.monotonic() - renewed >= LEASE_S / 3 and self._part is not None:
                renewed = time.monotonic()
                self._part.renew()
                for peer in self._part.peers.values():
                    with contextlib.suppress(FairshardError):  # the pass that needs it finds out
                        peer.call("POST", f"/sessions/{self.run_id}/lease", {}, deadline_s=LEASE_S)

    def _check(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _lead(self) -> dict[str, Any]:
        began = time.monotonic()
        run = self._runs.run(self.run_id)
        plan, request = self._runs.services.plans.get(run["plan_id"]), run["request"]
        start = plan["megaphone_plan"]["start_node"]
        if start != self._me:
            raise Conflict(f"node {self._me} does not lead runs of plan {run['plan_id']}: {start} does")
        self._runs.state(self.run_id, "loading")
        text = self._sessions.stages.text(run["plan_id"])
        inputs, more = ({}, 0) if request.get("deploy") else self._asked(request, text)
        batch, prompt = next((tuple(value.shape[:2]) for value in inputs.values()), (1, 1))
        padded = not bool(inputs.get("attention_mask", torch.ones(1)).all())
        asked: dict[str, Any] = {"batch": batch, "prompt": prompt, "more": more, "padded": padded}
        others = sorted({hop["node_id"] for hop in plan["megaphone_plan"]["chain"]} - {self._me})
        body = {
            "run_id": self.run_id,
            "plan_id": plan["plan_id"],
            "revision": plan.get("revision"),
            "digest": plan["megaphone_plan"].get("announcement", {}).get("digest"),
            "from": self._me,
            "to": others,
            **asked,
        }
        self._told = others
        announce(self._runs, body)
        with ThreadPoolExecutor(1) as pool:
            mine = pool.submit(self._sessions.make, self.run_id, plan["plan_id"], start=self._me, **asked)
            nodes = self._collect(others, mine)
            self._part = mine.result()
        nodes[self._me] = described(self._part.loaded, self._url)
        self._open(nodes)
        load_s = time.monotonic() - began
        if request.get("deploy"):
            taken = {node: int(nodes[node]["weight_bytes"]) for node in sorted(nodes)}
            self._runs.deploy(run["plan_id"], taken)
            return {"timings": {"load_s": load_s}, "nodes": taken}
        self._patience_s = self._settings.silence_s
        self._runs.beat(self.run_id, for_s=self._patience_s)  # the last one was for longer
        self._runs.state(self.run_id, "running")
        made = self._generate(inputs, more, request, text) if more else self._once(inputs, request)
        return {**made, "timings": {"load_s": load_s, **self._timings()}, "checks": self._checks()}

    def _asked(self, request: Mapping[str, Any], text: Text) -> tuple[dict[str, Tensor], int]:
        """The model's inputs, and how many new tokens at most."""
        inputs = _inputs(request, text)
        if "inputs" in request or request.get("embed"):
            return inputs, 0
        length = inputs["input_ids"].shape[1]
        more = request.get("max_new_tokens")
        if more is None:
            more = min(_TOKENS, max(1, (text.context or _TOKENS + length) - length))
        if text.context is not None and length + more > text.context:
            raise InvalidInput(
                f"{length} tokens and {more} new ones are more than the model's context of {text.context}",
                details={"tokens": length, "max_new_tokens": more, "context": text.context},
            )
        return inputs, int(more)

    def _collect(self, others: Sequence[str], mine: Future[Part]) -> dict[str, Any]:
        """What each of the other nodes answers.

        Raises:
            FairshardError: The first refusal, of this node's own (`mine`) too.
            Unavailable: If a node says nothing.
        """
        ready: dict[str, Any] = {}
        heard = dict.fromkeys(others, (time.monotonic(), _FIRST_WORD_S))
        deadline = time.monotonic() + self._settings.load_s
        while len(ready) < len(others):
            self._check()
            if mine.done():
                mine.result()
            said = next_answer(self._runs, self.run_id, timeout_s=0.5)
            now = time.monotonic()
            if said is not None and said["node_id"] in heard:
                node_id = said["node_id"]
                if said["state"] == "refused":
                    raise _refusal(node_id, said["error"])
                heard[node_id] = (now, _START_S if said["state"] == "taken" else LOADING_S)
                if said["state"] == "ready":
                    ready[node_id] = said
            for node_id, (when, patience) in heard.items():
                if node_id not in ready and (now - when > patience or now > deadline):
                    raise Unavailable(
                        f"node {node_id} did not answer the announcement of the run within "
                        f"{min(patience, self._settings.load_s):g} s",
                        details={"node_id": node_id},
                    )
        return ready

    def _open(self, nodes: Mapping[str, Any]) -> None:
        """Tell each node who else takes part, over the way that its frames will take."""
        hosts = {node["host"] for node in nodes.values()}
        lost = [node_id for node_id, node in nodes.items() if _is_loopback(node["url"])]
        if len(hosts) > 1 and lost:
            raise Conflict(
                f"node {lost[0]} is on another machine and states no address that others reach: set "
                "FAIRSHARD_PEER_URL (or FAIRSHARD_RUN_URL) there",
                details={"nodes": lost, "setting": "FAIRSHARD_PEER_URL"},
            )
        assert self._part is not None
        told = {node_id: {name: node[name] for name in ("url", "units", "names")} for node_id, node in nodes.items()}
        self._part.open(told, token=self._token)
        for peer in self._part.peers.values():
            peer.call("POST", f"/sessions/{self.run_id}", {"nodes": told}, deadline_s=self._settings.deadline_s)

    def _forget(self) -> None:
        peers = {} if self._part is None else self._part.peers
        for node_id in self._told:
            with contextlib.suppress(FairshardError):
                if node_id in peers:
                    peers[node_id].call("DELETE", f"/sessions/{self.run_id}", deadline_s=LEASE_S)
                else:  # the run was refused before their addresses were known to all
                    self._runs.tell(node_id, {"what": "end", "run_id": self.run_id})
        self._sessions.end(self.run_id)

    # -- passes ----------------------------------------------------------------------------------------------------
    def _send(self, handoff: Handoff) -> Mapping[str, Tensor]:
        self._check()
        assert self._part is not None
        began = time.monotonic()
        output, said = self._part.run_pass(handoff)
        self._passes.append((time.monotonic() - began, said))
        return output

    def _generate(
        self, inputs: Mapping[str, Tensor], more: int, request: Mapping[str, Any], text: Text
    ) -> dict[str, Any]:
        assert self._part is not None
        streams = [Stream(text, request.get("stop") or ()) for _ in range(inputs["input_ids"].shape[0])]

        def on_token(new: Mapping[int, int]) -> list[int]:
            self._check()
            said = {row: streams[row].add(token) for row, token in new.items()}
            rows = range(len(streams))
            self._runs.tokens(
                self.run_id, [[new[row]] if row in new else [] for row in rows], [said.get(row, "") for row in rows]
            )
            return [row for row in new if streams[row].stopped]

        driver = Driver(self._part.loaded.stage, self._send)
        made = driver.generate(
            inputs,
            max_new_tokens=more,
            temperature=float(request.get("temperature", 0.0)),
            top_p=float(request.get("top_p", 1.0)),
            top_k=int(request.get("top_k", 0)),
            seed=request.get("seed"),
            on_token=on_token,
            logits=bool(request.get("logits")),
        )
        rest = [stream.end() for stream in streams]
        if any(rest):
            self._runs.tokens(self.run_id, [[] for _ in rest], rest)
        return {
            "token_ids": made.token_ids,
            "text": _one([stream.whole for stream in streams]),
            "finish_reason": _one(made.finish_reasons),
            "prompt_tokens": int(inputs["attention_mask"].sum()),
            **({"logits": _listed(made.logits)} if made.logits is not None else {}),
        }

    def _once(self, inputs: Mapping[str, Tensor], request: Mapping[str, Any]) -> dict[str, Any]:
        """One pass of a model that generates nothing: its outputs, or with `embed` one vector a sequence."""
        output = self._send(Handoff(inputs=inputs))
        if request.get("embed"):
            hidden = output.get("last_hidden_state")
            if hidden is None:
                raise InvalidInput(f"this model gives no hidden states to embed by, but {', '.join(output)}")
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weights).sum(1) / weights.sum(1)
            vectors = torch.nn.functional.normalize(mean.float(), dim=-1)
            return {"embeddings": _listed(vectors), "prompt_tokens": int(mask.sum())}
        found = {name: _listed(value) for name, value in output.items() if isinstance(value, Tensor)}
        return {"outputs": found}

    # -- what it took ----------------------------------------------------------------------------------------------
    def _timings(self) -> dict[str, Any]:
        later = [seconds for seconds, _ in self._passes[1:]]
        stages: dict[tuple[int, str], list[float]] = defaultdict(list)
        hops: dict[tuple[int, str, str], list[tuple[float, int]]] = defaultdict(list)
        for _, said in self._passes:
            for visit in said["visits"]:
                stages[visit["step"], visit["node_id"]].append(visit["compute_s"])
            for hop in said["hops"]:
                hops[hop["step"], hop["from"], hop["to"]].append((hop["seconds"], hop["bytes"]))
        return {
            "prefill_s": self._passes[0][0] if self._passes else None,
            "decode_s_per_token": sum(later) / len(later) if later else None,
            "stages": [
                {
                    "step": step,
                    "node_id": node,
                    "prefill_s": took[0],
                    "decode_s": sum(took[1:]) / len(took[1:]) if len(took) > 1 else None,
                    "passes": len(took),
                }
                for (step, node), took in sorted(stages.items())
            ],
            "hops": [
                {
                    "step": step,
                    "from": sender,
                    "to": receiver,
                    "prefill_s": took[0][0],
                    "prefill_bytes": took[0][1],
                    "decode_s": sum(s for s, _ in took[1:]) / len(took[1:]) if len(took) > 1 else None,
                    "decode_bytes": took[-1][1] if len(took) > 1 else None,
                }
                for (step, sender, receiver), took in sorted(hops.items())
            ],
        }

    def _checks(self) -> dict[str, Any]:
        """What was checked on the way; a frame that failed would have ended the run."""
        return {"frames": sum(len(said["hops"]) for _, said in self._passes), "passes": len(self._passes)}


def described(loaded: Loaded, url: str) -> dict[str, Any]:
    """What a node that is ready says of itself."""
    import socket

    holder = loaded.holder
    return {
        "url": url,
        "host": socket.gethostname(),
        "units": sorted(holder.units),
        "names": sorted(holder.names),
        "weight_bytes": loaded.weight_bytes,
        "load_s": loaded.load_s,
    }


def _refusal(node_id: str, error: Mapping[str, Any]) -> FairshardError:
    message = f"node {node_id} refuses the run: {error.get('message')}"
    details = {**(error.get("details") or {}), "node_id": node_id}
    return from_code(str(error.get("code")), message, details=details) or Unavailable(message, details=details)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def _inputs(request: Mapping[str, Any], text: Text) -> dict[str, Tensor]:
    """The model's inputs; prompts of unequal length are padded on the left."""
    if "inputs" in request:
        try:
            return {name: torch.tensor(value) for name, value in request["inputs"].items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"the inputs are no tensors: {error!s:.200}") from None
    if "token_ids" in request:
        rows = request["token_ids"]
    elif "messages" in request:
        rows = [text.of_messages(request["messages"])]
    else:
        prompts = request["prompt"]
        rows = text.of_prompt([prompts] if isinstance(prompts, str) else prompts)
    if not rows or not all(rows):
        raise InvalidInput("there is no token to begin with: the prompt is empty")
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _one(values: list[Any]) -> Any:
    """The value of the one sequence, or the list of several."""
    return values[0] if len(values) == 1 else values


def _listed(value: Tensor) -> Any:
    if value.numel() > _MOST_NUMBERS:
        raise InvalidInput(
            f"an answer of {value.numel():,} numbers is more than passes as JSON, {_MOST_NUMBERS:,}: ask for less",
            details={"numbers": value.numel(), "most": _MOST_NUMBERS},
        )
    return value.float().tolist() if value.is_floating_point() else value.tolist()
