"""A checkpoint on the Hub, at one commit. Files that are in the local cache are read from there."""

from __future__ import annotations

import hashlib
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from planner.errors import (
    AccessDenied,
    FairshardError,
    IntegrityError,
    InvalidCheckpoint,
    InvalidInput,
    NotFound,
    Unavailable,
)
from planner.names import check_model_name
from workers.checkpoint.base import Checkpoint, CheckpointFile, file_of
from workers.checkpoint.folder import check_range, open_folder, read_local
from workers.disk.paths import is_inner
from workers.network.ranges import RangeReader, RemoteFile, Server
from workers.network.retry import RetryPolicy, Transient, asked_s, retrying
from workers.settings import HubSettings

#: Times that a whole file is read before its bytes are given up as wrong.
_ROUNDS = 3
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Git's id of a file, or its sha256.
_ETAG = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """A repository at one commit; made by `open_hub`. May be shared between threads."""

    model_name: str
    revision: str
    files: Mapping[str, CheckpointFile]
    endpoint: str
    #: The repository's folder in the Hub's cache; it may not exist.
    cache: Path
    server: Server
    #: The branch or tag that was asked for; None where it was a commit.
    ref: str | None = None
    _own: threading.local = field(default_factory=threading.local)

    def local_path(self, name: str) -> Path | None:
        """Where the file lies in the Hub's cache, or None if its bytes come over the network.

        Raises:
            NotFound: If the repository has no such file.
        """
        file = file_of(self, name)
        snapshot = self.cache / "snapshots" / self.revision / name
        # A blob is named by its ETag: the same file of another revision serves as well.
        blob = self.cache / "blobs" / (file.etag or "-")
        for path in (snapshot, blob):
            if path.is_file() and path.stat().st_size == file.size_bytes:
                return path
        return None

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of the file; retried and checked against the pinned commit.

        Raises:
            NotFound: If the repository has no such file.
            InvalidCheckpoint: If the range lies beyond the file's end.
            AccessDenied: If the repository is gated or private and the token does not open it.
            IntegrityError: If the server has another file under that name.
            Unavailable: If the server cannot be reached within the retries.
        """
        file = file_of(self, name)
        end = check_range(file, begin, end)
        path = self.local_path(name)
        if path is not None:
            return read_local(path, file, begin, end)
        if not hasattr(self._own, "reader"):
            self._own.reader = self.reader()
        for _ in range(_ROUNDS):
            found = bytearray()
            if begin < end:
                self._own.reader.read(self.remote(name), begin, end, found.extend)
            if len(found) != file.size_bytes or _is_as_stated(found, file):
                return bytes(found)
            self._own.reader.close()  # the next read goes over another connection
        raise IntegrityError(
            f"{name} of {self.model_name} differs from what the Hub states ({file.etag}) in each of {_ROUNDS} reads",
            details={"file": name, "stated": file.etag},
        )

    def remote(self, name: str) -> RemoteFile:
        """The file's address and what pins it."""
        file = file_of(self, name)
        path = f"/{self.model_name}/resolve/{self.revision}/{urllib.parse.quote(name)}"
        return RemoteFile(url=self.endpoint + path, size_bytes=file.size_bytes, etag=file.etag, commit=self.revision)

    def reader(self, *, pause: Callable[[float], object] = time.sleep) -> RangeReader:
        """A connection of one's own; `pause` sleeps between attempts, and may raise to stop."""
        return RangeReader(self.server, pause=pause)


def git_id(data: bytes | bytearray) -> str:
    """What git names a file of these bytes: the Hub's ETag for files that are not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _is_as_stated(data: bytearray, file: CheckpointFile) -> bool:
    """Whether a whole file's bytes have the digest that the Hub states for it, if it states one."""
    if file.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == file.sha256
    return file.etag is None or len(file.etag) != 40 or git_id(data) == file.etag


def open_hub(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    hub: HubSettings,
    policy: RetryPolicy | None = None,
) -> Checkpoint:
    """Open the Hub's repository `name` at the commit that `revision` means now.

    Raises:
        NotFound: If there is no such repository or revision, or (offline) no cached copy of it.
        AccessDenied: If it is gated or private and the token does not open it.
        Unavailable: If the Hub cannot be reached within the retries, and the cache has no copy of the revision.
    """
    policy = policy or RetryPolicy()
    cache = hub.cache_dir / f"models--{name.replace('/', '--')}"
    cached = _cached_commit(cache, revision)
    if hub.offline:
        if cached is None:
            raise NotFound(
                f"HF_HUB_OFFLINE is set, and {cache} has no copy of {name} at {revision or 'main'}; "
                f"unset it, or fetch the model once with a connection",
                details={"model_name": name, "revision": revision},
            )
        return open_folder(cache / "snapshots" / cached, model_name=name, revision=cached)
    remedy = _remedy(name, hub, token)
    token = token or hub.token
    try:
        commit, files = retrying(
            lambda: _listing(name, revision, token, hub.endpoint, policy, remedy=remedy),
            what=f"{hub.endpoint}/{name}",
            policy=policy,
        )
    except Unavailable:
        if cached is None:
            raise
        return open_folder(cache / "snapshots" / cached, model_name=name, revision=cached)
    return HubCheckpoint(
        model_name=name,
        revision=commit,
        files=files,
        endpoint=hub.endpoint,
        cache=cache,
        ref=None if revision == commit else revision or "main",
        server=Server(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            policy=policy,
            remedy=remedy,
        ),
    )


