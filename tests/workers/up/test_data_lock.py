"""The data folder's lock: one service at a time, and the one refused is told who holds it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from planner.errors import Conflict
from workers.up.data_lock import DataLock

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from workers.up.data_lock import DataLock
with DataLock(Path(sys.argv[1])) as lock:
    lock.describe(url="http://127.0.0.1:1234")
    heir = subprocess.Popen(["sleep", sys.argv[2]], pass_fds=(lock.fd,))
    print(heir.pid, flush=True)
    time.sleep(600)
"""


def hold(data: Path, heir_s: str) -> tuple[subprocess.Popen[str], int]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(data), heir_s], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def test_the_second_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    holder, heir = hold(tmp_path / "data", "600")
    try:
        with pytest.raises(Conflict, match=rf"pid {holder.pid}, http://127\.0\.0\.1:1234.*--data") as caught:
            DataLock(tmp_path / "data").__enter__()
        assert caught.value.details["pid"] == holder.pid
    finally:
        end(holder)
        os.kill(heir, signal.SIGKILL)


def test_it_is_free_again_afterwards(tmp_path: Path) -> None:
    with DataLock(tmp_path) as lock:
        lock.describe(url="http://x")
        assert json.loads((tmp_path / "up.lock").read_text()) == {"pid": os.getpid(), "url": "http://x"}
    with DataLock(tmp_path):
        pass


def test_after_a_kill_it_waits_until_the_heir_has_ended_too(tmp_path: Path) -> None:
    holder, _heir = hold(tmp_path, "2")
    end(holder)
    with DataLock(tmp_path, patience_s=60):
        pass


def test_an_heir_that_stays_is_named_as_the_cause(tmp_path: Path) -> None:
    holder, heir = hold(tmp_path, "600")
    end(holder)
    try:
        with pytest.raises(Conflict, match=rf"pid {holder.pid}, killed.*redis-server"):
            DataLock(tmp_path, patience_s=0.1).__enter__()
    finally:
        os.kill(heir, signal.SIGKILL)
