"""The command, as users and scripts run it: what it prints where, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hub.server import TestHub
from safetensors.torch import load_file
from support.cases import make as cases
from support.checkpoints import copy_of

from workers.cli import main

FAIRSHARD = Path(sys.executable).with_name("fairshard")
NODES = """\
nodes:
  - {node_id: fast, flop_per_s: 165e12, memory_bytes: 24e9, memory_bytes_per_s: 1e12}
  - {node_id: slow, device: Tesla T4}
links: {latency_s: 0.001, bytes_per_s: 1.25e8}
"""


class Shell:
    """Runs `fairshard`, in this process, in a folder that has a checkpoint `m` and a nodes file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, *arguments: str, rc: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it; the exit status must be `rc`, and no traceback may show."""
        out, err = io.StringIO(), io.StringIO()
        settings = {"FAIRSHARD_DATA": str(self.folder / "data"), **(env or {})}
        with (
            contextlib.chdir(self.folder),
            mock.patch.dict(os.environ, settings),
            # The command hides warnings from its users, unless they ask for them: here they are errors.
            mock.patch.object(sys, "warnoptions", ["error"]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                status = main(list(arguments))
            except SystemExit as end:  # --help, --version
                status = int(end.code or 0)
        assert status == rc, out.getvalue() + err.getvalue()
        assert "Traceback" not in err.getvalue()
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

    def json(self, *arguments: str, rc: int = 0, env: dict[str, str] | None = None) -> Any:
        """What it prints with --json."""
        return json.loads(self(*arguments, "--json", rc=rc, env=env).stdout)


@pytest.fixture
def fairshard(tmp_path: Path) -> Shell:
    copy_of("llama_files", tmp_path / "m")
    (tmp_path / "nodes.yaml").write_text(NODES)
    return Shell(tmp_path)


# --- the command itself


def test_help_shows_commands_examples_and_exit_statuses(fairshard: Shell) -> None:
    text = fairshard("--help").stdout
    for name in (
        "profile", "plan", "download", "publish", "split", "verify", "merge", "convert", "submit", "jobs", "nodes",
        "node", "delete", "up", "devices", "completion", "demo",
    ):  # fmt: skip
        assert re.search(rf"^    {name}\s", text, re.MULTILINE)
    assert "no plan exists" in text
    assert "FAIRSHARD_URL" in text


@pytest.mark.parametrize(
    "command",
    [
        "profile", "plan", "download", "publish", "split", "verify", "merge", "convert", "submit", "jobs", "nodes",
        "node", "delete", "devices", "up", "completion", "demo",
    ],
)  # fmt: skip
def test_every_commands_help_has_an_example(fairshard: Shell, command: str) -> None:
    usage, _, examples = fairshard(command, "--help").stdout.partition("\nexample")
    assert f" fairshard {command}" in examples
    assert "--json" in usage


def test_the_version_is_the_packages(fairshard: Shell) -> None:
    done = subprocess.run([str(FAIRSHARD), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fairshard", "0.1.0"]
    assert fairshard("--version").stdout == done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("plan",),
        ("plan", "m"),
        ("plan", "--nodes", "nodes.yaml"),
        ("plan", "m", "--metadata", "x.json", "--nodes", "nodes.yaml"),
        ("plan", "m", "--nodes", "nodes.yaml", "--compare", "--max-context"),
        ("plan", "m", "--nodes", "nodes.yaml", "--compare", "--replicas", "2"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--replicas", "0"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--replicas", "some"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--replicas", "2", "--objective", "latency"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--replicas", "2", "--strategy", "equal"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--replicas", "auto", "--pin", "lm_head=fast"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--replicas", "auto", "--device-map", "map.json"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--pin", "lm_head"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--pin", "nothing.*=fast"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--pin", "0-99=fast"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--pin", "0=nobody"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--max-memory", "fast=2"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--reserve", "much"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--time-budget", "0"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--time-budget", "nan"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--strategy", "best"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--output", "plan.txt"),
        ("plan", "m", "--nodes", "nodes.yaml", "--no-compute", "--kv-dtype", "F7"),
        ("plan", "m", "--nodes", "m", "--no-compute"),
        ("profile", "m", "--no-compute", "--batch-size", "0"),
        ("profile", "m", "--no-compute", "--batch-size", "1000000000000"),
        ("profile", "m", "--no-compute", "--sequence-length", "x"),
        ("profile", "a/b/c", "--no-compute"),
        ("split", "m", "--plan", "x", "--node", "../x"),
        ("jobs", "--wait"),
        ("submit", "../../etc/passwd"),
        ("submit", "a/b", "--option", "strategy=greedy"),
        ("devices", "Quadro T400"),
        ("up", "--nodes", "0"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_clear_line(fairshard: Shell, arguments: tuple[str, ...]) -> None:
    done = fairshard(*arguments, rc=2)
    assert done.stdout == ""
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("fairshard")
    assert len(last) < 700
    answer = fairshard.json(*arguments, rc=2)
    assert last.endswith(" ".join(answer["error"].split()))
    assert answer["code"] == "invalid_input"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", "./nowhere"), "nowhere"),
        (("plan", "m", "--nodes", "none.yaml"), "there is no file none.yaml"),
        (("plan", "--metadata", "bad.json", "--nodes", "nodes.yaml"), "layers[0].compute_required must be a number"),
        (("publish", "bad.json"), "layers[0].compute_required must be a number"),
        (("publish", "none.json"), "there is no file none.json"),
        (("verify", "m"), "no finished shard"),
        (("merge", "m", "out"), "no finished shard"),
        (("nodes",), "is the service up (fairshard up)"),
        (("jobs",), "does FAIRSHARD_URL name it?"),
        (("delete", "x"), "no answer from http://127.0.0.1:9"),
        (("submit", "owner/name"), "no answer from"),
    ],
)
def test_what_fails_ends_with_1_and_one_clear_line(
    fairshard: Shell, arguments: tuple[str, ...], message: str
) -> None:
    (fairshard.folder / "bad.json").write_text(
        '{"model_name": "a/b", "layers": [{"name": "x", "compute_required": -1}]}'
    )
    env = {"FAIRSHARD_URL": "http://127.0.0.1:9"}
    done = fairshard(*arguments, rc=1, env=env)
    assert message in done.stderr
    assert len(done.stderr.rstrip().splitlines()) == 1
    # With --json scripts get the API's form of an error, and people the same line as before.
    answer = fairshard.json(*arguments, rc=1, env=env)
    assert message in answer["error"]
    assert set(answer) == {"error", "code", "details"}


def test_a_closed_pipe_is_no_accident(fairshard: Shell) -> None:
    line = f"'{FAIRSHARD}' devices --json | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=fairshard.folder)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_a_setting_that_does_not_parse_is_named(fairshard: Shell) -> None:
    done = fairshard("profile", "m", rc=2, env={"FAIRSHARD_FLOP_PER_S": "fast"})
    assert "FAIRSHARD_FLOP_PER_S must be a number above 0, in FLOP/s, got 'fast'" in done.stderr
    done = fairshard("nodes", rc=2, env={"FAIRSHARD_URL": "ftp://x"})
    assert "FAIRSHARD_URL must be an address such as https://host:port" in done.stderr


def test_a_typing_error_in_a_nodes_file_is_found_before_the_model_is_looked_for(fairshard: Shell) -> None:
    (fairshard.folder / "typo.yaml").write_text(NODES.replace("memory_bytes_per_s", "memory_bytes_per_sec"))
    for command in (("plan", "nobody/nothing"), ("up",)):
        text = fairshard(*command, "--nodes", "typo.yaml", rc=2).stderr
        assert "nodes[0].memory_bytes_per_sec is not a known field; did you mean memory_bytes_per_s?" in text


# --- profile


def test_a_profile_from_headers_loads_neither_numpy_nor_marshmallow_nor_the_hub_client(fairshard: Shell) -> None:
    script = (
        "import sys; from workers.cli.main import main;"
        "rc = main(['profile', 'm', '--no-compute', '--output', 'profile.json', '--quiet']) + "
        "main(['profile', 'm', '--no-compute']);"
        "heavy = {'numpy', 'marshmallow', 'huggingface_hub', 'torch', 'transformers', 'yaml', 'rich', 'argcomplete',"
        " 'flask'};"
        "print(rc, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=fairshard.folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n0 []\n")
    assert json.loads((fairshard.folder / "profile.json").read_text())["total_layers"] == 6


def test_a_command_traces_without_torchs_compiler_and_leaves_a_callers_process_alone(fairshard: Shell) -> None:
    script = (
        "import sys; from workers.cli.main import main;"
        "rc = main({arguments});"
        "watched = {{'torch._inductor', 'torch.distributed.tensor', 'workers.profiling.tracing.lean_imports'}};"
        "print(rc, sorted(watched & set(sys.modules)))"
    )
    command = ["profile", "m", "--output", "profile.json", "--quiet"]

    def run(arguments: str, *argv: str) -> str:
        code = script.format(arguments=arguments)
        shutil.rmtree(fairshard.folder / "data", ignore_errors=True)
        return subprocess.run(
            [sys.executable, "-c", code, *argv],
            cwd=fairshard.folder,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "FAIRSHARD_DATA": str(fairshard.folder / "data")},
        ).stdout

    assert run("", *command) == "0 ['workers.profiling.tracing.lean_imports']\n"
    assert run(repr(command)) == "0 ['torch._inductor', 'torch.distributed.tensor']\n"


def test_a_profile_is_shown_and_written(fairshard: Shell) -> None:
    shown = fairshard("profile", "m", "--no-compute", "--sequence-length", "64", "--batch-size", "2").stdout
    assert "model.layers.3" in shown
    assert "47,392 parameters" in shown
    assert "2 × 64 tokens" in shown
    answer = fairshard.json("profile", "m", "--no-compute", "--sequence-length", "64", "--batch-size", "2")
    assert (answer["batch_size"], answer["sequence_length"]) == (2, 64)
    assert answer["approximate"]
    for name in ("p.json", "p.yaml"):
        assert fairshard("profile", "m", "--no-compute", "--output", name).stdout == ""
    plans = [
        fairshard.json("plan", "--metadata", name, "--nodes", "nodes.yaml")["plan_id"]
        for name in ("p.json", "p.yaml")
    ]
    assert plans[0] == plans[1]


def test_a_model_is_named_or_a_folder(fairshard: Shell, hub: TestHub) -> None:
    (fairshard.folder / "data" / "models" / "owner").mkdir(parents=True)
    (fairshard.folder / "data" / "models" / "owner" / "mine").symlink_to(fairshard.folder / "m")
    assert fairshard.json("profile", "owner/mine", "--no-compute")["model_name"] == "owner/mine"
    commit = hub.add_repo("tester/tiny", fairshard.folder / "m")
    answer = fairshard.json("profile", "tester/tiny", "--no-compute")
    assert (answer["model_name"], answer["revision"]) == ("tester/tiny", commit)
    assert "tester/none" in fairshard("profile", "tester/none", "--no-compute", rc=1).stderr


# --- plan


def test_a_plan_is_shown_explained_written_and_imported_again(fairshard: Shell) -> None:
    done = fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--explain", "--output", "plan.yaml")
    assert "fast → slow" in done.stdout
    # The profile is by the general rule: each figure that rests on it is marked, and none is proven.
    assert "proven" not in done.stdout
    assert "the best, as far as an approximate profile can tell" in done.stdout
    assert all(row.count("≈") == 4 for row in done.stdout.splitlines() if row.startswith(("fast ", "slow ")))
    assert "approximate: FLOP and activations by the general rule" in done.stdout
    assert done.stderr == "wrote plan.yaml\n"
    answer = fairshard.json("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--explain")
    assert answer["success"] is True
    assert answer["explanation"]
    assert len(answer["approximate"]) == 1
    assert set(answer["split_plan"]) == {"fast", "slow"}
    again = fairshard.json("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--import", "plan.yaml")
    assert again["split_plan"] == answer["split_plan"]


def test_an_edited_plan_is_checked_before_it_is_accepted(fairshard: Shell) -> None:
    fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--output", "plan.json", "--quiet")
    path = fairshard.folder / "plan.json"
    plan = json.loads(path.read_text())
    fast, slow = plan["split_plan"]["fast"], plan["split_plan"]["slow"]
    moved = fast["layer_names"].pop()
    path.write_text(json.dumps(plan))
    arguments = ("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--import", "plan.json")
    assert f"1 of 6 layers on no node: {moved}" in fairshard(*arguments, rc=2).stderr
    slow["layer_names"].append(moved)
    path.write_text(json.dumps(plan))
    assert moved in fairshard.json(*arguments)["split_plan"]["slow"]["layer_names"]
    done = fairshard("split", "m", "--no-compute", "--plan", "plan.json", "--node", "slow", "--output", "s", rc=1)
    assert "was edited" in done.stderr or "split_plan has it elsewhere" in done.stderr
    assert not (fairshard.folder / "s").exists()


def test_what_a_user_sets_is_kept(fairshard: Shell) -> None:
    arguments = ("plan", "m", "--no-compute", "--nodes", "nodes.yaml")
    answer = fairshard.json(*arguments, "--pin", "lm_head,0=slow", "--pin", "model.layers.*=fast")
    assert answer["split_plan"]["slow"]["layer_names"] == ["model.embed_tokens", "lm_head"]
    answer = fairshard.json(*arguments, "--exclude", "fast")
    assert set(answer["split_plan"]) == {"slow"}
    assert {node["node_id"]: node["limit"] for node in answer["nodes"]}["fast"] == "excluded"
    answer = fairshard.json(*arguments, "--max-compute", "fast=0.2")
    assert answer["split_plan"]["fast"]["total_compute"] <= 0.2 * answer["metadata"]["total_compute"]
    answer = fairshard.json(*arguments, "--strategy", "pipeline", "--objective", "latency", "--phase", "decode")
    assert (answer["strategy"], answer["objective"], answer["phase"]) == ("pipeline", "latency", "decode")
    assert len(answer["split_plan"]) == 1  # two nodes would only add a hop
    fairshard(*arguments, "--exclude", "fast", "--output", "kept.json")
    answer = fairshard.json(*arguments, "--keep", "kept.json")
    assert set(answer["split_plan"]) == {"slow"}


def test_an_infeasible_plan_ends_with_3_and_says_by_how_much(fairshard: Shell) -> None:
    (fairshard.folder / "small.yaml").write_text("nodes: [{node_id: a, flop_per_s: 1e12, memory_bytes: 100000}]")
    done = fairshard("plan", "m", "--no-compute", "--nodes", "small.yaml", rc=3)
    assert len(done.stderr.splitlines()) == 1
    answer = fairshard.json("plan", "m", "--no-compute", "--nodes", "small.yaml", rc=3)
    assert answer["code"] == "infeasible"
    assert answer["details"]["limit"] == "memory"
    fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--reserve", "23GiB", rc=3)
    fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--time-budget", "1e-12", rc=3)
    refused = fairshard.json("plan", "m", "--no-compute", "--nodes", "small.yaml", "--compare", rc=3)["strategies"]
    assert {row["feasible"] for row in refused} == {False}
    fairshard("plan", "m", "--no-compute", "--nodes", "small.yaml", "--max-context", rc=3)


def test_strategies_are_compared_and_the_longest_context_found(fairshard: Shell) -> None:
    answer = fairshard.json("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--compare")
    by_name = {row["strategy"]: row for row in answer["strategies"]}
    assert set(by_name) == {"greedy", "pipeline", "equal", "memory"}
    assert by_name["greedy"]["bottleneck_s"] <= by_name["equal"]["bottleneck_s"]
    latency = ("--objective", "latency", "--compare")
    assert fairshard.json("plan", "m", "--no-compute", "--nodes", "nodes.yaml", *latency)["strategies"]
    assert "bottleneck" in fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--compare").stdout
    (fairshard.folder / "tight.yaml").write_text("nodes: [{node_id: a, flop_per_s: 1e12, memory_bytes: 1000000}]")
    arguments = ("plan", "m", "--no-compute", "--nodes", "tight.yaml")
    answer = fairshard.json(*arguments, "--max-context")
    assert answer["limit"] == "nodes"
    longest = answer["max_sequence_length"]
    fairshard(*arguments, "--sequence-length", str(longest))
    fairshard(*arguments, "--sequence-length", str(longest + 1), rc=3)
    # A cache of half the bytes a value leaves room for about twice the tokens.
    fairshard("profile", "m", "--no-compute", "--output", "p.json")
    more = fairshard.json(
        "plan", "--metadata", "p.json", "--nodes", "tight.yaml", "--kv-dtype", "F16", "--max-context"
    )
    assert 1.9 * longest <= more["max_sequence_length"] <= 2.1 * longest


@pytest.mark.parametrize(
    ("longest", "shown", "limit"),
    [
        (512, "512 tokens (1 sequences at a time), which is all that the model takes\n", "model"),
        (None, "at least 16,777,216 tokens (1 sequences at a time)\n", "search"),
    ],
)
def test_a_context_that_memory_does_not_limit_says_so(
    fairshard: Shell, longest: int | None, shown: str, limit: str
) -> None:
    layer = {"name": "x", "compute_required": 1e9}
    (fairshard.folder / "p.json").write_text(
        json.dumps({"model_name": "a/b", "layers": [layer], "longest_sequence": longest})
    )
    arguments = ("plan", "--metadata", "p.json", "--nodes", "nodes.yaml", "--max-context")
    assert fairshard(*arguments).stdout == shown
    assert fairshard.json(*arguments)["limit"] == limit


def test_several_chains_are_shown_and_written_one_plan_each(fairshard: Shell) -> None:
    (fairshard.folder / "four.yaml").write_text(
        "nodes:\n"
        + "".join(f"  - {{node_id: n{at}, flop_per_s: {at}e12, memory_bytes: 24e9}}\n" for at in (1, 2, 3, 4))
    )
    arguments = ("plan", "m", "--no-compute", "--nodes", "four.yaml", "--replicas")
    answer = fairshard.json(*arguments, "3", "--exclude", "n1")
    assert answer["chains"] == len(answer["plans"]) == 3
    assert sorted(node for plan in answer["plans"] for node in plan["split_plan"]) == ["n2", "n3", "n4"]
    assert answer["idle"] == [{"node_id": "n1", "reason": "excluded by the request"}]
    total = sum(1 / plan["predicted"]["bottleneck_s"] for plan in answer["plans"])
    assert answer["throughput_per_s"] == pytest.approx(total)
    assert answer["ratio"] == pytest.approx(total / answer["one_chain"]["throughput_per_s"])
    assert total <= answer["upper_bound_per_s"] == pytest.approx(total * (1 + answer["gap"]))
    done = fairshard(*arguments, "auto", "--explain", "--output", "plan.yaml")
    written = sorted(path.name for path in fairshard.folder.glob("plan-*.yaml"))
    assert written == [f"plan-{number}.yaml" for number in range(1, len(written) + 1)]
    assert len(written) > 1
    assert done.stderr == "".join(f"wrote {name}\n" for name in written)
    assert f"{len(written)} chains make" in done.stdout
    assert "one chain's" in done.stdout
    # Each is a plan like any other.
    again = fairshard.json("plan", "m", "--no-compute", "--nodes", "four.yaml", "--import", "plan-2.yaml")
    assert again["split_plan"].keys() == fairshard.json(*arguments, "auto")["plans"][1]["split_plan"].keys()


def test_chains_that_do_not_fit_are_refused_with_the_bytes_that_are_missing(fairshard: Shell) -> None:
    (fairshard.folder / "tight.yaml").write_text("nodes: [{node_id: a, flop_per_s: 1e12, memory_bytes: 1000000}]")
    answer = fairshard.json("plan", "m", "--no-compute", "--nodes", "tight.yaml", "--replicas", "99", rc=3)
    assert answer["details"]["missing_bytes"] > 0
    assert "99 replicas of" in answer["error"]
    assert len(fairshard.json("plan", "m", "--no-compute", "--nodes", "tight.yaml", "--replicas", "1")["plans"]) == 1


def test_a_replan_moves_only_what_it_must(fairshard: Shell) -> None:
    arguments = ("plan", "m", "--no-compute", "--nodes", "nodes.yaml")
    before = fairshard.json(*arguments, "--output", "before.json")
    after = fairshard.json(*arguments, "--from-plan", "before.json")
    assert after["moves"] == []
    assert after["plan_id"] == before["plan_id"]
    after = fairshard.json(*arguments, "--from-plan", "before.json", "--exclude", "slow")
    assert [move["layer_name"] for move in after["moves"]] == before["split_plan"]["slow"]["layer_names"]
    assert {(move["from"], move["to"]) for move in after["moves"]} == {("slow", "fast")}
    assert after["moved_bytes"] == sum(move["bytes"] for move in after["moves"]) > 0
    shown = fairshard(*arguments, "--from-plan", "before.json", "--exclude", "slow").stdout
    assert "to move" in shown


def test_a_plan_that_is_read_again_is_for_what_it_was_made_for(fairshard: Shell) -> None:
    fairshard("profile", "m", "--no-compute", "--output", "p.json")
    asked = ("--strategy", "pipeline", "--objective", "latency", "--phase", "decode")
    sizes = ("--batch-size", "8", "--sequence-length", "1024")
    for source in (("m", "--no-compute"), ("--metadata", "p.json")):
        arguments = ("plan", *source, "--nodes", "nodes.yaml")
        before = fairshard.json(*arguments, *asked, *sizes, "--output", "before.json")
        after = fairshard.json(*arguments, "--from-plan", "before.json")
        again = fairshard.json(*arguments, "--import", "before.json")
        # The imported allocation was not solved for: its bound is proven anew, and the document is another.
        assert after["plan_id"] == before["plan_id"]
        for name in ("split_plan", "strategy", "objective", "phase", "batch_size", "sequence_length"):
            assert after[name] == again[name] == before[name], name
        assert after["moves"] == []
        # What is asked anew wins.
        for option in ("--from-plan", "--import"):
            other = fairshard.json(*arguments, option, "before.json", "--phase", "prefill", "--batch-size", "2")
            assert (other["strategy"], other["phase"]) == ("pipeline", "prefill")
            assert (other["batch_size"], other["sequence_length"]) == (2, 1024)


def test_a_device_map_is_written_for_accelerate(fairshard: Shell) -> None:
    arguments = ("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--device-map", "map.json")
    answer = fairshard.json(*arguments)
    found = json.loads((fairshard.folder / "map.json").read_text())
    chain = [hop["node_id"] for hop in answer["megaphone_plan"]["chain"]]
    for node, share in answer["split_plan"].items():
        assert {found[name] for name in share["layer_names"]} == {chain.index(node)}
    assert found["model.norm"] == found["lm_head"]


# --- shards


def test_shards_are_cut_verified_and_merged_to_the_same_bytes(fairshard: Shell) -> None:
    plan = fairshard.json("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--output", "plan.yaml")
    folders = []
    for node in ("fast", "slow"):
        answer = fairshard.json(
            "split", "m", "--no-compute", "--plan", "plan.yaml", "--node", node, "--output", "shards"
        )
        assert answer["directory"] == f"shards/{plan['plan_id']}/{node}"
        assert answer["layers"] == plan["split_plan"][node]["layer_names"]
        folders.append(answer["directory"])
    assert fairshard.json("verify", *folders, "--source", "m")["complete"] is True
    assert "everything is right" in fairshard("verify", *folders).stdout
    assert "not given: the shards of slow" in fairshard("verify", folders[0]).stdout
    fairshard("verify", folders[0], "--complete", rc=1)
    fairshard("merge", *folders, "whole")
    originals = sorted((fairshard.folder / "m").glob("*.safetensors"))
    assert originals
    for original in originals:
        assert (fairshard.folder / "whole" / original.name).read_bytes() == original.read_bytes()
    # Files of at most so many bytes each, with an index.
    several = fairshard.json(
        "split", "m", "--no-compute", "--plan", "plan.yaml", "--node", "fast", "--output", "several",
        "--max-shard-size", "30kB",
    )  # fmt: skip
    assert len(several["files"]) > 2
    assert (fairshard.folder / several["directory"] / "model.safetensors.index.json").is_file()
    # A byte that flipped is found, named, and the exit status says so.
    damaged = next((fairshard.folder / folders[1]).glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.unlink()  # it may be a hard link to the checkpoint's own file
    damaged.write_bytes(content)
    done = fairshard("verify", *folders, "--source", "m", rc=1)
    assert damaged.name in done.stdout
    assert "damaged" in done.stdout


def test_a_checkpoint_that_lacks_a_tensor_is_said_to_everywhere(fairshard: Shell) -> None:
    cases.make("missing-one-tensor", fairshard.folder / "less")
    said = "the checkpoint lacks 1 tensor of its model: model.layers.1.mlp.up_proj.weight"
    assert said in fairshard("profile", "less").stdout
    refused = fairshard("plan", "less", "--nodes", "nodes.yaml", rc=1)
    assert f"{said}; to plan it all the same, give --allow-missing" in refused.stderr
    allowed = ("--allow-missing", "--strategy", "equal", "--output", "plan.json")
    assert said in fairshard("plan", "less", "--nodes", "nodes.yaml", *allowed).stdout
    folders = []
    for node in ("fast", "slow"):
        done = fairshard("split", "less", "--plan", "plan.json", "--node", node, "--output", "shards")
        assert said in done.stdout
        folders.append(next((fairshard.folder / "shards").glob(f"*/{node}")).as_posix())
    assert (
        "bit-identical to the checkpoint, which lacks 1 tensor of its model: model.layers.1.mlp.up_proj.weight"
        in fairshard("verify", *folders, "--source", "less").stdout
    )
    assert f"what was given is right; {said}" in fairshard("verify", folders[0]).stdout
    # Without the class nobody looked, and that is said.
    assert "missing tensors: not checked" in fairshard("profile", "less", "--no-compute").stdout
    assert "missing tensors: not checked" in fairshard("plan", "less", "--no-compute", "--nodes", "nodes.yaml").stdout


def test_parameters_that_are_not_certain_are_said_to_be_not_known(fairshard: Shell) -> None:
    cases.make("quant-mlx4", fairshard.folder / "mlx")
    shown = fairshard("profile", "mlx").stdout
    assert "426,624 parameters, 267.5 kB (53.25 kB of it beside packed weights)" in shown
    shown = fairshard("profile", "mlx", "--no-compute").stdout
    assert "parameters: not known, 267.5 kB" in shown
    assert "426" not in shown
    fairshard("plan", "mlx", "--no-compute", "--nodes", "nodes.yaml")


def test_a_variant_is_named_once_and_kept_by_its_plan_and_shards(fairshard: Shell) -> None:
    cases.make("layout-two-variants", fairshard.folder / "two")
    assert "(bf16, fp16): name one with --variant" in fairshard("profile", "two", "--no-compute", rc=1).stderr
    which = ("--variant", "bf16", "--no-compute")
    assert fairshard.json("profile", "two", *which)["revision"].endswith("~variant=bf16")
    plan = fairshard.json("plan", "two", *which, "--nodes", "nodes.yaml", "--output", "plan.json")
    folders = []
    for node in plan["split_plan"]:
        cut = ("--no-compute", "--plan", "plan.json", "--node", node, "--output", "shards")
        folders.append(fairshard.json("split", "two", *cut)["directory"])
    assert fairshard.json("verify", *folders, "--source", "two")["complete"] is True
    fairshard("verify", *folders, "--source", "two", "--variant", "fp16", rc=1)
    fairshard("merge", *folders, "whole")
    original = fairshard.folder / "two" / "model.bf16.safetensors"
    assert (fairshard.folder / "whole" / "model.safetensors").read_bytes() == original.read_bytes()


def test_a_cache_that_is_not_known_is_asked_for(fairshard: Shell) -> None:
    copy_of("t5", fairshard.folder / "t5")
    assert "not known" in fairshard("profile", "t5", "--no-compute").stdout
    plan = ("plan", "t5", "--no-compute", "--nodes", "nodes.yaml")
    assert "--kv-bytes-per-token N" in fairshard(*plan, rc=2).stderr
    assert "as stated: 1,024 bytes a token" in fairshard(*plan, "--kv-bytes-per-token", "1KiB").stdout
    fairshard("profile", "t5", "--no-compute", "--output", "t5.json")
    told = ("--metadata", "t5.json", "--nodes", "nodes.yaml", "--kv-bytes-per-token", "1KiB")
    assert fairshard.json("plan", *told)["approximate"]


def test_a_plan_is_only_for_its_own_model_revision_and_nodes(fairshard: Shell) -> None:
    fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--output", "plan.json")
    arguments = ("split", "m", "--no-compute", "--plan", "plan.json", "--output", "s")
    assert "gives node other nothing; it uses fast, slow" in fairshard(*arguments, "--node", "other", rc=2).stderr
    config = fairshard.folder / "m" / "config.json"
    config.write_text(config.read_text().replace("\n", "\n\n", 1))
    assert "revision" in fairshard(*arguments, "--node", "fast", rc=1).stderr
    assert not (fairshard.folder / "s").exists()


def test_a_plan_is_exact_unless_told_otherwise_and_split_agrees_with_it(fairshard: Shell) -> None:
    assert fairshard.json("profile", "m", "--output", "exact.json")["approximate"] == []
    plan = fairshard.json("plan", "m", "--nodes", "nodes.yaml", "--output", "plan.json")
    from_metadata = fairshard.json("plan", "--metadata", "exact.json", "--nodes", "nodes.yaml")
    assert from_metadata["split_plan"] == plan["split_plan"]
    for node, more in (("fast", ()), ("slow", ("--metadata", "exact.json"))):
        fairshard("split", "m", "--plan", "plan.json", "--node", node, "--output", "shards", *more)
    folders = [f"shards/{plan['plan_id']}/{node}" for node in ("fast", "slow")]
    assert fairshard.json("verify", *folders, "--source", "m")["complete"] is True


def test_a_bin_checkpoint_is_converted(fairshard: Shell) -> None:
    old = fairshard.folder / "old"
    old.mkdir()
    tensors: dict[str, Any] = {}
    for path in sorted((fairshard.folder / "m").glob("*.safetensors")):
        tensors |= load_file(path)
    torch.save(tensors, old / "pytorch_model.bin")
    (old / "config.json").write_bytes((fairshard.folder / "m" / "config.json").read_bytes())
    fairshard("convert", "old", "new")
    converted: dict[str, Any] = {}
    for path in (fairshard.folder / "new").glob("*.safetensors"):
        converted |= load_file(path)
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())
    assert "there is nothing to convert" in fairshard("convert", "m", "again", rc=2).stderr
    assert "holds something" in fairshard("convert", "old", "new", rc=1).stderr


# --- publish, download, devices


def test_metadata_and_plans_are_published_to_a_folder(fairshard: Shell) -> None:
    fairshard("profile", "m", "--no-compute", "--output", "p.json")
    fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--output", "plan.json")
    first = fairshard.json("publish", "p.json", "--store", "./store")
    again = fairshard.json("publish", "p.json", "--store", "./store")
    assert first == again
    stored = json.loads((fairshard.folder / "store" / first["path"]).read_text())
    assert stored["model_name"] == json.loads((fairshard.folder / "p.json").read_text())["model_name"]
    answer = fairshard.json("publish", "plan.json", "--store", "./store")
    assert (fairshard.folder / "store" / answer["path"]).is_file()
    fairshard("publish", "p.json")  # the data folder's store, where nothing else is set
    assert list((fairshard.folder / "data" / "store").rglob("*.json"))


def test_metadata_is_published_to_the_hub(fairshard: Shell, hub: TestHub) -> None:
    fairshard("profile", "m", "--no-compute", "--output", "p.json")
    env = {"HF_TOKEN": hub.token, "METADATA_REPO": "tester/metadata"}
    answer = fairshard.json("publish", "p.json", env=env)
    assert answer["commit"]
    assert answer["path"].startswith("profiles/")


def test_a_checkpoint_is_downloaded_whole(fairshard: Shell, hub: TestHub) -> None:
    commit = hub.add_repo("tester/tiny", fairshard.folder / "m")
    answer = fairshard.json("download", "tester/tiny", "there")
    assert answer["revision"] == commit
    for path in (fairshard.folder / "m").iterdir():
        assert (fairshard.folder / "there" / path.name).read_bytes() == path.read_bytes()


def test_a_shard_is_compared_with_the_commit_that_it_was_cut_from(fairshard: Shell, hub: TestHub) -> None:
    hub.add_repo("tester/moves", fairshard.folder / "m")
    fairshard.json("plan", "tester/moves", "--no-compute", "--nodes", "nodes.yaml", "--output", "plan.json")
    split = ("split", "tester/moves", "--no-compute", "--plan", "plan.json", "--node", "fast")
    directory = fairshard.json(*split)["directory"]
    hub.add_repo(
        "tester/moves", {**{path.name: path for path in (fairshard.folder / "m").iterdir()}, "README.md": "new"}
    )
    assert fairshard.json("verify", directory, "--source", "tester/moves")["ok"] is True


def test_a_shard_without_a_folder_of_its_own_counts_for_the_node_s_quota(fairshard: Shell) -> None:
    for strategy in ("greedy", "equal"):
        options = ("--no-compute", "--nodes", "nodes.yaml", "--strategy", strategy, "--output", f"{strategy}.json")
        fairshard("plan", "m", *options)
    split = ("split", "m", "--no-compute", "--node", "fast", "--plan")
    done = fairshard.json(*split, "greedy.json")
    assert Path(done["directory"]).parent == fairshard.folder / "data" / "nodes" / "fast" / "shards"
    quota = {"FAIRSHARD_DISK_QUOTA": str(30 * 1024 + sum(file["size_bytes"] for file in done["files"]))}
    assert "FAIRSHARD_DISK_QUOTA" in fairshard(*split, "equal.json", env=quota, rc=1).stderr


def test_devices_are_listed_with_their_sources(fairshard: Shell) -> None:
    answer = fairshard.json("devices")
    assert len(answer["devices"]) >= 60
    assert fairshard.json("devices", "NVIDIA A100-SXM4-80GB")["devices"][0]["flop_per_s"]["fp16"] == 312e12
    assert "312" in fairshard("devices").stdout
    assert "source: NVIDIA A100 Tensor Core GPU datasheet" in fairshard("devices", "NVIDIA A100-SXM4-80GB").stdout


def test_progress_goes_to_stderr_and_quiet_silences_it(fairshard: Shell) -> None:
    (fairshard.folder / "nodes.yaml").write_text(NODES)
    done = fairshard("plan", "m", "--no-compute", "--nodes", "nodes.yaml", "--output", "p.json", "--json", "--quiet")
    assert done.stderr == ""
    json.loads(done.stdout)
