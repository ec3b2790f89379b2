"""Machines for tests: each with a network of its own, a home and a data folder; they share a router, and no file.

A machine is a network namespace where the system lets us make one (Linux, as root, with iproute2), else an address of
the loopback.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from support.running import until

#: The router's own address on each cable.
_GATEWAY = "169.254.0.1"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def namespaces_work() -> bool:
    """Whether this system lets us make network namespaces."""
    if not shutil.which("ip") or os.getuid() != 0:
        return False
    name = f"fs-try-{os.getpid()}"
    try:
        _make_router(name)
        _plug_in(f"{name}-1", "10.0.0.1", router=name, port="p1")
    except subprocess.CalledProcessError:
        return False
    finally:
        for made in (f"{name}-1", name):
            subprocess.run(["ip", "netns", "del", made], capture_output=True, check=False)
    return True


def _make_router(name: str) -> None:
    # Not a bridge: many kernels of sandboxes have none.
    _ip("netns", "add", name)
    forward = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
    subprocess.run(["ip", "netns", "exec", name, *forward], check=True, capture_output=True)


def _plug_in(name: str, address: str, *, router: str, port: str) -> None:
    """A namespace of this address, whose packets pass through `router`."""
    _ip("netns", "add", name)
    _ip("-n", router, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("-n", router, "addr", "add", f"{_GATEWAY}/32", "dev", port)
    _ip("-n", router, "link", "set", port, "up")
    _ip("-n", router, "route", "add", f"{address}/32", "dev", port)
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "addr", "add", f"{address}/32", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", name, "route", "add", "default", "via", _GATEWAY, "dev", "eth0", "onlink")


@dataclass
class Machine:
    """One of them."""

    name: str
    address: str
    folder: Path
    #: Its network namespace; None: it is an address of the loopback.
    namespace: str | None
    env: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def _argv(self, command: str) -> list[str]:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, "bash", "-euc", command]

    def run(self, command: str, *, timeout_s: float = 180) -> str:
        """Run a shell's command to its end; its stdout. AssertionError if it fails."""
        done = self.attempt(command, timeout_s=timeout_s)
        assert done.returncode == 0, f"{self.name}$ {command}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def attempt(self, command: str, *, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        """The same, whatever comes of it."""
        return subprocess.run(
            self._argv(command),
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, name: str, command: str) -> None:
        """Start a command that stays, with its output in `<name>.out`."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                self._argv(f"exec {command}"),
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def said(self, name: str) -> str:
        """What a command that was started has said; AssertionError if it ended."""
        text = (self.folder / f"{name}.out").read_text(errors="replace")
        assert self.running[name].poll() is None, f"{self.name}: {name} ended\n{text[-4000:]}\n{self.logs()}"
        return text

    def switch_off(self) -> None:
        """End everything at once, without a word to anybody."""
        for process in self.running.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                first = psutil.Process(process.pid)
                for each in [first, *first.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            process.wait()
        self.running.clear()

    def written(self) -> str:
        """Everything that its processes wrote."""
        files = [*self.folder.glob("*.out"), *self.folder.glob("**/logs/*.log")]
        return "\n".join(path.read_text(errors="replace") for path in files)

    def logs(self) -> str:
        """The end of everything that its processes wrote."""
        files = [*self.folder.glob("*.out"), *self.folder.glob("**/logs/*.log")]
        return "\n".join(
            f"---- {self.name}: {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in files
        )


@contextlib.contextmanager
def machines(
    names: Sequence[str], directory: Path, *, env: Mapping[str, str], addresses: Sequence[str]
) -> Iterator[dict[str, Machine]]:
    """Machines by name; `addresses` are theirs where they have a network of their own, else they are 127.0.1.x."""
    apart = namespaces_work()
    tag = f"fs{secrets.token_hex(3)}"
    made: dict[str, Machine] = {}
    try:
        if apart:
            _make_router(f"{tag}-net")
        for number, name in enumerate(names, start=1):
            namespace = f"{tag}-{number}" if apart else None
            address = addresses[number - 1] if apart else f"127.0.1.{number}"
            if namespace:
                _plug_in(namespace, address, router=f"{tag}-net", port=f"p{number}")
            folder = directory / name
            (folder / "home").mkdir(parents=True)
            own = {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "HOME": str(folder / "home"),
                "HF_HOME": str(folder / "home" / "hf"),
                "HF_HUB_OFFLINE": "1",
                "LANG": "C.UTF-8",
                **env,
            }
            made[name] = Machine(name=name, address=address, folder=folder, namespace=namespace, env=own)
        yield made
    finally:
        for machine in made.values():
            machine.switch_off()
        if apart:
            listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
            for line in listed.splitlines():
                if line.startswith(f"{tag}-"):
                    _ip("netns", "del", line.split()[0])


def says(machine: Machine, name: str, text: str, *, timeout_s: float = 60) -> str:
    """Wait until what was started says `text`; all that it said."""
    until(
        lambda: text in machine.said(name),
        what=lambda: f"{machine.name}: {name} says {text!r}\n{machine.logs()}",
        timeout_s=timeout_s,
    )
    return machine.said(name)
