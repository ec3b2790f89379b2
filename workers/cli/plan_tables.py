"""How plans are shown to people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planner.errors import Infeasible
from planner.plan import Plan
from planner.profile import lacking
from workers.cli.console import Table, shown_bytes, shown_flop, shown_memory, shown_rate, shown_seconds

if TYPE_CHECKING:
    from planner.profile import ModelProfile
    from planner.replan.replanner import Move
    from planner.replicas.make import Replicas


def plan_shown(plan: Plan) -> list[str | Table]:
    """The plan as a table of nodes, with its prediction below; what rests on an approximate profile is marked ≈."""
    mark = "≈ " if plan.approximate else ""
    parts: dict[str, list[str]] = {}
    for stage in plan.stages:
        parts.setdefault(stage.node_id, []).append(span(stage.start, stage.end))
    rows = []
    for report in sorted(plan.nodes, key=lambda node: (not node.used, _first(plan, node.node_id), node.node_id)):
        memory = report.memory_used_bytes + report.memory_free_bytes
        rows.append(
            (
                report.node_id,
                len(plan.allocation.get(report.node_id, ())),
                shortened(parts.get(report.node_id, ())),
                f"{mark}{shown_flop(report.flop)}" if report.used else "",
                f"{mark}{shown_seconds(report.seconds)}" if report.used else "",
                f"{mark}{report.compute_utilization:.0%}" if report.used else "",
                f"{mark}{shown_memory(report.memory_used_bytes)} of {shown_memory(memory)}" if report.used else "",
                report.limit or "",
            )
        )
    head = ("node", "layers", "which", "compute", "time", "busy", "memory", "limit")
    found = plan.predicted
    proof = f"{mark}at most {found.gap:.2%} over the best possible"
    if found.exact:
        proof = "the best, as far as an approximate profile can tell" if mark else "proven best"
    asked = f"{plan.strategy}, {plan.objective}, {plan.phase}; {plan.batch_size} × {plan.sequence_length} tokens"
    times = (("bottleneck", found.bottleneck_s), ("one pass", found.latency_s), ("time budget", plan.time_budget_s))
    return [
        Table(head, rows, right=("layers", "compute", "time", "busy", "memory")),
        "",
        f"plan {plan.plan_id} of {plan.model_name} ({asked})",
        ", ".join(f"{name} {mark}{shown_seconds(value)}" for name, value in times) + f"; {proof}",
        *lacking(plan.missing_tensors),
        f"chain: {arrows([hop.node_id for hop in plan.megaphone.chain])}",
        *([f"without images: {arrows(plan.megaphone.text_chain)}"] if plan.megaphone.text_chain else []),
        *_shared_kv(plan),
    ]


def _shared_kv(plan: Plan) -> list[str]:
    """What hops between layers that share keys and values carry for it."""
    carried = max((hop.shared_kv_bytes for hop in plan.megaphone.chain), default=0)
    if not carried:
        return []
    hops = sum(hop.shared_kv_bytes > 0 for hop in plan.megaphone.chain)
    return [f"keys and values that layers share: up to {shown_bytes(carried)} of the payload on {hops} hops"]


def _first(plan: Plan, node_id: str) -> int:
    return next((stage.start for stage in plan.stages if stage.node_id == node_id), plan.total_layers)


def span(start: int, end: int) -> str:
    """Layers [start, end) by position: "3" or "0-3"."""
    return str(start) if end == start + 1 else f"{start}-{end - 1}"


def shortened(spans: Sequence[str], most: int = 6) -> str:
    """The first few of many."""
    return ",".join(spans[:most]) + (f",… ({len(spans)} runs)" if len(spans) > most else "")


def arrows(steps: Sequence[str], most: int = 12) -> str:
    """The Megaphone's way: "a → b → c"."""
    return " → ".join(steps[:most]) + (f" → … ({len(steps)} steps)" if len(steps) > most else "")


