"""`gunicorn web.wsgi:app`: the environment's application, made when asked for, not at import."""

from __future__ import annotations

import sys

from flask import Flask

from planner.errors import FairshardError
from web.app import create_app

#: gunicorn's exit status of a worker that can't load its application: it then ends, instead of trying again.
_NOT_LOADED = 4


def __getattr__(name: str) -> Flask:
    if name == "app":
        try:
            return create_app()
        except FairshardError as error:
            print(f"fairshard: {error}", file=sys.stderr, flush=True)
            sys.exit(_NOT_LOADED)
    raise AttributeError(name)
