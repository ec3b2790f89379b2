"""Calls another node's runner: HTTP/1.1 over connections that are kept, and a death that is noticed at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from planner.errors import FairshardError, NodeFailure, Unavailable, from_code

_JSON = "application/json"
_SLICE_BYTES = 1 << 20


class Peer:
    """One other node, as runs call it; for any number of threads."""

    def __init__(self, node_id: str, url: str, *, token: str, silence_s: float) -> None:
        self.node_id, self.url = node_id, url
        self._silence_s = silence_s
        self._headers = {"Authorization": f"Bearer {token}"}
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._closed = False

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, deadline_s: float) -> Any:
        """What the node answers to JSON; errors as `send`."""
        data = () if body is None else (json.dumps(body).encode(),)
        return self.send(method, path, data, kind=_JSON, deadline_s=deadline_s)

    def send(
        self,
        method: str,
        path: str,
        pieces: Sequence[bytes],
        *,
        deadline_s: float,
        kind: str = "application/octet-stream",
    ) -> Any:
        """What the node answers to `pieces`, one after the other.

        While it works, it sends an empty line several times within `silence_s`.

        Raises:
            FairshardError: The one by which the node refuses.
            Unavailable: If it is not there, dies meanwhile, says nothing for `silence_s`, or is not done after
                `deadline_s`.
        """
        began = time.monotonic()
        while True:
            connection, used = self._connection()
            try:
                response = self._begin(connection, method, path, pieces, kind)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if used and not isinstance(error, TimeoutError):
                    continue  # it was closed while it was idle; a frame that did arrive would be refused as replayed
                raise self._gone(error) from None
            try:
                return self._answer(response, began + deadline_s)
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                raise self._gone(error) from None
            finally:
                self._keep(connection)

    def close(self) -> None:
        """Close what is idle now, and what is in use once it is done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        parts = urllib.parse.urlsplit(self.url)
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=self._silence_s), False

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if not self._closed and connection.sock is not None:
                self._idle.append(connection)
                return
        connection.close()

    def _begin(
        self, connection: http.client.HTTPConnection, method: str, path: str, pieces: Sequence[bytes], kind: str
    ) -> http.client.HTTPResponse:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in self._headers.items():
            connection.putheader(name, value)
        connection.putheader("Content-Type", kind)
        connection.putheader("Content-Length", str(sum(map(len, pieces))))
        # The first piece goes out with the head, in one packet.
        connection.endheaders(pieces[0] if pieces else None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was read: it says why
            for piece in pieces[1:]:
                # In slices: the time limit of `send` is that of all it is given.
                for begin in range(0, len(piece), _SLICE_BYTES):
                    connection.send(memoryview(piece)[begin : begin + _SLICE_BYTES])
        return connection.getresponse()

    def _answer(self, response: http.client.HTTPResponse, deadline: float) -> Any:
        while not (line := response.readline()).strip():
            if not line:
                raise http.client.IncompleteRead(b"")
            if time.monotonic() > deadline:
                response.close()
                raise TimeoutError("deadline")
        response.read()
        said = json.loads(line)
        if not isinstance(said, dict):
            raise ValueError("no object")
        if "error" in said:
            raise self._refusal(said)
        return said

    def _refusal(self, said: Mapping[str, Any]) -> FairshardError:
        code, message, details = (said.get(name) for name in ("code", "error", "details"))
        known = from_code(str(code), str(message), details=details if isinstance(details, dict) else None)
        return known or NodeFailure(f"node {self.node_id}: {message}", details={"node_id": self.node_id})

    def _gone(self, error: Exception) -> Unavailable:
        if isinstance(error, TimeoutError):
            late = str(error) == "deadline"
            why = "did not answer within its deadline" if late else f"said nothing for {self._silence_s:g} s"
        else:
            why = f"is gone ({error!r:.120})"
        return Unavailable(f"node {self.node_id} at {self.url} {why}", details={"node_id": self.node_id})
