"""Nodes join with a join token only, and none can be another."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st
from support.running import RedisProcess, until

from planner.errors import AccessDenied, Conflict, InvalidInput
from planner.limits import MAX_JSON_BYTES
from workers.ledger.connection import is_local
from workers.ledger.ledger import Ledger
from workers.ledger.steps import StepSpec
from workers.nodes import joining
from workers.nodes.joining import Authority, Joining, Token, make_authority, read_authority
from workers.nodes.registry import Registry
from workers.queue.claims import run_step
from workers.service.services import Services
from workers.service.tokens import Tokens
from workers.settings import QueueSettings, Settings

SETTINGS = Settings.from_env({"NODE_ID": "a"})


@pytest.fixture
def authority() -> Authority:
    return Authority()


def _node(authority: Authority, ids: str) -> Joining:
    return Joining.from_settings(replace(SETTINGS, join_key=authority.join_key, join_token=authority.token(ids)))


def _verifier(authority: Authority) -> Joining:
    return Joining.from_settings(replace(SETTINGS, join_key=authority.join_key))


def test_a_node_is_believed_what_it_says_itself_and_nothing_else(authority: Authority) -> None:
    node, verifier = _node(authority, "a"), _verifier(authority)
    said = {"node_id": "a", "flop_per_s": 1e11, "shards": ["x"], "load": 0.1}
    proof = node.prove("a", "alive", said)
    assert verifier.holds("a", "alive", json.loads(json.dumps(said)), json.loads(json.dumps(proof)))
    assert not verifier.holds("b", "alive", said, proof)
    assert not verifier.holds("a", "result", said, proof)
    assert not verifier.holds("a", "alive", said | {"flop_per_s": 1e12}, proof)
    # A node that signs for another with its own, good, key and grant.
    assert not verifier.holds("b", "alive", said, node.prove("b", "alive", said))
    forged = node.prove("b", "alive", said) | {"ids": "b"}
    assert not verifier.holds("b", "alive", said, forged)
    # The grant of one node beside the key of another.
    other = _node(authority, "b").prove("b", "alive", said)
    assert not verifier.holds("b", "alive", said, other | {"key": proof["key"], "signature": proof["signature"]})
    # An authority of the attacker's own.
    assert not verifier.holds("a", "alive", said, _node(Authority(), "a").prove("a", "alive", said))
    for nonsense in (
        None,
        {},
        "x",
        {"ids": "a"},
        dict.fromkeys(proof, ""),
        dict.fromkeys(proof, "é"),
        {**proof, "key": 1},
    ):
        assert not verifier.holds("a", "alive", said, nonsense)


@given(st.dictionaries(st.sampled_from(["node_id", "ids", "key", "grant", "signature"]), st.text(max_size=100)))
def test_fuzz_no_made_up_proof_holds(proof: dict[str, str]) -> None:
    assert not _verifier(Authority()).holds("a", "alive", {}, proof)


@pytest.mark.parametrize(("ids", "node_id", "may"), [
    ("gpu-*", "gpu-1", True), ("gpu-*", "gpu", False), ("gpu-*", "big", False), ("*", "any", True),
    ("a", "ab", False),
])  # fmt: skip
def test_a_token_may_be_for_a_prefix(authority: Authority, ids: str, node_id: str, may: bool) -> None:
    node = _node(authority, ids)
    assert _verifier(authority).holds(node_id, "x", {}, node.prove(node_id, "x", {})) is may
    if may:
        node.check_node(node_id)
    else:
        with pytest.raises(Conflict, match="FAIRSHARD_JOIN_TOKEN"):
            node.check_node(node_id)


def test_a_node_without_its_token_does_not_start(authority: Authority) -> None:
    with pytest.raises(Conflict, match="has none"):
        _verifier(authority).check_node("a")
    with pytest.raises(Conflict, match="has one for 'b'"):
        _node(authority, "b").check_node("a")
    Joining().check_node("a")


def test_wrong_settings_are_named_and_secrets_not_repeated(authority: Authority) -> None:
    with pytest.raises(InvalidInput, match="FAIRSHARD_JOIN_KEY"):
        Joining.from_settings(replace(SETTINGS, join_key="nonsense"))
    token = authority.token("a")
    for bad in ("x", token[:-1], token + "A", token.replace(".", "")):
        with pytest.raises((InvalidInput, Conflict), match="FAIRSHARD_JOIN_TOKEN") as refused:
            Joining.from_settings(replace(SETTINGS, join_key=authority.join_key, join_token=bad)).check_node("a")
        assert len(bad) < 9 or bad not in str(refused.value)
    assert token.split(".")[1] not in repr(Token.parse(token))
    for ids in ("", "../x", "a/b", "**", "a b"):
        with pytest.raises(InvalidInput):
            authority.token(ids)


def test_tokens_are_made_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "authority"
    assert joining.main(["authority", str(path)]) == 0
    key = capsys.readouterr().out.strip()
    assert path.stat().st_mode & 0o077 == 0
    assert joining.main(["token", "a", "--authority", str(path)]) == 0
    token = capsys.readouterr().out.strip()
    Joining.from_settings(replace(SETTINGS, join_key=key, join_token=token)).check_node("a")
    assert joining.main(["authority", str(path)]) == 1  # never written over
    assert joining.main(["token", "a", "--authority", str(tmp_path / "none")]) == 1
    assert "error:" in capsys.readouterr().err
    assert read_authority(path).join_key == key
    assert make_authority(tmp_path / "other").join_key != key


def test_the_registry_lists_nodes_that_joined(server: RedisProcess, authority: Authority) -> None:
    with server.client() as client:
        client.flushall()
        registry = Registry(client, joining=_verifier(authority))
        Registry(client, joining=_node(authority, "a")).announce({"node_id": "a", "instance": "1"})
        # With Redis' password alone; with another node's token; under another's key.
        Registry(client).announce({"node_id": "b", "instance": "2"})
        Registry(client, joining=_node(authority, "a")).announce({"node_id": "c", "instance": "3"})
        client.set("fairshard:node:d", str(client.get("fairshard:node:a")))
        client.sadd("fairshard:nodes", "d")
        assert [info["node_id"] for info in registry.alive()] == ["a"]
        assert registry.alive() == registry.alive()
        assert not {"proof", "signed_at"} & registry.alive()[0].keys()
        assert sorted(Registry(client).alive_ids()) == ["a", "b", "c"]  # they were there to be believed


def test_a_squatter_does_not_keep_a_node_out(server: RedisProcess, authority: Authority) -> None:
    with server.client() as client:
        client.flushall()
        Registry(client).announce({"node_id": "a", "instance": "squatter"})
        Registry(client, joining=_node(authority, "a")).announce({"node_id": "a", "instance": "true"})
        assert [info["instance"] for info in Registry(client, joining=_verifier(authority)).alive()] == ["true"]


def test_an_old_announcement_keeps_no_dead_node_alive(server: RedisProcess, authority: Authority) -> None:
    with server.client() as client:
        client.flushall()
        Registry(client, joining=_node(authority, "a"), ttl_s=60).announce({"node_id": "a", "instance": "1"})
        said = str(client.get("fairshard:node:a"))
        assert Registry(client, joining=_verifier(authority), ttl_s=60).alive()
        client.set("fairshard:node:a", said)  # for ever
        short = Registry(client, joining=_verifier(authority), ttl_s=0.001)
        until(lambda: not short.alive(), what="it is too old")
        assert Registry(client, joining=_verifier(authority), ttl_s=3600).alive()


def _ledger(client: Any) -> tuple[Ledger, str]:
    client.flushall()
    ledger = Ledger(client)
    steps = [
        StepSpec(name="split:a", task="workers.split", queue="node.a", node_id="a"),
        StepSpec(name="finish", task="planner.finish", queue="planner", after=("split:a",)),
    ]
    return ledger, ledger.submit("process", model_name="x/y", params={}, steps=steps).job_id


@pytest.mark.parametrize("thief", [None, "b", "a"])
def test_a_step_counts_only_if_its_own_node_did_it(
    server: RedisProcess, authority: Authority, thief: str | None
) -> None:
    with server.client() as client:
        ledger, job_id = _ledger(client)
        # Whoever has Redis' password can claim and commit; what comes of it is another matter.
        theirs = Joining() if thief is None else _node(authority, thief)
        run_step(
            ledger, job_id, "split:a", lambda _: {"shard": "mine"}, owner="w", node_id=thief or "a", joining=theirs
        )

        def finish(claim: Any) -> dict[str, Any]:
            return {"saw": claim.result("split:a")}

        verifier = _verifier(authority)
        if thief == "a":
            seen = run_step(ledger, job_id, "finish", finish, owner="p", joining=verifier)
            assert seen == {"saw": {"shard": "mine"}}
            return
        with pytest.raises(AccessDenied, match="who is not node a"):
            run_step(ledger, job_id, "finish", finish, owner="p", joining=verifier)
        assert ledger.views.job(job_id)["state"] == "failed"


@pytest.mark.parametrize(("url", "expected"), [
    ("redis://127.0.0.1:6379/0", True), ("redis://:p@localhost:1/0", True), ("unix:///run/redis.sock", True),
    ("redis://[::1]:6379", True), ("rediss://u:p@redis:6379/0", False), ("redis://10.0.0.1:6379", False),
    ("redis://localhost.evil.example:1", False),
])  # fmt: skip
def test_what_a_local_redis_is(url: str, expected: bool) -> None:
    assert is_local(url) is expected


def test_a_payload_that_unfolds_without_end_is_refused(server: RedisProcess) -> None:
    """Whoever has Redis' password may have put it there."""
    settings = Settings.from_env({"REDIS_URL": server.url, "NODE_ID": "a"})
    services = Services(settings=settings, queue=QueueSettings())
    services.put_payload("job", "profile", {"a": 1})
    assert services.get_payload("job", "profile") == {"a": 1}
    bomb = zlib.compress(b" " * (MAX_JSON_BYTES + 1), 9)
    services.redis.set("fairshard:payload:job:profile", base64.b85encode(bomb).decode())
    with pytest.raises(InvalidInput, match="unpacks to more"):
        services.get_payload("job", "profile")


def test_a_fingerprint_tells_tokens_apart_and_needs_the_key(server: RedisProcess) -> None:
    with server.client() as client:
        one, two = (Tokens(client, key=Fernet.generate_key()) for _ in range(2))
    assert one.fingerprint("hf_a") == one.fingerprint("hf_a")
    assert len({one.fingerprint("hf_a"), one.fingerprint("hf_b"), two.fingerprint("hf_a")}) == 3
