"""Services of real processes: started once for the tests that leave them as they found them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hub.server import TestHub
from support.running import Service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Planner and three unequal nodes; metadata in a folder, no Hub token."""
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, env={"HF_HOME": str(directory / "hf")}) as running:
        yield running


@pytest.fixture(scope="session")
def hub_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The same, with its metadata in a Hub repository and a token that may write there."""
    directory = tmp_path_factory.mktemp("hub-service")
    env = {"HF_HOME": str(directory / "hf"), "HF_TOKEN": "hf_tester", "METADATA_REPO": "tester/metadata"}
    with Service(directory, env=env) as running:
        yield running


@pytest.fixture
def endpoint(hub: TestHub) -> str:
    """The test Hub's address; every worker has it from its environment."""
    assert os.environ["HF_ENDPOINT"] == hub.url
    return hub.url
