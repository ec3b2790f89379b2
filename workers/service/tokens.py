"""Users' own Hub tokens: encrypted under their job's id, gone when it ends. Never an argument, result or log line."""

from __future__ import annotations

import contextlib
import hmac
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from redis import Redis

from planner.errors import InvalidInput
from workers.disk.durable import write_new
from workers.ledger.connection import is_local, reachable
from workers.settings import Settings


def secret_key(settings: Settings) -> bytes:
    """The key that all roles share: FAIRSHARD_SECRET; on one machine else `<data>/secret`, made by who comes first.

    Raises:
        InvalidInput: If it is not set, and other machines reach this Redis: each would make its own.
    """
    if settings.secret:
        return settings.secret.encode()
    if not is_local(settings.redis_url):
        raise InvalidInput(
            "FAIRSHARD_SECRET must be set, to the same value for every role: other machines reach this Redis, and "
            "users' Hub tokens pass through it encrypted. `python -m workers.nodes.joining secret` makes one "
            "(`fairshard join` brings it by itself)",
            details={"setting": "FAIRSHARD_SECRET"},
        )
    path = settings.data_dir / "secret"
    with contextlib.suppress(FileExistsError):  # the second of two processes takes the first one's
        write_new(path, Fernet.generate_key(), mode=0o600)
    return path.read_bytes().strip()


class Tokens:
    """The tokens of unfinished jobs; the ledger deletes a job's token with its end."""

    def __init__(self, redis: Redis, *, key: bytes, prefix: str = "fairshard:", ttl_s: float = 86400.0) -> None:
        """Use `key` (see `secret_key`); a token whose job never ends goes after `ttl_s`.

        Raises:
            InvalidInput: If `key` is not a Fernet key.
        """
        self._redis: Any = redis
        self._key = key
        self._prefix = prefix
        self._ttl_ms = round(ttl_s * 1000)
        try:
            self._fernet = Fernet(key)
        except ValueError as error:
            raise InvalidInput("FAIRSHARD_SECRET must be 32 url-safe base64-encoded bytes (a Fernet key)") from error

    def fingerprint(self, token: str) -> str:
        """Tells tokens apart, and tells nothing about them to whoever lacks the key."""
        return hmac.new(self._key, token.encode(), "sha256").hexdigest()

    def put(self, job_id: str, token: str) -> None:
        """Keep a job's token."""
        with reachable():
            self._redis.set(f"{self._prefix}token:{job_id}", self._fernet.encrypt(token.encode()), px=self._ttl_ms)

    def get(self, job_id: str) -> str | None:
        """The job's token, or None if it has none.

        Raises:
            InvalidInput: If it was encrypted with another key.
        """
        with reachable():
            found = self._redis.get(f"{self._prefix}token:{job_id}")
        if not found:
            return None
        try:
            return self._fernet.decrypt(found.encode()).decode()
        except InvalidToken as error:
            raise InvalidInput(
                "the job's Hub token can't be decrypted here: FAIRSHARD_SECRET must be the same for every role"
            ) from error

    def drop(self, job_id: str) -> None:
        """Forget a job's token."""
        with reachable():
            self._redis.delete(f"{self._prefix}token:{job_id}")
