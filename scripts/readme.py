"""Runs the console blocks of README.md and docs/tour.md in a copy of the tree with an empty home folder.

    python scripts/readme.py            writes what the commands print into docs/tour.md, and takes the page's picture
    tests/integration/test_demo.py      runs them too, and compares

A block is fenced as ```console. Its lines `$ command` are run in order in one fresh shell; the rest is their output
(in README.md a part of it). `fairshard up` keeps its terminal: it runs in the background on a free port, and what
follows is a new shell. A command that stands in both documents runs once. The Hub is out of reach, so that the model
is the one of the PyPI package, everywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.md"
DOCUMENTS = (ROOT / "README.md", TOUR)
PICTURE = ROOT / "docs" / "images" / "page.png"
HUB = "https://huggingface.co"
#: Where `fairshard up` answers, as the documents say.
URL = "http://127.0.0.1:8080"
#: Nobody listens there.
NO_HUB = "http://127.0.0.1:9"
_FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SKIP = shutil.ignore_patterns(".git", ".venv", ".fairshard", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
#: What the commands of the documents write into the tree; workers/ has a folder of the first name.
_WRITTEN = ("shards", "out")
#: What comes and goes with the machine's speed.
_FLEETING = re.compile(
    r"^\s*[\d.]+ s  \S+ +(running|\d+%)|^  \S+: (queued|running|[\d,]+ of |\d+% of |[\d.]+ [kMGT]?B)"
    r"|^  for the command line|^Making|\d%\||is ignored: it is neither"
)


@dataclass
class Command:
    """A command of the document, what is said that it prints, and what it printed."""

    text: str
    said: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    status: int | None = None


def parse(block: str) -> list[Command]:
    """The commands of one block."""
    commands: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            commands.append(Command(line[2:]))
        elif commands:
            commands[-1].said.append(line)
    return commands


def normal(line: str) -> str:
    """The line without what differs from run to run, and from machine to machine."""
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "H", line)
    line = re.sub(r"[\d][\d,.:]*", "N", line)
    line = re.sub(r"\b[kMGT]i?B\b", "B", re.sub(r"\bN [mµ]s\b", "N s", line))
    # What this machine is: its processor's name, its own Redis.
    line = re.sub(r"^(node-N) .* (N GFLOP/s +N B +N B)", r"\1 \2", re.sub(r"redis-server N .*", "redis-server", line))
    return re.sub(r"─+", "─", " ".join(line.split()))


@dataclass
class Session:
    """A copy of the tree in which commands are run."""

    clone: Path
    home: Path
    url: str = URL
    _up: subprocess.Popen[str] | None = None
    #: What this terminal's shell was told: `source`, `export`.
    _shell: list[str] = field(default_factory=list)
    _ran: dict[str, Command] = field(default_factory=dict)

    def env(self) -> dict[str, str]:
        """An empty home and no setting but the endpoint."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("FAIRSHARD_", "HF_", "PYTEST", "VIRTUAL_ENV"))
        }
        # A python3 that lives in a home folder's manager would lose its way with another home.
        path = [f"{sys.base_prefix}/bin", *os.environ["PATH"].split(os.pathsep)]
        path = [place for place in path if ".venv" not in Path(place).parts]
        return kept | {
            "HOME": str(self.home),
            "PATH": os.pathsep.join(path),
            "HF_ENDPOINT": NO_HUB,
            "FAIRSHARD_URL": self.url,
            "COLUMNS": "110",
            "PYTHONUTF8": "1",
        }

    def run(self, command: Command, *, timeout_s: float = 600.0) -> None:
        """Run one command, unless it has run already, and note what it printed."""
        if command.text in self._ran:
            before = self._ran[command.text]
            command.status, command.printed = before.status, before.printed
            return
        if command.text == "fairshard up":
            self._start(command)
            self._shell.clear()
        elif command.text.startswith(("source ", "export ")):
            self._shell.append(command.text)
            command.status = 0
            return
        else:
            self._finish(command, timeout_s)
        self._ran[command.text] = command

    def _finish(self, command: Command, timeout_s: float) -> None:
        done = subprocess.run(
            ["/bin/bash", "-c", "\n".join(["set -e", *self._shell, command.text.replace(URL, self.url)])],
            cwd=self.clone,
            env=self.env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        command.status = done.returncode
        command.printed = self._readable(done.stdout)

    def _start(self, command: Command) -> None:
        lines: list[str] = []
        argv = ["/bin/bash", "-c", "\n".join(["set -e", *self._shell, "exec fairshard up --port 0"])]
        self._up = subprocess.Popen(argv, cwd=self.clone, env=self.env(), stderr=subprocess.PIPE, text=True)

        def read(up: subprocess.Popen[str]) -> None:
            assert up.stderr is not None
            lines.extend(iter(up.stderr.readline, ""))

        threading.Thread(target=read, args=(self._up,), daemon=True).start()
        deadline = time.monotonic() + 180
        while not any("for the command line" in line for line in lines):
            if self._up.poll() is not None or time.monotonic() > deadline:
                command.status, command.printed = 1, list(lines)
                return
            time.sleep(0.1)
        (self.url,) = [line.split()[-1] for line in lines if "page and API" in line]
        command.status, command.printed = 0, self._readable("".join(lines))

    def _readable(self, text: str) -> list[str]:
        text = text.replace(NO_HUB, HUB).replace(self.url, URL).replace(str(self.clone), "fairshard")
        lines = [line.rstrip().split("\r")[-1] for line in text.splitlines()]
        kept = [line for line in lines if not _FLEETING.search(line)]
        return "\n".join(kept).strip("\n").splitlines()

    def stop(self) -> int | None:
        """End `fairshard up`, if it was started; its status."""
        if self._up is None:
            return None
        self._up.terminate()
        status = self._up.wait(90)
        if self._up.stderr is not None:
            self._up.stderr.close()
        self._up = None
        return status


@contextlib.contextmanager
def session(directory: Path) -> Iterator[Session]:
    """A fresh copy of the tree below `directory`."""
    clone, home = directory / "fairshard", directory / "home"
    shutil.copytree(
        ROOT,
        clone,
        ignore=lambda at, names: _SKIP(at, names) | set(_WRITTEN if Path(at) == ROOT else ()),
        symlinks=True,
    )
    home.mkdir()
    made = Session(clone, home)
    try:
        yield made
    finally:
        made.stop()


def picture(url: str) -> None:
    """The page with its newest plan, as README.md shows it."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(url)
        page.locator("#jobs button").first.click()
        page.get_by_role("button", name="Show its plan").click()
        page.get_by_text("Comparing strategies").wait_for(state="detached")
        PICTURE.parent.mkdir(exist_ok=True)
        page.screenshot(path=PICTURE, full_page=True)
        browser.close()


def main() -> int:
    """Write docs/tour.md's outputs anew."""
    text = TOUR.read_text(encoding="utf-8")
    failed = False
    with tempfile.TemporaryDirectory() as directory, session(Path(directory)) as live:

        def ran(command: Command) -> Command:
            nonlocal failed
            print("$", command.text, file=sys.stderr, flush=True)
            live.run(command)
            failed |= command.status != 0
            print(*command.printed, sep="\n", file=sys.stderr, flush=True)
            if command.text.startswith("fairshard submit") and not failed:
                picture(live.url)
            return command

        def rewritten(match: re.Match[str]) -> str:
            lines = [
                line
                for command in map(ran, parse(match.group(1)))
                for line in (f"$ {command.text}", *command.printed)
            ]
            return "\n".join(["```console", *lines, "```"])

        text = _FENCE.sub(rewritten, text)
    if failed:
        print("a command failed: docs/tour.md stays as it is", file=sys.stderr)
        return 1
    TOUR.write_text(text, encoding="utf-8")
    return 0


def commands(text: str) -> list[Command]:
    """All commands of a document."""
    return [command for match in _FENCE.finditer(text) for command in parse(match.group(1))]


if __name__ == "__main__":
    sys.exit(main())
