"""Writes the table of settings in docs/operations.md: `python scripts/settings_doc.py` (`make docs`)."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- settings: made by `make docs` -->\n", "<!-- end of settings -->\n"


def render() -> str:
    """The document, with its table anew."""
    sys.path.insert(0, str(ROOT))
    from workers.settings.environment import variables

    order = ("all", "node", "workers", "API", "client")
    rows = sorted(variables().values(), key=lambda variable: order.index(variable.roles or "all"))
    lines = ["| for | variable | default | |\n|---|---|---|---|\n"]
    for row in rows:
        names = f"`{row.name}`" + (f", or `{row.name}_FILE`" if row.file else "")
        default = f"`{row.default}`" if row.default and " " not in row.default else row.default
        lines.append(f"| {row.roles} | {names} | {default} | {row.what} |\n".replace("|  |", "| |"))
    head, _, rest = TARGET.read_text(encoding="utf-8").partition(BEGIN)
    return head + BEGIN + "".join(lines) + END + rest.partition(END)[2]


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
