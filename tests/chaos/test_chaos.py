from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chaos.suite import Chaos
from support.depth import depth


class RollingRestart(Chaos):
    """Nothing is killed: one role after another is told to end, and started again."""

    turn = 0

    def misfortune(self) -> None:
        workers = self.service.all_workers
        roles = [self.web, *workers, self.service.redis]
        role: Any = roles[self.turn % len(roles)]
        self.turn += 1
        self.accidents[getattr(role, "name", type(role).__name__)] += 1
        assert role.stop() == 0
        role.start()


@pytest.mark.slow
@pytest.mark.search
@pytest.mark.timeout(depth(400, 900))
def test_nothing_is_lost_in_chaos(tmp_path: Path) -> None:
    """The short form of `make chaos`: a child, a worker, Redis and the web process are killed, Redis is paused."""
    jobs = depth(12, 80)
    figures = Chaos(tmp_path, seed=7, jobs=jobs, seconds=depth(8, 80)).run()
    assert figures["jobs"] >= jobs
    assert sum(figures["accidents"].values()) >= 3


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.timeout(400)
def test_a_rolling_restart_of_all_roles_under_load_loses_nothing(tmp_path: Path) -> None:
    rolling = RollingRestart(tmp_path, seed=8, jobs=12, seconds=12)
    figures = rolling.run()
    assert len(figures["accidents"]) >= 3
    # Whoever is told to end finishes, or hands back: no lease runs out, and no attempt is lost.
    assert figures["leases_expired"] == 0
