"""A Redis for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from support.running import RedisProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as process:
        yield process


@pytest.fixture
def client(server: RedisProcess) -> Iterator[redis.Redis]:
    """A client of it, empty at the start of each test."""
    with server.client() as client:
        client.flushall()
        yield client
