"""A plan in words: what it costs, how good it is, who holds what and why."""

from __future__ import annotations

from planner.explain.reports import gib, seconds_text
from planner.plan import Plan
from planner.problem.arrays import SLACK
from planner.profile import lacking

_MOST = 12


def explain(plan: Plan) -> str:
    """One readable paragraph about the plan, then one line for each node."""
    predicted = plan.predicted
    used = [report for report in plan.nodes if report.used]
    left_out = [report for report in plan.nodes if not report.used]
    what = "one request" if plan.objective == "latency" else "the slowest node's part of a pass"
    value = predicted.latency_s if plan.objective == "latency" else predicted.bottleneck_s
    # Within a time budget the fewest nodes are taken, and the bound is that of just these.
    few = plan.objective == "throughput" and plan.time_budget_s > predicted.bottleneck_s * (1 + SLACK)
    proof = (
        f"{'the best' if predicted.exact else f'at most {predicted.gap:.2%} above the best'}"
        f"{' of just these nodes' if few else ''} as far as an approximate profile can tell"
        if plan.approximate
        else f"which is proven to be the best{' of just these nodes' if few else ''}"
        if predicted.exact
        else f"at most {predicted.gap:.2%} above the best {'of just these nodes' if few else 'there can be'} "
        f"(proven bound {seconds_text(predicted.lower_bound_s)})"
    )
    lines = [
        f"{plan.model_name}: {plan.total_layers} {plan.unit}s on {len(used)} of {len(plan.nodes)} nodes by "
        f"{plan.strategy} for {plan.objective} "
        f"({plan.phase}, batch {plan.batch_size}, context {plan.sequence_length:,}). "
        f"{what.capitalize()} takes {seconds_text(value)}, {proof}. "
        f"One pass through the chain of {len(plan.megaphone.chain)} steps takes {seconds_text(predicted.latency_s)}, "
        f"{seconds_text(sum(hop.transfer_s for hop in plan.megaphone.chain))} of it on links. " + _limits(plan)
    ]
    lines += [f"  All figures rest on an approximate profile: {reason}" for reason in plan.approximate]
    lines += [f"  {line[:1].upper()}{line[1:]}" for line in lacking(plan.missing_tensors)]
    lines += [f"  {report.node_id}: {report.reason}" for report in used[:_MOST]]
    if len(used) > _MOST:
        lines.append(f"  ... and {len(used) - _MOST} nodes more")
    lines += [f"  {report.node_id}: {report.reason}" for report in left_out[:_MOST]]
    if len(left_out) > _MOST:
        lines.append(f"  ... and {len(left_out) - _MOST} nodes more that hold nothing")
    return "\n".join(lines)


def _limits(plan: Plan) -> str:
    """What binds, in a sentence."""
    used = [report for report in plan.nodes if report.used]
    counts: dict[str, int] = {}
    for report in used:
        counts[report.limit or "nothing"] = counts.get(report.limit or "nothing", 0) + 1
    parts = [f"{name} on {count}" for name, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))]
    free = sum(report.memory_free_bytes for report in used)
    return f"The limit is {', '.join(parts)}; {gib(free)} of memory stay free on the nodes used."
