"""What this machine is: device, measured FLOP/s, memory bandwidth, memory, disk free, versions.

Settings override what is measured, so that a machine can offer less than it has.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from planner.errors import NodeFailure
from planner.names import check_node_id
from workers.settings import Settings

#: Measured once, kept for so long: a machine's rates do not change with its restarts.
_CACHE_S = 7 * 86400
#: Share of a machine's memory that is offered; the rest is the system's and the worker's own.
_MEMORY_SHARE = 0.8


def describe(settings: Settings) -> dict[str, Any]:
    """This node as JSON, for the registry; measures on first use, then answers from `<node>/probe.json`.

    `{node_id, device, flop_per_s, memory_bytes, memory_bytes_per_s, load, disk_free_bytes, versions, host, pid,
    instance, started_at, shards}`.
    """
    rates = _rates(settings)
    process = psutil.Process()
    return {
        "node_id": settings.node_id,
        "device": rates["device"],
        "flop_per_s": settings.flop_per_s or rates["flop_per_s"],
        "memory_bytes": settings.memory_bytes or rates["memory_bytes"],
        "memory_bytes_per_s": settings.memory_bytes_per_s or rates["memory_bytes_per_s"],
        "stated": bool(settings.flop_per_s or settings.memory_bytes),
        "load": 0.0,
        "peer_url": settings.peer_url,
        "versions": rates["versions"],
        "host": socket.gethostname(),
        "pid": process.pid,
        "instance": instance(settings),
        "started_at": datetime.fromtimestamp(process.create_time(), tz=UTC).isoformat(timespec="seconds"),
    } | live(settings)


def live(settings: Settings) -> dict[str, Any]:
    """What changes while the node runs: `{disk_free_bytes, shards}`."""
    settings.shards_dir.mkdir(parents=True, exist_ok=True)
    return {
        "disk_free_bytes": shutil.disk_usage(settings.shards_dir).free,
        "shards": sorted(path.parent.name for path in settings.shards_dir.glob("[!.]*/manifest.json")),
    }


def instance(settings: Settings) -> str:
    """Tells two machines of the same NODE_ID apart; kept in the node's folder, so the same after a restart."""
    path = settings.node_dir / "instance"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"instance.{os.getpid()}")
        temporary.write_text(secrets.token_hex(8), encoding="ascii")
        temporary.replace(path)
    return path.read_text(encoding="ascii").strip()


def hold_name(data_dir: Path, pattern: str) -> str:
    """The first of node-1, node-2, ... (for "node-*") that no running node of the data folder has, held from now on.

    So whoever comes back without a name of its own, as a container does, finds the shards that it left. The lock is
    an open file's, which the processes that this one becomes or starts inherit: it goes when the last of them does.

    Raises:
        InvalidInput: If what `pattern` gives is no node id.
        NodeFailure: If the folder cannot be written.
    """
    for number in itertools.count(1):
        name = check_node_id(pattern.replace("*", str(number)))
        path = data_dir / "nodes" / name / "lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise NodeFailure(f"{path} cannot be written: {error}", details={"path": str(path)}) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        os.set_inheritable(descriptor, True)
        return name
    raise AssertionError("there is always a next number")


def worker_argv(settings: Settings) -> list[str]:
    """The command that runs this machine as a compute node."""
    queues = f"compute,node.{settings.node_id}"
    worker = ["worker", "-Q", queues, "-n", f"{settings.node_id}@%h", "-c", "1", "--loglevel", "INFO"]
    return [sys.executable, "-m", "celery", "-A", "workers.celery_app", *worker]


def _rates(settings: Settings) -> dict[str, Any]:
    versions = _versions()
    if settings.flop_per_s is not None and settings.memory_bytes is not None:
        # Loading torch costs seconds and 200 MB, for figures that nobody would use; nor are they kept, since the
        # next start may state nothing.
        stated = {"flop_per_s": None, "memory_bytes": None, "memory_bytes_per_s": None}
        return {"device": _cpu_name(), "versions": versions} | stated
    path = settings.node_dir / "probe.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if time.time() - path.stat().st_mtime < _CACHE_S and known["versions"] == versions:
            return dict(known)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rates = _measure_apart() | {"versions": versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"probe.{os.getpid()}.json")
    temporary.write_text(json.dumps(rates), encoding="utf-8")
    temporary.replace(path)
    return rates


def _measure_apart() -> dict[str, Any]:
    # In a process of its own, so that the worker stays as small as it was.
    measured = subprocess.run(
        [sys.executable, "-m", "workers.nodes.probe"], capture_output=True, text=True, check=False
    )
    if measured.returncode:
        raise NodeFailure(
            f"this machine could not be measured: {measured.stderr.strip()[-500:]}; "
            "state FAIRSHARD_FLOP_PER_S and FAIRSHARD_MEMORY_BYTES instead"
        )
    return dict(json.loads(measured.stdout))


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("fairshard", "torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure() -> dict[str, Any]:
    """`{device, flop_per_s, memory_bytes, memory_bytes_per_s}` of this machine's first device."""
    import torch

    if not torch.cuda.is_available():
        memory = round(psutil.virtual_memory().total * _MEMORY_SHARE)
        return {"device": _cpu_name(), "memory_bytes": memory} | _measure_device("cpu")
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": str(properties.name),
        "memory_bytes": round(properties.total_memory * 0.95),
    } | _measure_device("cuda")


def _measure_device(device: str) -> dict[str, Any]:
    """Sustained matmul rate at bfloat16 (float32 where that is faster) and copy bandwidth, each in under a second."""
    import torch

    size = 8192 if device == "cuda" else 1024

    def ready() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def best(run: Callable[[], object]) -> float:
        run()
        ready()
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            ready()
            times.append(time.perf_counter() - begin)
        # What else runs on the machine only ever makes it slower.
        return min(times)

    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        # Not ones: a card at its power limit is a tenth faster where no bits flip.
        left = torch.randn(size, size, dtype=dtype, device=device)
        rates.append(2 * size**3 / best(lambda left=left: left @ left))  # type: ignore[misc]
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 26) // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # A copy reads and writes each byte.
    bandwidth = 2 * source.numel() * 4 / best(lambda: target.copy_(source))
    return {"flop_per_s": max(rates), "memory_bytes_per_s": bandwidth}


def _cpu_name() -> str:
    with_name = Path("/proc/cpuinfo")
    if with_name.is_file():
        for line in with_name.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"CPU with {os.cpu_count()} cores"


if __name__ == "__main__":
    print(json.dumps(measure()))
