"""What every test stands on: a clean environment, no network but the loopback, and a Hub of its own."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hub.server import TestHub
from support.depth import DEEP, VARIABLE

_SCRUBBED = ("HF_", "HUGGING", "FAIRSHARD_", "TRANSFORMERS_")
#: What starts processes of the service is made of these modules' classes, or by these fixtures.
_SERVICE_MODULES = {"support.running", "support.web_cases"}
_SERVICE_FIXTURES = {"bare_redis", "settings", "service", "hub_service", "server", "browser"}
_SHARE_THE_WEB_SERVICE = {f"tests/web/test_{name}.py" for name in ("service", "page", "metrics")}
_SCRUBBED_NAMES = ("REDIS_URL", "NODE_ID", "METADATA_REPO", "MODEL")


class _Session:
    """The one Hub of this test process and the folder for its clients' caches."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="fairshard-tests-"))
        self.hub = TestHub()


_SESSION = pytest.StashKey[_Session]()


def _keep_bytecode() -> None:
    """Where PYTHONDONTWRITEBYTECODE is set, keep what Python compiles all the same, in the environment's folder.

    The tests start hundreds of processes, and importing torch and transformers takes each 9 s of CPU with it, 21 s
    without.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(sys.prefix, "bytecode")))
        sys.dont_write_bytecode = False


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module imports a library that reads it."""
    _keep_bytecode()
    for name in list(os.environ):
        # The depth is for the other test processes, that take over this one's environment.
        if (name.startswith(_SCRUBBED) and name != VARIABLE) or name in _SCRUBBED_NAMES:
            del os.environ[name]
    session = config.stash[_SESSION] = _Session()
    session.hub.__enter__()
    os.environ |= {
        "HF_ENDPOINT": session.hub.url,
        "HF_HOME": str(session.home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Xet has a storage service of its own that no test Hub can stand in for; plain HTTP is what we speak.
        "HF_HUB_DISABLE_XET": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A proxy in the environment must not see what is meant for the loopback.
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    # The same cases in every run of `make test`; others each time where there is time to search.
    hypothesis.settings.register_profile("fairshard", deadline=None, derandomize=not DEEP, print_blob=True)
    hypothesis.settings.load_profile("fairshard")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts processes of the service, for `make quick`; leave out what only `make test-deep` runs."""
    for item in items:
        if _needs_service(item):
            item.add_marker("service")
    if DEEP:
        return
    deep = [item for item in items if item.get_closest_marker("deep")]
    if deep:
        config.hook.pytest_deselected(items=deep)
        items[:] = [item for item in items if not item.get_closest_marker("deep")]


def _needs_service(item: pytest.Item) -> bool:
    """Whether a Redis, a worker, a web server or a browser is started for it, by its file or by a fixture."""
    if _SERVICE_FIXTURES.intersection(getattr(item, "fixturenames", ())):
        return True
    module = getattr(item, "module", None)
    return any(
        getattr(each, "__module__", None) in _SERVICE_MODULES
        for each in vars(module).values()
        if isinstance(each, type)
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a process a file at a time, and all files that share a service: it takes seconds to start."""
    from xdist.scheduler import LoadFileScheduling

    class ByService(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "tests/web" if file in _SHARE_THE_WEB_SERVICE else file

    return ByService(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the Hub and remove its clients' caches."""
    session = config.stash.get(_SESSION, None)
    if session is not None:
        session.hub.__exit__(None, None, None)
        shutil.rmtree(session.home, ignore_errors=True)


@pytest.fixture
def hub(pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestHub]:
    """A Hub without repositories, and an empty client cache; `HF_ENDPOINT` points at it in every process.

    No token is in the environment: a test that needs one sets HF_TOKEN or passes `hub.token`.
    """
    hub = pytestconfig.stash[_SESSION].hub
    hub.reset()
    # The library reads its settings when it is imported, once for all tests: before they change for this one.
    from huggingface_hub import constants

    home = tmp_path / "hf-home"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    yield hub
    assert not hub.errors, f"the test Hub failed itself: {hub.errors!r}"
