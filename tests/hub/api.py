"""The Hub's REST protocol: a request in, a reply out; no sockets here.

Statuses, headers and JSON fields follow what huggingface.co sends and huggingface_hub reads: 401 `RepoNotFound` for
what an anonymous caller may not know of, 404 with a token, `X-Error-Code` on every refusal, 302 to a signed CDN
address for LFS files with `X-Linked-Size` and `X-Linked-Etag`, 412 where `parentCommit` is not the branch's head.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from hub.repos import Blob, Commit, Entry, Repo, is_lfs

if TYPE_CHECKING:
    from hub.server import TestHub

PAGE_ENTRIES = 1000


@dataclass(slots=True, kw_only=True)
class Ask:
    """A request: `path` is the raw (still quoted) URL path, header names are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def token(self) -> str | None:
        scheme, _, value = self.headers.get("authorization", "").partition(" ")
        return value if scheme.lower() == "bearer" else None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(slots=True, kw_only=True)
class Reply:
    """An answer: small content in `body`, or a `blob` that may be served by range."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    blob: Blob | None = None


class RefusalError(Exception):
    """A refusal as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        extra = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.reply = json_reply({"error": message}, status=status, **extra)


def json_reply(value: object, *, status: int = 200, **headers: str) -> Reply:
    return Reply(
        status=status, headers={"Content-Type": "application/json", **headers}, body=json.dumps(value).encode()
    )


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset|space)s/{_REPO}"
_FILE = rf"/(?:(?P<kind>dataset|space)s/)?{_REPO}"
_REV = r"(?P<rev>[^/]+)"


