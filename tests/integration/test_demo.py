"""README and tour on a fresh machine: a copy of the tree, an empty home folder, and the commands as they stand there.

Every command must succeed, and what the documents show of its output must be what it prints (numbers and hashes
aside).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint, minilm
from support.depth import DEEP

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.search, pytest.mark.timeout(1200)]


def load_readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_script", ROOT / "scripts" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["readme_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


readme = load_readme()


def lend_environment(clone: Path) -> None:
    """Let the copy of the tree find this environment's packages, as if `make install` had put them there.

    `make test-deep` has everything installed; that takes minutes.
    """
    venv.create(clone / ".venv", symlinks=True)
    (packages,) = (clone / ".venv").glob("lib/python*/site-packages")
    # First the copy itself: what is in the environment as an editable install is the tree that these tests lie in.
    (packages / "lent.pth").write_text(f"{clone}\n{sysconfig.get_path('purelib')}\n")
    script = Path(sys.executable).with_name("fairshard").read_text(encoding="utf-8")
    lent = clone / ".venv/bin/fairshard"
    lent.write_text(script.replace(str(Path(sys.executable).parent), str(lent.parent)), encoding="utf-8")
    lent.chmod(0o755)
    files = b"".join(
        (clone / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "scripts/install.sh")
    )
    sum_of_them = subprocess.run(["cksum"], input=files, stdout=subprocess.PIPE, check=True).stdout.decode().strip()
    (clone / ".venv/.fairshard-installed").write_text(f"{sum_of_them} {clone}\nqueue\nweb\nworkers\n")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch, readme.session(folder) as session:
        if DEEP:
            patch.setenv("PYTHONPYCACHEPREFIX", str(folder / "bytecode"))
        else:
            lend_environment(session.clone)
        yield session


def processes_below(folder: Path) -> list[str]:
    """Command lines of processes that run from `folder` or work in it."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        where = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if process.pid != os.getpid() and any(str(folder) in text for text in where):
            found.append(" ".join(process.info["cmdline"] or []))
    return found


def test_the_documents_keep_their_word_from_a_bare_clone(live: Any) -> None:
    commands = [c for path in readme.DOCUMENTS for c in readme.commands(path.read_text(encoding="utf-8"))]
    assert commands[0].text == "make demo"
    shown = {command.text.split()[1] for command in commands if command.text.startswith("fairshard")}
    assert shown >= {
        "profile",
        "plan",
        "split",
        "verify",
        "merge",
        "publish",
        "download",
        "up",
        "submit",
        "jobs",
        "nodes",
    }
    for command in commands:
        live.run(command)
        printed = "\n".join(command.printed)
        assert command.status == 0, f"$ {command.text}\n{printed}"
        if command is commands[0]:  # the tour shows it too, when `fairshard up` runs
            assert processes_below(live.clone) == [], "the demo left something running"
        have = {readme.normal(line) for line in command.printed}
        missing = [line for line in command.said if readme.normal(line) not in have]
        if not DEEP:
            missing = [
                line for line in missing if not re.match("Making|Installing|Installed|The Hub can't be reached", line)
            ]
        assert not missing, f"$ {command.text}\nprints no longer:\n" + "\n".join(missing) + f"\nbut:\n{printed}"
    assert live.stop() == 0
    assert processes_below(live.clone) == []


def test_a_second_demo_starts_in_seconds_and_takes_a_folder(live: Any) -> None:
    """After the first: nothing is installed again. The times are printed, and judged by a person."""
    live.run(readme.Command("make install"))  # nothing to do, if the test above ran
    command = readme.Command(f"make demo MODEL={checkpoint('qwen2')}")
    live.run(command)
    printed = "\n".join(command.printed)
    assert command.status == 0, printed
    assert "Installing" not in printed
    assert f"Model: local/qwen2, the folder {checkpoint('qwen2').resolve()}" in printed
    assert "everything is right" in printed
    assert processes_below(live.clone) == []


def test_where_the_hub_answers_the_demo_takes_the_model_from_there(live: Any, hub: TestHub) -> None:
    commit = hub.add_repo("sentence-transformers/all-MiniLM-L6-v2", minilm())
    command = readme.Command(f"HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 make demo")
    live.run(command)
    printed = "\n".join(command.printed)
    assert command.status == 0, printed
    assert f"Model: sentence-transformers/all-MiniLM-L6-v2 from the Hub ({hub.url})" in printed
    assert f"revision {commit[:12]}" in printed
    assert "everything is right" in printed
    assert hub.counters.requests("*/model.safetensors") > 0
    assert processes_below(live.clone) == []


def test_a_model_that_is_neither_folder_nor_id_is_refused_before_anything_starts(live: Any) -> None:
    command = readme.Command("make demo MODEL=../../etc/passwd")
    live.run(command)
    assert command.status != 0
    printed = "\n".join(command.printed)
    assert "'../../etc/passwd' is neither a folder nor a Hub id 'owner/name'" in printed
    assert "ready after" not in printed


def test_an_old_python_is_refused_with_the_way_out(live: Any, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.2' || exit 1\n")
    old.chmod(0o755)
    command = readme.Command(f"rm -f .venv/.fairshard-installed && PYTHON={old} make demo")
    live.run(command)
    assert command.status != 0
    assert re.search(r"needs Python 3\.11 or later", "\n".join(command.printed))


@pytest.mark.parametrize("document", ["README.md", "docs/library.md"])
def test_the_library_example_of_the_documents_runs(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace('"owner/name"', repr(str(minilm())))
    code = code.replace('"examples/nodes.yaml"', repr(str(ROOT / "examples/nodes.yaml")))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, document, "exec"), {})
    made = ["my-shard/model.safetensors"] if document == "README.md" else ["plan.json", "whole/model.safetensors"]
    assert all((tmp_path / path).is_file() for path in made)
