#!/usr/bin/env python3
"""Looks what is pinned in constraints.txt up among the known holes, with pip-audit.

Status 1 if there are any. Some networks hide the advisories: an answer without them is no all-clear, and that is
said, with status 0.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 180


def judge(output: str) -> tuple[int, str]:
    """Exit status and sentence for what pip-audit printed as JSON."""
    try:
        found = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 0, "NOT CHECKED: the advisory service can't be reached from here."
    checked = [item for item in found if "vulns" in item]
    if len(checked) < len(found) * 0.9:
        return 0, f"NOT CHECKED: the advisory service knows only {len(checked)} of {len(found)} releases from here."
    holes = [f"{item['name']} {item['version']}: {hole['id']}" for item in checked for hole in item["vulns"]]
    if holes:
        return 1, "\n".join(["Known holes:", *holes])
    return 0, f"No known hole in {len(checked)} releases."


def main() -> int:
    """Ask pip-audit."""
    pins = re.findall(r"^[\w.-]+==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join(pins))
        listed.flush()
        command = [str(ROOT / ".venv" / "bin" / "pip-audit"), "--format", "json", "--progress-spinner", "off"]
        command += ["--timeout", "10", "--no-deps", "--disable-pip", "--requirement", listed.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
            status, said = judge(done.stdout)
        except subprocess.TimeoutExpired:
            status, said = 0, f"NOT CHECKED: the advisory service did not answer within {_LIMIT_S} s."
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
