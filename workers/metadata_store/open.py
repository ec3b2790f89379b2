"""Opening the store that a name means: a Hub repository or a folder."""

from __future__ import annotations

from pathlib import Path

from planner.errors import InvalidInput
from planner.names import check_model_name
from workers.metadata_store.base import MetadataStore
from workers.metadata_store.folder import FolderStore
from workers.network.retry import RetryPolicy
from workers.settings import HubSettings


def open_store(
    spec: str | Path,
    *,
    token: str | None = None,
    private: bool = True,
    hub: HubSettings | None = None,
    policy: RetryPolicy | None = None,
) -> MetadataStore:
    """The store that `spec` names; nothing is read, made or asked for yet.

    Args:
        spec: `owner/name` or `datasets/owner/name` for a Hub repository, else a folder. A string of the form
            `owner/name` is never taken for a folder: write `./owner/name`, or pass a `Path`.
        token: The Hub token; default the process's own.
        private: Whether a Hub repository that has to be made is private.
        hub: How to reach the Hub; default by the environment.
        policy: The limits of patience with the Hub.

    Raises:
        InvalidInput: If `spec` names neither.
    """
    if isinstance(spec, str) and (not spec.strip() or "://" in spec):
        raise InvalidInput(
            "the metadata store must be 'owner/name' of a Hub repository (not its address), or a folder; "
            f"got {spec.rpartition('@')[2]!r}"
        )
    text = str(spec)
    kind, name = ("dataset", text.removeprefix("datasets/")) if text.startswith("datasets/") else ("model", text)
    try:
        if isinstance(spec, Path):
            raise InvalidInput
        check_model_name(name)
    except InvalidInput:
        return FolderStore(Path(spec).expanduser().absolute())
    from workers.metadata_store.hub import HubStore

    hub = hub or HubSettings.from_env()
    return HubStore(
        repo_id=name,
        kind=kind,
        token=token or hub.token,
        private=private,
        endpoint=hub.endpoint,
        offline=hub.offline,
        policy=policy or RetryPolicy(),
    )
