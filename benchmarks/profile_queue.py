"""Different models sent as one batch through the whole service: API, Redis, one compute worker, the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.running import Service, Web, until

SIZES = (10, 100, 1000)
#: Of the rate at 10 models, what is left at 1,000.
KEPT = 0.8


def measure(
    folder: Path,
    *,
    write: Callable[..., Path],
    report: Callable[..., None],
    sizes: tuple[int, ...] = SIZES,
) -> None:
    """Send one batch of each size, no model twice, and report how many are profiled and published per second.

    Args:
        folder: Where models and data lie.
        write: Writes a model's folder; takes changes of its config.
        report: Takes name, value and unit, as `benchmarks.profile.report`.
        sizes: Models in each batch.
    """
    names = iter([f"owner/m{number:04d}" for number in range(sum(sizes) + 1)])
    for number in range(sum(sizes) + 1):
        write(
            folder / "models" / "owner" / f"m{number:04d}",
            num_hidden_layers=4 + number % 40,
            intermediate_size=1024 + 64 * (number // 40),
        )
    env = {"FAIRSHARD_MAX_BATCH": str(max(sizes)), "FAIRSHARD_MAX_QUEUE": "100000"}
    service = Service(folder / "run", models_dir=folder / "models", nodes={"one": (100e9, 8 << 30)}, env=env)
    with service, Web(env=service.env, directory=folder) as web:
        client: Any = service.redis.client()

        def run(count: int) -> tuple[float, float]:
            """Seconds, and seconds of a core that the compute worker took."""
            before, used = _done(client), _core_s(service)
            begin = time.perf_counter()
            status, batch = web.ask(
                "POST", "/api/batches", {"models": [{"model_name": next(names)} for _ in range(count)]}
            )
            assert status == 202, batch
            until(
                lambda: _done(client) >= before + count,
                what=lambda: f"{count} jobs are done:\n{service.logs()}",
                timeout_s=60 + count,
                every_s=0.02,
            )
            took = time.perf_counter() - begin
            status, batch = web.ask("GET", f"/api/batches/{batch['batch_id']}", timeout_s=60)
            assert batch["counts"] == {"done": count}, batch["counts"]
            return took, _core_s(service) - used

        run(1)
        rates = {}
        for size in sizes:
            took, used = run(size)
            rates[size] = size / took
            report(
                f"{size} different models as one batch",
                size / took,
                "profiles/s by one worker",
                note=f"{size / used:.3g} per second of a core; {_resident_mb(service):.0f} MB resident",
            )
        first, last = rates[min(sizes)], rates[max(sizes)]
        report(f"rate at {max(sizes)} models / at {min(sizes)}", last / first, "x", target=KEPT, least=True)


def _done(client: Any) -> int:
    return int(client.hget("fairshard:counters", "jobs_done_total") or 0)


def _processes(service: Service) -> list[Any]:
    import psutil

    worker = service.workers["one"]
    return [psutil.Process(pid) for pid in worker.children()]


def _core_s(service: Service) -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in _processes(service)))


def _resident_mb(service: Service) -> float:
    return float(max(process.memory_info().rss for process in _processes(service))) / 2**20