def canonical_name(name: str, *, token: str | None, hub: HubSettings) -> str:
    """The "owner/name" of a model that is named without its owner ("gpt2"), as the Hub resolves it.

    Raises:
        NotFound: If the Hub knows none by this name, or may not be asked (HF_HUB_OFFLINE).
        Unavailable: If it cannot be reached within the retries.
    """
    wanted = NotFound(
        f"{hub.endpoint} knows no model {name!r} without its owner: name it 'owner/name'",
        details={"field": "model_name"},
    )
    if hub.offline:
        raise wanted
    policy = RetryPolicy(attempts=2, first_s=0.2, longest_s=0.5, stall_s=5.0)

    def ask() -> str:
        from huggingface_hub import HfApi
        from huggingface_hub import errors as hub_errors

        try:
            return str(HfApi(endpoint=hub.endpoint, token=token or False).model_info(name, timeout=policy.stall_s).id)
        except hub_errors.HfHubHTTPError as error:
            if getattr(getattr(error, "response", None), "status_code", 0) in {401, 403, 404}:
                raise wanted from None
            raise Transient(str(error)) from error
        except Exception as error:
            if not isinstance(error, (OSError, ValueError)) and not type(error).__module__.startswith("httpx"):
                raise
            raise Transient(f"{type(error).__name__}: {error}") from error

    found = retrying(ask, what=f"{hub.endpoint}/{name}", policy=policy)
    try:
        return check_model_name(found)
    except InvalidInput:
        raise wanted from None


def _cached_commit(cache: Path, revision: str | None) -> str | None:
    commit = revision if revision and _COMMIT.fullmatch(revision) else None
    ref = cache / "refs" / (revision or "main")
    if commit is None and ref.is_file():
        commit = ref.read_text(encoding="utf-8").strip()
    return commit if commit and (cache / "snapshots" / commit).is_dir() else None


def _listing(
    name: str, revision: str | None, token: str | None, endpoint: str, policy: RetryPolicy, *, remedy: str
) -> tuple[str, Mapping[str, CheckpointFile]]:
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    api = HfApi(endpoint=endpoint, token=token or False)
    try:
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=policy.stall_s)
    except hub_errors.HfHubHTTPError as error:
        raise _explained(error, name, revision, endpoint, remedy) from error
    except Exception as error:
        # Its HTTP client is httpx or httpx2 by version, and neither's errors are OSErrors.
        if not isinstance(error, (OSError, ValueError)) and not type(error).__module__.startswith("httpx"):
            raise
        raise Transient(f"{type(error).__name__}: {error}") from error
    if not info.sha:
        raise Transient("the server names no commit")
    files = {}
    for item in info.siblings or []:
        if item.size is None:
            raise Transient(f"the server states no size of {item.rfilename}")
        sha256 = item.lfs.sha256 if item.lfs else None
        etag = sha256 or item.blob_id
        # All three become paths in the cache and in shards, and git allows no others.
        if not is_inner(item.rfilename) or not _ETAG.fullmatch(etag or "0" * 40) or not _COMMIT.fullmatch(info.sha):
            raise InvalidCheckpoint(
                f"{endpoint} lists an impossible file in {name}: {item.rfilename!r:.200}",
                details={"model_name": name, "file": item.rfilename[:200]},
            )
        files[item.rfilename] = CheckpointFile(name=item.rfilename, size_bytes=item.size, etag=etag, sha256=sha256)
    return info.sha, files


def _explained(error: Exception, name: str, revision: str | None, endpoint: str, remedy: str) -> Exception:
    """Our error for one of huggingface_hub's."""
    from huggingface_hub import errors as hub_errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    headers: Mapping[str, str] = getattr(response, "headers", {})
    details = {"model_name": name, "revision": revision, "status": status, "hub_code": headers.get("X-Error-Code")}
    answer: type[FairshardError]
    if isinstance(error, hub_errors.GatedRepoError):
        answer, text = AccessDenied, f"{name} is gated. {remedy}"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        answer, text = NotFound, f"{name} has no revision {revision!r} on {endpoint}"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        answer, text = NotFound, f"{endpoint} shows no model {name}: there is none, or it is private. {remedy}"
    elif isinstance(error, hub_errors.DisabledRepoError) or status in {401, 403}:
        answer, text = AccessDenied, f"{name}: HTTP {status} from {endpoint}. {remedy}"
    elif status == 404:
        answer, text = NotFound, f"{endpoint} shows no model {name}"
    else:
        return Transient(f"HTTP {status}", retry_after_s=asked_s(headers.get))
    return answer(text, details=details)


def _remedy(name: str, hub: HubSettings, token: str | None) -> str:
    """What opens a repository that did not open; `token` is the caller's own."""
    terms = f"accept its terms at {hub.endpoint}/{name}"
    if token:
        return f"Your token does not open it: {terms} as that user, or give another"
    give = f"{terms} if it has any, and give a token with access: the header X-HF-Token of the API, or HF_TOKEN"
    if hub.token:
        return f"The token of this process (HF_TOKEN) does not open it, and you gave none of your own: {give}"
    return give[0].upper() + give[1:]
