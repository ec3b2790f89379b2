"""The metadata store in a Hub repository.

huggingface_hub commits; what it leaves to its callers is added here: a commit whose reply was lost is looked for
before it is tried again, a commit made meanwhile by another node is built upon, content is checked against git's own
id when it is read back, and no request waits for ever.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from planner.errors import AccessDenied, FairshardError, IntegrityError, InvalidInput, NotFound, Unavailable
from planner.limits import MAX_JSON_BYTES
from workers.metadata_store.base import check_path
from workers.network.ranges import RangeReader, RemoteFile, Server
from workers.network.retry import RetryPolicy, Transient, asked_s, retrying
from workers.progress import wait

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")

_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Seconds without a byte after which a request is given up; the library's own client would wait for ever.
_IDLE_S = 60.0
#: Commits by others that one write builds upon before it gives up: many nodes may publish at the same time.
_CONFLICTS = 25
_DIGEST_READS = 3


class _ConflictError(Exception):
    """Someone else's commit came first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubStore:
    """A Hub repository's main branch; made by `open_store`."""

    repo_id: str
    endpoint: str
    token: str | None = field(default=None, repr=False)
    #: "model" or "dataset".
    kind: str = "model"
    #: Whether the repository is made private, if it has to be made.
    private: bool = True
    offline: bool = False
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def spec(self) -> str:
        """`owner/name`, with `datasets/` before it for a dataset."""
        return self.repo_id if self.kind == "model" else f"{self.kind}s/{self.repo_id}"

    def read(self, path: str, *, revision: str | None = None) -> bytes:
        """See `MetadataStore.read`."""
        check_path(path)
        pinned = revision is not None and _COMMIT.fullmatch(revision)
        commit = revision if revision and pinned else self._retried(lambda api: self._at(api, revision))
        found = self._retried(lambda api: self._entries(api, [path], commit)).get(path)
        if found is None:
            raise NotFound(
                f"{self.spec} on {self.endpoint} has no file {path} at {commit}",
                details={"store": self.spec, "path": path, "revision": commit},
            )
        if found.size > MAX_JSON_BYTES:
            raise InvalidInput(
                f"{path} of {self.spec} takes {found.size:,} bytes, at most {MAX_JSON_BYTES:,} are read",
                details={"store": self.spec, "path": path, "size_bytes": found.size},
            )
        etag = found.lfs.sha256 if found.lfs else found.blob_id
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        url = f"{self.endpoint}/{prefix}{self.repo_id}/resolve/{commit}/{quote(path)}"
        remote = RemoteFile(url=url, size_bytes=found.size, etag=etag, commit=commit)
        server = Server(
            headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
            policy=self.policy,
            remedy=self._remedy(),
        )
        for _ in range(_DIGEST_READS):
            content = bytearray()
            reader = RangeReader(server)
            try:
                if found.size:
                    reader.read(remote, 0, found.size, content.extend)
            finally:
                reader.close()
            if _digest(bytes(content), lfs=found.lfs is not None) == etag:
                return bytes(content)
        raise IntegrityError(
            f"{self.spec}/{path} at {commit}: {_DIGEST_READS} reads brought other bytes than the Hub's digest {etag}",
            details={"store": self.spec, "path": path, "revision": commit, "digest": etag},
        )

    def write(self, files: Mapping[str, bytes | None], *, message: str) -> str:
        """See `MetadataStore.write`; makes the repository if there is none."""
        for path in files:
            check_path(path)
        if self.token is None:
            raise AccessDenied(
                f"publishing to {self.spec} takes a Hub token: set HF_TOKEN", details={"store": self.spec}
            )

        def commit(api: HfApi) -> str:
            for attempt in range(1, _CONFLICTS + 1):
                try:
                    return self._commit_once(api, files, message)
                except _ConflictError as error:
                    pause_s = replace(self.policy, first_s=0.05, longest_s=2.0).pause_s(attempt)
                    wait(pause_s, f"HTTP {error} from {self.spec}: another commit came first, attempt {attempt + 1}")
            raise Transient(f"{_CONFLICTS} commits of others came between")

        return self._retried(commit)

    def list(self, prefix: str = "") -> list[str]:
        """See `MetadataStore.list`."""
        folder = f"{check_path(prefix.rstrip('/'))}/" if prefix.rstrip("/") else ""

        def listing(api: HfApi) -> list[str]:
            # Not list_repo_tree: it retries by itself, up to 23 s a time, which would multiply with our own retries.
            info = api.repo_info(self.repo_id, repo_type=self.kind, timeout=_IDLE_S)
            names = (item.rfilename for item in getattr(info, "siblings", None) or [])
            return sorted(name for name in names if name.startswith(folder) and not name.startswith("."))

        return self._retried(listing)

    def _commit_once(self, api: HfApi, files: Mapping[str, bytes | None], message: str) -> str:
        """Commit what differs from the branch's head, on top of it; the new id, or the head's if nothing does."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            head = self._at(api, None)
        except RepositoryNotFoundError:
            # "Not found" may also mean that we may not see it; then making it is refused, and the refusal says why.
            api.create_repo(self.repo_id, repo_type=self.kind, private=self.private, exist_ok=True)
            head = self._at(api, None)
        there = self._entries(api, list(files), head)
        changed = {path: content for path, content in files.items() if not _is(there.get(path), content)}
        if not changed:
            return head
        operations = [
            CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
            for path, content in sorted(changed.items())
        ]
        try:
            return api.create_commit(
                self.repo_id, operations, commit_message=message, repo_type=self.kind, parent_commit=head
            ).oid
        except HfHubHTTPError as error:
            if error.response.status_code in {409, 412}:
                raise _ConflictError(error.response.status_code) from error
            raise

    def _at(self, api: HfApi, revision: str | None) -> str:
        info = api.repo_info(self.repo_id, revision=revision, repo_type=self.kind, timeout=_IDLE_S)
        if not info.sha:
            raise Transient("the server names no commit")
        return info.sha

    def _entries(self, api: HfApi, paths: Sequence[str], commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        found = api.get_paths_info(self.repo_id, list(paths), revision=commit, repo_type=self.kind)
        return {item.path: item for item in found if isinstance(item, RepoFile)}

    def _retried(self, call: Callable[[HfApi], T]) -> T:
        """Call with a client, again where that may help; the library's errors come out as ours."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        if self.offline:
            raise Unavailable(
                f"HF_HUB_OFFLINE is set, and {self.spec} is a Hub repository: unset it, or use a folder"
            )
        _limit_waiting()
        api = HfApi(endpoint=self.endpoint, token=self.token or False)

        def attempt() -> T:
            try:
                return call(api)
            except (Transient, FairshardError):
                raise
            except HfHubHTTPError as error:
                raise self._explained(error) from error
            except Exception as error:
                # Its HTTP client is httpx or httpx2 by version, and neither's errors are OSErrors; what fails in its
                # upload threads it raises as RuntimeError.
                if not isinstance(error, (OSError, RuntimeError)) and not type(error).__module__.startswith("httpx"):
                    raise
                raise Transient(f"{type(error).__name__}: {error}") from error

        return retrying(attempt, what=f"{self.endpoint}/{self.spec}", policy=self.policy)

    def _explained(self, error: Any) -> Exception:
        from huggingface_hub import errors as hub_errors

        status, headers = error.response.status_code, error.response.headers
        details = {"store": self.spec, "status": status, "hub_code": headers.get("X-Error-Code")}
        if isinstance(error, hub_errors.RevisionNotFoundError):
            return NotFound(f"{self.spec} on {self.endpoint} has no such revision", details=details)
        unseen = isinstance(error, hub_errors.RepositoryNotFoundError)
        if isinstance(error, hub_errors.GatedRepoError) or status == 403 or (status == 401 and not unseen):
            return AccessDenied(f"{self.spec}: HTTP {status} from {self.endpoint}. {self._remedy()}", details=details)
        if status in {401, 404}:
            return NotFound(
                f"{self.endpoint} shows no {self.kind} repository {self.repo_id}: there is none, or it is private. "
                f"{self._remedy()}",
                details=details,
            )
        if status in {400, 413, 422}:
            said = headers.get("X-Error-Message") or error.response.text[:200]
            return InvalidInput(f"{self.endpoint} refuses the commit to {self.spec}: {said}", details=details)
        return Transient(f"HTTP {status}", retry_after_s=asked_s(headers.get))

    def _remedy(self) -> str:
        if self.token is None:
            return "Give a token with access: HF_TOKEN"
        return "The token in use may not do that: give one with write access to it"


def _digest(content: bytes, *, lfs: bool) -> str:
    if lfs:
        return hashlib.sha256(content).hexdigest()
    # git's id of a file; it pins content here, it guards against no attacker.
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _is(entry: RepoFile | None, content: bytes | None) -> bool:
    """Whether the repository's file has this content (None: is not there)."""
    if entry is None or content is None:
        return entry is None and content is None
    if entry.size != len(content):
        return False
    return _digest(content, lfs=entry.lfs is not None) == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _limit_waiting() -> None:
    """Give huggingface_hub's client a time limit, unless this process has set a client of its own.

    Its default client waits without end for a server that has accepted a commit and says nothing.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    default = _http.default_client_factory
    if getattr(_http, "_GLOBAL_CLIENT_FACTORY", None) is not default:
        return

    def limited() -> Any:
        client: Any = default()
        client.timeout = _IDLE_S
        return client

    set_client_factory(limited)
