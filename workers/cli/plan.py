"""fairshard plan: who would hold what, and how fast that is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import Infeasible, InvalidInput
from planner.plan import OBJECTIVES, PHASES, STRATEGIES
from workers.cli import plan_tables as tables
from workers.cli.arguments import adder, assignment, count_or_auto, fraction, pinned_layers, positive, shares, size
from workers.cli.console import Table, emit, say, write_document
from workers.cli.models import add_sizes, add_source, checkpoint_of, profile_of

if TYPE_CHECKING:
    from planner.cluster import Cluster
    from planner.plan import Plan, PlanOptions
    from planner.profile import ModelProfile

_PLAN = """\
nodes file (YAML or JSON):
  nodes:
    - {node_id: fast, flop_per_s: 165e12, memory_bytes: 24e9, memory_bytes_per_s: 1e12}
    - {node_id: slow, device: Tesla T4}             figures from the catalogue (fairshard devices)
  links: {latency_s: 0.001, bytes_per_s: 1.25e8}    optional; pairs: [{from, to, latency_s, bytes_per_s}]

examples:
  fairshard plan ./my-model --nodes nodes.yaml --explain
  fairshard plan --metadata profile.json --nodes nodes.yaml --compare
  fairshard plan owner/name --nodes nodes.yaml --strategy pipeline --objective latency --phase decode
  fairshard plan owner/name --nodes nodes.yaml --pin 0-3=fast --pin lm_head=slow --exclude old --output plan.yaml
  fairshard plan owner/name --nodes changed.yaml --from-plan plan.yaml      moves as few bytes as it can
  fairshard plan owner/name --nodes nodes.yaml --import edited.yaml         checks a plan that was edited
  fairshard plan owner/name --nodes nodes.yaml --max-context
  fairshard plan owner/name --nodes nodes.yaml --replicas auto --output plan.yaml    plan-1.yaml, plan-2.yaml, ...
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = adder(commands, common)("plan", run, "show which node would hold what, and how fast that is", _PLAN)
    add_source(command, required=False)
    command.add_argument(
        "--metadata", type=Path, metavar="FILE", help="what `profile --output` wrote, instead of SOURCE"
    )
    command.add_argument("--nodes", type=Path, metavar="FILE", required=True, help="the machines (YAML or JSON)")
    command.add_argument(
        "--no-compute", action="store_true", help="count SOURCE's FLOP by a general rule; loads no torch"
    )
    add_sizes(command, batch=None, sequence=None)
    command.add_argument("--kv-dtype", metavar="DTYPE", help="dtype of the KV cache (default: the model's)")
    command.add_argument(
        "--kv-bytes-per-token", type=size, metavar="SIZE",
        help="what a token takes in all layers together whose KV cache is not known",
    )  # fmt: skip

    how = command.add_argument_group(
        "how", "With --from-plan or --import, what you do not give here is taken from that plan."
    )
    how.add_argument("--strategy", choices=STRATEGIES, help="default greedy")
    how.add_argument("--objective", choices=OBJECTIVES, help="default throughput")
    how.add_argument("--phase", choices=PHASES, help="default prefill")
    how.add_argument("--time-budget", type=positive, metavar="S", help="seconds that a node's part may take")
    how.add_argument(
        "--pin", type=assignment, action="append", default=[], metavar="LAYERS=NODE",
        help="layers by name, pattern or position: lm_head=a, 'model.layers.1?=a', 0-3,7=a; may be repeated",
    )  # fmt: skip
    how.add_argument("--keep", type=Path, metavar="PLAN", help="leave every layer that this plan places where it is")
    how.add_argument("--exclude", action="append", default=[], metavar="NODE", help="leave a node out")
    how.add_argument(
        "--max-memory", type=assignment, action="append", default=[], metavar="NODE=FRACTION",
        help="use at most this part of a node's memory",
    )  # fmt: skip
    how.add_argument(
        "--max-compute", type=assignment, action="append", default=[], metavar="NODE=FRACTION",
        help="give a node at most this part of the whole compute",
    )  # fmt: skip
    how.add_argument(
        "--reserve", type=size, default=0, metavar="SIZE", help="keep this free on every node, e.g. 2GiB"
    )
    how.add_argument("--count-activations", action="store_true", help="count peak activations as memory, too")
    how.add_argument("--allow-missing", action="store_true", help="plan a checkpoint that lacks tensors of its model")
    how.add_argument("--compute-min", action="store_true", help="leave out work that kernels skip as masked")

    what = command.add_argument_group("what")
    what.add_argument("--explain", action="store_true", help="why each node holds what it holds")
    what.add_argument("--compare", action="store_true", help="what every strategy would give")
    what.add_argument("--max-context", action="store_true", help="the longest sequence for which a plan exists")
    what.add_argument(
        "--replicas", type=count_or_auto, metavar="N", help="make N (or auto) chains, each with the whole model"
    )
    what.add_argument("--from-plan", type=Path, metavar="PLAN", help="re-plan: move as few bytes as possible")
    what.add_argument(
        "--tolerance",
        type=fraction,
        default=0.05,
        metavar="F",
        help="to move less, a plan may be this much slower than the best (default 0.05)",
    )
    what.add_argument("--import", dest="edited", type=Path, metavar="PLAN", help="check and complete an edited plan")
    what.add_argument("--output", type=Path, metavar="FILE", help="write the plan there (.json, .yaml)")
    what.add_argument("--device-map", type=Path, metavar="FILE", help="write accelerate's device_map there")


