"""Where other nodes of a run reach this one's runner: frames in, sessions opened, renewed and ended.

    POST   /frames               a frame (`workers.runner.frame`); answered when the chain behind it is done
    POST   /sessions/<run>       opens the run's session here
    POST   /sessions/<run>/lease renews it
    DELETE /sessions/<run>       ends it

Who has no token learns nothing. While a frame is worked on, an empty line tells its sender several times within
FAIRSHARD_HOP_SILENCE_S that this node lives; the last line is JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, Self

from planner.errors import FairshardError, InvalidInput, LimitExceeded, NotFound
from workers.network.node_server import NodeHandler, NodeServer
from workers.runner.frame import Frame, read_frame
from workers.runner.runs import error_json
from workers.settings import RunSettings

logger = logging.getLogger(__name__)

_PATH = re.compile(r"/sessions/([0-9a-f]{8,64})(/lease)?")
#: Largest body that opens a session: who holds which of a model's parts.
_LARGEST_JSON = 16 << 20
#: Frames that are worked on at once.
_MOST_VISITS = 10_000
#: Bytes of a refused body that are taken and forgotten.
_MOST_UNREAD = 64 << 20
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Sessions(Protocol):
    """What the server hands its requests to."""

    def frame(self, frame: Frame) -> dict[str, Any]:
        """Run a step and hand on what comes of it."""

    def open(self, run_id: str, said: dict[str, Any]) -> dict[str, Any]:
        """Open a run's session."""

    def renew(self, run_id: str) -> dict[str, Any]:
        """Renew a session's lease."""

    def end(self, run_id: str) -> dict[str, Any]:
        """End a session."""


class RunnerServer:
    """The server; a context that serves while it is open."""

    def __init__(self, sessions: Sessions, *, token: str, url: str, settings: RunSettings) -> None:
        """Bind the address that `url` names; port 0 is any free one.

        Raises:
            InvalidInput: If it is taken.
        """
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or "127.0.0.1"
        bound = host if host in _LOOPBACK else ""
        try:
            self._server = _Server((bound, parts.port or 0), sessions, token, settings)
        except OSError as error:
            raise InvalidInput(
                f"port {parts.port} for runs cannot be opened here: {error.strerror}; name a free one "
                "(FAIRSHARD_RUN_URL)",
                details={"port": parts.port, "setting": "FAIRSHARD_RUN_URL"},
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._server.start("runner-server")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.stop()


class _Server(NodeServer):
    def __init__(self, address: tuple[str, int], sessions: Sessions, token: str, settings: RunSettings) -> None:
        self.sessions, self.settings = sessions, settings
        self.beat_s = settings.silence_s / 4
        # A pass that visits this node many times holds a thread for each visit until the chain behind it is done.
        self.pool = ThreadPoolExecutor(_MOST_VISITS, "frames")
        super().__init__(address, _Handler, token=token)


class _Handler(NodeHandler):
    #: Of a connection that is idle, in seconds; its owner makes another.
    timeout = 120
    server: _Server

    def do_POST(self) -> None:  # noqa: N802  (http.server's name)
        self._serve("POST")

    def do_DELETE(self) -> None:  # noqa: N802  (http.server's name)
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        if not self.admitted():
            self._whole(401, {"error": "the token is missing or wrong", "code": "access_denied"})
            return
        try:
            work = self._work(method)
        except FairshardError as error:
            self._refuse(error)
            return
        self._worked_on(self.server.pool.submit(work))

    def _work(self, method: str) -> Callable[[], dict[str, Any]]:
        """What is to be done; all of the body is read.

        Raises:
            FairshardError: If nothing is.
        """
        sessions = self.server.sessions
        length = self.headers.get("Content-Length") or ""
        if not length.isascii() or not length.isdigit() or len(length) > 15:
            raise InvalidInput("a body needs its Content-Length")
        if method == "POST" and self.path == "/frames":
            # A sender that goes silent in the middle is cut off, as one is that goes silent between two.
            self.connection.settimeout(self.server.settings.silence_s)
            try:
                frame = read_frame(self.rfile.read, int(length), largest_bytes=self.server.settings.max_frame_bytes)
            except TimeoutError:
                raise InvalidInput("a frame was cut: its sender went silent") from None
            self.connection.settimeout(self.timeout)
            return lambda: sessions.frame(frame)
        if int(length) > _LARGEST_JSON:
            raise LimitExceeded(f"a body of {int(length):,} bytes is larger than {_LARGEST_JSON:,}")
        body = self.rfile.read(int(length))
        found = _PATH.fullmatch(self.path)
        if found is None:
            raise NotFound("there is nothing at this address")
        run_id = found[1]
        if method == "DELETE":
            return lambda: sessions.end(run_id)
        if found[2]:
            return lambda: sessions.renew(run_id)
        try:
            said = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"the body is no JSON: {error!s:.200}") from None
        if not isinstance(said, dict):
            raise InvalidInput("the body is no object")
        return lambda: sessions.open(run_id, said)

    def _worked_on(self, work: Future[dict[str, Any]]) -> None:
        """Tell the caller that this node lives until `work` is done, then what came of it."""
        began = False
        while not wait([work], timeout=self.server.beat_s).done:
            if not began:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                began = True
            self._chunk(b"\n")
        error = work.exception()
        if error is None:
            answer = work.result()
        else:
            if not isinstance(error, FairshardError):
                logger.error("a call of another node failed", exc_info=error)
            answer = _refusal(error)
        if began:
            self._chunk(json.dumps(answer).encode() + b"\n")
            self._chunk(b"")
        else:
            self._whole(200, answer)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _refuse(self, error: FairshardError) -> None:
        # What of the body was not read would be taken for the next request.
        self.close_connection = True
        self._whole(400, _refusal(error))
        # Its sender reads the answer only if it isn't cut off while it sends.
        with contextlib.suppress(OSError):
            self.connection.settimeout(self.server.settings.silence_s)
            self.connection.shutdown(socket.SHUT_WR)
            left = _MOST_UNREAD
            while left > 0 and (data := self.connection.recv(1 << 16)):
                left -= len(data)

    def _whole(self, status: int, answer: dict[str, Any]) -> None:
        self.answer(status, json.dumps(answer).encode() + b"\n")


def _refusal(error: BaseException) -> dict[str, Any]:
    said = error_json(error)
    return {"error": said["message"], "code": said["code"], "details": said["details"]}
