"""fairshard split, verify, merge: a node's shard, and the proof that the shards are the checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.names import check_node_id
from workers.cli_io import emit, progress, shown_bytes, size, table
from workers.cli_models import add_source, checkpoint_of

_SPLIT = """\
examples:
  fairshard split ./my-model --plan plan.json --node a --output ./shards
  fairshard split owner/name --plan plan.json --node a        fetches only the bytes that a's shard needs
"""
_VERIFY = """\
examples:
  fairshard verify shards/1f0c.../*                           each shard is whole, and together they are the model
  fairshard verify shards/1f0c.../* --source ./my-model       and bit-identical to the checkpoint
"""
_MERGE = """\
example:
  fairshard merge shards/1f0c.../* ./whole                    the shards become one checkpoint again
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    form = argparse.RawDescriptionHelpFormatter

    command = commands.add_parser(
        "split", parents=[common], formatter_class=form, epilog=_SPLIT, help="cut out one node's shard"
    )
    add_source(command)
    command.add_argument("--plan", type=Path, required=True, metavar="FILE", help="what `plan --output` wrote")
    command.add_argument("--node", required=True, metavar="ID", help="the node whose shard is cut")
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the shard goes to DIR/<plan_id>/<node> (default: this node's shards)",
    )
    command.add_argument(
        "--max-file-size", type=size, default=5 * 10**9, metavar="SIZE", help="of a shard's files (default 5GB)"
    )
    command.add_argument("--sha256", action="store_true", help="put sha256 into the manifest beside the fast digest")
    command.add_argument("--paranoid", action="store_true", help="read everything back from the disk and compare")
    command.set_defaults(run=split)

    command = commands.add_parser(
        "verify", parents=[common], formatter_class=form, epilog=_VERIFY, help="prove that shards are whole and right"
    )
    command.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="shards' folders")
    command.add_argument("--source", metavar="SOURCE", help="compare with this checkpoint (a Hub id or a folder)")
    command.add_argument("--revision", metavar="R", help="of SOURCE (default: the plan's)")
    command.set_defaults(run=verify)

    command = commands.add_parser(
        "merge", parents=[common], formatter_class=form, epilog=_MERGE, help="make one checkpoint of all shards"
    )
    command.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="the folders of all shards of a plan")
    command.add_argument("out", type=Path, metavar="OUT", help="folder for the checkpoint")
    command.set_defaults(run=merge)


def split(args: argparse.Namespace) -> int:
    """Fairshard split."""
    from planner.errors import InvalidInput
    from planner.export import import_plan
    from planner.wire import load_file
    from workers.generator import generate
    from workers.settings import Settings
    from workers.splitter import split as cut

    node_id = check_node_id(args.node)
    obj = load_file(args.plan)
    revision = obj.get("revision") if isinstance(obj, dict) else None
    if args.revision is None and isinstance(revision, str):
        args.revision = revision  # the plan's, and not what the branch has become since
    checkpoint = checkpoint_of(args)
    profile = generate(checkpoint, compute=False, progress=progress(args))
    plan = import_plan(obj, profile)
    if node_id not in plan.allocation:
        raise InvalidInput(
            f"plan {plan.plan_id} gives node {node_id} nothing; it uses {', '.join(sorted(plan.allocation))}",
            details={"node_id": node_id, "nodes": sorted(plan.allocation)},
        )
    output = args.output or replace(Settings.from_env(), node_id=node_id).shards_dir
    manifest = cut(
        checkpoint,
        profile,
        plan,
        node_id=node_id,
        output=output,
        progress=progress(args),
        max_shard_bytes=args.max_file_size,
        sha256=args.sha256,
        paranoid=args.paranoid,
    )
    folder = output / plan.plan_id / node_id
    answer = {"directory": str(folder), **manifest.to_json()}
    rows = [(file.name, shown_bytes(file.size_bytes), file.digest) for file in manifest.files]
    lines = [
        *table(("file", "bytes", "digest"), rows, right=" r"),
        "",
        f"{len(manifest.tensors)} tensors in {folder}",
    ]
    emit(args, answer, lines)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Fairshard verify."""
    from workers.splitter import verify as prove

    checkpoint = None
    if args.source is not None:
        checkpoint = checkpoint_of(args)
    report = prove(args.dirs, checkpoint=checkpoint, progress=progress(args))
    answer = report.to_json()
    lines = report.lines()
    emit(args, answer, lines)
    return 0 if report.ok else 1


def merge(args: argparse.Namespace) -> int:
    """Fairshard merge."""
    from workers.splitter import merge as join

    folder = join(args.dirs, args.out, progress=progress(args))
    emit(args, {"directory": str(folder)}, [f"wrote {folder}"])
    return 0