def run(args: argparse.Namespace) -> int:
    """Fairshard plan."""
    from planner.wire.read import cluster_from_json, load_file

    if (args.source is None) == (args.metadata is None):
        raise InvalidInput("give either SOURCE or --metadata FILE")
    others = (args.replicas, args.from_plan, args.edited)
    if args.compare + args.max_context + sum(given is not None for given in others) > 1:
        raise InvalidInput("--compare, --max-context, --replicas, --from-plan and --import exclude each other")
    nodes = load_file(args.nodes)
    cluster_from_json(nodes, strict=True)  # refused before a profile is fetched
    before = None
    if args.from_plan or args.edited:
        before = load_file(args.from_plan or args.edited)
        args = _as_planned(args, before)
    profile = _profile(args)
    cluster = cluster_from_json(nodes, dtype=profile.dtype)
    options = _options(args, profile)
    if args.compare:
        return _compare(args, profile, cluster, options)
    if args.max_context:
        return _max_context(args, profile, cluster, options)
    if args.replicas is not None:
        return _replicas(args, profile, cluster, options)
    if args.from_plan is not None:
        return _replan(args, before, profile, cluster, options)
    return _show(args, _plan(before, profile, cluster, options), profile)


def _as_planned(args: argparse.Namespace, before: object) -> argparse.Namespace:
    """The arguments with what the plan was made for where nothing else is asked."""
    from planner.strategies.imported import made_for

    kept = {name: value for name, value in made_for(before).items() if getattr(args, name) is None}
    return argparse.Namespace(**{**vars(args), **kept})


def _profile(args: argparse.Namespace) -> ModelProfile:
    from planner.kv_dtype import with_kv_bytes

    profile = _profiled(args)
    stated = args.kv_bytes_per_token
    return profile if stated is None else with_kv_bytes(profile, stated)


def _profiled(args: argparse.Namespace) -> ModelProfile:
    if args.metadata is None:
        return profile_of(checkpoint_of(args), args, compute=not args.no_compute)
    from planner.kv_dtype import with_kv_dtype
    from planner.limits import check_batch_size, check_sequence_length
    from planner.wire.read import load_file, profile_from_json

    profile = profile_from_json(load_file(args.metadata))
    if args.kv_dtype is not None:
        profile = with_kv_dtype(profile, args.kv_dtype)
    return profile.at(
        batch_size=profile.batch_size if args.batch_size is None else check_batch_size(args.batch_size),
        sequence_length=profile.sequence_length
        if args.sequence_length is None
        else check_sequence_length(args.sequence_length),
    )


def _options(args: argparse.Namespace, profile: ModelProfile) -> PlanOptions:
    from planner.plan import PlanOptions

    pins: dict[str, str] = {}
    if args.keep is not None:
        from planner.wire.read import load_file, plan_from_json

        known = {layer.name for layer in profile.layers}
        for node_id, names in plan_from_json(load_file(args.keep)).allocation.items():
            pins.update((name, node_id) for name in names if name in known)
    for layers, node_id in args.pin:
        pins.update((name, node_id) for name in pinned_layers(layers, profile))
    given = {name: getattr(args, name) for name in ("strategy", "objective", "phase")}
    return PlanOptions(
        **{name: value for name, value in given.items() if value is not None},
        time_budget_s=args.time_budget,
        pins=pins,
        exclude=frozenset(args.exclude),
        max_memory_share=shares("--max-memory", args.max_memory),
        max_compute_share=shares("--max-compute", args.max_compute),
        reserve_bytes=args.reserve,
        count_activations=args.count_activations,
        use_compute_min=args.compute_min,
        allow_missing=args.allow_missing,
    )


