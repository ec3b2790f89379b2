"""How much a caller may send: requests a minute (Flask-Limiter on Redis) and bytes a body."""

from __future__ import annotations

from flask import Flask, current_app, request
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address

from web.auth import is_loopback
from web.errors import Refused
from web.guard import caller_name
from web.services import services, services_of
from workers.ledger.connection import connect
from workers.settings import QueueSettings

_DEFAULT = "600/minute"


def _key() -> str:
    name = caller_name()
    return f"token:{name}" if name else f"address:{get_remote_address()}"


def _body() -> None:
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        # A few bytes may unfold into gigabytes.
        raise Refused(
            f"a body with Content-Encoding {encoding[:40]!r} is not unpacked: send it as it is",
            status=415,
            code="unsupported_media_type",
        )
    view = current_app.view_functions.get(request.endpoint or "")
    if getattr(view, "takes_metadata", False):
        request.max_content_length = services().web.max_metadata_bytes


def _exempt() -> bool:
    return (request.endpoint or "").startswith("health.") or request.endpoint == "static"


def init_app(app: Flask) -> None:
    """Limit the bodies of `app`, and its rate unless it is off (as it is on loopback by default)."""
    made = services_of(app)
    app.config["MAX_CONTENT_LENGTH"] = made.web.max_body_bytes
    app.before_request(_body)
    limit = made.web.rate_limit or ("off" if is_loopback(made.web.bind) else _DEFAULT)
    if limit == "off":
        return
    pool = connect(made.settings.redis_url, timeout_s=1.0).connection_pool
    limiter = Limiter(
        _key,
        # Over all addresses together: a default limit would be each address's own.
        application_limits=[limit],
        application_limits_exempt_when=_exempt,
        storage_uri="redis://",
        # Below the service's own keys: deploy/redis.sh lets it write no others.
        storage_options={
            "connection_pool": pool,  # type: ignore[dict-item]  # its types know texts and numbers only
            "key_prefix": f"{QueueSettings.from_env().prefix}limits",
        },
        headers_enabled=True,
        # Redis away: this process counts alone until it is back; nobody waits for it.
        in_memory_fallback_enabled=True,
    )
    limiter.init_app(app)
