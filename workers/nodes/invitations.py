"""Invitations: all that a machine needs to be a node, sealed; whoever has the token can open it.

    coordinator   seals one into its data folder, and prints the token          `workers.up.coordinator.invite`
    API           hands the sealed text to whoever names it, and can't open it  GET /api/nodes/invitations/<id>
    machine       opens it with the token, keeps it, and starts its node        `fairshard join`

The token is the key (256 random bits), and the invitation's id is made from it, so what passes over the network is of
no use to who reads it there, and what he changes is refused (Fernet). An invitation ends after a day, or when its
file is removed; machines that joined stay.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from cryptography.fernet import Fernet, InvalidToken

from planner.errors import InvalidInput, NotFound
from workers.disk.durable import write_whole

#: How long an invitation can be opened, in seconds.
LASTS_S = 86400.0
_PREFIX = "fsi_"
_TOKEN = re.compile(rf"{_PREFIX}[A-Za-z0-9_-]{{43}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What a machine is told."""

    #: Without the certificate's path, which each machine has its own of.
    redis_url: str = field(repr=False)
    #: The certificate that Redis' is checked by (PEM); None: Redis speaks no TLS.
    ca: str | None
    #: FAIRSHARD_JOIN_KEY, FAIRSHARD_JOIN_TOKEN, FAIRSHARD_SECRET and FAIRSHARD_PEER_TOKEN.
    join_key: str
    join_token: str = field(repr=False)
    secret: str = field(repr=False)
    peer_token: str = field(repr=False)

    def seal(self, folder: Path, *, lasts_s: float = LASTS_S) -> str:
        """Put it, sealed, into `folder`, from which those that ended go; the token."""
        now = time.time()
        for path in folder.glob("*.json"):
            if _until(path) < now:
                path.unlink(missing_ok=True)
        key = Fernet.generate_key()
        sealed = Fernet(key).encrypt(json.dumps(asdict(self)).encode()).decode()
        token = _PREFIX + key.decode().rstrip("=")
        text = json.dumps({"until": now + lasts_s, "sealed": sealed})
        write_whole(folder / f"{invitation_id(token)}.json", text.encode(), mode=0o600)
        return token

    @classmethod
    def open(cls, sealed: str, token: str) -> Self:
        """What was sealed under `token`.

        Raises:
            InvalidInput: If it was not, or is none.
        """
        try:
            return cls(**json.loads(Fernet(_key(token)).decrypt(sealed.encode())))
        except (InvalidToken, TypeError, ValueError):
            raise InvalidInput("what the coordinator answered is no invitation of this token") from None

    def keep(self, folder: Path) -> None:
        """Write it into `folder`, for `environment`."""
        write_whole(folder / "invitation.json", json.dumps(asdict(self)).encode(), mode=0o600)
        if self.ca:
            write_whole(folder / "ca.crt", self.ca.encode(), mode=0o600)

    def environment(self, folder: Path) -> dict[str, str]:
        """The settings of the node whose invitation was kept in `folder`."""
        checked = f"?ssl_cert_reqs=required&ssl_ca_certs={(folder / 'ca.crt').absolute()}" if self.ca else ""
        return {
            "REDIS_URL": self.redis_url + checked,
            "FAIRSHARD_JOIN_KEY": self.join_key,
            "FAIRSHARD_JOIN_TOKEN": self.join_token,
            "FAIRSHARD_SECRET": self.secret,
            "FAIRSHARD_PEER_TOKEN": self.peer_token,
        }


def kept(folder: Path) -> Invitation:
    """The invitation that this machine accepted.

    Raises:
        NotFound: If it accepted none.
    """
    try:
        return Invitation(**json.loads((folder / "invitation.json").read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"this machine has not joined yet ({folder} holds no invitation): run the line that the coordinator "
            "printed, fairshard join URL TOKEN"
        ) from None
    except (TypeError, ValueError):
        raise InvalidInput(f"{folder / 'invitation.json'} is damaged: join again") from None


def invitation_id(token: str) -> str:
    """What an invitation is asked for by; it tells nothing about the token.

    Raises:
        InvalidInput: If `token` is none; the message does not repeat it.
    """
    return hashlib.sha256(_key(token)).hexdigest()[:32]


def sealed(folder: Path, wanted: str) -> str:
    """The sealed text of an invitation.

    Raises:
        NotFound: If there is none, or it ended.
    """
    path = folder / f"{wanted}.json"
    if re.fullmatch(r"[0-9a-f]{32}", wanted) and _until(path) > time.time():
        return str(json.loads(path.read_bytes())["sealed"])
    raise NotFound(
        "there is no such invitation: it ended (a day after it was made), was withdrawn, or is another "
        "coordinator's; 'fairshard join --new' on the coordinator makes another"
    )


def _key(token: str) -> bytes:
    if not _TOKEN.fullmatch(token):
        raise InvalidInput(f"a token to join with is {_PREFIX} and 43 letters, digits, '-' or '_'")
    return f"{token.removeprefix(_PREFIX)}=".encode()


def _until(path: Path) -> float:
    try:
        return float(json.loads(path.read_bytes())["until"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
