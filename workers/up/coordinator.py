"""`fairshard up --coordinator`: Redis, API and planner for nodes on other machines, which join by one line each.

<data>/coordinator/access.json   Redis' password, the key of users' Hub tokens, the peers' token: made once
<data>/coordinator/certs         Redis' certificate and its authority's, where Redis speaks TLS
<data>/coordinator/tokens.json   the API's tokens, hashed; the first one lies in api-token
<data>/coordinator/invitations   sealed: see `workers.nodes.invitations`
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from planner.errors import InvalidInput, NodeFailure, NotFound
from workers.disk.durable import write_whole
from workers.nodes.invitations import Invitation
from workers.nodes.joining import Authority, read_authority
from workers.up import certificates, redis_server

_ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104  (compared with, not bound to)  # nosec B104
_HERE = ("127.0.0.1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """Where a service for several machines is reached."""

    #: The address that API and Redis listen on.
    host: str = "127.0.0.1"
    #: Where other machines find them; None: at `host`.
    address: str | None = None
    redis_port: int = 6379
    #: Whether a Redis without TLS may be reached by other machines.
    insecure_redis: bool = False

    @property
    def name(self) -> str:
        """Where others find it, as addresses of the web have it.

        Raises:
            InvalidInput: If it listens on every address, and nobody said which others shall use.
        """
        name = self.address or self.host
        if name in _ANY:
            raise InvalidInput(f"--host {self.host} is every address: say by --address which one other machines use")
        return f"[{name}]" if ":" in name else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a service's roles need to find each other."""

    redis_config: Path
    redis_url: str = field(repr=False)
    #: For all roles but Redis.
    env: Mapping[str, str] = field(repr=False)


def folder_of(data: Path) -> Path:
    """Where a coordinator keeps what it hands out."""
    return data / "coordinator"


def prepare(data: Path, at: Coordinator, *, binary: Path, api_url: str, prefix: str) -> Access:
    """Make what is missing of secrets and certificates, and Redis' configuration.

    Raises:
        InvalidInput: If other machines would reach a Redis without TLS, and nobody said that they may.
        Conflict: If the certificate that is there is for other addresses.
    """
    folder = folder_of(data)
    tls = redis_server.speaks_tls(binary)
    if not tls and not (at.insecure_redis or _is_loopback(at.host)):
        raise InvalidInput(
            f"{binary} speaks no TLS, and by --host {at.host} other machines reach it: its password would pass in "
            "the clear. Install one that does ('apt install redis-server' on Debian and Ubuntu), or say "
            "--insecure-redis where nobody else is on that network (a VPN, a cable)",
            details={"redis_server": str(binary), "host": at.host},
        )
    known = _read(folder) or {
        "redis_password": secrets.token_urlsafe(24),
        "secret": Fernet.generate_key().decode(),
        "peer_token": secrets.token_urlsafe(24),
    }
    user = f"fairshard:{known['redis_password']}"
    scheme, checked, certs = "redis", "", None
    if tls:
        certs = folder / "certs"
        certificates.make(certs, list(dict.fromkeys([at.name.strip("[]"), *_HERE])))
        scheme, checked = "rediss", f"?ssl_cert_reqs=required&ssl_ca_certs={certs / 'ca.crt'}"
    # For `invite`, also while the service runs.
    known |= {"api_url": api_url, "redis_url": f"{scheme}://{user}@{at.name}:{at.redis_port}/0", "tls": tls}
    write_whole(folder / "access.json", json.dumps(known, indent=1).encode(), mode=0o600)
    config = redis_server.write_config(
        data / "redis",
        port=at.redis_port,
        password=known["redis_password"],
        shared=redis_server.Shared(host=at.host, certs=certs, prefix=prefix),
    )
    _make_api_token(folder)
    return Access(
        redis_config=config,
        redis_url=f"{scheme}://{user}@{_HERE[0]}:{at.redis_port}/0{checked}",
        env={
            "FAIRSHARD_SECRET": known["secret"],
            "FAIRSHARD_TOKENS_FILE": str(folder / "tokens.json"),
            "FAIRSHARD_REQUIRE_TOKEN": "always",
        },
    )


def invite(data: Path, ids: str = "*") -> str:
    """The line that makes a machine a node of the coordinator of this data folder.

    Args:
        data: The data folder.
        ids: The node that it may be; "prefix*": any whose id begins so.

    Raises:
        NotFound: If this is no coordinator's data folder.
        InvalidInput: If `ids` can be no node's id.
    """
    folder = folder_of(data)
    known = _read(folder)
    if known is None:
        raise NotFound(f"{data} is no coordinator's data folder: 'fairshard up --coordinator' makes it one")
    authority: Authority = read_authority(data / "authority")
    invitation = Invitation(
        redis_url=known["redis_url"],
        ca=(folder / "certs" / "ca.crt").read_text(encoding="ascii") if known["tls"] else None,
        join_key=authority.join_key,
        join_token=authority.token(ids),
        secret=known["secret"],
        peer_token=known["peer_token"],
    )
    return f"fairshard join {known['api_url']} {invitation.seal(folder / 'invitations')}"


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / "access.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise NodeFailure(f"{path} cannot be read: {error}", details={"path": str(path)}) from None


def _make_api_token(folder: Path) -> None:
    """A first token for the API, in a file: what is printed stays in terminals and logs."""
    tokens, plain = folder / "tokens.json", folder / "api-token"
    if tokens.exists():
        return
    # A process of its own: nothing below `workers` knows the web.
    command = [sys.executable, "-m", "web.auth", "new", "coordinator", "--scopes", "admin", "--file", str(tokens)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise NodeFailure(f"no API token could be made: {made.stderr.strip()[-500:]}")
    write_whole(plain, made.stdout.encode(), mode=0o600)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