class Api:
    """Routes a request to what answers it."""

    def __init__(self, hub: TestHub) -> None:
        self.hub = hub
        self.routes: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = [
            (method, re.compile(pattern), handler)
            for method, pattern, handler in (
                ("GET", r"/api/whoami-v2", self.whoami),
                ("POST", r"/api/validate-yaml", lambda _ask: json_reply({"errors": [], "warnings": []})),
                ("POST", r"/api/repos/create", self.create_repo),
                ("DELETE", r"/api/repos/delete", self.delete_repo),
                ("GET", _API, self.info),
                ("GET", r"/api/models/(?P<name>[^/]+)", self.moved),
                ("GET", rf"{_API}/revision/{_REV}", self.info),
                ("GET", rf"{_API}/tree/{_REV}(?:/(?P<under>.+))?", self.tree),
                ("POST", rf"{_API}/paths-info/{_REV}", self.paths_info),
                ("GET", rf"{_API}/commits/{_REV}", self.commits),
                ("GET", rf"{_API}/refs", self.refs),
                ("POST", rf"{_API}/(?P<what>branch|tag)/{_REV}", self.create_ref),
                ("POST", rf"{_API}/preupload/{_REV}", self.preupload),
                ("POST", rf"{_API}/commit/{_REV}", self.commit),
                ("GET", rf"/api/resolve-cache/(?P<kind>model|dataset|space)s/{_REPO}/{_REV}/(?P<file>.+)", self.file),
                ("GET", rf"{_FILE}/resolve/{_REV}/(?P<file>.+)", self.resolve),
                ("POST", rf"{_FILE}\.git/info/lfs/objects/batch", self.lfs_batch),
            )
        ]

    def answer(self, ask: Ask) -> Reply:
        """The reply to `ask`; HEAD is answered as GET and its body dropped by the server."""
        method = "GET" if ask.method == "HEAD" else ask.method
        try:
            for route_method, pattern, handler in self.routes:
                if route_method == method and (match := pattern.fullmatch(ask.path)):
                    found = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return handler(ask, **found)
        except RefusalError as refusal:
            return refusal.reply
        return json_reply({"error": f"no such endpoint: {ask.method} {ask.path}"}, status=404)

    # -- who may do what ------------------------------------------------------------------------------------------

    def user(self, ask: Ask) -> str | None:
        if ask.token is None:
            return None
        if ask.token not in self.hub.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[ask.token]

    def repo(self, ask: Ask, name: str, kind: str = "model", *, write: bool = False) -> Repo:
        user = self.user(ask)
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self.hub.may_write(user, name) and user not in repo.granted):
            raise RefusalError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise RefusalError(401, "Invalid username or password.")
        if write and not self.hub.may_write(user, name):
            raise RefusalError(403, f"You don't have the rights to write to {name}")
        return repo

    @staticmethod
    def at(repo: Repo, rev: str) -> Commit:
        commit = repo.resolve(rev)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit

    def whoami(self, ask: Ask) -> Reply:
        user = self.user(ask)
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        orgs = [{"name": org, "type": "org"} for org in sorted(self.hub.orgs.get(user, frozenset()))]
        return json_reply({"type": "user", "name": user, "orgs": orgs, "auth": {"type": "access_token"}})

    # -- repositories ---------------------------------------------------------------------------------------------

    def create_repo(self, ask: Ask) -> Reply:
        wanted, user = ask.json(), self.user(ask)
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        url = f"{self.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        if not self.hub.may_write(user, name):
            raise RefusalError(403, f"You don't have the rights to create a {kind} under the namespace of {name}")
        with self.hub.lock:
            if (kind, name) in self.hub.repos:
                return json_reply({"error": "You already created this model repo", "url": url}, status=409)
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            repo = Repo(repo_id=name, kind=kind, private=private)
            repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, title="initial commit")
            self.hub.repos[kind, name] = repo
        return json_reply({"url": url, "name": name})

    def delete_repo(self, ask: Ask) -> Reply:
        wanted, user = ask.json(), self.user(ask)
        name, kind = f"{wanted.get('organization') or user}/{wanted['name']}", wanted.get("type") or "model"
        self.repo(ask, name, kind, write=True)
        del self.hub.repos[kind, name]
        return Reply(status=200)

    def moved(self, _ask: Ask, name: str) -> Reply:
        """A model that is named without its owner: where it is, if it is anywhere."""
        if name not in self.hub.moved:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return json_reply({}, status=307, Location=f"/api/models/{self.hub.moved[name]}")

    def info(self, ask: Ask, repo: str, kind: str, rev: str = "main") -> Reply:
        found = self.repo(ask, repo, kind)
        commit = self.at(found, rev)
        blobs = "blobs=" in ask.query
        siblings = [
            {"rfilename": e.path}
            | ({"size": e.blob.size, "blobId": e.blob.git_oid} if blobs else {})
            | ({"lfs": e.lfs_json} if blobs and e.lfs else {})
            for _, e in sorted(commit.entries.items())
        ]
        return json_reply(
            {
                "_id": commit.oid[:24],
                "id": repo,
                "modelId": repo,
                "author": repo.split("/", maxsplit=1)[0],
                "sha": commit.oid,
                "lastModified": commit.date,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    @staticmethod
    def _entry_json(entry: Entry) -> dict[str, Any]:
        # For an LFS file git's own id is that of the pointer; clients only need it to be stable.
        found = {"type": "file", "oid": entry.blob.git_oid, "size": entry.blob.size, "path": entry.path}
        return found | ({"lfs": entry.lfs_json} if entry.lfs else {})

    def _listing(self, commit: Commit, under: str, *, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{under}/" if under else ""
        files: list[dict[str, Any]] = []
        folders: set[str] = set()
        for path, entry in sorted(commit.entries.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            if recursive or len(parts) == 1:
                files.append(self._entry_json(entry))
            folders.update(
                prefix + "/".join(parts[:n]) for n in range(1, len(parts) if recursive else min(len(parts), 2))
            )
        return [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in sorted(folders)] + files

    def tree(self, ask: Ask, repo: str, kind: str, rev: str, under: str = "") -> Reply:
        commit = self.at(self.repo(ask, repo, kind), rev)
        query = parse_qs(ask.query)
        listing = self._listing(
            commit, under, recursive=query.get("recursive", ["false"])[0].lower() in ("true", "1")
        )
        if under and not listing:
            raise RefusalError(404, f"{under} does not exist on {rev}", "EntryNotFound")
        start, page = int(query.get("cursor", ["0"])[0]), self.hub.page_entries
        reply = json_reply(listing[start : start + page])
        if start + page < len(listing):
            kept = "&".join(p for p in ask.query.split("&") if p and not p.startswith("cursor="))
            reply.headers["Link"] = f'<{self.hub.url}{ask.path}?{kept}&cursor={start + page}>; rel="next"'
        return reply

    def paths_info(self, ask: Ask, repo: str, kind: str, rev: str) -> Reply:
        commit = self.at(self.repo(ask, repo, kind), rev)
        if ask.headers.get("content-type", "").startswith("application/json"):
            paths = ask.json()["paths"]
        else:
            paths = parse_qs(ask.body.decode()).get("paths", [])
        listing = {item["path"]: item for item in self._listing(commit, "", recursive=True)}
        return json_reply([listing[path] for path in paths if path in listing])

    def commits(self, ask: Ask, repo: str, kind: str, rev: str) -> Reply:
        found = self.repo(ask, repo, kind)
        self.at(found, rev)
        return json_reply(
            [
                {"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": [{"user": "tester"}]}
                for c in found.history(rev)
            ]
        )

    def refs(self, ask: Ask, repo: str, kind: str) -> Reply:
        found = self.repo(ask, repo, kind)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in found.tags.items()]
        return json_reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def create_ref(self, ask: Ask, repo: str, kind: str, what: str, rev: str) -> Reply:
        found = self.repo(ask, repo, kind, write=True)
        wanted = ask.json()
        # A branch is made at `startingPoint`; a tag is named in the body, and the URL says what it points at.
        name, target = (rev, wanted.get("startingPoint") or "main") if what == "branch" else (wanted["tag"], rev)
        refs = found.branches if what == "branch" else found.tags
        if name in refs:
            raise RefusalError(409, f"Reference already exists: {name}")
        refs[name] = self.at(found, target).oid
        return json_reply({})

    # -- reading files --------------------------------------------------------------------------------------------

    def _entry(self, ask: Ask, repo: str, kind: str, rev: str, file: str) -> tuple[Commit, Entry]:
        found = self.repo(ask, repo, kind)
        user = self.user(ask)
        if found.gated and not self.hub.may_write(user, repo) and user not in found.granted:
            message = f"Access to model {repo} is restricted. You must be authenticated and granted access."
            raise RefusalError(401 if user is None else 403, message, "GatedRepo")
        commit = self.at(found, rev)
        entry = commit.entries.get(file)
        if entry is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        return commit, entry

    def resolve(self, ask: Ask, repo: str, rev: str, file: str, kind: str = "model") -> Reply:
        commit, entry = self._entry(ask, repo, kind, rev, file)
        if entry.lfs and self.hub.cdn:
            linked = {"X-Linked-Size": str(entry.blob.size), "X-Linked-Etag": f'"{entry.etag}"'}
            location = self.hub.signed_url(repo, kind, entry)
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.blob.git_oid}"', **linked, "Location": location}
            return Reply(status=302, headers=headers, body=f"Found. Redirecting to {location}".encode())
        if self.hub.relative_redirects:
            location = f"/api/resolve-cache/{kind}s/{repo}/{commit.oid}/{quote(file)}"
            headers = {"X-Repo-Commit": commit.oid, "X-Linked-Size": str(entry.blob.size), "Location": location}
            return Reply(status=307, headers=headers | {"X-Linked-Etag": f'"{entry.etag}"'})
        return self.file(ask, repo, kind, rev, file)

    def file(self, ask: Ask, repo: str, kind: str, rev: str, file: str) -> Reply:
        commit, entry = self._entry(ask, repo, kind, rev, file)
        return Reply(headers={"X-Repo-Commit": commit.oid, "ETag": f'"{entry.etag}"'}, blob=entry.blob)

    # -- writing files --------------------------------------------------------------------------------------------

    def preupload(self, ask: Ask, repo: str, kind: str, rev: str) -> Reply:
        commit = self.at(self.repo(ask, repo, kind, write=True), rev)
        answers = []
        for file in ask.json()["files"]:
            there = commit.entries.get(file["path"])
            lfs = self.hub.lfs_uploads and is_lfs(file["path"], file["size"])
            oid = {"oid": there.etag} if there else {}
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return json_reply({"files": answers})

    def lfs_batch(self, ask: Ask, repo: str, kind: str = "model") -> Reply:
        self.repo(ask, repo, kind, write=True)
        objects = []
        for wanted in ask.json()["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.uploads:
                answer["actions"] = {"upload": {"href": f"{self.hub.cdn_url}/upload/{wanted['oid']}", "header": {}}}
            objects.append(answer)
        return json_reply({"transfer": "basic", "objects": objects})

    def commit(self, ask: Ask, repo: str, kind: str, rev: str) -> Reply:
        found = self.repo(ask, repo, kind, write=True)
        lines = [json.loads(line) for line in ask.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        changes: dict[str, Blob | None] = {}
        with found.lock:
            head = self.at(found, rev)
            if rev not in found.branches:
                raise RefusalError(400, f"{rev} is not a branch")
            if header.get("parentCommit") and not head.oid.startswith(header["parentCommit"]):
                raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            lfs = {path for path, entry in head.entries.items() if entry.lfs}
            for line in lines[1:]:
                value, path = line["value"], line["value"]["path"]
                lfs.discard(path)
                if line["key"] == "file":
                    changes[path] = Blob(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.uploads:
                        raise RefusalError(400, f"LFS object {value['oid']} was not uploaded")
                    changes[path] = self.hub.uploads[value["oid"]]
                    lfs.add(path)
                elif line["key"] == "deletedFile":
                    if path not in head.entries:
                        raise RefusalError(400, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    changes[path] = None
                else:
                    changes |= {p: None for p in head.entries if p.startswith(path.rstrip("/") + "/")}
            made = found.commit(changes, title=header["summary"], branch=rev, lfs=frozenset(lfs))
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.url}/{prefix}{repo}/commit/{made.oid}"
        return json_reply({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})
