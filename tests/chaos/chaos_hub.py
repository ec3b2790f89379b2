"""The test Hub in a process of its own, that answers badly when told to.

    python chaos_hub.py OWNER/NAME=FOLDER...        from tests/chaos, with tests/ on the path

Prints {"url", "token"}; then reads lines of JSON: a fault's fields, {"clear": true}, or {"history": "owner/name"},
which is answered by the commits of that repository, oldest first, each the list of [path, digest] it changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hub.server import TestHub


def main() -> None:
    """Serve until stdin closes."""
    with TestHub() as hub:
        for spec in sys.argv[1:]:
            name, _, folder = spec.partition("=")
            hub.add_repo(name, Path(folder))
        print(json.dumps({"url": hub.url, "token": hub.token}), flush=True)
        for line in sys.stdin:
            given = json.loads(line)
            if "history" in given:
                print(json.dumps(history(hub, given["history"])), flush=True)
            elif "clear" in given:
                hub.faults.clear()
            else:
                hub.fault(**given)


def history(hub: TestHub, name: str) -> list[list[list[str]]]:
    """What each commit changed."""
    changes: list[list[list[str]]] = []
    before: dict[str, str] = {}
    for commit in reversed(hub.repo(name).history("main")):
        now = {path: entry.etag for path, entry in commit.entries.items()}
        changes.append([[path, digest] for path, digest in now.items() if before.get(path) != digest])
        before = now
    return changes


if __name__ == "__main__":
    main()
