"""A step that is blocked is left within a beat or two of its job's cancel, and says meanwhile what it waits for."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.running import RedisProcess, until

from workers.ledger.ledger import Ledger
from workers.ledger.steps import StepSpec
from workers.network.retry import RetryPolicy, Transient, retrying
from workers.progress import stoppable, wait
from workers.queue import claims
from workers.queue.claims import Claim, run_step
from workers.transfer.threads import ThreadGroup


def asked_to_wait(_: Claim) -> Any:
    def attempt() -> None:
        raise Transient("HTTP 429", retry_after_s=100.0)

    return retrying(attempt, what="https://hub/x", policy=RetryPolicy())


def no_answer(_: Claim) -> Any:
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def attempt() -> bytes:
            with socket.create_connection(silent.getsockname()) as connection:
                return connection.recv(1)

        return retrying(attempt, what="https://hub/x", policy=RetryPolicy())


def caught_once(_: Claim) -> Any:
    with stoppable("a library that catches everything"):
        try:
            time.sleep(60)
        except Exception:
            time.sleep(60)


def thinks(_: Claim) -> Any:
    with stoppable("plans"):
        while True:
            pass


def in_threads(claim: Claim) -> Any:
    group = ThreadGroup(total=2, progress=claim.progress, what="shard")
    for _ in range(2):
        group.start(lambda: wait(100.0, "https://hub/x asks to wait", pause=group.pause))
    group.wait()


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (asked_to_wait, r"https://hub/x asks to wait 10\d s: HTTP 429"),
        (no_answer, "waits for https://hub/x"),
        (caught_once, "a library that catches everything"),
        (thinks, "plans"),
        (in_threads, "https://hub/x asks to wait"),
    ],
)
def test_a_cancelled_step_is_left_wherever_it_is(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch, work: Callable[[Claim], Any], said: str
) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.1)
    ledger = Ledger(server.client())
    job_id = ledger.submit(
        "request", model_name="a/b", params={}, steps=[StepSpec(name="s", task="t", queue="q")]
    ).job_id
    cancelled: list[float] = []

    def cancel() -> None:
        other = Ledger(server.client())
        until(
            lambda: re.fullmatch(said, (other.views.job(job_id)["steps"][0]["progress"] or {}).get("what", "")),
            what=said,
        )
        cancelled.append(time.monotonic())
        other.cancel(job_id)

    thread = threading.Thread(target=cancel)
    thread.start()
    assert run_step(ledger, job_id, "s", work, owner="me@here") is None
    thread.join()
    assert time.monotonic() - cancelled[0] < 2


def test_what_is_waited_for_and_until_when_is_in_the_progress(server: RedisProcess) -> None:
    ledger = Ledger(server.client())
    job_id = ledger.submit(
        "request", model_name="a/b", params={}, steps=[StepSpec(name="s", task="t", queue="q")]
    ).job_id
    seen: list[Any] = []

    def work(claim: Claim) -> dict[str, Any]:
        claim.progress(3, 10, what="shard")
        wait(30.0, "the Hub asks", pause=lambda _: claim.beat())
        seen.append(ledger.views.job(job_id)["steps"][0]["progress"])
        claim.beat()
        seen.append(ledger.views.job(job_id)["steps"][0]["progress"])
        return {}

    run_step(ledger, job_id, "s", work, owner="me@here")
    waiting, after = seen
    assert (waiting["what"], waiting["done"], waiting["total"]) == ("the Hub asks", 3, 10)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", waiting["waits_until"])
    assert (after["what"], after.get("waits_until")) == ("shard", None)