def _plan(edited: Any, profile: ModelProfile, cluster: Cluster, options: PlanOptions) -> Plan:
    if edited is not None:
        from planner.strategies.imported import import_plan

        sizes = {"batch_size": profile.batch_size, "sequence_length": profile.sequence_length}
        return import_plan({**edited, **sizes}, profile, cluster, options)
    from planner.strategies.make import make_plan

    return make_plan(profile, cluster, options, generated_at=_now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _show(
    args: argparse.Namespace,
    plan: Plan,
    profile: ModelProfile,
    extra: Mapping[str, Any] | None = None,
    more: Sequence[str | Table] = (),
) -> int:
    from planner.wire.read import plan_to_json
    from workers.settings import HubSettings

    obj = plan_to_json(plan, model_url=HubSettings.from_env().url(plan.model_name))
    if args.output is not None:
        write_document(args.output, obj)
        say(args, f"wrote {args.output}")
    if args.device_map is not None:
        from planner.strategies.imported import device_map

        write_document(args.device_map, device_map(plan, profile))
        say(args, f"wrote {args.device_map}")
    shown = [*tables.plan_shown(plan), *(f"approximate: {reason}" for reason in profile.approximate)]
    if args.explain:
        from planner.explain.words import explain

        text = explain(plan)
        obj = {**obj, "explanation": text}
        shown += ["", text]
    emit(args, {**obj, "approximate": list(profile.approximate), **(extra or {})}, [*shown, *more])
    return 0


def _compare(args: argparse.Namespace, profile: ModelProfile, cluster: Cluster, options: PlanOptions) -> int:
    from planner.strategies.make import compare

    found = compare(profile, cluster, options)
    emit(args, {"strategies": tables.compared(found)}, [tables.compare_table(found)])
    return 3 if all(isinstance(plan, Infeasible) for plan in found.values()) else 0


def _max_context(args: argparse.Namespace, profile: ModelProfile, cluster: Cluster, options: PlanOptions) -> int:
    from planner.strategies.make import max_context

    longest = max_context(profile, cluster, options)
    if not longest:
        raise Infeasible(
            f"no plan exists for {profile.model_name} on these nodes, however short the sequence",
            details={"max_sequence_length": 0},
        )
    limit, text = tables.context(longest, profile)
    obj = {"model_name": profile.model_name, "batch_size": profile.batch_size, "max_sequence_length": longest}
    emit(args, {**obj, "limit": limit}, [text])
    return 0


def _replan(
    args: argparse.Namespace, before: object, profile: ModelProfile, cluster: Cluster, options: PlanOptions
) -> int:
    from planner.replan.replanner import replan
    from planner.strategies.imported import import_plan

    old = import_plan(before, profile)
    after = replan(old, profile, cluster, options, tolerance=args.tolerance, generated_at=_now())
    moves = tables.moves(after.moves)
    extra = {
        "moves": moves,
        "moved_bytes": after.moved_bytes,
        "must_move_bytes": after.must_move_bytes,
        "objective_s": after.objective_s,
        "best_objective_s": after.best_objective_s,
        "reason": after.reason,
    }
    return _show(args, after.plan, profile, extra, [*tables.moves_shown(moves), after.reason])


def _replicas(args: argparse.Namespace, profile: ModelProfile, cluster: Cluster, options: PlanOptions) -> int:
    """Show the chains, and write each one's plan: FILE-1, FILE-2, ... for `--output FILE`."""
    from planner.explain.words import explain
    from planner.replicas.make import make_replicas
    from planner.replicas.to_json import replicas_to_json

    if args.device_map is not None:
        raise InvalidInput(
            "--device-map is one chain's: write the chains with --output, then give one to --import with --device-map"
        )
    found = make_replicas(profile, cluster, options, replicas=args.replicas, generated_at=_now())
    obj = replicas_to_json(found)
    if args.output is not None:
        for number, plan in enumerate(obj["plans"], 1):
            path = args.output.with_stem(f"{args.output.stem}-{number}")
            write_document(path, plan)
            say(args, f"wrote {path}")
    shown: list[str | Table] = []
    for number, plan in enumerate(found.plans, 1):
        rate = tables.per_s(1 / plan.predicted.bottleneck_s, plan)
        shown += [f"chain {number} of {len(found.plans)}: {rate}", "", *tables.plan_shown(plan)]
        if args.explain:
            text = explain(plan)
            obj["plans"][number - 1]["explanation"] = text
            shown += ["", text]
        shown.append("")
    emit(args, obj, [*shown, *tables.replicas_lines(found)])
    return 0
