"""`fairshard up` as a person runs it: a process whose roles are killed -9, and which leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.checkpoints import models_dir
from support.running import share_traces

from workers.settings import child_env

FAIRSHARD = Path(sys.executable).parent / "fairshard"
ROLES = ("redis", "api", "node-1", "node-2", "planner", "flower")

pytestmark = pytest.mark.slow


class Up:
    """A running `fairshard up`."""

    def __init__(self, data: Path, **settings: str) -> None:
        env = child_env({"FAIRSHARD_MODELS_DIR": str(models_dir("llama")), **settings})
        command = [str(FAIRSHARD), "up", "--port", "0", "--nodes", "2", "--data", str(data)]
        self.data = data
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def said(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"{what}: not within {timeout_s:.0f} s\n" + "\n".join(self.lines))
            time.sleep(0.05)

    def ready(self) -> str:
        self.until(lambda: self.said("fairshard is up"), "ready")
        (line,) = self.said(r"page and API")
        return line.split()[-1]

    def roles(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def role(self, name: str) -> psutil.Process:
        """The process whose output goes to the role's log."""
        log = self.data / "logs" / f"{name}.log"
        for process in self.roles():
            try:
                if Path(f"/proc/{process.pid}/fd/1").samefile(log):
                    return process
            except OSError:
                continue
        raise LookupError(name)

    def finish(self) -> int:
        """End it, whatever happened before."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.reader.join(10)
            assert self.process.stderr is not None
            self.process.stderr.close()


def call(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def job(api: str, job_id: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = call(f"{api}/api/jobs/{job_id}")
    except OSError:
        return {"state": "unreachable"}
    return found


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(share_traces(tmp_path / "data"))
    try:
        yield up
    finally:
        up.finish()


def test_every_role_that_is_killed_starts_again_and_the_job_accepted_before_ends(up: Up) -> None:
    api = up.ready()
    before = {name: up.role(name).pid for name in ROLES}
    assert len(before) == len(set(before.values())) == len(up.roles())
    accepted = call(f"{api}/api/request", {"model_name": "tiny/llama", "process": True})["job_id"]
    for name in ROLES:
        os.kill(before[name], signal.SIGKILL)
    for name in ROLES:
        up.until(lambda n=name: up.said(rf"^{n} was ended by SIGKILL; starting it again in"), f"{name} noticed")  # type: ignore[misc]

    def back(name: str) -> bool:
        try:
            return up.role(name).pid != before[name]
        except LookupError:
            return False

    up.until(lambda: all(back(name) for name in ROLES), "all roles back")
    up.until(lambda: job(api, accepted)["state"] in {"done", "failed"}, "the job's end", 180)
    ended = job(api, accepted)
    assert ended["state"] == "done", ended
    shards = list((up.data / "nodes").glob("node-*/shards/*/manifest.json"))
    assert {path.parts[-4] for path in shards} == {"node-1", "node-2"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_all_roles_in_order_and_leaves_nothing(up: Up, number: signal.Signals) -> None:
    api = up.ready()
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= len(ROLES)
    up.process.send_signal(number)
    assert up.process.wait(90) == 0
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert len(gone) == len(family)
    with pytest.raises(OSError, match="refused"):
        call(f"{api}/api/health/live")
    up.reader.join(10)
    assert "nothing is left running" in up.lines[-1]


def test_a_stop_while_it_starts_is_heeded_and_leaves_nothing(up: Up) -> None:
    up.until(lambda: up.said("redis .*ready"), "Redis")
    family = psutil.Process(up.process.pid).children(recursive=True)
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(90) == 0
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_the_folder_is_its_own_until_it_is_killed_and_its_roles_end_then(up: Up) -> None:
    api = up.ready()
    command = [str(FAIRSHARD), "up", "--port", "0", "--data", str(up.data)]
    second = subprocess.run(command, env=child_env({}), capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert f"pid {up.process.pid}" in second.stderr
    assert api in second.stderr
    assert "--data" in second.stderr
    assert call(f"{api}/api/health/live")["live"] is True  # and the first goes on
    family = psutil.Process(up.process.pid).children(recursive=True)
    up.process.kill()
    up.process.wait(30)
    assert not psutil.wait_procs(family, timeout=90)[1]
    again = Up(up.data)
    try:
        again.ready()
    finally:
        assert again.finish() == 0


def test_a_wrong_setting_of_all_roles_is_refused_before_anything_starts(tmp_path: Path) -> None:
    env = child_env({"FAIRSHARD_LEASE_S": "never"})
    command = [str(FAIRSHARD), "up", "--port", "0", "--data", str(tmp_path / "data")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "FAIRSHARD_LEASE_S must be a number of seconds above 0" in done.stderr
    assert not (tmp_path / "data" / "redis").exists()


def test_a_role_that_can_not_start_is_given_up_with_the_end_of_its_log(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tokens = tmp_path / "tokens.json"
    tokens.write_text("{}")
    env = child_env({"FAIRSHARD_REQUIRE_TOKEN": "always", "FAIRSHARD_TOKENS_FILE": str(tokens)})  # the API's alone
    command = [str(FAIRSHARD), "up", "--port", "0", "--nodes", "1", "--data", str(data)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "died 3 times. The end of" in done.stderr
    assert 'fairshard: the tokens file tokens.json must be {"tokens": [...]}' in done.stderr
    assert "nothing is left running" in done.stderr


def test_it_starts_where_tokens_are_asked_for_on_loopback_too(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    command = [sys.executable, "-m", "web.auth", "new", "me", "--scopes", "read", "--file", str(tokens)]
    subprocess.run(command, check=True, capture_output=True)
    up = Up(tmp_path / "data", FAIRSHARD_REQUIRE_TOKEN="always", FAIRSHARD_TOKENS_FILE=str(tokens))
    try:
        api = up.ready()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            call(f"{api}/api/nodes")
    finally:
        assert up.finish() == 0
