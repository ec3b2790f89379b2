"""fairshard plan --replicas: several chains from one cluster, each of the whole model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Literal

from planner.errors import InvalidInput
from workers.cli.console import Table, emit, say, write_document
from workers.cli.plan_tables import plan_shown

if TYPE_CHECKING:
    from planner.cluster import Cluster
    from planner.plan import Plan, PlanOptions
    from planner.profile import ModelProfile
    from planner.replicas.make import Replicas


def replicas_count(text: str) -> Literal["auto"] | int:
    """How many chains, for argparse.

    Raises:
        ArgumentTypeError: If it is neither auto nor a whole number of at least 1.
    """
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"auto or a whole number of at least 1 is expected, got {text!r}")
    return int(text)


def run_replicas(
    args: argparse.Namespace, profile: ModelProfile, cluster: Cluster, options: PlanOptions, *, generated_at: str
) -> int:
    """Show the chains, and write each one's plan: FILE-1, FILE-2, ... for `--output FILE`.

    Raises:
        InvalidInput: If what is asked makes no sense for several chains.
        Infeasible: If there are no such chains.
    """
    from planner.explain.words import explain
    from planner.replicas.make import make_replicas
    from planner.replicas.to_json import replicas_to_json

    if args.device_map is not None:
        raise InvalidInput(
            "--device-map is one chain's: write the chains with --output, then give one to --import with --device-map"
        )
    found = make_replicas(profile, cluster, options, replicas=args.replicas, generated_at=generated_at)
    obj = replicas_to_json(found)
    if args.output is not None:
        for number, plan in enumerate(obj["plans"], 1):
            path = args.output.with_stem(f"{args.output.stem}-{number}")
            write_document(path, plan)
            say(args, f"wrote {path}")
    shown: list[str | Table] = []
    for number, plan in enumerate(found.plans, 1):
        rate = _per_s(1 / plan.predicted.bottleneck_s, plan)
        shown += [f"chain {number} of {len(found.plans)}: {rate}", "", *plan_shown(plan)]
        if args.explain:
            text = explain(plan)
            obj["plans"][number - 1]["explanation"] = text
            shown += ["", text]
        shown.append("")
    emit(args, obj, [*shown, *_sum_lines(found)])
    return 0


def _sum_lines(found: Replicas) -> list[str]:
    """What the chains make together, and who is in none."""
    chains = "1 chain makes" if len(found.plans) == 1 else f"{len(found.plans)} chains make"
    first = found.one_chain
    proof = f"the best possible makes at most {found.gap:.2%} more"
    if found.exact:
        proof = "the best, as far as an approximate profile can tell" if first.approximate else "proven best"
    one = _per_s(1 / first.predicted.bottleneck_s, first)
    lines = [
        f"{chains} {_per_s(found.throughput_per_s, first)} together, {found.ratio:.3f} × one chain's {one}",
        f"upper bound {_per_s(found.upper_bound_per_s, first)}; {proof}",
    ]
    return lines + [f"idle: {node_id}: {why}" for node_id, why in found.idle]


def _per_s(rate: float, plan: Plan) -> str:
    return f"{'≈ ' if plan.approximate else ''}{rate:.4g} passes/s"
