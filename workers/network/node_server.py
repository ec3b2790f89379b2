"""The HTTP servers by which nodes reach each other: connections that are kept, and a token for every call."""

from __future__ import annotations

import hmac
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class NodeServer(ThreadingHTTPServer):
    """A server of one node; it serves from `start` to `stop`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[NodeHandler], *, token: str) -> None:
        """Bind `address`.

        Raises:
            OSError: If it is taken.
        """
        self.authorization = f"Bearer {token}".encode()
        super().__init__(address, handler)

    def start(self, name: str) -> None:
        """Serve in a thread of this name."""
        threading.Thread(target=self.serve_forever, args=(0.2,), daemon=True, name=name).start()

    def stop(self) -> None:
        """Serve no more, and give the address back."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A node that hangs up in the middle is no event."""


class NodeHandler(BaseHTTPRequestHandler):
    """A call of another node."""

    protocol_version = "HTTP/1.1"
    server_version = "fairshard"
    sys_version = ""
    disable_nagle_algorithm = True
    server: NodeServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing; the nodes that call know what they got."""

    def admitted(self) -> bool:
        """Whether the caller knows the token."""
        given = (self.headers.get("Authorization") or "").encode()
        return hmac.compare_digest(given, self.server.authorization)

    def answer(self, status: int, body: bytes) -> None:
        """Answer with JSON."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
