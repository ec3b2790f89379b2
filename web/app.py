"""The application, made by a list of `init_app`s; nothing connects before the first request."""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import replace
from typing import Any

from flask import Flask

from planner.errors import InvalidInput
from web import audit, errors, guard, limits, metrics
from web.auth import Tokens, is_loopback
from web.replayer import Replayer
from web.runs import openai
from web.runs import plans as plan_runs
from web.schemas import ids, openapi
from web.services import Services, install
from web.views import batches, docs, health, jobs, nodes, page, plans, process, requests
from workers.jobs.jobs import Jobs
from workers.metadata_store.open import open_store
from workers.service.tokens import secret_key
from workers.settings import Settings, WebSettings


def create_app(settings: Settings | None = None, **overrides: Any) -> Flask:
    """Make the WSGI application.

    Args:
        settings: Of Redis, the store and the data folder; default: from the environment.
        **overrides: Fields of `WebSettings` that replace what the environment says (`bind="0.0.0.0:80"`, ...);
            `background=False` leaves out the thread that looks into the journal.

    Raises:
        InvalidInput: If a setting is wrong, or the address can be reached by others and there is no tokens file.
    """
    background = overrides.pop("background", True)
    web = replace(WebSettings.from_env(), **overrides)
    settings = settings or Settings.from_env()
    secret_key(settings)  # now, not when the first Hub token comes
    _log_to_stderr()
    app = Flask("web", static_url_path="/static")
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the default provider has it
    made = _services(settings, web)
    install(app, made)
    errors.init_app(app)
    metrics.init_app(app)
    guard.init_identity(app)
    limits.init_app(app)
    guard.init_access(app)
    audit.init_app(app)
    api = openapi.init_app(app)
    ids.init_app(app, api)
    for noun in (requests, process, plans, plan_runs, jobs, batches, nodes, health):
        api.register_blueprint(noun.blp)
    openapi.finish(api)
    openai.init_app(app)
    docs.init_app(app)
    page.init_app(app)
    if background:
        replayer = Replayer(made.jobs)
        replayer.ensure()
        app.before_request(replayer.ensure)  # a server that forks after loading leaves its threads behind
    return app


def _log_to_stderr() -> None:
    log = logging.getLogger("fairshard")
    log.setLevel(logging.INFO)
    if not log.hasHandlers():  # gunicorn sets up its own loggers only; without this the audit lines would go nowhere
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)


def _services(settings: Settings, web: WebSettings) -> Services:
    return Services(
        settings=settings,
        web=web,
        jobs=Jobs.from_settings(
            settings, journal=True, max_queued=web.max_queue, max_per_submitter=web.max_jobs_per_token
        ),
        store=functools.cache(
            lambda: open_store(settings.metadata_repo or settings.store_dir, token=settings.hub_token)
        ),
        tokens=_tokens(web),
        waiters=threading.BoundedSemaphore(web.waiters),
        listeners=threading.BoundedSemaphore(web.listeners),
    )


def _tokens(web: WebSettings) -> Tokens | None:
    if web.require_token == "never":  # noqa: S105  (no password)
        return None
    if web.require_token == "auto" and is_loopback(web.bind) and web.tokens_file is None:  # noqa: S105
        return None
    if web.tokens_file is None:
        raise InvalidInput(
            f"others can reach {web.bind}, and there are no API tokens: make one with "
            "`python -m web.auth new NAME --file tokens.json` and set FAIRSHARD_TOKENS_FILE, or bind to 127.0.0.1",
            details={"setting": "FAIRSHARD_TOKENS_FILE", "bind": web.bind},
        )
    return Tokens(web.tokens_file)
