"""Which nodes `fairshard up` runs, and what it says of those it can't."""

import socket
from pathlib import Path

import pytest

from planner.errors import Conflict, InvalidInput
from workers.up import service as up
from workers.up.roles import HOST
from workers.up.stated_nodes import stated_nodes


def test_three_nodes_of_unequal_size_by_default() -> None:
    nodes = stated_nodes(None, memory_bytes=60 * 2**30)
    # 80 % of 60 GiB is 48 GiB, in 3 + 2 + 1 shares of 8 GiB
    assert [node.memory_bytes // 2**30 for node in nodes] == [24, 16, 8]
    assert [node.flop_per_s for node in nodes] == [300e9, 200e9, 100e9]
    assert [node.node_id for node in nodes] == ["node-1", "node-2", "node-3"]


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_together_they_never_state_more_than_the_machine_has(count: int) -> None:
    nodes = stated_nodes(str(count), memory_bytes=10**10)
    assert len(nodes) == count == len({node.node_id for node in nodes})
    assert 0 < sum(node.memory_bytes for node in nodes) <= 10**10


def test_a_nodes_file_says_what_the_nodes_state(tmp_path: Path) -> None:
    file = tmp_path / "nodes.yaml"
    file.write_text(
        "nodes:\n  - {node_id: big, flop_per_s: 2.0e+12, memory_bytes: 1000000000, memory_bytes_per_s: 5.0e+10}\n"
    )
    (node,) = stated_nodes(str(file))
    assert (node.node_id, node.flop_per_s, node.memory_bytes, node.memory_bytes_per_s) == ("big", 2e12, 10**9, 5e10)


@pytest.mark.parametrize("text", ["0", "65", "no-such-file.yaml", "-1"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--nodes"):
        stated_nodes(text)


def test_a_node_can_not_be_called_like_a_role(tmp_path: Path) -> None:
    file = tmp_path / "nodes.yaml"
    file.write_text("nodes:\n  - {node_id: redis, flop_per_s: 1.0e+9, memory_bytes: 1000000}\n")
    with pytest.raises(InvalidInput, match="'redis'"):
        stated_nodes(str(file))


def test_a_port_in_use_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(Conflict, match=rf"port {port} .*--port 0"),
            up.running(port=port, data=tmp_path, say=lambda _line: None),
        ):
            pass
    assert not (tmp_path / "redis").exists()  # refused before anything was started