def compared(found: Mapping[str, Plan | Infeasible]) -> list[dict[str, Any]]:
    """Every strategy's outcome as JSON."""
    rows: list[dict[str, Any]] = []
    for name, plan in found.items():
        if isinstance(plan, Infeasible):
            rows.append({"strategy": name, "feasible": False, "error": str(plan), "details": plan.details})
        else:
            predicted = plan.predicted
            rows.append(
                {
                    "strategy": name,
                    "feasible": True,
                    "plan_id": plan.plan_id,
                    "bottleneck_s": predicted.bottleneck_s,
                    "latency_s": predicted.latency_s,
                    "lower_bound_s": predicted.lower_bound_s,
                    "gap": predicted.gap,
                    "exact": predicted.exact,
                    "nodes_used": len(plan.allocation),
                    "hops": len(plan.megaphone.chain) - 1,
                    "approximate": bool(plan.approximate),
                }
            )
    return rows


def compare_table(found: Mapping[str, Plan | Infeasible]) -> Table:
    """Every strategy's outcome as a table."""
    rows = [
        (
            row["strategy"],
            *(
                f"{'≈ ' * row['approximate']}{text}"
                for text in (shown_seconds(row["bottleneck_s"]), shown_seconds(row["latency_s"]), f"{row['gap']:.2%}")
            ),
            row["nodes_used"],
            row["hops"],
            "",
        )
        if row["feasible"]
        else (row["strategy"], "", "", "", "", "", row["error"])
        for row in compared(found)
    ]
    head = ("strategy", "bottleneck", "one pass", "gap", "nodes", "hops", "why not")
    return Table(head, rows, right=head[1:-1])


def context(longest: int, profile: ModelProfile) -> tuple[str, str]:
    """What ends the longest context, and it in words."""
    from planner.strategies.make import context_limit

    text, limit = f"{longest:,} tokens ({profile.batch_size} sequences at a time)", context_limit(profile, longest)
    shown = {"model": f"{text}, which is all that the model takes", "search": f"at least {text}", "nodes": text}
    return limit, shown[limit]


def moves(found: Iterable[Move]) -> list[dict[str, Any]]:
    """A re-plan's moves as JSON: who gives what to whom."""
    return [
        {"layer_name": move.layer_name, "from": move.source, "to": move.target, "bytes": move.size_bytes}
        for move in found
    ]


def moves_shown(found: Sequence[Mapping[str, Any]]) -> list[str | Table]:
    """A re-plan's moves as a table."""
    if not found:
        return ["", "nothing moves"]
    total = sum(move["bytes"] for move in found)
    rows = [
        (move["layer_name"], move["from"] or "(checkpoint)", move["to"], shown_bytes(move["bytes"])) for move in found
    ]
    return ["", Table(("layer", "from", "to", "bytes"), rows, right=("bytes",)), f"{shown_bytes(total)} to move"]


def nodes_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    """Registered nodes as a table."""
    rows = [
        (
            node["node_id"],
            node.get("device") or "",
            shown_rate(node.get("flop_per_s") or 0),
            shown_memory(node.get("memory_bytes") or 0),
            shown_bytes(node["disk_free_bytes"]) if node.get("disk_free_bytes") is not None else "",
            node.get("state") or "",
        )
        for node in nodes
    ]
    head = ("node", "device", "compute", "memory", "disk free", "state")
    return Table(head, rows, right=head[2:5])


def replicas_lines(found: Replicas) -> list[str]:
    """What the chains make together, and who is in none."""
    chains = "1 chain makes" if len(found.plans) == 1 else f"{len(found.plans)} chains make"
    first = found.one_chain
    proof = f"the best possible makes at most {found.gap:.2%} more"
    if found.exact:
        proof = "the best, as far as an approximate profile can tell" if first.approximate else "proven best"
    one = per_s(1 / first.predicted.bottleneck_s, first)
    lines = [
        f"{chains} {per_s(found.throughput_per_s, first)} together, {found.ratio:.3f} × one chain's {one}",
        f"upper bound {per_s(found.upper_bound_per_s, first)}; {proof}",
    ]
    return lines + [f"idle: {node_id}: {why}" for node_id, why in found.idle]


def per_s(rate: float, plan: Plan) -> str:
    """A plan's rate for people."""
    return f"{'≈ ' if plan.approximate else ''}{rate:.4g} passes/s"
