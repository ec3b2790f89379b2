"""fairshard split, verify, merge: a node's shard, and the proof that the shards are the checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.names import check_node_id, split_revision
from planner.profile import lacking
from workers.cli.arguments import adder, size
from workers.cli.console import Table, emit, progress, shown_bytes
from workers.cli.models import add_part, add_source, checkpoint_of

if TYPE_CHECKING:
    from workers.shards.verify import VerifyReport

_SPLIT = """\
examples:
  fairshard split ./my-model --plan plan.json --node a --output ./shards
  fairshard split owner/name --plan plan.json --node a        fetches only the bytes that a's shard needs
"""
_VERIFY = """\
examples:
  fairshard verify shards/1f0c.../*                           check each, and that together they are the model
  fairshard verify shards/1f0c.../* --source ./my-model       and compare every bit with the checkpoint
"""
_MERGE = """\
example:
  fairshard merge shards/1f0c.../* ./whole                    the shards become one checkpoint again
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    add = adder(commands, common)

    command = add("split", split, "cut out one node's shard", _SPLIT)
    add_source(command)
    command.add_argument("--plan", type=Path, required=True, metavar="FILE", help="what `plan --output` wrote")
    command.add_argument(
        "--metadata", type=Path, metavar="FILE", help="the profile it was made from (default: profile SOURCE again)"
    )
    command.add_argument("--no-compute", action="store_true", help="the plan was made with --no-compute")
    command.add_argument("--node", required=True, metavar="ID", help="the node whose shard is cut")
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the shard goes to DIR/<plan_id>/<node> (default: this node's shards)",
    )
    command.add_argument(
        "--max-shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="of a shard's files (default 5GB)"
    )
    command.add_argument("--sha256", action="store_true", help="put sha256 into the manifest beside the fast digest")
    command.add_argument("--paranoid", action="store_true", help="fetch every byte twice and compare")

    command = add("verify", verify, "check that shards are complete and unchanged", _VERIFY)
    command.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="shards' folders")
    command.add_argument("--complete", action="store_true", help="fail unless every shard of the plan is given")
    command.add_argument("--source", metavar="SOURCE", help="compare with this checkpoint (a Hub id or a folder)")
    command.add_argument("--revision", metavar="R", help="of SOURCE (default: the plan's)")
    add_part(command)

    command = add("merge", merge, "join all shards of a plan into one checkpoint", _MERGE)
    command.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="the folders of all shards of a plan")
    command.add_argument("out", type=Path, metavar="OUT", help="folder for the checkpoint")


def split(args: argparse.Namespace) -> int:
    """Fairshard split."""
    from planner.errors import InvalidInput
    from planner.strategies.imported import import_plan
    from planner.wire.read import load_file, profile_from_json
    from workers.generator import generate
    from workers.settings import Settings
    from workers.splitter import split as cut

    node_id = check_node_id(args.node)
    obj = load_file(args.plan)
    revision = obj.get("revision") if isinstance(obj, dict) else None
    if args.revision is None and isinstance(revision, str):
        args.revision = revision  # the plan's, and not what the branch has become since
    checkpoint = checkpoint_of(args)
    settings = replace(Settings.from_env(), node_id=node_id)
    if args.metadata is not None:
        profile = profile_from_json(load_file(args.metadata))
    else:
        traces = settings.data_dir / "traces"
        profile = generate(
            checkpoint, compute=not args.no_compute, cache_dir=traces, lean=args.lean, progress=progress(args)
        )
    plan = import_plan(obj, profile)
    if node_id not in plan.allocation:
        raise InvalidInput(
            f"plan {plan.plan_id} gives node {node_id} nothing; it uses {', '.join(sorted(plan.allocation))}",
            details={"node_id": node_id, "nodes": sorted(plan.allocation)},
        )
    # Without --output where the node's own jobs keep theirs: the quota counts it, and deleting the plan finds it.
    folder = args.output / plan.plan_id / node_id if args.output else settings.shards_dir / plan.plan_id
    manifest = cut(
        checkpoint,
        profile,
        plan,
        node_id=node_id,
        output=folder,
        progress=progress(args),
        max_shard_bytes=args.max_shard_size,
        sha256=args.sha256,
        paranoid=args.paranoid,
        quota_bytes=settings.disk_quota_bytes,
    )
    answer = {"directory": str(folder), **manifest.to_json()}
    rows = [
        (file.name, shown_bytes(file.size_bytes), file.digest or "(linked; verify reads it)")
        for file in manifest.files
    ]
    files = Table(("file", "bytes", "digest"), rows, right=("bytes",))
    lines = [f"{len(manifest.tensors)} tensors in {folder}", *lacking(manifest.missing_tensors)]
    emit(args, answer, [files, "", *lines])
    return 0


def verify(args: argparse.Namespace) -> int:
    """Fairshard verify."""
    from workers.shards.manifest import read_manifest
    from workers.shards.verify import verify as prove

    checkpoint = None
    if args.source is not None:
        if args.revision is None:  # as split does; of a folder only which part of it is meant
            revision = read_manifest(args.dirs[0]).revision
            here = Path(args.source).expanduser().is_dir()
            args.revision = str(split_revision(revision)[1]) or None if here else revision
        checkpoint = checkpoint_of(args)
    report = prove(args.dirs, checkpoint=checkpoint, progress=progress(args))
    emit(args, report.to_json(), report_lines(report))
    return 0 if (report.complete if args.complete else report.ok) else 1


def report_lines(report: VerifyReport) -> list[str]:
    """What was proven, and what was not."""
    counts = f"{report.shards} shards, {report.files} files, {report.tensors} tensors, {shown_bytes(report.bytes)}"
    lines = [f"{problem.directory}: {problem.what}: {problem.reason}" for problem in report.problems]
    lines += [f"{name}: put together again, sha256 {digest}" for name, digest in report.rebuilt.items()]
    if report.proven:
        lines.append(f"proven equal to the checkpoint's: {', '.join(report.proven)}")
    if report.missing_nodes:
        lines.append(f"not given: the shards of {', '.join(report.missing_nodes)}")
    verdict = "everything is right" if report.complete else "what was given is right" if report.ok else "damaged"
    if report.ok and report.missing_tensors:
        said = lacking(report.missing_tensors)[0]
        exact = f"bit-identical to {said.replace(' lacks', ', which lacks', 1)}"
        verdict = exact if report.complete else f"{verdict}; {said}"
    return [*lines, f"{counts}: {verdict}"]


def merge(args: argparse.Namespace) -> int:
    """Fairshard merge."""
    from workers.shards.merge import merge as join

    folder = join(args.dirs, args.out, progress=progress(args))
    emit(args, {"directory": str(folder)}, [f"wrote {folder}"])
    return 0
