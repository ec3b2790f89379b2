"""`fairshard up`: the whole service on this machine. A private Redis, planner, compute nodes, API and Flower.

As a coordinator it has no nodes and no Flower, and other machines may reach its Redis and its API.

The nodes are processes of unequal *stated* size: what they state is what the planner believes, as on real machines
whose figures are overridden by setting. Everything lies below one data folder:

    <data>/redis            the append-only file            <data>/logs     one file a role
    <data>/nodes/<node_id>  each node's shards              <data>/up.lock  held while the service runs
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from planner.cluster import Node
from planner.errors import Conflict, FairshardError, Unavailable
from workers.ledger.connection import connect
from workers.network.api_client import Client
from workers.nodes.joining import make_authority, read_authority
from workers.nodes.registry import Registry
from workers.settings import ClientSettings, QueueSettings
from workers.up import redis_server
from workers.up.coordinator import Access, Coordinator, folder_of, invite, prepare
from workers.up.data_lock import DataLock
from workers.up.roles import HOST, Roles
from workers.up.stated_nodes import stated_nodes
from workers.up.supervisor import Supervisor

#: Seconds for one role to become ready; the first start on a cold disk reads the whole of torch.
_READY_S = 120.0
#: Deaths in a row after which a role that never was ready is given up.
_MOST_DEATHS = 3

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_port(port: int, *, host: str = HOST, option: str = "--port") -> int:
    if port == 0:
        return free_port()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise Conflict(
                f"port {port} of {host} can't be used ({error}): {option} N takes another, {option} 0 any free one",
                details={"port": port},
            ) from None
    return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a running service is reached."""

    api: str
    #: None: there is none.
    flower: str | None

    @property
    def docs(self) -> str:
        """The API's readable documentation."""
        return f"{self.api}/docs"


@dataclass(slots=True, kw_only=True)
class Service:
    """A running service; its owner calls `poll` a few times a second."""

    data: Path
    nodes: tuple[Node, ...]
    at: Addresses
    supervisor: Supervisor
    stop_asked: threading.Event
    hurry_asked: threading.Event

    def poll(self) -> bool:
        """Start again what died; False once someone asked to stop."""
        self.supervisor.poll()
        return not self.stop_asked.wait(0.1)

    @property
    def client(self) -> Client:
        """A caller of its API, with FAIRSHARD_TOKEN where it is set."""
        return Client(ClientSettings(url=self.at.api, token=ClientSettings.from_env().token), timeout_s=10)


@contextlib.contextmanager
def running(
    *,
    port: int = 8080,
    data: Path,
    nodes: str | None = None,
    coordinator: Coordinator | None = None,
    say: Say = say_on_stderr,
    offline: bool = False,
) -> Iterator[Service]:
    """The service, ready within the `with` block and gone after it. Only in the main thread: it takes the signals.

    Args:
        port: Of the API; 0: any free one.
        data: The data folder.
        nodes: As `stated_nodes`.
        coordinator: Run no nodes here, and let those of other machines in.
        say: Takes the lines of progress.
        offline: Tell the nodes not to try the Hub.

    Raises:
        Conflict: If the port or the folder is in use.
        InvalidInput: If other machines would reach a Redis without TLS (`Coordinator.insecure_redis`).
        Unavailable: If there is no Redis, or a role does not come up; with the end of its log.
        KeyboardInterrupt: If it was asked to stop before it was ready.
    """
    data = data.absolute()
    stated = () if coordinator else stated_nodes(nodes)
    queue = QueueSettings.from_env()
    if coordinator:  # the stand-in in Python lets in whoever connects
        binary, which = redis_server.find_binary()
        server = [str(binary)]
    else:
        server, which = redis_server.find_server()
    stop, hurry = threading.Event(), threading.Event()
    with DataLock(data) as lock, _signals(stop, hurry):
        if coordinator:
            port = _check_port(port, host=coordinator.host)
            redis_port = _check_port(coordinator.redis_port, host=coordinator.host, option="--redis-port")
            coordinator = replace(coordinator, redis_port=redis_port)
            at = Addresses(api=f"http://{coordinator.name}:{port}", flower=None)
        else:
            port = _check_port(port)
            at = Addresses(api=f"http://{HOST}:{port}", flower=f"http://{HOST}:{free_port()}")
        lock.describe(url=at.api)
        supervisor = Supervisor(say=say)
        service = Service(data=data, nodes=stated, at=at, supervisor=supervisor, stop_asked=stop, hurry_asked=hurry)
        say(f"fairshard up: data in {data}, logs in {data / 'logs'}")
        try:
            if coordinator:
                access = prepare(data, coordinator, binary=Path(server[0]), api_url=at.api, prefix=queue.prefix)
            else:
                access = _private(data)
            bind = f"{coordinator.host if coordinator else HOST}:{port}"
            common = {**access.env, "FAIRSHARD_BIND": bind} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
            _start(service, replace(access, env=common), server=server, which=which, lock=lock, queue=queue, say=say)
            yield service
        finally:
            say("stopping ...")
            # New work is refused first, then what runs is finished or handed back, and the ledger's Redis goes last.
            supervisor.stop(
                [["api", "flower"], [*(node.node_id for node in stated), "planner"], ["redis"]], hurry=hurry.is_set
            )
            say("stopped; nothing is left running.")


