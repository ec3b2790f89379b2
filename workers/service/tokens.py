"""Users' own Hub tokens: encrypted under their job's id, gone when it ends. Never an argument, result or log line."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from redis import Redis

from planner.errors import InvalidInput
from workers.ledger.connection import reachable
from workers.settings import Settings


def secret_key(settings: Settings) -> bytes:
    """The key that web and workers share: FAIRSHARD_SECRET, else `<data>/secret`, made by whoever comes first.

    Raises:
        InvalidInput: If it is not a Fernet key.
    """
    if settings.secret:
        return settings.secret.encode()
    path = settings.data_dir / "secret"
    if not path.is_file():
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"secret.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(Fernet.generate_key())
        try:
            # Not a rename: the second of two processes must take the first one's key, not replace it.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return Path(path).read_bytes().strip()


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
                "the job's Hub token can't be decrypted here: FAIRSHARD_SECRET must be the same on web and workers"
            ) from error

    def drop(self, job_id: str) -> None:
        """Forget a job's token."""
        with reachable():
            self._redis.delete(f"{self._prefix}token:{job_id}")
