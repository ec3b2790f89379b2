"""Byte ranges over HTTP, from servers that fail now and then.

Built on http.client, so a reader costs one connection and one buffer, and bytes go from the socket straight to the
caller. Failures that may pass are retried (`workers.network.retry`). Refused at once are:

- an answer whose ETag, commit, length or Content-Range is not that of the pinned file;
- 401, 403, 404 of the server itself (from a CDN they mean an expired address, and a new one is asked for).

The token goes to the endpoint alone, never to an address that it redirects to.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from planner.errors import AccessDenied, IntegrityError, NodeFailure, NotFound
from workers.network.retry import RetryPolicy, Transient, asked_s, retrying

_BUFFER_BYTES = 512 * 1024
_REDIRECTS = 5
#: A server that ignores Range is read past this much, and no further.
_SKIP_BYTES = 1024 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 525, 526, 529, 530})
_EXPIRED = frozenset({400, 401, 403, 404, 410})

#: Receives bytes in the order of the file; may raise to stop.
Sink = Callable[[memoryview], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file that a server keeps, and what pins it."""

    url: str
    size_bytes: int
    #: Without quotes; None where the server states none.
    etag: str | None = None
    #: What X-Repo-Commit must say, if it says anything.
    commit: str | None = None


@dataclass(slots=True)
class Server:
    """What the readers of one server share."""

    #: Sent to the URLs of `RemoteFile`s alone, never to an address that they redirect to.
    headers: Mapping[str, str]
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    #: What to say when access is denied.
    remedy: str = ""
    #: Whether it may send us elsewhere, as the Hub does.
    redirects: bool = True
    #: Address of a file -> where it was redirected to (a signed address with an end).
    _locations: dict[str, str] = field(default_factory=dict)
    #: Address of a file -> the ETag that the CDN gave first.
    _etags: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def location(self, url: str) -> str | None:
        """Where `url` redirected to, if that is known."""
        return self._locations.get(url)

    def moved(self, url: str, target: str) -> None:
        """Remember where `url` redirects to."""
        with self._lock:
            self._locations[url] = target

    def expired(self, url: str, target: str) -> None:
        """Forget a redirect that no longer works, unless another reader has already found a new one."""
        with self._lock:
            if self._locations.get(url) == target:
                del self._locations[url]

    def same_etag(self, url: str, etag: str) -> bool:
        """Whether the CDN's ETag is the one that it gave first."""
        with self._lock:
            return self._etags.setdefault(url, etag) == etag


