"""What the tests of the API share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from support.running import free_port, until

#: Machines of a what-if.
NODES = [
    {"node_id": "big", "flop_per_s": 3e12, "memory_bytes": 8 << 30},
    {"node_id": "small", "flop_per_s": 1e12, "memory_bytes": 2 << 30},
]
#: Metadata in the williw form.
WILLIW_METADATA = {
    "model_name": "williw/model",
    "model_type": "transformer",
    "batch_size": 1,
    "sequence_length": 512,
    "layers": [
        {
            "name": f"layers.{index}.weight",
            "shape": [64, 64],
            "num_params": 4096,
            "compute_required": 8192.0,
            "layer_type": "linear",
            "dtype": "torch.float32",
        }
        for index in range(6)
    ],
    "total_compute": 49152.0,
    "total_layers": 6,
    "generated_at": 1700000000.5,
    "node_id": "node_001",
}


def error_of(response: Any) -> dict[str, Any]:
    """The error payload, checked for its form and for what it must never hold."""
    assert response.mimetype == "application/json", response.get_data(as_text=True)[:300]
    found: dict[str, Any] = response.get_json()
    assert set(found) == {"error", "code", "details"}, found
    assert isinstance(found["error"], str)
    assert found["error"]
    assert isinstance(found["details"], dict)
    text = json.dumps(found)
    assert "Traceback" not in text
    assert ".py" not in text
    return found


class Server:
    """The application under a real gunicorn, as it is run for real."""

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "gunicorn.log"
        self.env = dict(os.environ) | {"NODE_ID": "web"} | dict(env) | {"FAIRSHARD_BIND": f"127.0.0.1:{self.port}"}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "gunicorn", "--no-control-socket", "-c", "python:web.gunicorn_conf"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, "web.wsgi:app"], env=self.env, stdout=log, stderr=log)
        until(self.serves, what="gunicorn serves", timeout_s=60)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def serves(self) -> bool:
        """Whether it answers."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/api/health/live")[0] == 200
        except OSError:
            return False

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        asked = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
