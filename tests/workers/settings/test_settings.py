"""Settings: what each may be, what is said of a wrong one, and that every role says it before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InvalidInput
from workers.cli.main import main
from workers.metadata_store.open import open_store
from workers.settings import HubSettings, Settings, WebSettings, check_environment, settings_in_force
from workers.settings.environment import variables
from workers.settings.redis_url import RedisUrl

BIN = Path(sys.executable).parent
FERNET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
TOKEN = "fsj_a.b.c"

#: Of every setting: values that are taken, and values that are refused.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "FAIRSHARD_DATA": (["/tmp/x", "rel/x", "~/x"], ["https://host/x", __file__]),
    "FAIRSHARD_MODELS_DIR": (["/tmp/x"], ["s3://bucket/x", __file__]),
    "REDIS_URL": (["redis://h", "unix:///run/redis.sock"], ["h:6379", "http://h", "memory://"]),
    "METADATA_REPO": (
        ["me/x", "datasets/me/x", "/srv/store", "./store", "~/store"],
        ["https://huggingface.co/me/x", "me", "me/x/y", "spaces/me/x", "s3://b"],
    ),
    "NODE_ID": (["gpu-1"], ["a b", "-a", "a/b", "x" * 65, ".."]),
    "HF_TOKEN": (["hf_abc"], ["hf_abc def", "hf_ä", "a\nb"]),
    "FAIRSHARD_SECRET": ([FERNET], ["short", FERNET[:-4], "ä" * 44]),
    "FAIRSHARD_FLOP_PER_S": (["1e12", "5"], ["0", "-1", "nan", "inf", "1e12 FLOP/s", "fast"]),
    "FAIRSHARD_MEMORY_BYTES_PER_S": (["1e11"], ["0", "-1", "nan", "quick"]),
    "FAIRSHARD_DISK_QUOTA": (["1000"], ["0", "1.5", "-1", "all"]),
    "FAIRSHARD_PEER_URL": (["http://10.0.0.1:8090"], ["10.0.0.1:8090", "https://h", "http://", "http://h:99999"]),
    "FAIRSHARD_PEER_TOKEN": (["abc"], ["a b"]),
    "FAIRSHARD_RUN_URL": (["http://10.0.0.1:8091"], ["10.0.0.1:8091", "https://h"]),
    "FAIRSHARD_JOIN_KEY": (["open", "A" * 43], ["closed", "A" * 42, "OPEN"]),
    "FAIRSHARD_JOIN_TOKEN": ([TOKEN], ["token", "fsj_"]),
    "FAIRSHARD_LEAN": (["0", "1", "off", "true"], ["2", "maybe"]),
    "HF_ENDPOINT": (
        ["https://hub.example/", "http://127.0.0.1:9"],
        ["hub.example", "ftp://h", "https://", "http://a b"],
    ),
    "HF_HUB_OFFLINE": (["1", "0", "ON", "no"], ["ture", "2"]),
    "HF_HOME": (["/tmp/hf"], ["https://h/x"]),
    "HF_HUB_CACHE": (["/tmp/hf/hub"], ["https://h/x"]),
    "FAIRSHARD_KEY_PREFIX": (["mine:", "a_b-c."], ["a b", "a*", "{x}", "x" * 101]),
    "FAIRSHARD_MAX_ATTEMPTS": (["1", "1000"], ["0", "0.5", "-1", "1001", "three"]),
    "FAIRSHARD_BIND": (
        ["127.0.0.1:8080", "[::1]:80", "localhost:1", "unix:/run/x.sock", "0.0.0.0:0"],
        ["8080", "127.0.0.1", ":8080", "http://h:80", "h:99999", "a b:80", "unix:x"],
    ),
    "FAIRSHARD_TOKENS_FILE": (["/etc/tokens.json"], ["https://h/tokens"]),
    "FAIRSHARD_REQUIRE_TOKEN": (["always", "Never", "auto"], ["yes", "1"]),
    "FAIRSHARD_RATE_LIMIT": (
        ["600/minute", "off", "10 per second", "5/2 hours; 100/day"],
        ["lots", "600", "600/fortnight", "-1/minute", "minute/600"],
    ),
    "FAIRSHARD_CORS_ORIGINS": (["*", "https://a.example, http://b:80"], ["a.example", "https://a/x", "https://*.a"]),
    "FAIRSHARD_TRUSTED_PROXIES": (["0", "2"], ["-1", "0.5", "101", "one"]),
    "FAIRSHARD_AUDIT_LOG": (["/var/log/audit"], ["syslog://h"]),
    "FAIRSHARD_FLOWER_URL": (["http://127.0.0.1:5555"], ["127.0.0.1:5555", "javascript:x"]),
    "FAIRSHARD_URL": (["https://service.example/"], ["service.example", "redis://h"]),
    "FAIRSHARD_TOKEN": (["fs_abc"], ["a b"]),
}
_SECONDS = (["1", "0.5", "86400"], ["0", "-3", "nan", "inf", "1e300", "never", "5s"])
_COUNT = (["1", "20"], ["0", "0.5", "-1", "many", "1e12", "nan"])


def cases(name: str) -> tuple[list[str], list[str]]:
    if name.endswith("_BYTES"):
        return ["1000000", "8e9"], ["0", "-5", "0.5", "1e30", "many"]
    return CASES.get(name) or (_SECONDS if name.endswith("_S") else _COUNT)


@pytest.mark.parametrize("name", sorted(variables()))
def test_every_setting_takes_what_it_may_be_and_names_what_it_may_not(name: str) -> None:
    right, wrong = cases(name)
    for value in [*right, "", "  "]:
        check_environment({"NODE_ID": "n", name: value})
    for value in [*wrong, f'"{right[0]}"', f"'{right[0]}'"]:
        with pytest.raises(InvalidInput) as caught:
            check_environment({"NODE_ID": "n", name: value})
        message = str(caught.value)
        assert message.startswith(f"{name} must be ")
        assert caught.value.details == {"setting": name}
        assert len(message) < 420
        shown = "***" if variables()[name].secret else value.strip()
        assert message.endswith(f", got {shown!r}")


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert Settings.from_env(dict.fromkeys(variables(), "")) == Settings.from_env({})
    assert WebSettings.from_env({"FAIRSHARD_TRUSTED_PROXIES": "0"}) == WebSettings()


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://h", {"hosts": (("h", 6379),), "database": 0}),
        ("redis://:p%2Fa@h:1/3", {"hosts": (("h", 1),), "database": 3, "password": "p/a", "username": None}),
        ("redis://u:p@s@[::1]:7/", {"hosts": (("[::1]", 7),), "username": "u", "password": "p@s"}),
        ("unix:///run/r.sock?db=2", {"path": "/run/r.sock", "database": 2, "hosts": ()}),
        ("unix://:pw@/run/r.sock", {"path": "/run/r.sock", "password": "pw"}),
        ("rediss://h", {"tls": {"ssl_cert_reqs": "required", "ssl_check_hostname": True}}),
        (
            f"rediss://h?ssl_ca_certs={__file__}&ssl_check_hostname=false",
            {"tls": {"ssl_cert_reqs": "required", "ssl_check_hostname": False, "ssl_ca_certs": __file__}},
        ),
        ("rediss://h?ssl_cert_reqs=none", {"tls": {"ssl_cert_reqs": "none", "ssl_check_hostname": False}}),
        (
            "sentinel://:pw@a,b:5/1?master=m&sentinel_password=s",
            {"hosts": (("a", 26379), ("b", 5)), "master": "m", "database": 1, "sentinel_login": {"password": "s"}},
        ),
        ("sentinel://a", {"master": "mymaster", "tls": None}),
    ],
)
def test_a_redis_url_is_taken_apart(url: str, parts: dict[str, Any]) -> None:
    found = RedisUrl.parse(url)
    assert {name: getattr(found, name) for name in parts} == parts


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+socket:///run/r.sock", "unix:///path"),
        ("redis+sentinel://a/m", "sentinel://host:port"),
        ("127.0.0.1:6379", "redis://[user:password@]host"),
        ("h:6379/0", "redis://[user:password@]host"),
        ("redis://:pa/ss@h:6379/0", "'/' is %2F"),
        ("redis://:pa#ss@h:6379/0", "%23"),
        ("redis://:pa?ss@h:6379/0", "'?' is %3F"),
        ("redis://:pa ss@h", "%20"),
        ("redis://h/abc", "a database that is a number"),
        ("redis://h/0/1", "a database that is a number"),
        ("redis://h:0x/0", "a port from 1 to 65535"),
        ("redis://h:99999", "a port from 1 to 65535"),
        ("redis://", "a host's name"),
        ("redis://a,b", "several Sentinels"),
        ("redis://h?ssl_ca_certs=/x", "TLS is rediss://"),
        ("rediss://h?ssl_ca_certs=/no/such", "there is no '/no/such'"),
        ("rediss://h?ssl_cert_reqs=perhaps", "required or none"),
        ("rediss://h?timeout=3", "of the options ssl_cert_reqs"),
        ("unix://run/r.sock", "three slashes"),
        ("unix:///run/r.sock?db=x", "a database that is a number"),
        ("sentinel://a?service=m", "of the options master"),
    ],
)
def test_a_wrong_redis_url_is_told_what_is_right(url: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=r"REDIS_URL must be ") as caught:
        Settings.from_env({"REDIS_URL": url})
    assert said in str(caught.value)
    assert "pa" not in str(caught.value).partition(", got ")[2].replace("unix", "").replace("perhaps", "")


@pytest.mark.parametrize("url", ["redis://:geheim@h:1/x", "redis://:geheim", "unix://u:geheim@/x?q=1", "geheim://x"])
def test_a_password_is_never_shown(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Settings.from_env({"REDIS_URL": url})
    assert ("geheim" in str(caught.value)) is url.startswith("geheim")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInput, match=r"no setting FAIRSHARD_LISTNERS: did you mean FAIRSHARD_LISTENERS\?"):
        check_environment({"FAIRSHARD_LISTNERS": "4", "NODE_ID": "n"})
    with pytest.raises(InvalidInput, match="`fairshard config` lists the settings"):
        check_environment({"FAIRSHARD_XYZZY": "", "NODE_ID": "n"})
    # docker compose's own, which honcho hands on; the tests'; other programs'.
    check_environment({"FAIRSHARD_PORT": "80", "FAIRSHARD_TEST_DEEP": "1", "FAIRSHARDX": "", "NODE_ID": "n"})


def test_a_secret_can_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{FERNET}\n")
    assert Settings.from_env({"FAIRSHARD_SECRET_FILE": str(tmp_path / "secret")}).secret == FERNET
    with pytest.raises(InvalidInput, match="FAIRSHARD_SECRET_FILE must be the path of a file that can be read"):
        Settings.from_env({"FAIRSHARD_SECRET_FILE": str(tmp_path / "none")})


def test_the_hub_s_token_and_cache_are_found_where_its_client_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored\n")
    found = HubSettings.from_env({"HF_HOME": str(tmp_path)})
    assert (found.token, found.cache_dir) == ("hf_stored", tmp_path / "hub")


def test_an_address_of_a_repository_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=r"'owner/name' of a Hub repository \(not its address\)"):
        open_store("https://me:hf_x@huggingface.co/me/x")
    assert not list(tmp_path.iterdir())


def test_config_shows_every_setting_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIRSHARD_SECRET", FERNET)
    monkeypatch.setenv("REDIS_URL", "redis://user:geheim@h:1/0")
    assert main(["config", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows.keys() == variables().keys()
    assert rows["FAIRSHARD_SECRET"]["value"] == "***"
    assert (rows["REDIS_URL"]["value"], rows["REDIS_URL"]["whence"]) == ("redis://***@h:1/0", "environment")
    assert rows["FAIRSHARD_LEASE_S"] | {"what": "", "roles": ""} == {
        "name": "FAIRSHARD_LEASE_S", "value": "15", "whence": "default", "default": "15", "what": "", "roles": "",
        "error": None,
    }  # fmt: skip
    monkeypatch.setenv("FAIRSHARD_LISTENERS", "0.5")
    assert main(["config", "listeners"]) == 2
    said = capsys.readouterr()
    assert "wrong" in said.out
    assert "FAIRSHARD_LISTENERS must be a whole number from 1 to 1,000, got '0.5'" in said.err
    assert "geheim" not in said.out
    assert len(settings_in_force({"FAIRSHARD_X": "", "NODE_ID": "-"})[1]) == 2


ROLES = {
    "API": ["gunicorn", "-c", "python:web.gunicorn_conf", "--no-control-socket", "web.wsgi:app"],
    "planner": ["celery", "-A", "workers.celery_app", "worker", "-Q", "planner", "-n", "planner@%h", "-c", "1"],
    "flower": ["celery", "-A", "workers.celery_app", "flower", "--port=0"],
    "node": ["fairshard", "node"],
    "up": ["fairshard", "up"],
    "redis": ["python", "-m", "workers.up.redis_server"],
}


def started(role: str, tmp_path: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    env = os.environ | {"FAIRSHARD_DATA": str(tmp_path / "data")} | env
    command = [str(BIN / ROLES[role][0]), *ROLES[role][1:]]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


def test_no_role_starts_with_a_wrong_setting(tmp_path: Path) -> None:
    began = {role: started(role, tmp_path, {"FAIRSHARD_RATE_LIMIT": "lots"}) for role in ROLES}
    tokens = started("API", tmp_path, {"FAIRSHARD_REQUIRE_TOKEN": "always"})
    for role, process in began.items():
        _, said = process.communicate(timeout=120)
        assert process.returncode not in {0, -9}, role
        lines = said.strip().splitlines()
        assert len(lines) == 1, (role, said)
        assert "FAIRSHARD_RATE_LIMIT must be off, or requests in a time such as 600/minute" in lines[0]
        assert lines[0].endswith("got 'lots'")
    # What only the whole application can find out.
    _, said = tokens.communicate(timeout=120)
    assert tokens.returncode != 0
    assert "fairshard: others can reach" in said
    assert "Traceback" not in said
    assert not (tmp_path / "data" / "redis").exists()
