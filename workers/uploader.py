"""Publishes profiles and plans to a metadata store, and finds them there again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.dtypes import canonical
from planner.errors import FairshardError, InvalidInput, InvalidMetadata, NotFound
from planner.names import is_of, split_revision
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.wire.documents import loads_json
from planner.wire.read import dumps, plan_from_json, plan_to_json, profile_from_json, profile_to_json
from workers.metadata_store.base import MetadataStore, plan_path, profile_path, profiles_folder, williw_path
from workers.progress import Progress, silent

#: Differences that do not make metadata new: the same model profiled, or plan made, again, elsewhere or later.
_WHO_AND_WHEN = ("generated_at", "node_id", "model_url")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where something was published, for messages: never the thing itself."""

    #: `MetadataStore.spec` of the store.
    store: str
    path: str
    #: Commit of the store at which `path` has the published content.
    commit: str
    #: Whether it was there already, and stays as it was.
    again: bool = False


def publish(
    profile: ModelProfile, store: MetadataStore, *, kv_dtype: str | None = None, progress: Progress = silent
) -> Published:
    """Publish a profile under its own path and, for williw clients, under the root file's, in one commit.

    With another KV cache than the model's own (`kv_dtype`, what the profile was made with) the path says so.
    Metadata that differs only in when and where it was made stays as it is, so that a repeat makes no new commit.

    Raises:
        InvalidInput: If the profile has no legal model name.
        AccessDenied: If the token may not write to the store.
        NodeFailure: If the store's folder cannot be written.
        Unavailable: If the Hub cannot be reached within the retries.
    """
    other = canonical(kv_dtype) if kv_dtype and canonical(kv_dtype) != canonical(profile.dtype or "") else None
    path = profile_path(profile.model_name, profile.revision, profile.batch_size, profile.sequence_length, other)
    metadata = profile_to_json(profile)
    content = dumps(metadata)
    progress(0, 2 * len(content), what=f"publishing {profile.model_name}")
    files = {place: _kept(store, place, metadata) or content for place in (path, williw_path(profile.model_name))}
    commit = store.write(files, message=f"Metadata of {profile.model_name} at {profile.revision}")
    progress(2 * len(content), 2 * len(content), what=f"publishing {profile.model_name}")
    return Published(store=store.spec, path=path, commit=commit)


def publish_plan(plan: Plan, store: MetadataStore, *, model_url: str | None = None) -> Published:
    """Publish a plan; one that differs only in when it was made stays as it is.

    Raises:
        AccessDenied: If the token may not write to the store.
        NodeFailure: If the store's folder cannot be written.
        Unavailable: If the Hub cannot be reached within the retries.
    """
    path, content = plan_path(plan.plan_id), plan_to_json(plan, model_url=model_url)
    kept = _kept(store, path, content)
    commit = store.write({path: kept or dumps(content)}, message=f"Plan {plan.plan_id} for {plan.model_name}")
    return Published(store=store.spec, path=path, commit=commit, again=kept is not None)


def load_profile(store: MetadataStore, path: str, revision: str | None = None) -> ModelProfile:
    """The profile published at `path`, now or as of the store's commit `revision`; the williw form is read as well.

    Raises:
        NotFound: If there is none.
        InvalidMetadata: If it cannot be read as metadata.
        Unavailable: If the Hub cannot be reached within the retries.
    """
    source = f"{store.spec}/{path}"
    try:
        return profile_from_json(loads_json(store.read(path, revision=revision), source=source))
    except InvalidMetadata:
        raise
    except InvalidInput as error:
        raise InvalidMetadata(str(error), details=error.details | {"store": store.spec, "path": path}) from error


def load_plan(store: MetadataStore, plan_id: str, revision: str | None = None) -> Plan:
    """The plan that was published under this id.

    Raises:
        NotFound: If there is none.
        InvalidMetadata: If it cannot be read as a plan.
        Unavailable: If the Hub cannot be reached within the retries.
    """
    path = plan_path(plan_id)
    return plan_from_json(loads_json(store.read(path, revision=revision), source=f"{store.spec}/{path}"))


def latest_profile(store: MetadataStore, model_name: str, *, revision: str | None = None) -> ModelProfile:
    """A model's newest profile in a store: the root file's, ours or a williw client's, else the newest of its own.

    Args:
        store: Where to look.
        model_name: `owner/name`.
        revision: Only profiles of this commit of the model (default any), and of the part of the repository that it
            names (default the whole).

    Raises:
        NotFound: If the store has none; the message says where was looked.
        InvalidMetadata: If the root file names this model and cannot be read.
        Unavailable: If the Hub cannot be reached within the retries.
    """
    root = williw_path(model_name)
    try:
        newest = load_profile(store, root)
        # "a/b_c" and "a_b/c" have one root file between them.
        if newest.model_name == model_name and is_of(newest.revision, revision):
            return newest
    except NotFound:
        pass
    folder = profiles_folder(model_name, revision if split_revision(revision)[0] else None)
    found = []
    for path in store.list(folder):
        try:
            found.append(load_profile(store, path))
        except FairshardError as error:
            if error.retryable:
                raise
    mine = [p for p in found if p.model_name == model_name]
    matching = [p for p in mine if is_of(p.revision, revision)]
    if not matching:
        at = f" at {revision}" if revision else ""
        others = sorted({str(part) for p in mine if (part := split_revision(p.revision)[1])})
        only = f"; there is some of {', '.join(others)}: name the subfolder or variant" if others else ""
        raise NotFound(
            f"{store.spec} has no metadata of {model_name}{at}: neither {root} nor anything below {folder}/{only}",
            details={"store": store.spec, "model_name": model_name, "revision": revision},
        )
    return max(matching, key=lambda p: (p.generated_at or "", p.revision or ""))


def _kept(store: MetadataStore, path: str, new: dict[str, Any]) -> bytes | None:
    """What lies at `path`, if `new` says nothing else; None if it does."""
    try:
        content = store.read(path)
        old = loads_json(content)
    except (NotFound, InvalidInput):
        return None
    ignored = dict.fromkeys(_WHO_AND_WHEN)
    same = isinstance(old, dict) and old | ignored == loads_json(dumps(new)) | ignored
    return content if same else None