def _private(data: Path) -> Access:
    """A Redis for this machine alone, with a password of this run."""
    password, port = secrets.token_urlsafe(24), free_port()
    config = redis_server.write_config(data / "redis", port=port, password=password)
    return Access(redis_config=config, redis_url=f"redis://:{password}@{HOST}:{port}/0", env={})


def _start(
    service: Service,
    access: Access,
    *,
    server: Sequence[str],
    which: str,
    lock: DataLock,
    queue: QueueSettings,
    say: Say,
) -> None:
    """Start all roles and wait until each is ready."""
    # Unlike a private Redis' password it stays: what nodes reported before a restart must be believed after it.
    key_file = service.data / "authority"
    authority = read_authority(key_file) if key_file.exists() else make_authority(key_file)
    common = {
        "REDIS_URL": access.redis_url,
        "FAIRSHARD_JOIN_KEY": authority.join_key,
        "FAIRSHARD_DATA": str(service.data),
        "FAIRSHARD_FLOWER_URL": service.at.flower or "",
        "PYTHONUNBUFFERED": "1",
        **access.env,
    }
    roles = Roles(service.data / "logs", common, authority)
    began = time.monotonic()

    def wait(name: str, ready: Callable[[], bool], what: str) -> None:
        _await(service, name, ready)
        say(f"  {name:<10} ready after {time.monotonic() - began:4.1f} s   {what}")

    start = service.supervisor.start
    start(roles.redis(server, access.redis_config, inherit=(lock.fd,)))
    wait("redis", lambda: redis_server.answers(access.redis_url), which)
    registry = Registry(connect(access.redis_url), prefix=queue.prefix, ttl_s=queue.node_ttl_s)
    # Together: each spends its first second on imports.
    start(roles.api(common["FAIRSHARD_BIND"]))
    for node in service.nodes:
        start(roles.node(node))
    start(roles.planner())
    flower = service.at.flower
    if flower:
        start(roles.flower(int(flower.rpartition(":")[2])))
    wait("api", lambda: _answers(service.at.api + "/api/health/live"), service.at.api)
    for node in service.nodes:
        wait(node.node_id, partial(_node_ready, service, registry, node.node_id), _size(node))
    wait("planner", lambda: _planner_answers(service), "plans, and finds lost work")
    if flower:
        wait("flower", lambda: _answers(flower), flower)


def _size(node: Node) -> str:
    return f"{node.flop_per_s / 1e9:,.0f} GFLOP/s, {node.memory_bytes / 2**30:.1f} GiB (stated)"


def _await(service: Service, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY_S
    while not ready():
        if not service.poll():
            raise KeyboardInterrupt
        given_up = service.supervisor.deaths(name) >= _MOST_DEATHS
        if given_up or time.monotonic() > deadline:
            why = f"died {_MOST_DEATHS} times" if given_up else f"was not ready within {_READY_S:.0f} s"
            log = service.data / "logs" / f"{name}.log"
            tail = "\n".join(service.supervisor.log_since_start(name).splitlines()[-15:])
            raise Unavailable(f"{name} {why}. The end of {log}:\n{tail}", details={"role": name, "log": str(log)})


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  (our own http)
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _planner_answers(service: Service) -> bool:
    try:
        return bool(service.client.call("GET", "/api/health")["checks"]["planner"])
    except (FairshardError, KeyError):
        return False


def _node_ready(service: Service, registry: Registry, node_id: str) -> bool:
    """Whether this service's process, and not one of an earlier service, announced itself as the node."""
    pid = service.supervisor.pid(node_id)
    try:
        return any(info["node_id"] == node_id and info.get("pid", pid) == pid for info in registry.alive())
    except FairshardError:
        return False


@contextlib.contextmanager
def _signals(stop: threading.Event, hurry: threading.Event) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP asks to stop, the second not to wait."""

    def asked(_number: int, _frame: object) -> None:
        (hurry if stop.is_set() else stop).set()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    *,
    port: int = 8080,
    data: Path,
    nodes: str | None = None,
    coordinator: Coordinator | None = None,
    say: Say = say_on_stderr,
) -> int:
    """Run the service until Ctrl-C or SIGTERM.

    Returns:
        0 after a stop that was asked for.

    Raises:
        FairshardError: As `running`.
    """
    began = time.monotonic()
    try:
        with running(port=port, data=data, nodes=nodes, coordinator=coordinator, say=say) as service:
            say(f"fairshard is up after {time.monotonic() - began:.1f} s. Ctrl-C ends it.")
            say(f"  page and API  {service.at.api}\n  API's docs    {service.at.docs}")
            if service.at.flower:
                say(f"  Flower        {service.at.flower}")
            if coordinator:
                say(f"  API token     in {folder_of(service.data) / 'api-token'}")
                if service.at.api.startswith(f"http://{HOST}:"):
                    say("  no other machine reaches this one: --host ADDRESS names where they shall")
                say("This line makes a machine a node, within a day (fairshard join --new prints another):")
                print(invite(service.data), flush=True)
            elif port != 8080:
                say(f"  for the command line: export FAIRSHARD_URL={service.at.api}")
            while service.poll():
                pass
    except KeyboardInterrupt:
        pass
    return 0
