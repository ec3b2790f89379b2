"""What people see at a terminal of 80 columns, and programs in a pipe."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import copy_of
from support.terminal import in_terminal

from workers.cli.console import Bars, Table, emit

FAIRSHARD = Path(sys.executable).with_name("fairshard")
PLAN = ("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--explain")
NODES = """\
nodes:
  - {node_id: a-desktop-with-a-long-name.lab.example.org, flop_per_s: 4e11, memory_bytes: 80MB}
  - {node_id: laptop, flop_per_s: 2e11, memory_bytes: 64MB}
links: {latency_s: 0.0005, bytes_per_s: 125MB/s}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy_of("llama_files", tmp_path / "m")
    (tmp_path / "nodes.yaml").write_text(NODES)
    return tmp_path


class Script(BaseHTTPRequestHandler):
    """A service whose job goes as the test says: each GET sees the next of `server.views`, the last one for ever."""

    server: Any

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"job_id": "c0ffee", "message": "accepted"})

    def do_GET(self) -> None:
        self._answer(self.server.views.pop(0) if len(self.server.views) > 1 else self.server.views[0])
        self.server.asked.set()

    def _answer(self, obj: object) -> None:
        text = json.dumps(obj).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def job(state: str, *steps: tuple[str, str, dict[str, Any] | None]) -> dict[str, Any]:
    return {
        "job_id": "c0ffee", "kind": "request", "model_name": "owner/name", "state": state, "error": None,
        "steps": [{"name": name, "state": at, "attempts": 1, "progress": progress} for name, at, progress in steps],
    }  # fmt: skip


def far(done: int, total: int, eta_s: float) -> dict[str, Any]:
    return {"done": done, "total": total, "what": "shard", "rate_per_s": 34e6, "eta_s": eta_s}


@pytest.fixture
def service() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.asked = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_table_fits_a_terminal_and_keeps_every_word(folder: Path) -> None:
    seen = in_terminal([str(FAIRSHARD), *PLAN], cwd=folder)
    assert seen.status == 0, seen.raw
    assert max(map(len, seen.lines)) <= 80
    # Folded, not cut: a long name goes on in the next line.
    column = "".join(line[: line.find(" ")] if " " in line else line for line in seen.lines[2:8])
    assert "a-desktop-with-a-long-name.lab.example.org" in column
    assert "…" not in seen.raw
    assert "\x1b[1m" in seen.raw
    plain = in_terminal([str(FAIRSHARD), *PLAN], cwd=folder, env={"NO_COLOR": "1"})
    assert not plain.coloured
    # Explanations are wrapped at words.
    assert re.search(r"\w+$", seen.lines[-3])


def test_a_pipe_gets_plain_lines_of_equal_cells(folder: Path) -> None:
    done = subprocess.run(
        [str(FAIRSHARD), *PLAN], cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "40"},
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    table = done.stdout.partition("\n\n")[0].splitlines()
    head, *rows = [re.split(r"  +", line) for line in table]
    assert head == ["node", "layers", "which", "compute", "time", "busy", "memory", "limit"]
    assert len(rows) == 2
    assert {len(row) for row in rows} == {len(head)}


def test_what_others_wrote_gives_a_terminal_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(("a", "b"), [("\x1b[2Jx", "\x9b31m\n\ty"), ("", 0)])
    emit(argparse.Namespace(bars=Bars(), json=False), {}, [table, "\x1b]0;title\x07"])
    assert capsys.readouterr().out == "a      b\n�[2Jx  �31m y\n–      0\n�]0;title�\n"


@pytest.mark.parametrize("columns", [80, 50])
def test_each_step_has_its_own_bar_and_ends_at_100_percent(service: Any, columns: int) -> None:
    service.views = [
        job("running", ("profile", "running", None), ("split:n1", "waiting", None), ("split:n2", "waiting", None)),
        *(
            job("running", ("profile", "done", far(97, 100, 1.0)),
                ("split:n1", "running", far(at * 10**7, 10**9, 12.0)),
                ("split:n2", "running", far(at * 10**6, 10**9, 27.8)))
            for at in range(1, 5)
        ),
        job("done", ("profile", "done", far(97, 100, 1.0)), ("split:n1", "done", far(61, 100, 9.0)),
            ("split:n2", "done", far(5, 100, 9.0))),
    ]  # fmt: skip
    seen = in_terminal(
        [str(FAIRSHARD), "submit", "owner/name", "--wait"], env={"FAIRSHARD_URL": service.url}, columns=columns
    )
    assert seen.status == 0, seen.raw
    assert seen.coloured
    assert max(map(len, seen.lines)) <= columns
    text = " ".join(" ".join(seen.lines).split())
    assert "28 s left" in text
    for name in ("profile", "split:n1", "split:n2"):
        bars = [line for line in seen.lines if line.startswith(name) and "━" in line]
        assert bars[-1].endswith("done, 100%"), name
    # The table at the end says so, too.
    assert "97%" not in text
    assert "61%" not in text
    assert columns < 80 or text.count("100% of 100 B") == 3


def test_a_pipe_gets_a_line_for_each_step(service: Any) -> None:
    service.views = [job("done", ("profile", "done", far(97, 100, 1.0)), ("publish", "failed", None))]
    done = subprocess.run(
        [str(FAIRSHARD), "jobs", "c0ffee", "--wait"], capture_output=True, text=True, check=True,
        env={**os.environ, "FAIRSHARD_URL": service.url},
    )  # fmt: skip
    assert done.stderr.splitlines() == ["  profile: done, 100%", "  publish: failed"]


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_ctrl_c_says_that_the_job_goes_on_and_how_to_watch_and_cancel_it(service: Any, more: tuple[str, ...]) -> None:
    service.views = [job("running", ("split:n1", "running", far(1, 100, 12.5)))]
    seen = in_terminal(
        [str(FAIRSHARD), "submit", "owner/name", "--wait", *more],
        env={"FAIRSHARD_URL": service.url},
        interrupt_on=service.asked,
    )
    assert seen.status == 130
    text = " ".join(" ".join(seen.lines).split())
    assert "job c0ffee goes on" in text
    assert "fairshard jobs c0ffee --wait" in text
    assert "fairshard jobs c0ffee --cancel" in text
    assert "Traceback" not in text
    if more == ("--json",):
        assert json.loads(seen.raw[seen.raw.index("{\r\n") :])["code"] == "interrupted"


def test_the_shell_completes_commands_options_and_choices() -> None:
    for shell in ("bash", "zsh", "fish"):
        code = subprocess.run(
            [str(FAIRSHARD), "completion", shell], capture_output=True, text=True, check=True
        ).stdout
        assert "fairshard" in code
    # The shell's own function, as it is called when a person presses Tab.
    script = f"""
export PATH={FAIRSHARD.parent}:$PATH; eval "$(fairshard completion bash)"
complete_line() {{
  COMP_LINE="$1" COMP_POINT=${{#1}} COMP_TYPE=9 COMP_WORDS=($1) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()
  _python_argcomplete fairshard "${{COMP_WORDS[-1]}}" x; echo "${{COMPREPLY[@]}}"
}}
complete_line "fairshard ver"; complete_line "fairshard plan --strategy pi"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["verify", "pipeline"]
