"""`gunicorn web.wsgi:app`: the environment's application, made when asked for, not at import."""

from __future__ import annotations

from flask import Flask

from web.app import create_app


def __getattr__(name: str) -> Flask:
    if name == "app":
        return create_app()
    raise AttributeError(name)
