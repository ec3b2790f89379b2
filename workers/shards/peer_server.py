"""Serves this node's finished shards to other nodes: read-only, by range, to those who know the token.

    GET /                          {"shards": [{"folder", "model_name", "revision", "plan_id", "node_id"}]}
    GET /<folder>/manifest.json
    GET /<folder>/<weight file>    with Range

Anything else is answered with 404: only finished shards and the files that their manifests list are served, and no
link that leads out of the shards' folder is followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from planner.errors import FairshardError, InvalidInput
from workers.network.node_server import NodeHandler, NodeServer
from workers.shards.manifest import MANIFEST, read_manifest

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
            self._server = _Server((host, port), shards_dir, token)
        except OSError as error:
            raise InvalidInput(
                f"port {port} of FAIRSHARD_PEER_URL cannot be opened here: {error.strerror}; name a free one",
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
        self._server.start("peer-server")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.stop()


def _served(folder: Path) -> _Served:
    manifest = read_manifest(folder)
    return _Served(
        entry={
            "folder": folder.name,
            "model_name": manifest.model_name,
            "revision": manifest.revision,
            "plan_id": manifest.plan_id,
            "node_id": manifest.node_id,
        },
        digests={item.name: item.digest for item in manifest.files},
    )


def _lies_in(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """What a request needs to know of a shard."""

    #: Its entry in the list of shards.
    entry: Mapping[str, str]
    #: Weight file -> digest.
    digests: Mapping[str, str | None]


class _Server(NodeServer):
    def __init__(self, address: tuple[str, int], shards_dir: Path, token: str) -> None:
        self.shards_dir = shards_dir
        #: Folder -> (which manifest it was, what it said): a large one takes longer to read than a range to send.
        self._known: dict[Path, tuple[tuple[int, int], _Served]] = {}
        super().__init__(address, _Handler, token=token)

    def served(self) -> dict[Path, _Served]:
        """The finished shards by folder, each manifest read once."""
        known: dict[Path, tuple[tuple[int, int], _Served]] = {}
        for path in sorted(self.shards_dir.glob(f"[!.]*/{MANIFEST}")):
            with contextlib.suppress(FairshardError, OSError):
                stat = path.stat()
                which, folder = (stat.st_ino, stat.st_mtime_ns), path.parent
                before = self._known.get(folder)
                known[folder] = before if before and before[0] == which else (which, _served(folder))
        self._known = known
        return {folder: found for folder, (_, found) in known.items()}


class _Handler(NodeHandler):
    timeout = 60
    server: _Server

    def do_GET(self) -> None:  # noqa: N802  (http.server's name)
        if not self.admitted():
            self.answer(401, b'{"error": "the token is missing or wrong"}')
            return
        shards = self.server.served()
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        if not path:
            self.answer(200, json.dumps({"shards": [dict(shard.entry) for shard in shards.values()]}).encode())
            return
        name, _, file = path.partition("/")
        folder = self.server.shards_dir / name
        known = folder in shards and (file == MANIFEST or file in shards[folder].digests)
        if known and _lies_in(self.server.shards_dir, folder / file):
            if file == MANIFEST:
                self.answer(200, (folder / MANIFEST).read_bytes())
            else:
                self._send_range(folder / file, shards[folder].digests[file])
            return
        self.answer(404, b'{"error": "there is no such shard or file"}')

    def _send_range(self, path: Path, digest: str | None) -> None:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            wanted = _RANGE.fullmatch(self.headers.get("Range") or f"bytes=0-{max(0, size - 1)}")
            if wanted is None or int(wanted[1]) > int(wanted[2]) or int(wanted[1]) >= max(1, size):
                self.answer(416, b"")
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
