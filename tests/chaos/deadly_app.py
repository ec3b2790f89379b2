"""The service's own app, in which some models end the process that touches them, as the system does without memory.

celery -A deadly_app worker ...
"""

from __future__ import annotations

import os
import signal
from typing import Any

from workers import downloader
from workers.celery_app import app as app  # noqa: PLC0414  (celery looks for it here)

_resolve = downloader.resolve


def _deadly(source: Any, **options: Any) -> Any:
    if "deadly" in str(source):
        os.kill(os.getpid(), signal.SIGKILL)
    return _resolve(source, **options)


downloader.resolve = _deadly
