"""The settings of running a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workers.settings.values import http_url, seconds, size, whole
from workers.settings.variables import Group, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings(Group):
    """How a node takes part in runs."""

    roles: ClassVar[str] = "node"

    url: str | None = setting(
        "FAIRSHARD_RUN_URL",
        http_url("http"),
        None,
        "where other nodes hand this one tensors: `http://host:port`",
        shown="the port after FAIRSHARD_PEER_URL's; else any free one of loopback",
    )
    idle_s: float = setting(
        "FAIRSHARD_RUNNER_IDLE_S",
        seconds,
        600.0,
        "a plan that nobody ran for so many seconds is unloaded, unless it is deployed; then the runner ends",
    )
    silence_s: float = setting(
        "FAIRSHARD_HOP_SILENCE_S", seconds, 2.0, "a node of a run that says nothing for so many seconds is dead"
    )
    deadline_s: float = setting(
        "FAIRSHARD_HOP_DEADLINE_S", seconds, 120.0, "longest that a pass may take from a node to the chain's end"
    )
    load_s: float = setting(
        "FAIRSHARD_LOAD_DEADLINE_S", seconds, 900.0, "longest that the nodes of a run may take to load their layers"
    )
    max_frame_bytes: int = setting(
        "FAIRSHARD_MAX_FRAME_BYTES", size, 2**30, "largest frame (tensors of one hop) that a node takes, in bytes"
    )
    max_sessions: int = setting(
        "FAIRSHARD_MAX_SESSIONS", whole(1, 10_000), 32, "most runs at once that this node takes part in"
    )