class RangeReader:
    """Reads ranges over one connection; one thread's own."""

    def __init__(self, server: Server, *, pause: Callable[[float], object] = time.sleep) -> None:
        self._server = server
        self._pause = pause
        self._connections: dict[tuple[str, str], http.client.HTTPConnection] = {}
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def __del__(self) -> None:
        self.close()

    def read(self, file: RemoteFile, begin: int, end: int, sink: Sink) -> None:
        """Hand bytes [begin, end) of `file` to `sink`, in order and each once, however often the connection breaks.

        Raises:
            AccessDenied: If the server asks for a token, or for another one.
            NotFound: If the server has no such file.
            IntegrityError: If the server has another file under that name than the pinned one.
            Unavailable: If the policy's limits are reached.
        """
        at = begin

        def counting(view: memoryview) -> None:
            nonlocal at
            try:
                sink(view)
            except OSError as error:  # or it would be taken for the connection's failure, and retried
                raise NodeFailure(f"what was fetched cannot be kept: {error}") from error
            at += len(view)

        def attempt() -> None:
            while at < end:
                self._once(file, at, end, counting)

        try:
            retrying(
                attempt,
                what=_shown(file.url),
                policy=self._server.policy,
                progress=lambda: at - begin,
                pause=self._pause,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections; the reader can be used again."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def abort(self) -> None:
        """End a read that another thread is in: its socket is shut, and `pause` decides that it stops."""
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _once(self, file: RemoteFile, begin: int, end: int, sink: Sink) -> None:
        known = self._server.location(file.url)
        url, own = known or file.url, known is None
        for _ in range(_REDIRECTS):
            try:
                response = self._get(url, begin, end, own=own)
                if own:
                    self._check_pins(file, response)
                if response.status in {200, 206}:
                    self._deliver(file, response, begin, end, sink, own=own)
                    return
                target = self._target(file, url, response, own=own)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                raise Transient(f"{type(error).__name__}: {error}") from error
            except BaseException:
                self.close()
                raise
            own = own and _origin(target) == _origin(file.url)
            url = target
        raise Transient(f"more than {_REDIRECTS} redirects")

    def _target(self, file: RemoteFile, url: str, response: http.client.HTTPResponse, *, own: bool) -> str:
        """Where an answer without bytes sends us; raises where it sends us nowhere."""
        status = response.status
        if status in {301, 302, 303, 307, 308}:
            location = response.getheader("Location")
            if not location or not self._server.redirects:
                raise Transient(
                    f"HTTP {status} {'without a Location' if not location else 'from a server that may not redirect'}"
                )
            response.read(_SKIP_BYTES)
            target = urllib.parse.urljoin(url, location)
            if _origin(target) != _origin(file.url):
                self._server.moved(file.url, target)
            return target
        reason = f"HTTP {status} {response.getheader('X-Error-Message') or response.reason}".strip()
        details = {"url": _shown(file.url), "status": status, "hub_code": response.getheader("X-Error-Code")}
        if status in _TRANSIENT:
            raise Transient(reason, retry_after_s=asked_s(response.getheader))
        if not own and status in _EXPIRED:
            self._server.expired(file.url, url)
            raise Transient(f"{reason} from {_shown(url)}: the signed address has expired")
        if status in {401, 403}:
            raise AccessDenied(f"{_shown(file.url)}: {reason}. {self._server.remedy}".strip(), details=details)
        if status in {404, 410}:
            raise NotFound(f"{_shown(file.url)}: {reason}", details=details)
        if status == 416:
            raise IntegrityError(
                f"{_shown(file.url)}: shorter than the {file.size_bytes} bytes it was listed with", details=details
            )
        raise Transient(reason)  # other 4xx come from proxies between, and pass more often than not

    def _check_pins(self, file: RemoteFile, response: http.client.HTTPResponse) -> None:
        commit = response.getheader("X-Repo-Commit")
        if commit and file.commit and commit != file.commit:
            raise IntegrityError(
                f"{_shown(file.url)}: the server answers for commit {commit}, pinned is {file.commit}",
                details={"url": _shown(file.url), "found": commit, "wanted": file.commit},
            )
        linked = response.getheader("X-Linked-Etag")
        etag = linked or (response.getheader("ETag") if response.status in {200, 206} else None)
        if etag and file.etag and _bare(etag) != file.etag:
            raise IntegrityError(
                f"{_shown(file.url)}: the server's ETag is {_bare(etag)}, pinned is {file.etag}: it was replaced",
                details={"url": _shown(file.url), "found": _bare(etag), "wanted": file.etag},
            )

    def _deliver(
        self, file: RemoteFile, response: http.client.HTTPResponse, begin: int, end: int, sink: Sink, *, own: bool
    ) -> None:
        encoding = response.getheader("Content-Encoding") or "identity"
        if encoding.lower() != "identity":
            # Not asked for, and not unpacked: a few bytes may unfold into gigabytes.
            raise IntegrityError(
                f"{_shown(file.url)}: the server sends Content-Encoding {encoding:.40}, which was not asked for",
                details={"url": _shown(file.url), "encoding": encoding[:40]},
            )
        etag = response.getheader("ETag")
        if etag and not own and not self._server.same_etag(file.url, _bare(etag)):
            raise IntegrityError(
                f"{_shown(file.url)}: the ETag changed to {_bare(etag)} while the file was read; it was replaced",
                details={"url": _shown(file.url), "found": _bare(etag)},
            )
        skip, length = begin, response.length
        if response.status == 206:
            found = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
            if not found or int(found[1]) != begin or int(found[2]) >= end:
                raise Transient(f"Content-Range {response.getheader('Content-Range')!r} for bytes {begin}-{end - 1}")
            if found[3] not in {"*", str(file.size_bytes)}:
                raise IntegrityError(f"{_shown(file.url)}: {found[3]} bytes long, listed with {file.size_bytes}")
            # A server may answer with less than was asked for; the rest is asked for next.
            end, skip = min(end, int(found[2]) + 1), 0
        elif length is not None and length != file.size_bytes:
            raise IntegrityError(f"{_shown(file.url)}: {length} bytes long, listed with {file.size_bytes}")
        elif begin > _SKIP_BYTES:
            raise Transient(f"the server ignores Range (200 instead of 206) at byte {begin}")
        if response.status == 206 and length is not None and length != end - begin:
            raise Transient(f"{length} bytes announced for a range of {end - begin}")
        self._pour(response, skip, end - begin, sink)

    def _pour(self, response: http.client.HTTPResponse, skip: int, count: int, sink: Sink) -> None:
        """Pass `count` bytes to the sink after leaving out `skip`, watching that they keep coming."""
        policy = self._server.policy
        raw = response.fp if response.length is not None and not response.chunked else None
        window_end, window_bytes = time.monotonic() + policy.stall_s, 0
        while count:
            if raw is not None:
                # readinto1 returns what one recv brings: a trickle is seen, and nothing is copied twice.
                got = raw.readinto1(self._buffer[: min(_BUFFER_BYTES, skip or count)])
                piece = self._buffer[:got]
            else:
                piece = memoryview(response.read1(min(_BUFFER_BYTES, skip or count)))
            if not piece:
                raise Transient(f"the connection ended {count + skip} bytes early")
            window_bytes += len(piece)
            now = time.monotonic()
            if now >= window_end:
                if window_bytes < min(policy.stall_bytes, count):
                    raise Transient(f"only {window_bytes} bytes came in {policy.stall_s:g} s")
                window_end, window_bytes = now + policy.stall_s, 0
            if skip:
                skip -= len(piece)
                continue
            sink(piece)
            count -= len(piece)
        if raw is None or response.status == 200 or response.will_close:
            self.close()  # what is left of the body would be taken for the next answer
        else:
            response.close()

    def _get(self, url: str, begin: int, end: int, *, own: bool) -> http.client.HTTPResponse:
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity", "User-Agent": "fairshard"}
        if own:
            headers.update(self._server.headers)
        try:
            parts = urllib.parse.urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise Transient(f"redirected to an invalid address: {_shown(url)}") from error
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        key = (parts.scheme, parts.netloc)
        fresh = key not in self._connections
        connection, through_proxy = self._connection(parts)
        target = url if through_proxy else path
        try:
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            connection.close()
            self._connections.pop(key, None)
            if fresh:
                raise
            # A kept connection that the server closed meanwhile is no failure of the server.
            return self._get(url, begin, end, own=own)
        if connection.sock is not None:
            connection.sock.settimeout(self._server.policy.stall_s)
        return response

    def _connection(self, parts: urllib.parse.SplitResult) -> tuple[http.client.HTTPConnection, bool]:
        import urllib.request

        host, port = parts.hostname or "", parts.port
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and urllib.request.proxy_bypass(host):
            proxy = None
        plain_proxy = bool(proxy) and parts.scheme == "http"
        found = self._connections.get((parts.scheme, parts.netloc))
        if found is not None:
            if found.sock is not None:
                found.sock.settimeout(self._server.policy.connect_s)
            return found, plain_proxy
        timeout = self._server.policy.connect_s
        at = urllib.parse.urlsplit(proxy) if proxy else None
        connect_to = (at.hostname or "", at.port) if at else (host, port)
        made: http.client.HTTPConnection
        if parts.scheme == "https":
            made = http.client.HTTPSConnection(connect_to[0], connect_to[1], timeout=timeout, context=_tls())
            if at:
                made.set_tunnel(host, port or 443)
        elif parts.scheme == "http":
            made = http.client.HTTPConnection(connect_to[0], connect_to[1], timeout=timeout)
        else:
            raise Transient(f"redirected to a {parts.scheme!r} address; only http and https are followed")
        made.connect()
        made.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[parts.scheme, parts.netloc] = made
        return made, plain_proxy


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        # Slim images have no certificates of their own; huggingface_hub's client brings these.
        try:
            import certifi
        except ImportError:
            return context
        context.load_verify_locations(certifi.where())
    return context


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _bare(etag: str) -> str:
    return etag.strip().removeprefix("W/").strip('"')


def _shown(url: str) -> str:
    """The address without its query, which may carry a signature."""
    return url.partition("?")[0]
