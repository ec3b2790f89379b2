"""What a running application holds, found from within a request by `services()`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from flask import Flask, current_app

from web.auth import Tokens
from workers.jobs.jobs import Jobs
from workers.metadata_store.base import MetadataStore
from workers.settings import Settings, WebSettings

_KEY = "fairshard"
_STOPPING = "fairshard-stopping"


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The application's settings and the things that its views talk to."""

    settings: Settings
    web: WebSettings
    jobs: Jobs
    #: Opens the store of metadata and plans; made at the first use, since a Hub repository costs a call.
    store: Callable[[], MetadataStore]
    #: None: no tokens are asked for.
    tokens: Tokens | None
    #: Places for requests that wait for a plan, and for event streams; a thread each.
    waiters: threading.BoundedSemaphore = field(repr=False)
    listeners: threading.BoundedSemaphore = field(repr=False)


def install(app: Flask, made: Services) -> None:
    """Make `made` what `services()` gives within requests to `app`."""
    app.extensions[_KEY] = made


def stop_when(app: Flask, stopping: Callable[[], bool]) -> None:
    """Have streams and waits of `app` end once `stopping()`: its server wants to go and waits for them."""
    app.extensions[_STOPPING] = stopping


def stopping() -> Callable[[], bool]:
    """What tells whether the server of this request wants to go; works outside the request too."""
    return cast("Callable[[], bool]", current_app.extensions.get(_STOPPING, lambda: False))


def services_of(app: Flask) -> Services:
    """The services of `app`, outside a request."""
    return cast("Services", app.extensions[_KEY])


def services() -> Services:
    """The services of the application that handles this request."""
    return cast("Services", current_app.extensions[_KEY])
