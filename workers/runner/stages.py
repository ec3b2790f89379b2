"""The stages that a node has loaded, within the memory that it offers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from planner.errors import IntegrityError, LimitExceeded
from workers.runner.route import Holder
from workers.runner.text import Text
from workers.runtime.stage import Stage, load_stage
from workers.shards.folder import file_is_whole
from workers.shards.manifest import read_manifest

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Loaded:
    """A plan's stage on this node."""

    plan_id: str
    folder: Path
    stage: Stage
    weight_bytes: int
    load_s: float
    #: Runs that use it now, and when the last of them ended.
    users: set[str] = field(default_factory=set)
    used_at: float = field(default_factory=time.monotonic)

    @cached_property
    def holder(self) -> Holder:
        """What it holds, for the other nodes."""
        stage = self.stage
        inner = Holder(units=stage.held)
        return Holder(
            units=stage.held,
            names=frozenset(n for n in stage.model.state_dict() if stage.can(f"={n}") and not inner.can(f"={n}")),
        )


class Stages:
    """Loads stages once, and lets those go that nobody uses."""

    def __init__(self, shards_dir: Path, *, memory_bytes: int | None) -> None:
        """Load from `shards_dir`, up to `memory_bytes` together with what sessions reserve; None: no limit."""
        self._shards_dir = shards_dir
        self.memory_bytes = memory_bytes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._loaded: dict[str, Loaded] = {}
        self._texts: dict[str, Text] = {}
        #: Run -> bytes that its caches take when they are full.
        self._reserved: dict[str, int] = {}

    def load(self, plan_id: str, run_id: str) -> Loaded:
        """The plan's stage, for `run_id` until `release`.

        Raises:
            NotFound: If there is no shard of the plan here.
            IntegrityError: If its files are not as they were finished.
            LimitExceeded: If it does not fit into this node's memory beside what is in use.
            InvalidInput, InvalidCheckpoint: If the model cannot be run in stages.
        """
        with self._lock:
            mine = self._loading.setdefault(plan_id, threading.Lock())
        with mine:
            with self._lock:
                known = self._loaded.get(plan_id)
                if known is not None:
                    known.users.add(run_id)
                    return known
            folder = self._shards_dir / plan_id
            manifest = read_manifest(folder)
            damaged = [file.name for file in (*manifest.files, *manifest.extras) if not file_is_whole(folder, file)]
            if damaged:
                raise IntegrityError(
                    f"the shard of plan {plan_id} is damaged: {damaged[0]} is not as it was finished; delete the "
                    "plan and process the model again",
                    details={"plan_id": plan_id, "files": damaged[:20]},
                )
            self._make_room(manifest.tensor_bytes, f"the layers of plan {plan_id}")
            began = time.monotonic()
            stage = load_stage(folder, device=self.device)
            loaded = Loaded(
                plan_id=plan_id,
                folder=folder,
                stage=stage,
                weight_bytes=manifest.tensor_bytes,
                load_s=time.monotonic() - began,
                users={run_id},
            )
            with self._lock:
                self._loaded[plan_id] = loaded
            logger.info("loaded the stage of plan %s in %.1f s", plan_id, loaded.load_s)
            return loaded

    def text(self, plan_id: str) -> Text:
        """The tokenizer beside the plan's shard; loaded once."""
        with self._lock:
            if plan_id not in self._texts:
                self._texts[plan_id] = Text(self._shards_dir / plan_id)
            return self._texts[plan_id]

    def reserve(self, run_id: str, cache_bytes: int) -> None:
        """Reserve memory for a run's caches, until `release`.

        Raises:
            LimitExceeded: If they do not fit.
        """
        self._make_room(cache_bytes, "the run's KV cache")
        with self._lock:
            self._reserved[run_id] = cache_bytes

    def release(self, run_id: str) -> None:
        """Say that the run needs nothing any more."""
        with self._lock:
            self._reserved.pop(run_id, None)
            for loaded in self._loaded.values():
                if run_id in loaded.users:
                    loaded.users.remove(run_id)
                    loaded.used_at = time.monotonic()

    def sweep(self, *, keep: Collection[str], idle_s: float) -> bool:
        """Unload what nobody used for `idle_s`, but for the plans of `keep`; whether anything is left."""
        before = time.monotonic() - idle_s
        with self._lock:
            for plan_id, loaded in list(self._loaded.items()):
                if plan_id not in keep and not loaded.users and loaded.used_at <= before:
                    del self._loaded[plan_id]
                    self._texts.pop(plan_id, None)
                    logger.info("unloaded the stage of plan %s: it was idle", plan_id)
            return bool(self._loaded)

    def _make_room(self, more: int, what: str) -> None:
        """Let idle stages go, longest unused first, until `more` bytes fit."""
        if self.memory_bytes is None:
            return
        with self._lock:
            idle = sorted((x for x in self._loaded.values() if not x.users), key=lambda loaded: loaded.used_at)
            while (used := self._used()) + more > self.memory_bytes and idle:
                del self._loaded[idle.pop(0).plan_id]
            if used + more > self.memory_bytes:
                raise LimitExceeded(
                    f"{what} takes {more:,} bytes, and of this node's {self.memory_bytes:,} {used:,} are in use "
                    f"({len(self._loaded)} plans, {len(self._reserved)} runs): wait for their end, or let the node "
                    "offer more (FAIRSHARD_MEMORY_BYTES)",
                    details={"bytes": more, "used_bytes": used, "memory_bytes": self.memory_bytes},
                )

    def _used(self) -> int:
        return sum(loaded.weight_bytes for loaded in self._loaded.values()) + sum(self._reserved.values())
