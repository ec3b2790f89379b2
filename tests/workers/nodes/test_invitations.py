"""Invitations: opened by their token alone, for a day; and where the key for Hub tokens comes from."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from planner.errors import Conflict, InvalidInput, NotFound
from workers.nodes.invitations import Invitation, invitation_id, kept, sealed
from workers.nodes.joining import main
from workers.service.tokens import secret_key
from workers.settings import Settings
from workers.up import certificates
from workers.up.coordinator import Coordinator, invite

INVITATION = Invitation(
    redis_url="rediss://fairshard:word@10.0.0.1:6379/0",
    ca="-----BEGIN CERTIFICATE-----",
    join_key="key",
    join_token="fsj_*.a.b",
    secret="s" * 43 + "=",
    peer_token="peers",
)


def test_an_invitation_is_opened_by_its_token_alone(tmp_path: Path) -> None:
    token = INVITATION.seal(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert token not in path.read_text()
    assert "word" not in path.read_text()
    assert path.stem == invitation_id(token)
    text = sealed(tmp_path, invitation_id(token))
    assert Invitation.open(text, token) == INVITATION
    assert "word" not in repr(INVITATION)
    other = INVITATION.seal(tmp_path)
    for wrong_text, wrong_token in ((text, other), (text[:-8] + "AAAAAA==", token), ("", token)):
        with pytest.raises(InvalidInput, match="no invitation of this token"):
            Invitation.open(wrong_text, wrong_token)
    with pytest.raises(InvalidInput) as refused:
        invitation_id("fsi_hunter2")
    assert "hunter2" not in str(refused.value)


def test_an_invitation_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = INVITATION.seal(tmp_path)
    later = time.time() + 86401
    monkeypatch.setattr(time, "time", lambda: later)
    for wanted in (invitation_id(token), "0" * 32, "../coordinator/access"):
        with pytest.raises(NotFound, match="fairshard join --new"):
            sealed(tmp_path, wanted)
    INVITATION.seal(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "those that ended go when another is made"


def test_what_a_machine_was_told_is_kept_for_its_owner_and_leads_to_settings(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has not joined yet"):
        kept(tmp_path)
    INVITATION.keep(tmp_path)
    assert all(path.stat().st_mode & 0o77 == 0 for path in tmp_path.iterdir())
    env = kept(tmp_path).environment(tmp_path)
    assert env["REDIS_URL"] == f"{INVITATION.redis_url}?ssl_cert_reqs=required&ssl_ca_certs={tmp_path}/ca.crt"
    assert Settings.from_env({**env, "FAIRSHARD_JOIN_KEY": "open"}).secret == INVITATION.secret
    plain = replace(INVITATION, ca=None, redis_url="redis://10.0.0.1/0")
    assert plain.environment(tmp_path)["REDIS_URL"] == "redis://10.0.0.1/0"
    (tmp_path / "invitation.json").write_text("{}")
    with pytest.raises(InvalidInput, match="join again"):
        kept(tmp_path)


def test_a_line_is_made_on_the_coordinator_alone(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no coordinator's data folder"):
        invite(tmp_path)
    with pytest.raises(InvalidInput, match="--address"):
        _ = Coordinator(host="0.0.0.0").name
    assert Coordinator(host="::", address="fd00::1").name == "[fd00::1]"


def test_a_certificate_is_for_addresses_and_names_and_says_so_where_it_is_not(tmp_path: Path) -> None:
    assert certificates.make(tmp_path, ["10.0.0.1", "fd00::1", "localhost"])
    assert not certificates.make(tmp_path, ["fd00::1"])
    with pytest.raises(Conflict, match=r"no certificate for 10\.0\.0\.2, but for 10\.0\.0\.1"):
        certificates.make(tmp_path, ["10.0.0.2"])


def test_the_key_for_hub_tokens_is_asked_for_where_other_machines_reach_redis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"FAIRSHARD_DATA": str(tmp_path)}
    here = secret_key(Settings.from_env(env))
    assert here == secret_key(Settings.from_env(env))
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    there = {**env, "REDIS_URL": "redis://10.0.0.1/0"}
    with pytest.raises(InvalidInput, match=r"python -m workers\.nodes\.joining secret"):
        secret_key(Settings.from_env(there))
    assert main(["secret"]) == 0
    made = capsys.readouterr().out.strip()
    Fernet(made)
    assert secret_key(Settings.from_env({**there, "FAIRSHARD_SECRET": made})) == made.encode()
