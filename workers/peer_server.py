"""Serves this node's finished shards to other nodes: read-only, by range, to those who know the token.

    GET /                          {"shards": [{"folder", "model_name", "revision", "plan_id", "node_id"}]}
    GET /<folder>/manifest.json
    GET /<folder>/<weight file>    with Range

Nothing else can be named: a folder is one that `workers.shards.finished_shards` lists, a file one that its manifest
lists; a link that leads out of the shards' folder is followed for nobody.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from planner.errors import InvalidInput
from workers.manifest import MANIFEST
from workers.shards import finished_shards

_LOOPBACK = frozenset({"127.0.0.1", "localhost"})
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class PeerServer:
    """The server of one node's shards; a context that serves while it is open."""

    def __init__(self, shards_dir: Path, *, token: str, host: str = "127.0.0.1", port: int = 0) -> None:
        """Bind the address.

        Raises:
            InvalidInput: If there is no token (whoever reaches the port could read the weights), or no such port is
                free here.
        """
        if not token:
            raise InvalidInput("FAIRSHARD_PEER_URL needs FAIRSHARD_PEER_TOKEN, the same on every node")
        try:
            self._server = _Server((host, port), shards_dir, f"Bearer {token}")
        except OSError as error:
            raise InvalidInput(
                f"port {port} of FAIRSHARD_PEER_URL cannot be served from here: {error.strerror}; name a free one",
                details={"port": port, "errno": error.errno},
            ) from error
        self.port = self._server.server_port

    @classmethod
    def at(cls, shards_dir: Path, *, url: str, token: str) -> PeerServer:
        """A server on the port that `url` names: of the loopback if it names that, else on every address here."""
        wrong = InvalidInput(f"FAIRSHARD_PEER_URL must be http://host:port, got {url!r}")
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            raise wrong from None
        if parts.scheme != "http" or not parts.hostname:
            raise wrong
        host = parts.hostname if parts.hostname in _LOOPBACK else ""
        return cls(shards_dir, token=token, host=host, port=port)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True, name="peer-server").start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _lies_in(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], shards_dir: Path, authorization: str) -> None:
        self.shards_dir = shards_dir
        self.authorization = authorization.encode()
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A node that hangs up in the middle is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "fairshard"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = 60
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing; the nodes that ask know what they got."""

    def do_GET(self) -> None:
        given = (self.headers.get("Authorization") or "").encode()
        if not hmac.compare_digest(given, self.server.authorization):
            self._answer(401, b'{"error": "the token is missing or wrong"}')
            return
        shards = dict(finished_shards(self.server.shards_dir))
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        if not path:
            listed = [
                {
                    "folder": folder.name,
                    "model_name": manifest.model_name,
                    "revision": manifest.revision,
                    "plan_id": manifest.plan_id,
                    "node_id": manifest.node_id,
                }
                for folder, manifest in shards.items()
            ]
            self._answer(200, json.dumps({"shards": listed}).encode())
            return
        name, _, file = path.partition("/")
        for folder, manifest in shards.items():
            digests = {item.name: item.digest for item in manifest.files}
            if folder.name == name and file == MANIFEST:
                self._answer(200, (folder / MANIFEST).read_bytes())
                return
            if folder.name == name and file in digests and _lies_in(self.server.shards_dir, folder / file):
                self._send_range(folder / file, digests[file])
                return
        self._answer(404, b'{"error": "there is no such shard or file"}')

    def _send_range(self, path: Path, digest: str | None) -> None:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            wanted = _RANGE.fullmatch(self.headers.get("Range") or f"bytes=0-{max(0, size - 1)}")
            if wanted is None or int(wanted[1]) > int(wanted[2]) or int(wanted[1]) >= max(1, size):
                self._answer(416, b"")
                return
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - begin))
            if digest is not None:
                self.send_header("ETag", f'"{digest}"')
            self.end_headers()
            self.wfile.flush()
            if end > begin:
                self.connection.sendfile(file, begin, end - begin)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
