"""The settings of a process, read from the environment here and nowhere else."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from planner.errors import InvalidInput
from planner.names import check_node_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment says; `fairshard ... --data` and friends override it with `dataclasses.replace`."""

    #: FAIRSHARD_DATA: everything that fairshard writes lies below.
    data_dir: Path
    #: FAIRSHARD_MODELS_DIR: `owner/name` folders here win over the Hub; default <data>/models.
    models_dir: Path
    #: REDIS_URL.
    redis_url: str
    #: METADATA_REPO: `owner/name` of the Hub repo for metadata and plans; None: the folder <data>/store.
    metadata_repo: str | None
    #: NODE_ID: default the host's name.
    node_id: str
    #: HF_TOKEN: this process's own Hub token; never leaves the process.
    hub_token: str | None
    #: FAIRSHARD_SECRET: Fernet key shared by web and workers, for users' Hub tokens.
    secret: str | None
    #: FAIRSHARD_FLOP_PER_S, FAIRSHARD_MEMORY_BYTES, FAIRSHARD_MEMORY_BYTES_PER_S: override what the probe finds.
    flop_per_s: float | None
    memory_bytes: int | None
    memory_bytes_per_s: float | None
    #: FAIRSHARD_DISK_QUOTA: bytes that this node's shards may take together; None: what the disk has.
    disk_quota_bytes: int | None = None
    #: FAIRSHARD_PEER_URL: where other nodes reach this one's shards, read-only; None: it serves none.
    peer_url: str | None = None
    #: FAIRSHARD_PEER_TOKEN: what nodes show each other for it.
    peer_token: str | None = None
    #: FAIRSHARD_JOIN_KEY, or a file that holds it, FAIRSHARD_JOIN_KEY_FILE: whose tokens let nodes in
    #: (`workers.nodes.joining`); "open": everyone is a node. Not needed where Redis is reached by this machine alone.
    join_key: str | None = None
    #: FAIRSHARD_JOIN_TOKEN, or FAIRSHARD_JOIN_TOKEN_FILE: what makes this process its node.
    join_token: str | None = None

    @property
    def store_dir(self) -> Path:
        """The default metadata store."""
        return self.data_dir / "store"

    @property
    def node_dir(self) -> Path:
        """What this node keeps for itself."""
        return self.data_dir / "nodes" / self.node_id

    @property
    def shards_dir(self) -> Path:
        """This node's shards, one folder a plan."""
        return self.node_dir / "shards"

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the settings.

        Raises:
            InvalidInput: If a variable does not parse; the message names it.
        """
        env = os.environ if env is None else env
        data = Path(env.get("FAIRSHARD_DATA") or ".fairshard").absolute()
        return cls(
            data_dir=data,
            models_dir=Path(env.get("FAIRSHARD_MODELS_DIR") or data / "models").absolute(),
            redis_url=env.get("REDIS_URL") or "redis://127.0.0.1:6379/0",
            metadata_repo=env.get("METADATA_REPO") or None,
            node_id=check_node_id(env.get("NODE_ID") or socket.gethostname() or "node"),
            hub_token=env.get("HF_TOKEN") or None,
            secret=env.get("FAIRSHARD_SECRET") or None,
            flop_per_s=_number(env, "FAIRSHARD_FLOP_PER_S"),
            memory_bytes=_integer(env, "FAIRSHARD_MEMORY_BYTES"),
            memory_bytes_per_s=_number(env, "FAIRSHARD_MEMORY_BYTES_PER_S"),
            disk_quota_bytes=_integer(env, "FAIRSHARD_DISK_QUOTA"),
            peer_url=(env.get("FAIRSHARD_PEER_URL") or "").rstrip("/") or None,
            peer_token=env.get("FAIRSHARD_PEER_TOKEN") or None,
            join_key=_text_or_file(env, "FAIRSHARD_JOIN_KEY"),
            join_token=_text_or_file(env, "FAIRSHARD_JOIN_TOKEN"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """How to reach the Hub, by the ecosystem's own variables."""

    #: HF_ENDPOINT, without a trailing slash; nothing else decides where requests go.
    endpoint: str
    #: HF_TOKEN, else what `hf auth login` stored below HF_HOME.
    token: str | None
    #: HF_HUB_OFFLINE: ask no server, use the cache alone.
    offline: bool
    #: HF_HUB_CACHE, else HF_HOME/hub.
    cache_dir: Path

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> HubSettings:
        """Read the settings.

        Raises:
            InvalidInput: If HF_ENDPOINT is not an http(s) address.
        """
        env = os.environ if env is None else env
        endpoint = (env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not endpoint.startswith(("http://", "https://")):
            raise InvalidInput(
                f"HF_ENDPOINT must start with http:// or https://, got {endpoint!r}",
                details={"setting": "HF_ENDPOINT"},
            )
        default_home = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
        home = Path(env.get("HF_HOME") or default_home).expanduser()
        token_file = Path(env.get("HF_TOKEN_PATH") or home / "token")
        token = env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN")
        if not token and token_file.is_file():
            token = token_file.read_text(encoding="utf-8")
        return cls(
            endpoint=endpoint,
            token=(token or "").strip() or None,
            offline=(env.get("HF_HUB_OFFLINE") or "").upper() in {"1", "ON", "YES", "TRUE"},
            cache_dir=Path(env.get("HF_HUB_CACHE") or home / "hub").expanduser(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSettings:
    """What the API's environment says; `create_app(**overrides)` replaces single values."""

    #: FAIRSHARD_BIND: the address the server listens on; decides whether tokens are asked for.
    bind: str = "127.0.0.1:8080"
    #: FAIRSHARD_TOKENS_FILE: hashed API tokens with their scopes.
    tokens_file: Path | None = None
    #: FAIRSHARD_REQUIRE_TOKEN: always, never, or auto (unless `bind` is loopback).
    require_token: Literal["always", "never", "auto"] = "auto"  # noqa: S105  (no password)
    #: FAIRSHARD_RATE_LIMIT: such as "600/minute", or "off"; None: off on loopback, "600/minute" elsewhere.
    rate_limit: str | None = None
    #: FAIRSHARD_CORS_ORIGINS: origins, comma separated, whose pages may call the API; "*" for all.
    cors_origins: tuple[str, ...] = ()
    #: FAIRSHARD_TRUSTED_PROXIES: how many proxies in front set X-Forwarded-For and -Proto.
    trusted_proxies: int = 0
    #: FAIRSHARD_MAX_BODY_BYTES: largest request body.
    max_body_bytes: int = 2**20
    #: FAIRSHARD_MAX_METADATA_BYTES: largest body where metadata may be posted (a plan's preview).
    max_metadata_bytes: int = 32 * 2**20
    #: FAIRSHARD_MAX_BATCH: most models in one batch.
    max_batch: int = 200
    #: FAIRSHARD_MAX_QUEUE: most unfinished jobs; beyond it a new one is refused with 503.
    max_queue: int = 10_000
    #: FAIRSHARD_MAX_JOBS_PER_TOKEN: most unfinished jobs of one caller; beyond it 429.
    max_jobs_per_token: int = 1_000
    #: FAIRSHARD_MAX_WAIT_S: longest that `Prefer: wait` is followed, in seconds.
    max_wait_s: float = 120.0
    #: FAIRSHARD_WAITERS: requests of one process that may wait for a plan at the same time; others get 202 at once.
    waiters: int = 4
    #: FAIRSHARD_LISTENERS: event streams of one process; more are asked to come back.
    listeners: int = 4
    #: FAIRSHARD_MAX_ARRIVAL_S: of a request that has not arrived whole by then, no more is read.
    max_arrival_s: float = 120.0
    #: FAIRSHARD_MAX_STREAM_S: after this an event stream ends and its client reconnects where it was.
    max_stream_s: float = 300.0
    #: FAIRSHARD_AUDIT_LOG: file for the audit lines; None: they go to the log.
    audit_log: Path | None = None
    #: FAIRSHARD_FLOWER_URL: where Flower is, for the page's link.
    flower_url: str | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> WebSettings:
        """Read the settings.

        Raises:
            InvalidInput: If a variable does not parse; the message names it.
        """
        env = os.environ if env is None else env
        require = (env.get("FAIRSHARD_REQUIRE_TOKEN") or "auto").lower()
        if require not in {"always", "never", "auto"}:
            raise InvalidInput(
                f"FAIRSHARD_REQUIRE_TOKEN must be always, never or auto, got {require!r}",
                details={"setting": "FAIRSHARD_REQUIRE_TOKEN"},
            )
        origins = (origin.strip() for origin in (env.get("FAIRSHARD_CORS_ORIGINS") or "").split(","))
        tokens, audit = env.get("FAIRSHARD_TOKENS_FILE"), env.get("FAIRSHARD_AUDIT_LOG")
        return cls(
            bind=env.get("FAIRSHARD_BIND") or "127.0.0.1:8080",
            tokens_file=Path(tokens).absolute() if tokens else None,
            require_token=cast("Literal['always', 'never', 'auto']", require),
            rate_limit=env.get("FAIRSHARD_RATE_LIMIT") or None,
            cors_origins=tuple(origin for origin in origins if origin),
            trusted_proxies=_integer(env, "FAIRSHARD_TRUSTED_PROXIES") or 0,
            max_body_bytes=_integer(env, "FAIRSHARD_MAX_BODY_BYTES") or 2**20,
            max_metadata_bytes=_integer(env, "FAIRSHARD_MAX_METADATA_BYTES") or 32 * 2**20,
            max_batch=_integer(env, "FAIRSHARD_MAX_BATCH") or 200,
            max_queue=_integer(env, "FAIRSHARD_MAX_QUEUE") or 10_000,
            max_jobs_per_token=_integer(env, "FAIRSHARD_MAX_JOBS_PER_TOKEN") or 1_000,
            max_wait_s=_number(env, "FAIRSHARD_MAX_WAIT_S") or 120.0,
            waiters=_integer(env, "FAIRSHARD_WAITERS") or 4,
            listeners=_integer(env, "FAIRSHARD_LISTENERS") or 4,
            max_arrival_s=_number(env, "FAIRSHARD_MAX_ARRIVAL_S") or 120.0,
            max_stream_s=_number(env, "FAIRSHARD_MAX_STREAM_S") or 300.0,
            audit_log=Path(audit).absolute() if audit else None,
            flower_url=env.get("FAIRSHARD_FLOWER_URL") or None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """How jobs are run; the same in every process of a service, or the shortest lease and the largest limit win."""

    #: FAIRSHARD_KEY_PREFIX: of every key in Redis, so that services can share one.
    prefix: str = "fairshard:"
    #: FAIRSHARD_LEASE_S: a worker that is silent for so long has lost its step.
    lease_s: float = 15.0
    #: FAIRSHARD_MAX_ATTEMPTS: after so many a step fails for good.
    max_attempts: int = 3
    #: FAIRSHARD_STEP_TIME_S: a step that takes longer fails.
    step_time_s: float = 6 * 3600.0
    #: FAIRSHARD_STEP_MEMORY_BYTES: memory that a step may take beyond what its worker has; None: no limit.
    step_memory_bytes: int | None = None
    #: FAIRSHARD_JOB_TTL_S: how long a job is kept after its end.
    job_ttl_s: float = 7 * 86400.0
    #: FAIRSHARD_NODE_TTL_S: a node that is silent for so long is dead; it announces itself three times as often.
    node_ttl_s: float = 15.0
    #: FAIRSHARD_GRACE_S: what a worker that was told to stop may still take to finish.
    grace_s: float = 30.0
    #: FAIRSHARD_PLAN_TTL_S: how long a plan's JSON stays in Redis (the store keeps it for good).
    plan_ttl_s: float = 30 * 86400.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> QueueSettings:
        """Read the settings.

        Raises:
            InvalidInput: If a variable does not parse; the message names it.
        """
        env = os.environ if env is None else env
        default = cls()
        return cls(
            prefix=env.get("FAIRSHARD_KEY_PREFIX") or default.prefix,
            lease_s=_number(env, "FAIRSHARD_LEASE_S") or default.lease_s,
            max_attempts=_integer(env, "FAIRSHARD_MAX_ATTEMPTS") or default.max_attempts,
            step_time_s=_number(env, "FAIRSHARD_STEP_TIME_S") or default.step_time_s,
            step_memory_bytes=_integer(env, "FAIRSHARD_STEP_MEMORY_BYTES"),
            job_ttl_s=_number(env, "FAIRSHARD_JOB_TTL_S") or default.job_ttl_s,
            node_ttl_s=_number(env, "FAIRSHARD_NODE_TTL_S") or default.node_ttl_s,
            grace_s=_number(env, "FAIRSHARD_GRACE_S") or default.grace_s,
            plan_ttl_s=_number(env, "FAIRSHARD_PLAN_TTL_S") or default.plan_ttl_s,
        )


def child_env(changes: Mapping[str, str], *, without: Collection[str] = ()) -> dict[str, str]:
    """The environment for a process that this one starts: its own, less `without`, with `changes`."""
    return {name: value for name, value in os.environ.items() if name not in without} | dict(changes)


def _text_or_file(env: Mapping[str, str], name: str) -> str | None:
    path = env.get(f"{name}_FILE")
    if env.get(name) or not path:
        return env.get(name) or None
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{name}_FILE: {path} cannot be read: {error}", details={"setting": name}) from None


def _number(env: Mapping[str, str], name: str) -> float | None:
    text = env.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise InvalidInput(f"{name} must be a positive number, got {text!r}", details={"setting": name})
    return value


def _integer(env: Mapping[str, str], name: str) -> int | None:
    value = _number(env, name)
    return None if value is None else int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Where the command line finds the service."""

    #: FAIRSHARD_URL, without a trailing slash.
    url: str
    #: FAIRSHARD_TOKEN: sent as `Authorization: Bearer`.
    token: str | None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> ClientSettings:
        """Read the settings.

        Raises:
            InvalidInput: If FAIRSHARD_URL is not an http(s) address.
        """
        env = os.environ if env is None else env
        url = (env.get("FAIRSHARD_URL") or "http://127.0.0.1:8080").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise InvalidInput(
                f"FAIRSHARD_URL must start with http:// or https://, got {url!r}",
                details={"setting": "FAIRSHARD_URL"},
            )
        return cls(url=url, token=env.get("FAIRSHARD_TOKEN") or None)
