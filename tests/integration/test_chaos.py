from __future__ import annotations

from pathlib import Path

import pytest
from integration.chaos import Chaos


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_is_lost_in_chaos(tmp_path: Path) -> None:
    """The short form of `make chaos`."""
    figures = Chaos(tmp_path, seed=7, jobs=15, seconds=20).run()
    assert figures["jobs"] == 15
    assert sum(figures["accidents"].values()) >= 3
