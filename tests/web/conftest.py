"""Applications over a real Redis; with real workers where a test needs work done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.checkpoints import models_dir
from support.running import RedisProcess, Service
from support.web_cases import Server

from web.app import create_app
from workers.settings import Settings

#: What the tests of this folder ask for as `tiny/<name>`.
TINY = (
    "bert",
    "deepseek_v3",
    "gemma2",
    "gpt2",
    "llama",
    "llama_deep",
    "llama_tied",
    "mixtral",
    "phi3",
    "qwen2",
)

MakeApp = Callable[..., Flask]


@pytest.fixture(scope="session")
def bare_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A Redis that nobody works for."""
    with RedisProcess(tmp_path_factory.mktemp("web-redis")) as redis:
        yield redis


@pytest.fixture
def settings(bare_redis: RedisProcess, tmp_path: Path) -> Settings:
    """Settings over an empty Redis and an empty data folder."""
    with bare_redis.client() as client:
        client.flushall()
    return Settings.from_env(
        {"REDIS_URL": bare_redis.url, "FAIRSHARD_DATA": str(tmp_path / "data"), "NODE_ID": "web"}
    )


@pytest.fixture
def make_app(settings: Settings) -> MakeApp:
    """Makes applications over those settings."""

    def make(**overrides: Any) -> Flask:
        return create_app(settings, **({"background": False} | overrides))

    return make


@pytest.fixture
def client(make_app: MakeApp) -> FlaskClient:
    """A client of the application as it is on loopback."""
    return make_app().test_client()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Redis, a planner and two unequal nodes, over the small checkpoints."""
    service = Service(
        tmp_path_factory.mktemp("web-service"),
        models_dir=models_dir(*TINY),
        nodes={"big": (3e12, 8 << 30), "small": (1e12, 2 << 30)},
    )
    with service:
        yield service


@pytest.fixture
def live(service: Service) -> FlaskClient:
    """A client of an application whose jobs are really done."""
    return create_app(Settings.from_env(service.env | {"NODE_ID": "web"}), background=False).test_client()


@pytest.fixture(scope="session")
def server(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The API under gunicorn as it is on loopback, with real workers behind it."""
    with Server(tmp_path_factory.mktemp("server"), service.env) as server:
        yield server
