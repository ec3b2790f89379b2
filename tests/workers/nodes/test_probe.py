"""What a machine says of itself: measured, unless its owner states less."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest

from planner.errors import NodeFailure
from workers.nodes import probe as node
from workers.nodes.registry import to_node
from workers.settings import Settings


def settings(folder: Path, **env: str) -> Settings:
    return Settings.from_env({"FAIRSHARD_DATA": str(folder), "NODE_ID": "here", **env})


def test_a_machine_that_states_nothing_is_measured_once(tmp_path: Path) -> None:
    said = node.describe(settings(tmp_path))
    assert said["node_id"] == "here"
    assert said["device"]
    assert said["stated"] is False
    # Any machine that runs this does a thousandth of a second's work of 2010 and no more than a rack of today's.
    assert 1e8 < said["flop_per_s"] < 1e17
    assert 1e8 < said["memory_bytes_per_s"] < 1e14
    assert 0 < said["memory_bytes"] < psutil.virtual_memory().total or "NVIDIA" in said["device"]
    assert 0 < said["disk_free_bytes"] <= shutil.disk_usage(tmp_path).total
    assert {"python", "fairshard", "torch", "transformers", "safetensors"} <= said["versions"].keys()
    assert json.loads(json.dumps(said)) == said
    assert to_node(said).flop_per_s == said["flop_per_s"]
    # Later starts take the figures from the node's folder, and know the node by it.
    probe = tmp_path / "nodes" / "here" / "probe.json"
    probe.write_text(json.dumps(json.loads(probe.read_text()) | {"flop_per_s": 12.5}))
    again = node.describe(settings(tmp_path))
    assert again["flop_per_s"] == 12.5
    assert again["instance"] == said["instance"] != node.instance(settings(tmp_path / "elsewhere"))


def test_what_is_stated_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"device": "card", "flop_per_s": 5e12, "memory_bytes": 10**10, "memory_bytes_per_s": 2e11}
    monkeypatch.setattr(node, "_measure_apart", lambda: dict(measured))
    some = node.describe(settings(tmp_path, FAIRSHARD_MEMORY_BYTES="5000"))
    assert (some["flop_per_s"], some["memory_bytes"], some["memory_bytes_per_s"]) == (5e12, 5000, 2e11)
    assert some["stated"] is True
    other = {"FAIRSHARD_FLOP_PER_S": "1e9", "FAIRSHARD_MEMORY_BYTES_PER_S": "1e8"}
    some = node.describe(settings(tmp_path, **other))
    assert (some["flop_per_s"], some["memory_bytes"], some["memory_bytes_per_s"]) == (1e9, 10**10, 1e8)


def test_stated_figures_are_forgotten_with_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stated = settings(tmp_path, FAIRSHARD_FLOP_PER_S="1e9", FAIRSHARD_MEMORY_BYTES="5000")
    monkeypatch.setattr(node, "_measure_apart", lambda: pytest.fail("nobody would use what is measured"))
    said = node.describe(stated)
    assert (said["flop_per_s"], said["memory_bytes"], said["memory_bytes_per_s"]) == (1e9, 5000, None)
    measured = {"device": "card", "flop_per_s": 5e12, "memory_bytes": 10**10, "memory_bytes_per_s": 2e11}
    monkeypatch.setattr(node, "_measure_apart", lambda: dict(measured))
    assert measured.items() <= node.describe(settings(tmp_path)).items()


def test_another_release_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tmp_path / "nodes" / "here" / "probe.json"
    probe.parent.mkdir(parents=True)
    measured = {"device": "card", "flop_per_s": 5e12, "memory_bytes": 10**10, "memory_bytes_per_s": 2e11}
    monkeypatch.setattr(node, "_measure_apart", lambda: dict(measured))
    for old in ('{"versions": {"torch": "1.0"}, "flop_per_s": 1}', "[]", "{", ""):
        probe.write_text(old)
        assert node.describe(settings(tmp_path))["flop_per_s"] == 5e12


def test_a_machine_that_can_not_be_measured_says_what_to_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text("raise ImportError('no kernel image for this device')")
    with pytest.raises(NodeFailure, match=r"no kernel image.*state FAIRSHARD_FLOP_PER_S and FAIRSHARD_MEMORY_BYTES"):
        node.describe(settings(tmp_path / "data"))
