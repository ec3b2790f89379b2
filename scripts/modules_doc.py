"""Writes docs/modules.md from the modules' own docstrings: `python scripts/modules_doc.py` (`make docs`)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "modules.md"
FLOORS = {
    "planner": "Decides. Values in, values out: no torch, Flask or Celery (but in the shell `planner.tasks`).",
    "workers": "Does. The I/O of compute nodes and the queue; each of the four steps is usable alone.",
    "web": "Talks. The HTTP API and its page; thin, with no torch.",
}
HEAD = """# Modules

Made from the modules' docstrings by `make docs`; a test keeps it true.
How they fit together: [architecture](architecture.md).
"""


def summary(path: Path) -> str:
    """The first paragraph of the module's docstring on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def render() -> str:
    """The page."""
    parts = [HEAD]
    for floor, what in FLOORS.items():
        parts.append(f"\n## {floor}\n\n{what}\n\n| module | what it is |\n|---|---|\n")
        for path in sorted((ROOT / floor).rglob("*.py")):
            if path.name != "__init__.py":
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                parts.append(f"| [`{name}`](../{path.relative_to(ROOT)}) | {summary(path)} |\n")
    return "".join(parts)


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")
