"""A small Hub for tests: it speaks the REST protocol of huggingface.co to the real `huggingface_hub` client.

In a test (the fixture `hub` of tests/conftest.py gives a clean one; `HF_ENDPOINT` points at it already):

    def test_something(hub: TestHub) -> None:
        commit = hub.add_repo("owner/name", folder_or_files, private=False, gated=False)   # -> commit id
        hub.fault("status", path="*/config.json", code=429, retry_after=1)                 # see hub/faults.py
        hub.fault("cut", path="*.safetensors", where="cdn", after_bytes=1000, times=2)
        ...
        assert hub.counters.requests("*/resolve/*", method="GET") == 1
        assert hub.counters.body_bytes("*.safetensors", where="cdn") < 1_000_000
        assert not any(r.authorization for r in hub.counters.log(where="cdn"))

Files that the Hub would keep in LFS (`*.safetensors`, `*.bin`, over 10 MB, ...) are served by redirect from a CDN of
another origin, with signed URLs that expire (`hub.sign_for_s`, `hub.expire_urls()`); the CDN refuses requests that
carry a token. `hub.token` belongs to user "tester", who may do all; `hub.add_user("bob")` returns the token of one
who may write below bob/ only, and read what is public or granted (`hub.grant("owner/name", "bob")`).
`hub.latency_s` and `hub.bytes_per_s` emulate a distant server, per request and per connection.

In a process of its own, from tests/:

    python -m hub.server [--port P] [--latency S] [--rate BYTES_PER_S] [--cheap-digests] OWNER/NAME=FOLDER...

It prints one line of JSON, {"url": ..., "cdn_url": ..., "token": ...}, and answers GET /_hub/counters with its log.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote

from hub.api import PAGE_ENTRIES, Api, Ask, Reply
from hub.faults import Counters, Fault, FaultKind, Request, Where
from hub.repos import Blob, Entry, Repo, blobs_of

_CHUNK_BYTES = 64 * 1024


class TestHub:
    """A Hub and its CDN on two ports of the loopback, each a threaded HTTP/1.1 server."""

    __test__ = False  # no test class, whatever its name says

    def __init__(self, *, port: int = 0) -> None:
        self._secret = secrets.token_bytes(16)
        self._servers = [_Server(self, "hub", port), _Server(self, "cdn", 0)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        # Another host name, so that no client can take the CDN for the Hub.
        self.cdn_url = f"http://localhost:{self._servers[1].server_port}"
        self.api = Api(self)
        self.counters = Counters()
        self.lock = threading.RLock()
        #: Exceptions that the server itself raised: a test should find none.
        self.errors: list[BaseException] = []
        self.closing = threading.Event()
        self.token = "hf_tester"
        self.reset()

    def reset(self) -> None:
        """Forget repositories, users, faults, settings and counters."""
        #: (kind, "owner/name") -> repository.
        self.repos: dict[tuple[str, str], Repo] = {}
        #: token -> user; user -> namespaces that the user may write to beside their own.
        self.tokens: dict[str, str] = {self.token: "tester"}
        self.orgs: dict[str, frozenset[str]] = {}
        self.uploads: dict[str, Blob] = {}
        self.faults: list[Fault] = []
        #: Names without an owner, or of another time -> where the model is now.
        self.moved: dict[str, str] = {}
        #: Serve LFS files by redirect to the CDN.
        self.cdn = True
        #: Answer for other files with a relative redirect, as huggingface.co does today.
        self.relative_redirects = False
        #: Ask clients to upload large files by LFS (basic transfer; set HF_HUB_DISABLE_XET=1).
        self.lfs_uploads = False
        self.page_entries = PAGE_ENTRIES
        self.sign_for_s = 3600.0
        self.latency_s = 0.0
        self.bytes_per_s: float | None = None
        self._generation = 0
        self.counters.clear()
        self.errors.clear()

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True, name=f"{server.where}").start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # -- set up ---------------------------------------------------------------------------------------------------

    def add_repo(
        self,
        name: str,
        files: Path | Mapping[str, bytes | str | Path],
        *,
        private: bool = False,
        gated: bool = False,
        kind: str = "model",
        cheap_digests: bool = False,
    ) -> str:
        """Make (or add a commit to) repository `name` from a folder or path -> content; returns the commit's id."""
        with self.lock:
            repo = self.repos.setdefault((kind, name), Repo(repo_id=name, kind=kind))
            repo.private, repo.gated = private, gated
        return repo.commit(blobs_of(files, cheap_digests=cheap_digests)).oid

    def repo(self, name: str, kind: str = "model") -> Repo:
        """The repository, to look at its commits and files."""
        return self.repos[kind, name]

    def read(self, name: str, path: str, *, revision: str = "main") -> bytes:
        """A file's content, as stored."""
        commit = self.repo(name).resolve(revision)
        assert commit is not None
        return commit.entries[path].blob.read()

    def tag(self, name: str, tag: str, revision: str = "main") -> None:
        """Name a commit."""
        commit = self.repo(name).resolve(revision)
        assert commit is not None
        self.repo(name).tags[tag] = commit.oid

    def add_user(self, user: str, *, orgs: Sequence[str] = ()) -> str:
        """Make a user who may write to `user`/* and `orgs`; returns their token."""
        self.tokens[f"hf_{user}"] = user
        self.orgs[user] = frozenset(orgs)
        return f"hf_{user}"

    def grant(self, name: str, user: str) -> None:
        """Let `user` read the private or gated repository `name`."""
        self.repo(name).granted.add(user)

    def may_write(self, user: str | None, name: str) -> bool:
        """Whether `user` may write to repository `name`."""
        return user == "tester" or (
            user is not None and name.split("/", maxsplit=1)[0] in {user, *self.orgs.get(user, ())}
        )

    def fault(self, kind: FaultKind, **settings: Any) -> Fault:
        """Inject a fault (see `hub.faults.Fault` for the settings); its `hits` tell how often it struck."""
        fault = Fault(kind=kind, **settings)
        with self.lock:
            self.faults.append(fault)
        return fault

    # -- signed URLs ----------------------------------------------------------------------------------------------

    def expire_urls(self) -> None:
        """Make every URL that was signed so far invalid."""
        self._generation += 1

    def _signature(self, path: str, expires: str) -> str:
        text = f"{path}\0{expires}\0{self._generation}".encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def signed_url(self, repo: str, kind: str, entry: Entry) -> str:
        path = f"/{kind}s/{repo}/{entry.blob.sha256}/{quote(entry.path)}"
        expires = f"{time.time() + self.sign_for_s:.3f}"
        return f"{self.cdn_url}{path}?Expires={expires}&Signature={self._signature(path, expires)}"

    def answer_cdn(self, ask: Ask) -> Reply:
        """The CDN's reply: a signed file, or the receipt of an LFS upload."""
        xml = {"Content-Type": "application/xml"}
        if "authorization" in ask.headers:  # S3 does so: the signature is the only credential it takes
            body = b"<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>"
            return Reply(status=400, headers=xml, body=body)
        if ask.method == "PUT" and ask.path.startswith("/upload/"):
            blob = Blob(ask.body)
            if blob.sha256 != ask.path.removeprefix("/upload/"):
                return Reply(status=400, headers=xml, body=b"<Error><Code>BadDigest</Code></Error>")
            self.uploads[blob.sha256] = blob
            return Reply(headers={"ETag": f'"{blob.sha256}"'})
        query = parse_qs(ask.query)
        expires, signature = query.get("Expires", ["0"])[0], query.get("Signature", [""])[0]
        if float(expires) < time.time() or not hmac.compare_digest(signature, self._signature(ask.path, expires)):
            return Reply(status=403, headers=xml, body=b"<Error><Code>AccessDenied</Code></Error>")
        kind, owner, name, digest, file = unquote(ask.path).lstrip("/").split("/", 4)
        for commit in reversed(self.repos[kind[:-1], f"{owner}/{name}"].commits.values()):
            entry = commit.entries.get(file)
            if entry is not None and entry.blob.sha256 == digest:
                return Reply(headers={"ETag": f'"{digest}"', "Content-Type": "binary/octet-stream"}, blob=entry.blob)
        return Reply(status=404, headers=xml, body=b"<Error><Code>NoSuchKey</Code></Error>")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: TestHub, where: Where, port: int) -> None:
        self.hub, self.where = hub, where
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError) and error is not None:
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: `counters` is the log."""

    def _any(self) -> None:
        hub, where = self.server.hub, self.server.where
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        ask = Ask(method=self.command, path=path, query=query, headers=headers, body=body)
        if where == "hub" and path == "/_hub/counters":
            self._send(Reply(body=json.dumps([asdict(r) for r in hub.counters.log()]).encode()), None, None)
            return
        log = Request(
            where=where,
            method=self.command,
            path=unquote(path),
            query=query,
            range=headers.get("range"),
            authorization=headers.get("authorization"),
        )
        hub.counters.add(log)
        if hub.latency_s:
            time.sleep(hub.latency_s)
        with hub.lock:
            matching = (
                f for f in hub.faults if f.take(where=where, method=log.method, path=log.path, ranged=bool(log.range))
            )
            fault = next(matching, None)
        if fault is not None and fault.kind == "hang":
            hub.closing.wait(fault.seconds)
            self.close_connection = True
            return
        if fault is not None and fault.kind == "reset" and not fault.after_bytes:
            self._drop(reset=True)
            return
        if fault is not None and fault.kind == "status":
            wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            reply = Reply(status=fault.code, headers=wait | dict(fault.headers), body=b'{"error": "injected"}')
        elif fault is not None and fault.kind == "expired":
            reply = Reply(status=403, headers={"Content-Type": "application/xml"}, body=b"<Error/>")
        else:
            reply = hub.answer_cdn(ask) if where == "cdn" else hub.api.answer(ask)
        if fault is not None and fault.kind == "lost_reply":
            self._drop(reset=False)
            return
        self._send(reply, fault, log)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def _drop(self, *, reset: bool) -> None:
        if reset:  # linger 0: the kernel sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(self, reply: Reply, fault: Fault | None, log: Request | None) -> None:
        headers = dict(reply.headers)
        size = len(reply.body) if reply.blob is None else reply.blob.size
        begin, end, status = 0, size, reply.status
        if reply.blob is not None:
            headers.setdefault("Accept-Ranges", "bytes")
            headers.setdefault("Content-Type", "application/octet-stream")
            if fault is not None and fault.kind == "etag":
                headers |= {name: f'"{"0" * 40}"' for name in headers if name.lower() == "etag"}
            wanted = (
                self.headers.get("Range") if self.headers.get("If-Range") in (None, headers.get("ETag")) else None
            )
            if fault is not None and fault.kind == "ignore_range":
                wanted = None
            if wanted and "," not in wanted:  # several ranges: the whole file is a legal answer
                found = _parse_range(wanted, size)
                if found is None:
                    self._send(Reply(status=416, headers={"Content-Range": f"bytes */{size}"}), None, log)
                    return
                begin, end = found
                if fault is not None and fault.kind == "wrong_range":
                    begin, end = min(begin + 1, size - 1), min(end + 1, size)
                status = 206
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
            elif self.headers.get("If-None-Match") == headers.get("ETag"):
                self._send(Reply(status=304, headers=headers), None, log)
                return
        elif fault is not None and fault.kind == "etag":
            headers |= {name: f'"{"0" * 40}"' for name in headers if name.lower() in ("etag", "x-linked-etag")}
        if log is not None:
            log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command != "HEAD" and end > begin:
            self._send_body(reply, begin, end, fault, log)

    def _send_body(self, reply: Reply, begin: int, end: int, fault: Fault | None, log: Request | None) -> None:
        rate = self.server.hub.bytes_per_s
        stop = end
        trickles = fault is not None and fault.kind == "trickle"
        if fault is not None and trickles:
            rate = fault.bytes_per_s
        if fault is not None and fault.kind in ("cut", "reset"):
            stop = min(end, begin + fault.after_bytes)
        flip = fault.offset if fault is not None and fault.kind == "flip" else None
        started, sent = time.monotonic(), 0
        # Small pieces where the pace matters, large ones where speed does.
        piece = _CHUNK_BYTES * 16 if rate is None else max(1, min(_CHUNK_BYTES, int(rate / 10)))
        for chunk in _chunks(reply, begin, stop, piece):
            data = chunk
            at = begin + sent
            if flip is not None and at <= flip < at + len(data):
                data = data[: flip - at] + bytes([data[flip - at] ^ 0xFF]) + data[flip - at + 1 :]
            sent += len(data)
            if log is not None:
                # Before the write: a client that has the last byte may look at the counters at once.
                log.sent_bytes = sent
            self.wfile.write(data)
            if trickles and fault not in self.server.hub.faults:
                # The test took its fault back: the rest comes at once.
                rate, trickles = self.server.hub.bytes_per_s, False
            if rate is not None and self.server.hub.closing.wait(max(0.0, started + sent / rate - time.monotonic())):
                break
        if sent < end - begin:
            self._drop(reset=fault is not None and fault.kind == "reset")


def _chunks(reply: Reply, begin: int, end: int, piece: int) -> Iterator[bytes]:
    source = reply.body if reply.blob is None else reply.blob.source
    if isinstance(source, bytes):
        yield from (source[at : min(at + piece, end)] for at in range(begin, end, piece))
        return
    with source.open("rb") as file:
        yield from (os.pread(file.fileno(), min(piece, end - at), at) for at in range(begin, end, piece))


def _parse_range(text: str, size: int) -> tuple[int, int] | None:
    """[begin, end) of the single range in a Range header, or None where it cannot be satisfied."""
    unit, _, span = text.partition("=")
    first, dash, last = span.strip().partition("-")
    if unit.strip() != "bytes" or not dash:
        return 0, size
    if not first:
        return (max(0, size - int(last)), size) if int(last) else None
    begin, end = int(first), min(int(last) + 1, size) if last else size
    return (begin, end) if begin < end else None


def main(argv: Sequence[str] | None = None) -> None:
    """Serve folders until stdin closes or the process is told to end."""
    parser = argparse.ArgumentParser(description="A Hub for tests, in a process of its own.")
    parser.add_argument("repos", nargs="*", metavar="OWNER/NAME=FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=None, help="bytes per second of a connection")
    parser.add_argument("--cheap-digests", action="store_true", help="made-up digests, for sparse files")
    args = parser.parse_args(argv)
    with TestHub(port=args.port) as hub:
        hub.latency_s, hub.bytes_per_s = args.latency, args.rate
        for spec in args.repos:
            name, _, folder = spec.partition("=")
            hub.add_repo(name, Path(folder), cheap_digests=args.cheap_digests)
        print(json.dumps({"url": hub.url, "cdn_url": hub.cdn_url, "token": hub.token}), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
