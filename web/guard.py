"""Who may call: the host that is meant, the token and its scope, the headers every answer carries, CORS."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, Response, current_app, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from web.auth import Token, is_loopback
from web.errors import Refused
from web.services import services, services_of

_View = TypeVar("_View", bound=Callable[..., Any])

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: What a browser's page of another origin may send and read.
_ALLOWED = "Authorization, Content-Type, Last-Event-ID, Prefer, X-HF-Token"
_EXPOSED = "Location, Preference-Applied, Retry-After, X-Request-ID"
_LOCAL_HOST = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def needs(scope: str | None) -> Callable[[_View], _View]:
    """Say which scope a view needs; None: everyone may call it. Without this, GET needs `read`, the rest `submit`."""

    def mark(view: _View) -> _View:
        view.needs_scope = scope  # type: ignore[attr-defined]
        return view

    return mark


def caller() -> Token | None:
    """The token of this request, None without one or with one that is not known; looked up once."""
    if "token" not in g:
        g.token = None
        tokens = services().tokens
        kind, _, presented = request.headers.get("Authorization", "").partition(" ")
        if tokens is not None and kind.lower() == "bearer" and presented.strip():
            g.token = tokens.find(presented.strip())
    token: Token | None = g.token
    return token


def caller_name() -> str | None:
    """The token's name, whom jobs count against; None where no tokens are asked for."""
    token = caller()
    return None if token is None else token.name


def hub_token() -> str | None:
    """The caller's own Hub token.

    Raises:
        Refused: If it cannot be one; the answer does not repeat it.
    """
    token = request.headers.get("X-HF-Token", "").strip()
    if not token:
        return None
    if len(token) > 512 or not token.isascii() or not token.isprintable() or " " in token:
        raise Refused("X-HF-Token is not a Hub token", status=422, code="invalid_input")
    return token


def _scope() -> str | None:
    # 404, 405 and preflights say nothing of value; the page and the document hold none of the service's data.
    if request.endpoint in {None, "static", "api-docs.openapi_json"} or request.method == "OPTIONS":
        return None
    view = current_app.view_functions[str(request.endpoint)]
    default = "read" if request.method in {"GET", "HEAD"} else "submit"
    scope: str | None = getattr(view, "needs_scope", default)
    return scope


def _check_host() -> None:
    # Without tokens, a page of any site could reach the API of this machine by a name that resolves to it.
    made = services()
    if made.tokens is None and is_loopback(made.web.bind) and not made.web.bind.startswith("unix:"):
        host = request.headers.get("Host", "")
        if not _LOCAL_HOST.fullmatch(host):
            raise Refused(
                "this API answers on loopback only; call it as localhost or 127.0.0.1, or bind it to an address "
                "and give it tokens",
                status=421,
                code="misdirected_request",
            )


def _check_token() -> None:
    made = services()
    scope = _scope()
    if made.tokens is None or scope is None:
        return
    token = caller()
    if token is None:
        sent = "Authorization" in request.headers
        raise Refused(
            "this token is not known here"
            if sent
            else "an API token is required: send 'Authorization: Bearer <token>' (FAIRSHARD_TOKEN)",
            status=401,
            code="unauthorized",
            headers={"WWW-Authenticate": 'Bearer realm="fairshard"' + (', error="invalid_token"' if sent else "")},
        )
    if not token.may(scope):
        raise Refused(
            f"the token {token.name!r} may not do this: it needs the scope {scope!r}",
            status=403,
            code="access_denied",
            details={"needed": scope, "has": sorted(token.scopes)},
            headers={"WWW-Authenticate": f'Bearer realm="fairshard", error="insufficient_scope", scope="{scope}"'},
        )


def _name_request() -> None:
    sent = request.headers.get("X-Request-ID", "")
    g.request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)


def _preflight() -> Response | None:
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers and _origin():
        response = Response(status=204)
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
        response.headers["Access-Control-Allow-Headers"] = _ALLOWED
        response.headers["Access-Control-Max-Age"] = "600"
        return response
    return None


def _origin() -> str | None:
    allowed, origin = services().web.cors_origins, request.headers.get("Origin")
    if origin and "*" in allowed:
        return "*"
    return origin if origin and origin in allowed else None


def _headers(response: Response) -> Response:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    if request.is_secure:
        response.headers.setdefault("Strict-Transport-Security", "max-age=31536000")
    if request.endpoint != "static":
        response.headers.setdefault("Cache-Control", "no-store")
    response.headers["X-Request-ID"] = g.get("request_id", "")
    if services().web.cors_origins:
        response.vary.add("Origin")
        if origin := _origin():
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    return response


def init_identity(app: Flask) -> None:
    """Name each request, check the host, answer preflights; first of all."""
    if proxies := services_of(app).web.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies, x_host=0)  # type: ignore[method-assign]
    app.before_request(_name_request)
    app.before_request(_check_host)
    app.before_request(_preflight)
    app.after_request(_headers)


def init_access(app: Flask) -> None:
    """Ask for tokens; after the rate limit, so that guessing is limited too."""
    app.before_request(_check_token)
