"""The wheel in an environment of its own: nothing of this tree is found there, only what pip installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.server import TestHub
from safetensors.torch import load_file
from support.checkpoints import copy_of

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Bare:
    """An environment with the wheel, and a folder elsewhere in which its `fairshard` runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir()
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        source = folder / "source"  # building writes beside its source
        for name in ("planner", "workers", "web"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
        run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"))
        (self.wheel,) = folder.glob("*.whl")

    def install(self, extra: str = "") -> None:
        """Install the wheel with an extra."""
        python = str(self.folder / "venv" / "bin" / "python")
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--prefer-binary")
        run(*pip, "-c", str(ROOT / "constraints.txt"), f"{self.wheel}{extra}")

    def __call__(
        self, *arguments: str, rc: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run its `fairshard`; the exit status must be `rc`."""
        command = [str(self.folder / "venv" / "bin" / "fairshard"), *arguments]
        done = subprocess.run(
            command,
            cwd=self.work,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == rc, done.stdout + done.stderr
        return done

    def json(self, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
        """What it prints with --json."""
        return json.loads(self(*arguments, "--json", env=env).stdout)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    made = Bare(tmp_path_factory.mktemp("wheel"))
    made.install()
    copy_of("llama_files", made.work / "m")
    (made.work / "nodes.yaml").write_text((ROOT / "examples" / "nodes.yaml").read_text())
    return made


def test_the_base_alone_names_the_extra_that_each_command_needs(bare: Bare) -> None:
    # What needs no more than the base does its work.
    bare("profile", "m", "--output", "p.json")
    bare("plan", "m", "--nodes", "nodes.yaml", "--output", "plan.json")
    bare("publish", "plan.json", "--store", "./store")
    assert bare("devices", "Tesla T4").stdout
    for command, extra in {
        "profile a/b": "hub",
        "plan a/b --nodes nodes.yaml": "hub",
        "download a/b": "hub",
        "publish plan.json --store me/x": "hub",
        "split m --plan plan.json --node laptop": "hub",
        "verify m": "hub",
        "merge m out": "hub",
        "convert a/b out": "hub",
        "up": "queue,web,workers",
        "node": "queue,workers",
    }.items():
        done = bare(*command.split(), rc=1)
        assert f"pip install 'fairshard[{extra}]'" in done.stderr, command
        assert len(done.stderr.splitlines()) == 1
    assert "is the service up" in bare("jobs", rc=1, env={"FAIRSHARD_URL": "http://127.0.0.1:9"}).stderr


def test_the_hub_extra_carries_all_that_needs_no_torch(bare: Bare, hub: TestHub) -> None:
    bare.install("[hub]")
    installed = {path.name for path in (bare.folder / "venv").glob("lib/*/site-packages/*")}
    assert "huggingface_hub" in installed
    assert not {"torch", "transformers", "celery", "flask", "redis"} & installed
    commit = hub.add_repo("tester/tiny", bare.work / "m")
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    # As `uvx --from 'fairshard[hub]' fairshard plan owner/name --nodes nodes.yaml` does it.
    plan = bare.json("plan", "tester/tiny", "--nodes", "nodes.yaml", "--output", "plan.json", env=env)
    assert plan["revision"] == commit
    assert any("torch is missing" in reason for reason in plan["approximate"])
    assert bare.json("profile", "tester/tiny", "--output", "profile.json", env=env)["revision"] == commit
    bare("publish", "profile.json", "--store", "tester/metadata", env=env)
    bare("download", "tester/tiny", "whole", env=env)
    for node in plan["split_plan"]:
        bare("split", "tester/tiny", "--plan", "plan.json", "--node", node, "--output", "shards", env=env)
    shards = [f"shards/{plan['plan_id']}/{node}" for node in plan["split_plan"]]
    assert bare.json("verify", *shards, "--source", "tester/tiny", env=env)["complete"] is True
    bare("merge", *shards, "merged")
    for original in (bare.work / "m").glob("*.safetensors"):
        assert (bare.work / "merged" / original.name).read_bytes() == original.read_bytes()
    old = bare.work / "old"
    old.mkdir()
    (old / "config.json").write_bytes((bare.work / "m" / "config.json").read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for path in (bare.work / "m").glob("*.safetensors"):
        tensors |= load_file(path)
    torch.save(tensors, old / "pytorch_model.bin")
    bare("convert", "old", "new")
    assert load_file(bare.work / "new" / "model.safetensors").keys() == tensors.keys()
