"""REDIS_URL as it is understood: one server, a socket of this machine, or the Sentinels that know the server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

_FORMS = "redis://[user:password@]host[:port][/database], or rediss:// (TLS), unix:///path or sentinel://host:port,host:port"
#: What other programs call them, and what is right here.
_OTHERS = {
    "redis+socket": "unix:///path/of/the/socket?db=0",
    "redis+unix": "unix:///path/of/the/socket?db=0",
    "redis+sentinel": "sentinel://host:port,host:port/0?master=NAME",
    "rediss+sentinel": "sentinel://host:port,host:port/0?master=NAME&ssl_ca_certs=FILE",
    "redis+ssl": "rediss://host:port/0?ssl_ca_certs=FILE",
}
_TLS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_OPTIONS = {
    "redis": (),
    "rediss": _TLS,
    "unix": ("db",),
    "sentinel": ("master", "sentinel_username", "sentinel_password", *_TLS),
}
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUrl:
    """The parts of a REDIS_URL."""

    #: (host, port) of the server, or of each Sentinel; empty for a socket.
    hosts: tuple[tuple[str, int], ...] = ()
    #: Of the socket.
    path: str | None = None
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    #: The name that the Sentinels know the server by; None: there are none.
    master: str | None = None
    #: What the Sentinels themselves ask for.
    sentinel_login: dict[str, str] = field(default_factory=dict, repr=False)
    #: redis-py's `ssl_...` options; None: no TLS.
    tls: dict[str, Any] | None = None

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Read a REDIS_URL.

        Raises:
            ValueError: If it is none; the message says what is expected.
        """
        scheme = url.partition("://")[0].lower() if "://" in url else ""
        if scheme in _OTHERS:
            raise ValueError(f"written as {_OTHERS[scheme]}")
        if scheme not in _OPTIONS:
            raise ValueError(_FORMS)
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ValueError(_FORMS) from None
        if parts.fragment or re.search(r"\s", url):
            raise ValueError("without '#' and spaces (in a password they are %23 and %20)")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if unknown := sorted(options.keys() - set(_OPTIONS[scheme])):
            known = f"of the options {', '.join(_OPTIONS[scheme])}" if _OPTIONS[scheme] else "without options"
            hint = "TLS is rediss://" if unknown[0] in _TLS else "in a password, '?' is %3F"
            raise ValueError(f"{known} after '?' ({hint})")
        user, _, hosts = parts.netloc.rpartition("@")
        username, _, password = user.partition(":")
        found = cls(username=unquote(username) or None, password=unquote(password) or None)
        if scheme == "unix":
            if hosts or len(parts.path) < 2:
                raise ValueError("unix:///path/of/the/socket?db=0, with three slashes")
            return replace(found, path=unquote(parts.path), database=_database(options.get("db", "")))
        return replace(
            found,
            hosts=_hosts(hosts, scheme),
            database=_database(parts.path.removeprefix("/")),
            master=(options.get("master") or "mymaster") if scheme == "sentinel" else None,
            sentinel_login={
                name: options[f"sentinel_{name}"]
                for name in ("username", "password")
                if f"sentinel_{name}" in options
            },
            tls=_tls(options) if scheme == "rediss" or any(name in _TLS for name in options) else None,
        )

    def for_celery(self) -> str:
        """The address of broker and result backend; the rest of it is Celery's settings."""
        login = "".join(
            f"{quote(part or '', safe='')}{sign}" for part, sign in ((self.username, ":"), (self.password, "@"))
        )
        login = login if self.username or self.password else ""
        if self.path is not None:
            return f"redis+socket://{login}{quote(self.path)}?virtual_host={self.database}"
        scheme = "sentinel" if self.master else "rediss" if self.tls else "redis"
        return ";".join(f"{scheme}://{login}{host}:{port}/{self.database}" for host, port in self.hosts)


def redis_url(value: str) -> str:
    """A REDIS_URL, as it was written.

    Raises:
        ValueError: If it is none; the message says what is expected.
    """
    RedisUrl.parse(value)
    return value


def _hosts(text: str, scheme: str) -> tuple[tuple[str, int], ...]:
    default = 26379 if scheme == "sentinel" else 6379
    names = text.split(",")
    if len(names) > 1 and scheme != "sentinel":
        raise ValueError(f"{scheme}:// of one server (several Sentinels are sentinel://host:port,host:port)")
    found = []
    for name in names:
        parts = SplitResult("", name, "", "", "")
        host = name if name.endswith("]") or ":" not in name else name.rpartition(":")[0]
        try:
            port = parts.port or default
        except ValueError:
            raise ValueError(
                f"{scheme}://host:port with a port from 1 to 65535 (in a password, '/' is %2F and ':' is %3A)"
            ) from None
        if not _HOST.fullmatch(host):
            raise ValueError(f"{scheme}://[user:password@]host:port, with a host's name or address")
        found.append((host, port))
    return tuple(found)


def _database(text: str) -> int:
    if text and not re.fullmatch(r"\d{1,5}", text):
        raise ValueError("of a database that is a number, such as /0 (in a password, '/' is %2F)")
    return int(text or 0)


def _tls(options: dict[str, str]) -> dict[str, Any]:
    """Verified unless it says otherwise; stated whole: Celery refuses to guess, and redis-py's default changed."""
    checked = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    names = options.get("ssl_check_hostname", "true").lower()
    if checked not in {"required", "none"} or names not in {"true", "false"}:
        raise ValueError("of ssl_cert_reqs=required or none, and ssl_check_hostname=true or false")
    found: dict[str, Any] = {"ssl_cert_reqs": checked, "ssl_check_hostname": checked != "none" and names == "true"}
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if name in options:
            if not Path(options[name]).is_file():
                raise ValueError(f"of an {name} that names a file (there is no {options[name]!r})")
            found[name] = options[name]
    return found
