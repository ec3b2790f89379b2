"""The supervisor with real processes: what dies starts again, what is stopped stays stopped and leaves no child."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from workers.settings import child_env
from workers.up.supervisor import LONGEST_WAIT_S, Role, Supervisor, backoff_s

SLEEPER = "import time\nprint('here', flush=True)\ntime.sleep(600)"
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('here', flush=True)\ntime.sleep(600)"
)
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('child', child.pid, flush=True)\n"
    "time.sleep(600)"
)


def role(tmp_path: Path, code: str, *, name: str = "r", grace_s: float = 20.0) -> Role:
    argv = (sys.executable, "-c", code)
    return Role(name=name, argv=argv, env=child_env({}), log=tmp_path / "logs" / f"{name}.log", grace_s=grace_s)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(said: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(said.append)
    yield supervisor
    supervisor.stop([], hurry=lambda: True)


def until(condition: Callable[[], bool], supervisor: Supervisor, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        supervisor.poll()
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("deaths", "expected_s"), [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (10_000, 30.0)]
)
def test_the_wait_doubles_up_to_its_limit(deaths: int, expected_s: float) -> None:
    assert backoff_s(deaths) == expected_s <= LONGEST_WAIT_S


def test_a_killed_role_starts_again_and_it_is_said_how_it_died(
    tmp_path: Path, supervisor: Supervisor, said: list[str]
) -> None:
    supervisor.start(role(tmp_path, SLEEPER))
    first = supervisor.pid("r")
    assert first is not None
    until(lambda: "here" in supervisor.log_since_start("r"), supervisor)
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.pid("r") not in (first, None), supervisor)
    assert supervisor.deaths("r") == 1
    assert len(said) == 1
    assert "r was ended by SIGKILL; starting it again in 0.5 s" in said[0]
    assert str(tmp_path) in said[0]


def test_the_log_is_kept_and_the_present_run_found_in_it(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.start(role(tmp_path, "import os; print('run of', os.getpid()); raise SystemExit(3)"))
    until(lambda: supervisor.deaths("r") >= 2, supervisor)
    whole = (tmp_path / "logs" / "r.log").read_text()
    assert whole.count("run of") == 2
    assert supervisor.log_since_start("r").count("run of") == 1


def test_a_role_that_dies_young_waits_longer_each_time(
    tmp_path: Path, supervisor: Supervisor, said: list[str]
) -> None:
    supervisor.start(role(tmp_path, "raise SystemExit(3)"))
    until(lambda: supervisor.deaths("r") >= 3, supervisor)
    assert [line.split("again in ")[1].split(" s")[0] for line in said] == ["0.5", "1", "2"]
    assert "ended with status 3" in said[0]


def test_a_program_that_is_missing_is_an_error_at_once(tmp_path: Path, supervisor: Supervisor) -> None:
    with pytest.raises(FileNotFoundError):
        supervisor.start(Role(name="r", argv=("/no/such/program",), env={}, log=tmp_path / "r.log"))


def test_a_dead_roles_children_are_ended_before_it_starts_again(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.start(role(tmp_path, PARENT))
    until(lambda: supervisor.log_since_start("r").endswith("\n"), supervisor)
    child = int(supervisor.log_since_start("r").split()[1])
    leader = supervisor.pid("r")
    assert leader is not None
    os.kill(leader, signal.SIGKILL)
    until(lambda: gone(child), supervisor)


def test_stop_ends_groups_in_order_and_leaves_nothing(tmp_path: Path, supervisor: Supervisor) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys, time\n"
        f"def end(*_):\n    open({str(order)!r}, 'a').write(sys.argv[1] + '\\n'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('here', flush=True)\ntime.sleep(600)"
    )
    pids = []
    for name in ("redis", "api", "node"):
        log = tmp_path / f"{name}.log"
        supervisor.start(Role(name=name, argv=(sys.executable, "-c", code, name), env=child_env({}), log=log))
        pids.append(supervisor.pid(name))
    until(lambda: all("here" in supervisor.log_since_start(n) for n in ("redis", "api", "node")), supervisor)
    supervisor.stop([["api"], ["node"], ["redis"]])
    assert order.read_text().split() == ["api", "node", "redis"]
    assert all(pid is not None and gone(pid) for pid in pids)


def test_one_that_does_not_end_in_its_grace_is_killed(
    tmp_path: Path, supervisor: Supervisor, said: list[str]
) -> None:
    supervisor.start(role(tmp_path, STUBBORN, grace_s=0.3))
    until(lambda: "here" in supervisor.log_since_start("r"), supervisor)
    pid = supervisor.pid("r")
    supervisor.stop([["r"]])
    assert pid is not None
    assert gone(pid)
    assert said == ["r did not end in time: killed"]


def test_hurry_kills_without_waiting_for_the_grace(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.start(role(tmp_path, STUBBORN, grace_s=3600))
    until(lambda: "here" in supervisor.log_since_start("r"), supervisor)
    pid = supervisor.pid("r")
    supervisor.stop([["r"]], hurry=lambda: True)
    assert pid is not None
    assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_roles_end_even_when_the_supervisor_is_killed(tmp_path: Path, supervisor: Supervisor) -> None:
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from workers.settings import child_env\n"
        "from workers.up.supervisor import Role, Supervisor\n"
        "inner = Supervisor(print)\n"
        f"inner.start(Role(name='in', argv=({sys.executable!r}, '-c', 'import time; time.sleep(600)'),"
        f" env=child_env({{}}), log=Path({str(tmp_path / 'in.log')!r})))\n"
        "print('inner', inner.pid('in'), flush=True)\n"
        "time.sleep(600)"
    )
    supervisor.start(role(tmp_path, code))
    until(lambda: supervisor.log_since_start("r").startswith("inner"), supervisor)
    inner = int(supervisor.log_since_start("r").split()[1])
    leader = supervisor.pid("r")
    assert leader is not None
    assert not gone(inner)
    os.kill(leader, signal.SIGKILL)
    until(lambda: gone(inner), supervisor)
