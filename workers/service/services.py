"""What a process of the service works with, made from the settings; connects at the first call, not here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from planner.errors import AccessDenied, NotFound
from planner.names import check_asked_name, check_model_name, split_revision
from workers.ledger.connection import connect, reachable
from workers.ledger.ledger import Ledger
from workers.ledger.steps import Wakeup
from workers.nodes.joining import Joining
from workers.nodes.registry import Registry
from workers.settings import HubSettings, QueueSettings, Settings

if TYPE_CHECKING:
    from redis import Redis

    from planner.profile import ModelProfile
    from workers.metadata_store.base import MetadataStore
    from workers.metadata_store.shared import SharedStore
    from workers.service.known_digests import KnownDigests
    from workers.service.plans import Plans
    from workers.service.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Services:
    """Ledger, registry, plans, tokens and metadata store of one service."""

    settings: Settings
    queue: QueueSettings
    wake: Callable[[Sequence[Wakeup]], None] | None = None
    #: How long one answer of Redis may take, in seconds.
    redis_timeout_s: float = 5.0
    #: Whether this role keeps the metadata and plans of a service without METADATA_REPO: API and planner do.
    keeper: bool = False

    @cached_property
    def redis(self) -> Redis:
        """The service's Redis."""
        return connect(self.settings.redis_url, timeout_s=self.redis_timeout_s)

    @cached_property
    def ledger(self) -> Ledger:
        """Jobs and steps."""
        return Ledger(
            self.redis,
            prefix=self.queue.prefix,
            wake=self.wake,
            lease_s=self.queue.lease_s,
            max_attempts=self.queue.max_attempts,
            job_ttl_s=self.queue.job_ttl_s,
        )

    @cached_property
    def registry(self) -> Registry:
        """Nodes alive."""
        return Registry(self.redis, prefix=self.queue.prefix, ttl_s=self.queue.node_ttl_s, joining=self.joining)

    @cached_property
    def joining(self) -> Joining:
        """Who may be a node."""
        return Joining.from_settings(self.settings)

    @cached_property
    def tokens(self) -> Tokens:
        """Users' Hub tokens."""
        from workers.service.tokens import Tokens, secret_key

        return Tokens(self.redis, key=secret_key(self.settings), prefix=self.queue.prefix)

    @cached_property
    def plans(self) -> Plans:
        """Plans by id and model."""
        from workers.service.plans import Plans

        return Plans(self.redis, self.store, prefix=self.queue.prefix, ttl_s=self.queue.plan_ttl_s)

    @cached_property
    def digests(self) -> KnownDigests:
        """What nodes found tensors to be."""
        from workers.service.known_digests import KnownDigests

        return KnownDigests(self.redis, prefix=self.queue.prefix, ttl_s=self.queue.plan_ttl_s)

    def user_token(self, job_id: str, params: Mapping[str, Any]) -> str | None:
        """The Hub token that the job was submitted with; None if it was without.

        Raises:
            AccessDenied: If it had one, and Redis lost it.
        """
        token = self.tokens.get(job_id)
        if token is None and params.get("with_token"):
            raise AccessDenied(
                "the Hub token that this job was sent with is gone (Redis lost it, or a day has passed; it is kept "
                "nowhere else): send the request again, with the token",
                details={"job_id": job_id},
            )
        return token

    @cached_property
    def _own_store(self) -> SharedStore:
        from workers.metadata_store.folder import FolderStore
        from workers.metadata_store.shared import SharedStore

        folder = FolderStore(self.settings.store_dir) if self.keeper else None
        return SharedStore(self.redis, prefix=self.queue.prefix, folder=folder)

    def store(self, repo: str | None = None, *, token: str | None = None) -> MetadataStore:
        """The service's metadata store, or the Hub repository `repo`."""
        chosen = repo or self.settings.metadata_repo
        if chosen is None:
            return self._own_store
        from workers.metadata_store.open import open_store

        if repo is not None:
            # Else `open_store` would take it for a folder's path.
            check_model_name(repo.removeprefix("datasets/"))
        return open_store(chosen, token=token)

    def keep(self) -> None:
        """A keeper's turn: its disk has what Redis has, and a Redis that was wiped gets it back.

        Raises:
            NodeFailure: If <data>/store cannot be written.
            Unavailable: If Redis cannot be reached.
        """
        if self.keeper and self.settings.metadata_repo is None:
            self._own_store.keep()

    def canonical(self, model_name: str, *, token: str | None = None) -> str:
        """The model's "owner/name"; a name without owner is what the Hub resolves it to.

        Raises:
            InvalidInput: If it is no name.
            NotFound: If the Hub knows no model by it.
            Unavailable: If the Hub must be asked, and cannot be reached.
        """
        if "/" in check_asked_name(model_name):
            return model_name
        from workers.checkpoint.hub import canonical_name

        hub = HubSettings.from_env()
        return canonical_name(model_name, token=token or hub.token, hub=hub)

    # -- payloads: too large for messages, gone when they were published ------------------------------------------
    def put_payload(self, job_id: str, name: str, value: Any) -> None:
        """Keep JSON between two steps of a job, for at most a day."""
        from workers.metadata_store.shared import pack

        with reachable():
            self.redis.set(f"{self.queue.prefix}payload:{job_id}:{name}", pack(json.dumps(value).encode()), ex=86400)

    def get_payload(self, job_id: str, name: str) -> Any:
        """What `put_payload` kept.

        Raises:
            NotFound: If there is nothing.
            InvalidInput: If it unpacks to more than metadata takes.
        """
        from workers.metadata_store.shared import unpack

        with reachable():
            packed: Any = self.redis.get(f"{self.queue.prefix}payload:{job_id}:{name}")
        if packed is None:
            raise NotFound(f"job {job_id} has no {name}: it was lost with Redis, or dropped after a day")
        return json.loads(unpack(packed, what=f"job {job_id}'s {name}"))

    # -- profiles --------------------------------------------------------------------------------------------------
    def profile_published(self, model_name: str, record: dict[str, Any]) -> None:
        """Remember where the model's newest profile lies: `{path, commit, revision, batch_size, sequence_length}`.

        That of each part of a repository (`planner.names.Part`) by itself, which the revision names.
        """
        with reachable():
            self.redis.hset(
                f"{self.queue.prefix}profiles", _named(model_name, record.get("revision")), json.dumps(record)
            )

    def profiled(self, model_name: str, *, revision: str | None = None) -> bool:
        """Whether this service has metadata of the model, or of the part of it that a revision names."""
        part = str(split_revision(revision)[1]) or None
        if self.newest_record(model_name, revision=part) is not None:
            return True
        try:
            self.newest_profile(model_name, revision=part)
        except NotFound:
            return False
        return True

    def newest_record(self, model_name: str, *, revision: str | None = None) -> dict[str, Any] | None:
        """Where the newest profile of the model, or of the part that a revision names, lies; None if unknown here."""
        with reachable():
            known: Any = self.redis.hget(f"{self.queue.prefix}profiles", _named(model_name, revision))
        return json.loads(known) if known else None

    def newest_profile(
        self, model_name: str, *, repo: str | None = None, revision: str | None = None, token: str | None = None
    ) -> ModelProfile:
        """The model's newest metadata.

        Args:
            model_name: "owner/name".
            repo: Hub repository to look in; None: this service's own store.
            revision: Of the model, and of which part of it; None: any commit of the whole.
            token: Hub token for `repo`.

        Raises:
            NotFound: If there is none.
        """
        from workers.uploader import latest_profile, load_profile

        if repo is None and split_revision(revision)[0] is None:
            record = self.newest_record(model_name, revision=revision)
            if record is not None:
                return load_profile(self.store(), record["path"], revision=record["commit"])
        return latest_profile(self.store(repo, token=token), model_name, revision=revision)

    def plan_profile(self, where: Mapping[str, Any], *, token: str | None = None) -> ModelProfile:
        """The profile that a plan is made from.

        Args:
            where: `{model_name, path, commit}` in the service's own store, or `{model_name, repo, revision}`; with
                `batch_size` and `sequence_length` to plan at (None: as profiled).
            token: Hub token for `repo`.

        Raises:
            NotFound: If there is none.
        """
        from workers.uploader import load_profile

        if where.get("path"):
            try:
                profile = load_profile(self.store(), where["path"], revision=where.get("commit"))
            except NotFound:
                # A Redis that was wiped has what the keepers gave back, under other commits.
                profile = load_profile(self.store(), where["path"])
        else:
            profile = self.newest_profile(
                where["model_name"], repo=where.get("repo"), revision=where.get("revision"), token=token
            )
        return profile.at(
            batch_size=where.get("batch_size") or profile.batch_size,
            sequence_length=where.get("sequence_length") or profile.sequence_length,
        )


def _named(model_name: str, revision: str | None) -> str:
    """The name under which a model's newest profile is known: each part of a repository has one of its own."""
    return f"{model_name}{split_revision(revision)[1]}"
