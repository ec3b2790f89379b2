"""The settings of a process, read from the environment here and nowhere else."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
        )


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
