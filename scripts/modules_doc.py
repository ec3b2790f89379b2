"""Writes docs/modules.md from the modules' own docstrings: `python scripts/modules_doc.py` (`make docs`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "modules.md"
PACKAGES = ("planner", "workers", "web")
HEAD = """# Modules

`make docs` writes this page from the docstrings of folders and files; a test compares the two.
How they fit together: [architecture](architecture.md).
"""


def summary(path: Path) -> str:
    """The first paragraph of the module's docstring on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def folders() -> Iterator[Path]:
    """The folders that hold modules: each package, then what lies in it."""
    for package in PACKAGES:
        yield from sorted({path.parent for path in (ROOT / package).rglob("*.py")})


def render() -> str:
    """The page."""
    parts = [HEAD]
    for folder in folders():
        name = folder.relative_to(ROOT).as_posix()
        level = "##" if name in PACKAGES else "###"
        parts.append(f"\n{level} {name}/\n\n{summary(folder / '__init__.py')}\n\n| file | what it is |\n|---|---|\n")
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        parts += [f"| [`{path.name}`](../{path.relative_to(ROOT)}) | {summary(path)} |\n" for path in files]
    return "".join(parts)


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")
