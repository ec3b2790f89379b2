"""All settings, by who needs them."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from planner.errors import InvalidInput
from planner.names import check_node_id
from workers.settings.redis_url import redis_url
from workers.settings.values import (
    bind,
    choice,
    fernet_key,
    folder,
    http_url,
    key_prefix,
    matching,
    metadata_repo,
    node_id,
    number,
    origins,
    path,
    rate,
    seconds,
    size,
    switch,
    text,
    whole,
)
from workers.settings.variables import Group, computed, setting


def _host_name() -> str:
    try:
        return check_node_id(socket.gethostname() or "node")
    except InvalidInput:
        raise InvalidInput(
            f"NODE_ID must be set: this host's name, {socket.gethostname()!r}, can't be a node's id",
            details={"setting": "NODE_ID"},
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Group):
    """What all roles and nodes are told; `fairshard ... --data` and friends override it by `dataclasses.replace`."""

    data_dir: Path = computed(
        "FAIRSHARD_DATA",
        folder,
        lambda: Path(".fairshard").absolute(),
        "the data folder: everything that fairshard writes lies below",
        shown=".fairshard",
    )
    models_dir: Path = computed(
        "FAIRSHARD_MODELS_DIR",
        folder,
        lambda: Path(".fairshard/models").absolute(),
        "`owner/name` folders here win over the Hub",
        shown="<data>/models",
    )
    redis_url: str = setting(
        "REDIS_URL",
        redis_url,
        "redis://127.0.0.1:6379/0",
        "the service's Redis: `redis://`, `rediss://` (TLS), `unix://` or `sentinel://`",
        file=True,
    )
    metadata_repo: str | None = setting(
        "METADATA_REPO",
        metadata_repo,
        None,
        "Hub repository for metadata and plans: `owner/name` or `datasets/owner/name`",
        shown="in Redis, and in <data>/store of API and planner",
    )
    node_id: str = computed("NODE_ID", node_id, _host_name, "this node's id", shown="the host's name", roles="node")
    hub_token: str | None = setting(
        "HF_TOKEN",
        text,
        None,
        "this process's own Hub token; never leaves the process",
        shown="what `hf auth login` stored",
        secret=True,
    )
    secret: str | None = setting(
        "FAIRSHARD_SECRET",
        fernet_key,
        None,
        "Fernet key for users' Hub tokens, the same for every role; needed where Redis is not on loopback",
        shown="<data>/secret",
        secret=True,
        file=True,
    )
    flop_per_s: float | None = setting(
        "FAIRSHARD_FLOP_PER_S",
        number(unit="FLOP/s"),
        None,
        "FLOP/s that the node states",
        shown="as measured",
        roles="node",
    )
    memory_bytes: int | None = setting(
        "FAIRSHARD_MEMORY_BYTES",
        size,
        None,
        "memory for weights and KV cache that the node states",
        shown="as measured",
        roles="node",
    )
    memory_bytes_per_s: float | None = setting(
        "FAIRSHARD_MEMORY_BYTES_PER_S",
        number(unit="bytes/s"),
        None,
        "memory bandwidth that the node states",
        shown="as measured",
        roles="node",
    )
    disk_quota_bytes: int | None = setting(
        "FAIRSHARD_DISK_QUOTA",
        size,
        None,
        "bytes that the node's shards may take together",
        shown="the disk",
        roles="node",
    )
    peer_url: str | None = setting(
        "FAIRSHARD_PEER_URL",
        http_url("http"),
        None,
        "where other nodes fetch this one's shards (read-only): `http://host:port`",
        shown="it serves none",
        roles="node",
    )
    peer_token: str | None = setting(
        "FAIRSHARD_PEER_TOKEN",
        text,
        None,
        "what nodes show each other to fetch shards",
        roles="node",
        secret=True,
        file=True,
    )
    join_key: str | None = setting(
        "FAIRSHARD_JOIN_KEY",
        matching("open|[A-Za-z0-9_-]{43}", "what `python -m workers.nodes.joining authority FILE` prints, or 'open'"),
        None,
        "whose join tokens let nodes in; `open`: every node is let in",
        shown="needed where Redis is not on loopback",
        file=True,
    )
    join_token: str | None = setting(
        "FAIRSHARD_JOIN_TOKEN",
        matching(r"fsj_\S+", "a join token; `python -m workers.nodes.joining token NODE --authority FILE` makes one"),
        None,
        "lets this process be its node",
        roles="node",
        secret=True,
        file=True,
    )
    lean: bool = setting(
        "FAIRSHARD_LEAN",
        switch,
        True,
        "1: a first trace in half the time, with tested versions of torch and transformers; 0: plain imports",
        roles="node",
    )

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
    def complete(cls, found: dict[str, Any], env: Mapping[str, str]) -> None:  # noqa: ARG003
        """The models lie in the data folder unless they are elsewhere."""
        if "data_dir" in found:
            found.setdefault("models_dir", found["data_dir"] / "models")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings(Group):
    """How to reach the Hub, by the ecosystem's own variables."""

    endpoint: str = setting(
        "HF_ENDPOINT", http_url(), "https://huggingface.co", "the Hub; nothing else decides where requests go"
    )
    token: str | None = setting(
        "HF_TOKEN",
        text,
        None,
        "this process's own Hub token; never leaves the process",
        shown="what `hf auth login` stored",
        secret=True,
    )
    offline: bool = setting("HF_HUB_OFFLINE", switch, False, "ask no server, use the cache alone")
    home: Path = computed(
        "HF_HOME",
        folder,
        lambda: Path.home() / ".cache" / "huggingface",
        "where the Hub's clients keep what they fetched and the token",
        shown="~/.cache/huggingface",
    )
    cache_dir: Path = computed(
        "HF_HUB_CACHE",
        folder,
        lambda: Path.home() / ".cache" / "huggingface" / "hub",
        "the cache of files of the Hub",
        shown="<HF_HOME>/hub",
    )

    @classmethod
    def complete(cls, found: dict[str, Any], env: Mapping[str, str]) -> None:
        """What other Hub clients go by."""
        cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home: Path = found.setdefault("home", cache / "huggingface")
        found.setdefault("cache_dir", home / "hub")
        token_file = Path(env.get("HF_TOKEN_PATH") or home / "token")
        if "token" not in found:
            token = env.get("HUGGING_FACE_HUB_TOKEN")
            if not token and token_file.is_file():
                token = token_file.read_text(encoding="utf-8")
            found["token"] = (token or "").strip() or None

    def url(self, model_name: str) -> str:
        """Where a person finds the model."""
        return f"{self.endpoint}/{model_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSettings(Group):
    """What the API is told; `create_app(**overrides)` replaces single values."""

    roles: ClassVar[str] = "API"

    bind: str = setting(
        "FAIRSHARD_BIND",
        bind,
        "127.0.0.1:8080",
        "the address that the API listens on; off loopback, tokens are asked for",
    )
    tokens_file: Path | None = setting(
        "FAIRSHARD_TOKENS_FILE", path, None, "hashed API tokens with their scopes; read again when it changes"
    )
    require_token: Literal["always", "never", "auto"] = setting(
        "FAIRSHARD_REQUIRE_TOKEN",
        choice("always", "never", "auto"),
        "auto",
        "`always`, `never`, or `auto` (unless the API listens on loopback alone)",
    )
    rate_limit: str | None = setting(
        "FAIRSHARD_RATE_LIMIT",
        rate,
        None,
        "requests of one caller, such as `600/minute`, or `off`",
        shown="off on loopback, else 600/minute",
    )
    cors_origins: tuple[str, ...] = setting(
        "FAIRSHARD_CORS_ORIGINS",
        origins,
        (),
        "origins, separated by commas, whose pages may call the API; `*` for all",
    )
    trusted_proxies: int = setting(
        "FAIRSHARD_TRUSTED_PROXIES", whole(0, 100), 0, "how many proxies in front set X-Forwarded-For and -Proto"
    )
    max_body_bytes: int = setting("FAIRSHARD_MAX_BODY_BYTES", size, 2**20, "largest body of a request, in bytes")
    max_metadata_bytes: int = setting(
        "FAIRSHARD_MAX_METADATA_BYTES",
        size,
        32 * 2**20,
        "largest body where metadata may be posted (a plan's preview), in bytes",
    )
    max_batch: int = setting("FAIRSHARD_MAX_BATCH", whole(1, 10_000), 200, "most models in one batch")
    max_queue: int = setting(
        "FAIRSHARD_MAX_QUEUE",
        whole(1, 10**9),
        10_000,
        "most unfinished jobs; beyond it a new one is refused with 503",
    )
    max_jobs_per_token: int = setting(
        "FAIRSHARD_MAX_JOBS_PER_TOKEN", whole(1, 10**9), 1_000, "most unfinished jobs of one caller; beyond it 429"
    )
    max_wait_s: float = setting(
        "FAIRSHARD_MAX_WAIT_S", seconds, 120.0, "longest that `Prefer: wait` is followed, in seconds"
    )
    waiters: int = setting(
        "FAIRSHARD_WAITERS",
        whole(1, 1000),
        4,
        "requests of one process that may wait for a plan at once; others get 202",
    )
    listeners: int = setting(
        "FAIRSHARD_LISTENERS", whole(1, 1000), 4, "event streams of one process at once; more are asked to come back"
    )
    max_arrival_s: float = setting(
        "FAIRSHARD_MAX_ARRIVAL_S",
        seconds,
        120.0,
        "longest that a request may take to arrive, in seconds (a silence of 10 s ends it too)",
    )
    max_stream_s: float = setting(
        "FAIRSHARD_MAX_STREAM_S",
        seconds,
        300.0,
        "longest event stream, in seconds; its client then reconnects where it was",
    )
    audit_log: Path | None = setting(
        "FAIRSHARD_AUDIT_LOG", path, None, "file for the audit lines, one of JSON a change", shown="the log"
    )
    flower_url: str | None = setting("FAIRSHARD_FLOWER_URL", http_url(), None, "the page's link to Flower")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings(Group):
    """How jobs are run; the same in every process of a service, or the shortest lease and the largest limit win."""

    roles: ClassVar[str] = "workers"

    prefix: str = setting(
        "FAIRSHARD_KEY_PREFIX",
        key_prefix,
        "fairshard:",
        "start of every key in Redis, so that services can share one",
    )
    lease_s: float = setting(
        "FAIRSHARD_LEASE_S", seconds, 15.0, "a worker that is silent for so many seconds has lost its step"
    )
    max_attempts: int = setting(
        "FAIRSHARD_MAX_ATTEMPTS", whole(1, 1000), 3, "attempts of a step, before it fails for good"
    )
    step_time_s: float = setting(
        "FAIRSHARD_STEP_TIME_S", seconds, 6 * 3600.0, "longest that a step may take, in seconds"
    )
    step_memory_bytes: int | None = setting(
        "FAIRSHARD_STEP_MEMORY_BYTES",
        size,
        None,
        "memory that a step may take beyond its worker's, in bytes",
        shown="no limit",
    )
    job_ttl_s: float = setting(
        "FAIRSHARD_JOB_TTL_S",
        seconds,
        7 * 86400.0,
        "seconds that a job is kept after its end (that it ended: 30 days at least)",
    )
    node_ttl_s: float = setting(
        "FAIRSHARD_NODE_TTL_S",
        seconds,
        15.0,
        "a node that is silent for so many seconds is dead; it announces itself three times as often",
    )
    grace_s: float = setting("FAIRSHARD_GRACE_S", seconds, 30.0, "seconds that a worker has to finish after SIGTERM")
    plan_ttl_s: float = setting(
        "FAIRSHARD_PLAN_TTL_S",
        seconds,
        30 * 86400.0,
        "seconds that a plan's JSON stays in Redis; the store keeps it until it is deleted",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings(Group):
    """Where the command line finds the service."""

    roles: ClassVar[str] = "client"

    url: str = setting("FAIRSHARD_URL", http_url(), "http://127.0.0.1:8080", "where the service is")
    token: str | None = setting(
        "FAIRSHARD_TOKEN", text, None, "the API token that the command line sends", secret=True, file=True
    )
