"""Redis by `rediss://` with a certificate that is checked, for the ledger, the broker and the rate limit alike.

The Redis that comes with fairshard's own start speaks no TLS, so a proxy with the compose file's certificates stands
before it; tests/integration/test_deploy.py uses Redis' own TLS where this machine's Redis has it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.redis_roles import counted, waiting
from support.running import Service, free_port, until

from planner.errors import Unavailable
from workers.jobs.jobs import Jobs
from workers.ledger.steps import ENDED
from workers.settings import QueueSettings, Settings


class TlsProxy:
    """Speaks TLS to whoever connects, and plainly to `target`."""

    def __init__(self, certs: Path, target: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certs / "redis.crt", certs / "redis.key")
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        #: TLS connections that were made.
        self.made = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(raw.close)
            near = stack.enter_context(self._context.wrap_socket(raw, server_side=True))
            far = stack.enter_context(socket.create_connection(("127.0.0.1", self._target)))
            self.made += 1
            threading.Thread(target=_pump, args=(far, near), daemon=True).start()
            _pump(near, far)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Service, TlsProxy]]:
    """A service whose processes reach Redis by TLS alone."""
    certs = tmp_path / "certs"
    subprocess.run([sys.executable, "-m", "workers.up.certificates", str(certs), "localhost"], check=True)
    service = Service(tmp_path, nodes={"one": (1e11, 2 << 30)}, env={"HF_HOME": str(tmp_path / "hf")})
    proxy = TlsProxy(certs, service.redis.port)
    service.redis_url = f"rediss://localhost:{proxy.port}/0?ssl_ca_certs={certs}/ca.crt"
    with service:
        yield service, proxy
    proxy.close()


def test_a_job_passes_over_tls_and_a_strangers_certificate_is_refused(
    hub: TestHub, guarded: tuple[Service, TlsProxy], tmp_path: Path
) -> None:
    service, proxy = guarded
    hub.add_repo("tester/sealed", checkpoint("llama"))
    jobs = service.jobs()
    job_id = jobs.submit_request("tester/sealed", process={})["job_id"]
    view: dict[str, Any] = until(
        lambda: (found := jobs.job(job_id))["state"] in ENDED and found, what=service.logs, timeout_s=120
    )
    assert view["state"] == "done", (view, service.logs())
    assert proxy.made > 4  # broker, backend and ledger of both workers, and ours

    def reached(url: str) -> None:
        env = service.env | {"REDIS_URL": url}
        Jobs.from_settings(Settings.from_env(env), queue=QueueSettings()).jobs()

    # Flower's and the limiter's connections are checked too.
    assert counted(service, limits="9/minute") == 1
    assert waiting(service) == [{"name": "planner", "messages": 0}]
    # Another authority's certificate, a name that it does not carry, no TLS at all.
    subprocess.run(
        [sys.executable, "-m", "workers.up.certificates", str(tmp_path / "other"), "localhost"], check=True
    )
    url = service.env["REDIS_URL"]
    reached(url)
    for wrong in (
        url.replace("/certs/ca.crt", "/other/ca.crt"),
        url.replace("//localhost", "//127.0.0.1"),
        url.replace("rediss://", "redis://").partition("?")[0],
        url.replace(str(proxy.port), str(free_port())),
    ):
        with pytest.raises(Unavailable):
            reached(wrong)
