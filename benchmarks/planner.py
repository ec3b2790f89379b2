"""How good and how quick plans are, each checked by a referee of the benchmark's own.

    python benchmarks/planner.py [--quick] [--milp SECONDS] [--rivals] [--parallax FOLDER] [--json FILE] [--plot FILE]
    python benchmarks/planner.py --replicas [--quick] [--json FILE]

Ratios are bottleneck (or latency) over the proven lower bound, which `--milp` sharpens with HiGHS where the plan is
not proven to be the best. `--replicas` compares several chains with one, and does no more. Pass and fail are against
the targets named in `TARGETS`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a file, its own folder is first on the path, and this file would hide the package `planner`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import planner_rivals as rivals
from benchmarks.planner_cases import Case, cases, machines, model, needed_bytes, random_model, real_models
from benchmarks.planner_latency import anywhere_ratio
from benchmarks.planner_two_runs import two_runs_bound_s
from planner.cluster import Cluster, Link, Node
from planner.errors import Infeasible
from planner.plan import Plan, PlanOptions
from planner.problem.arrays import build
from planner.problem.cost import layer_flop, layer_traffic_bytes, node_memory_bytes, roofline_s
from planner.replan.replanner import replan
from planner.replicas.make import Replicas, make_replicas
from planner.strategies.make import make_plan

TARGETS = {
    "runs_mean": 1.001,
    "runs_worst": 1.01,
    "all_mean": 1.01,
    "all_worst": 1.05,
    "median_130x64_ms": 20.0,
    "worst_130x64_ms": 100.0,
    "1000x1000_ms": 50.0,
    "10000_equal_x1000_ms": 100.0,
    "10000_different_x1000_ms": 2000.0,
    "resident_mb": 200.0,
    "hops_ratio": 1.5,
    "latency_ratio": 1.05,
    "moved_ratio": 1.2,
    "replicas_130x64_ms": 5000.0,
}


class Referee:
    """Judges a plan from the instance alone: it shares only the cost of one layer on one node with the planner."""

    def __init__(self, case: Case, options: PlanOptions) -> None:
        self.case = case
        self.seconds = [
            [
                roofline_s(
                    layer_flop(layer, case.model, phase=options.phase),
                    layer_traffic_bytes(layer, case.model, phase=options.phase),
                    node,
                )
                for layer in case.model.layers
            ]
            for node in case.cluster.nodes
        ]

    def nodes_of(self, plan: Plan) -> list[int]:
        """Node index of each layer; raises if a layer is missing or there twice."""
        at = {node.node_id: position for position, node in enumerate(self.case.cluster.nodes)}
        holder: dict[str, int] = {}
        for node_id, names in plan.allocation.items():
            for name in names:
                if name in holder:
                    raise AssertionError(f"{name} is there twice")
                holder[name] = at[node_id]
        return [holder[layer.name] for layer in self.case.model.layers]

    def fault(self, nodes: Sequence[int], *, contiguous: bool) -> str | None:
        """What is wrong with these nodes, or None."""
        layers = self.case.model.layers
        for at, node in enumerate(self.case.cluster.nodes):
            held = [layer for layer, home in zip(layers, nodes, strict=True) if home == at]
            if held and node_memory_bytes(held) > node.memory_bytes:
                return f"{node.node_id} is over its memory"
        changes = sum(a != b for a, b in pairwise(nodes))
        if contiguous and changes != len(set(nodes)) - 1:
            return "not contiguous"
        return None

    def bottleneck_s(self, nodes: Sequence[int]) -> float:
        """Seconds of the slowest node."""
        loads = [0.0] * len(self.seconds)
        for layer, node in enumerate(nodes):
            loads[node] += self.seconds[node][layer]
        return max(loads)


def timed(case: Case, options: PlanOptions, *, repeat: int = 1) -> tuple[Plan | Infeasible, float]:
    """The plan and the least milliseconds of `repeat` calls."""
    least = math.inf
    result: Plan | Infeasible | None = None
    for _ in range(repeat):
        start = time.perf_counter()
        try:
            result = make_plan(case.model, case.cluster, options)
        except Infeasible as error:
            result = error
        least = min(least, (time.perf_counter() - start) * 1e3)
    assert result is not None
    return result, least


def milp_bound_s(referee: Referee, limit_s: float) -> float:
    """A lower bound on the bottleneck of any layer anywhere by HiGHS, in seconds; 0 if it finds none in time."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    seconds = np.array(referee.seconds)
    count, layers = seconds.shape
    memory = np.array([node_memory_bytes([layer]) - layer.tied_bytes for layer in referee.case.model.layers]) / 1e9
    room = np.array([node.memory_bytes for node in referee.case.cluster.nodes]) / 1e9
    scale = 1 / float(seconds.min(axis=0).max())
    size = count * layers + 1
    rows = lil_matrix((layers + 2 * count, size))
    for node in range(count):
        for layer in range(layers):
            rows[layer, node * layers + layer] = 1
            rows[layers + node, node * layers + layer] = seconds[node, layer] * scale
            rows[layers + count + node, node * layers + layer] = memory[layer]
        rows[layers + node, size - 1] = -1
    low = np.concatenate((np.ones(layers), np.full(2 * count, -np.inf)))
    high = np.concatenate((np.ones(layers), np.zeros(count), room))
    cost = np.zeros(size)
    cost[-1] = 1
    result = milp(
        cost,
        constraints=LinearConstraint(rows.tocsr(), low, high),
        integrality=np.append(np.ones(size - 1), 0),
        bounds=Bounds(0, np.append(np.ones(size - 1), np.inf)),
        options={"time_limit": limit_s},
    )
    return float(result.mip_dual_bound) / scale if result.mip_dual_bound else 0.0


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else math.nan


class Report:
    """Lines on the screen, verdicts, and the same as data."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.failed: list[str] = []

    def verdict(self, name: str, value: float, target: str) -> None:
        """Compare `value` with a target by name."""
        good = value <= TARGETS[target]
        self.data[name] = {"value": value, "target": TARGETS[target], "pass": good}
        if not good:
            self.failed.append(name)
        print(f"  {'pass' if good else 'FAIL'}  {name}: {value:.5g} (target {TARGETS[target]:g})")

    def count(self, name: str, value: int, detail: str = "") -> None:
        """A count that has to be 0."""
        self.data[name] = {"value": value, "target": 0, "pass": value == 0}
        if value:
            self.failed.append(name)
        print(f"  {'pass' if value == 0 else 'FAIL'}  {name}: {value} (target 0) {detail}")


def detours_pay(case: Case, plan: Plan) -> bool:
    """Whether every contiguous plan is proven to be slower than `plan` by more than a two-thousandth."""
    staged = make_plan(case.model, case.cluster, PlanOptions(strategy="pipeline"))
    return staged.predicted.lower_bound_s > plan.predicted.bottleneck_s * 1.0004


def quality(
    report: Report, *, quick: bool, milp_s: float, rival_rules: dict[str, Callable[[Case], rivals.Nodes]]
) -> None:
    """Every instance by both strategies, and by the rivals."""
    chosen = cases(quick=quick)
    print(f"\n{len(chosen)} instances, {sum(case.impossible for case in chosen)} of them infeasible by construction")
    bounds: dict[str, float] = {}
    for strategy in ("greedy", "pipeline"):
        ratios: dict[bool, list[float]] = {True: [], False: []}
        puzzles: list[float] = []
        hops: dict[bool, list[float]] = {True: [], False: []}
        times: list[float] = []
        faults, refused, wrong = [], [], []
        worst: list[tuple[float, str]] = []
        for case in chosen:
            options = PlanOptions(strategy=strategy)
            plan, milliseconds = timed(case, options)
            if isinstance(plan, Infeasible):
                if not case.impossible:
                    refused.append(case.name)
                elif plan.details.get("missing_bytes", 0) <= 0:
                    wrong.append(case.name)
                continue
            times.append(milliseconds)
            referee = Referee(case, options)
            nodes = referee.nodes_of(plan)
            fault = referee.fault(nodes, contiguous=strategy == "pipeline")
            reached = referee.bottleneck_s(nodes)
            if fault or case.impossible or not math.isclose(reached, plan.predicted.bottleneck_s, rel_tol=1e-9):
                faults.append(f"{case.name}: {fault or 'prediction'}")
                continue
            bound = max(plan.predicted.lower_bound_s, bounds.get(case.name, 0.0))
            if strategy == "pipeline" and reached > bound * 1.001:
                bound = max(bound, two_runs_bound_s(build(case.model, case.cluster, options), bound))
            if milp_s and reached > bound * 1.001 and len(nodes) * len(case.cluster.nodes) <= 8_000:
                bound = max(bound, min(milp_bound_s(referee, milp_s), reached))
            if strategy == "greedy":
                bounds[case.name] = bound
            if case.puzzle:
                puzzles.append(reached / bound)
            else:
                ratios[case.runs].append(reached / bound)
                worst.append((reached / bound, case.name))
            if strategy == "greedy" and case.runs and len(plan.allocation) > 1:
                ratio = (len(plan.stages) - 1) / (len(plan.allocation) - 1)
                hops[ratio <= TARGETS["hops_ratio"] or not detours_pay(case, plan)].append(ratio)
        every = ratios[True] + ratios[False]
        print(
            f"\n{strategy}: {len(every)} plans, median {statistics.median(times):.1f} ms, worst {max(times):.0f} ms"
        )
        report.verdict(f"{strategy}: runs, geometric mean", geometric_mean(ratios[True]), "runs_mean")
        report.verdict(f"{strategy}: runs, worst", max(ratios[True]), "runs_worst")
        report.verdict(f"{strategy}: all, geometric mean", geometric_mean(every), "all_mean")
        report.verdict(f"{strategy}: all, worst", max(every), "all_worst")
        report.count(f"{strategy}: invalid plans", len(faults), "; ".join(faults[:3]))
        report.count(f"{strategy}: refused though feasible", len(refused), ", ".join(refused[:6]))
        report.count(f"{strategy}: infeasible with a wrong reason", len(wrong), ", ".join(wrong[:3]))
        if strategy == "greedy":
            report.verdict(
                f"greedy: hops over nodes used - 1, worst of {len(hops[True])}", max(hops[True]), "hops_ratio"
            )
            print(
                f"        mean {geometric_mean(hops[True]):.3f}; {len(hops[False])} more, for which every contiguous "
                "plan is proven slower: "
                f"mean {geometric_mean(hops[False]):.2f}, worst {max(hops[False], default=0):.1f}"
            )
        if puzzles:
            report.data[f"{strategy}: puzzles"] = {"mean": geometric_mean(puzzles), "worst": max(puzzles)}
            print(
                f"        {len(puzzles)} puzzles (layers all different, few to a node, no memory for one more), "
                "in none of the above: "
                f"{geometric_mean(puzzles):.4f} on average, worst {max(puzzles):.3f}"
            )
        print("  largest: " + ", ".join(f"{name} {ratio:.3f}" for ratio, name in sorted(worst, reverse=True)[:6]))
    for name, rule in rival_rules.items():
        found, invalid, none = [], 0, 0
        feasible = [case for case in chosen if case.name in bounds]
        for case in feasible:
            nodes_or_none = rule(case)
            referee = Referee(case, PlanOptions())
            if nodes_or_none is None:
                none += 1
            elif referee.fault(nodes_or_none, contiguous=False):
                invalid += 1
            else:
                found.append(referee.bottleneck_s(nodes_or_none) / bounds[case.name])
        mean, most = geometric_mean(found), max(found, default=math.nan)
        report.data[f"rival {name}"] = {"valid": len(found), "of": len(feasible), "mean": mean, "worst": most}
        print(
            f"  {name:44s} valid {len(found):3d} of {len(feasible)} ({invalid} over memory, {none} refused), "
            f"{mean:.3f} on average, worst {most:.1f}"
        )


def growth(report: Report, *, quick: bool) -> list[tuple[int, int, float]]:
    """Time over size, and the sizes that the targets name."""
    print("\ntime")
    times = []
    for seed in range(4 if quick else 12):
        profile, _ = list(real_models().values())[seed % 5]
        blocks = [(200_000_000, 2e8, 4096)] * 128
        wide = model("deep", blocks, hidden=4096, vocab=128256) if seed % 2 else profile
        case = Case(name="130x64", model=wide, cluster=_cluster(64, seed), runs=True)
        for strategy in ("greedy", "pipeline"):
            times.append(timed(case, PlanOptions(strategy=strategy), repeat=3)[1])
    report.verdict("130 layers x 64 nodes, median ms", statistics.median(times), "median_130x64_ms")
    report.verdict("130 layers x 64 nodes, worst ms", max(times), "worst_130x64_ms")
    points = []
    for layers, nodes in ((32, 8), (130, 64), (300, 300), (1000, 1000), (10_000, 1000)):
        profile = model("equal", [(200_000_000, 2e8, 4096)] * (layers - 2), hidden=4096, vocab=128256)
        case = Case(name="equal", model=profile, cluster=_cluster(nodes, 1), runs=True)
        slowest = max(timed(case, PlanOptions(strategy=strategy), repeat=3)[1] for strategy in ("greedy", "pipeline"))
        points.append((layers, nodes, slowest))
        print(f"        {layers:6d} layers x {nodes:4d} nodes: {slowest:8.1f} ms")
    report.verdict("1,000 x 1,000, ms", points[3][2], "1000x1000_ms")
    report.verdict("10,000 equal layers x 1,000 nodes, ms", points[4][2], "10000_equal_x1000_ms")
    if not quick:
        different = random_model("different", 9_998, 3, "uniform")
        case = Case(name="different", model=different, cluster=_cluster(1000, 2), runs=False)
        report.verdict(
            "10,000 different x 1,000, greedy ms", timed(case, PlanOptions())[1], "10000_different_x1000_ms"
        )
        pipeline = timed(case, PlanOptions(strategy="pipeline"))[1]
        report.verdict("10,000 different x 1,000, pipeline ms", pipeline, "10000_different_x1000_ms")
    report.data["growth"] = points
    return points


def _cluster(count: int, seed: int) -> Cluster:
    base = machines("wild", seed).nodes
    nodes = [base[(at * 7 + seed) % len(base)] for at in range(count)]
    return Cluster(
        nodes=tuple(
            Node(
                node_id=f"n{at:04d}",
                flop_per_s=node.flop_per_s * (1 + (at * 37 % 101) / 500),
                memory_bytes=node.memory_bytes,
                memory_bytes_per_s=node.memory_bytes_per_s,
            )
            for at, node in enumerate(nodes)
        ),
        default_link=Link(latency_s=0.001, bytes_per_s=1.25e9),
    )


def latency(report: Report) -> None:
    """One request's time on clusters whose pairs have links of their own, against all node sets tried."""
    import random

    from planner.latency.node_orders import Chains

    print("\none request at a time")
    ratios = []
    for seed in range(16):
        draw = random.Random(seed)
        profile = list(real_models().values())[seed % 8][0]
        base = machines("lab", seed, jitter=0.4).nodes[: 8 if seed % 2 else 7]
        ids = [node.node_id for node in base]
        links = {
            (a, b): Link(latency_s=draw.choice([0.0002, 0.005, 0.05]), bytes_per_s=draw.choice([1e8, 1.25e9, 1e10]))
            for a in ids
            for b in ids
            if a != b and seed % 4
        }
        cluster = Cluster(nodes=base, default_link=Link(latency_s=0.001, bytes_per_s=1e9), links=links)
        options = PlanOptions(strategy="pipeline", objective="latency")
        try:
            plan = make_plan(profile, cluster, options)
        except Infeasible:
            continue
        problem = build(profile, cluster, options)
        truth = Chains(problem, math.inf).exact()
        assert truth is not None
        ratios.append(plan.predicted.latency_s / min(truth[1], plan.predicted.latency_s))
        assert plan.predicted.lower_bound_s <= truth[1] * (1 + 1e-9)
    report.verdict(f"latency over the exact optimum, worst of {len(ratios)}", max(ratios), "latency_ratio")
    ratios = [ratio for seed in range(60) if (ratio := anywhere_ratio(seed)) is not None]
    report.verdict(f"the same, any layer anywhere, worst of {len(ratios)}", max(ratios), "latency_ratio")


def moves(report: Report, *, quick: bool) -> None:
    """Bytes moved after each node in turn leaves, over the bytes that have to move."""
    print("\nre-plan after a leave, 5 % tolerance")
    for strategy in ("greedy", "pipeline"):
        ratios, silent = [], 0
        for name, (profile, _) in list(real_models().items())[: 4 if quick else 9]:
            for mix in ("desk", "lab", "rack"):
                cluster = machines(mix, len(name))
                options = PlanOptions(strategy=strategy)
                try:
                    plan = make_plan(profile, cluster, options)
                except Infeasible:
                    continue
                for gone in list(plan.allocation)[:3]:
                    left = Cluster(
                        nodes=tuple(node for node in cluster.nodes if node.node_id != gone),
                        default_link=cluster.default_link,
                    )
                    try:
                        result = replan(plan, profile, left, options)
                    except Infeasible:
                        continue
                    ratio = result.moved_bytes / result.must_move_bytes if result.must_move_bytes else 1.0
                    ratios.append(ratio)
                    silent += ratio > 1.2 and "because" not in result.reason
        report.verdict(
            f"{strategy}: moved over must move, median of {len(ratios)}", statistics.median(ratios), "moved_ratio"
        )
        print(
            f"        mean {geometric_mean(ratios):.3f}, worst {max(ratios):.2f}, "
            f"{sum(r > 1.2 for r in ratios)} above 1.2"
        )
        report.count(f"{strategy}: above 1.2 without a reason", silent)


def replicas(report: Report, *, quick: bool) -> None:
    """Passes a second of several chains over those of one, wherever the cluster has the bytes of two models."""
    chosen = [
        case
        for case in cases(quick=quick)
        if sum(node.memory_bytes for node in case.cluster.nodes) >= 2 * needed_bytes(case.model)
    ]
    print(f"\nseveral chains (auto) against one: {len(chosen)} instances with memory for two models or more")
    for strategy in ("greedy", "pipeline"):
        ratios: list[tuple[float, str]] = []
        gaps, times, faults = [], [], []
        several = worse = 0
        for case in chosen:
            options = PlanOptions(strategy=strategy)
            one, _ = timed(case, options)
            start = time.perf_counter()
            try:
                found = make_replicas(case.model, case.cluster, options)
            except Infeasible:
                if not isinstance(one, Infeasible):
                    faults.append(f"{case.name}: refused")
                continue
            times.append((time.perf_counter() - start) * 1e3)
            referee = Referee(case, options)
            fault = replicas_fault(referee, found, contiguous=strategy == "pipeline")
            if fault or isinstance(one, Infeasible):
                faults.append(f"{case.name}: {fault or 'one chain is refused'}")
                continue
            ratio = found.throughput_per_s * referee.bottleneck_s(referee.nodes_of(one))
            ratios.append((ratio, case.name))
            gaps.append((found.gap, case.name))
            several += len(found.plans) > 1
            worse += ratio < 1 - 1e-9
        values, bounds = [ratio for ratio, _ in ratios], [gap for gap, _ in gaps]
        report.data[f"{strategy}: replicas"] = {
            "instances": len(values), "several": several, "ratio_mean": geometric_mean(values),
            "ratio_worst": min(values), "ratio_best": max(values), "gap_median": statistics.median(bounds),
            "gap_worst": max(bounds), "median_ms": statistics.median(times), "worst_ms": max(times),
        }  # fmt: skip
        print(
            f"\n{strategy}: {len(values)} divisions, {several} of them into several chains; median "
            f"{statistics.median(times):.0f} ms, worst {max(times):.0f} ms\n"
            f"        throughput over one chain's: {geometric_mean(values):.3f} (geometric mean), worst "
            f"{min(values):.3f}, best {max(values):.3f}\n"
            f"        gap to the bound of any division: median {statistics.median(bounds):.3%}, mean "
            f"{statistics.mean(bounds):.3%}, worst {max(bounds):.2%}"
        )
        report.count(f"{strategy}: fewer passes than one chain", worse)
        report.count(f"{strategy}: invalid divisions", len(faults), "; ".join(faults[:3]))
        for what, ranked in (("most", ratios), ("largest gaps", gaps)):
            print(
                f"  {what}: " + ", ".join(f"{name} {value:.2f}" for value, name in sorted(ranked, reverse=True)[:6])
            )
    times = []
    for seed in range(2 if quick else 6):
        blocks = [(200_000_000, 2e8, 4096)] * 128
        deep = (
            model("deep", blocks, hidden=4096, vocab=128256) if seed % 2 else random_model("r", 128, seed, "uniform")
        )
        start = time.perf_counter()
        make_replicas(deep, _cluster(64, seed))
        times.append((time.perf_counter() - start) * 1e3)
    print()
    report.verdict("replicas, 130 layers x 64 nodes, worst ms", max(times), "replicas_130x64_ms")


def replicas_fault(referee: Referee, found: Replicas, *, contiguous: bool) -> str | None:
    """What is wrong with a division into chains, or None."""
    used: set[str] = set()
    total = 0.0
    for plan in found.plans:
        nodes = referee.nodes_of(plan)
        fault = referee.fault(nodes, contiguous=contiguous)
        if fault:
            return fault
        ids = {referee.case.cluster.nodes[node].node_id for node in nodes}
        if used & ids:
            return f"{min(used & ids)} is in two chains"
        used |= ids
        total += 1 / referee.bottleneck_s(nodes)
    if not math.isclose(total, found.throughput_per_s, rel_tol=1e-9):
        return "prediction"
    if total > found.upper_bound_per_s * (1 + 1e-9):
        return "above the bound"
    idle = {node_id for node_id, _ in found.idle}
    return None if idle == {node.node_id for node in referee.case.cluster.nodes} - used else "idle nodes"


def everything(report: Report, arguments: argparse.Namespace) -> list[tuple[int, int, float]]:
    """All parts for single plans; the points of growth."""
    points = growth(report, quick=arguments.quick)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.verdict("resident after planning, MB", resident, "resident_mb")
    rules: dict[str, Callable[[Case], rivals.Nodes]] = {}
    if arguments.rivals:
        rules = {
            "the first implementation's rule, 1 s budget": rivals.first_rule,
            "largest remainder by memory": rivals.largest_remainder_by_memory,
            "accelerate, balanced, fastest first": rivals.accelerate_map,
        }
    if arguments.parallax:
        rules.update(rivals.parallax(arguments.parallax))
    quality(report, quick=arguments.quick, milp_s=arguments.milp, rival_rules=rules)
    latency(report)
    moves(report, quick=arguments.quick)
    return points


def main() -> int:
    """Run the parts and say what passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fifth instance")
    parser.add_argument("--milp", type=float, default=0.0, metavar="SECONDS", help="HiGHS's time for each bound")
    parser.add_argument("--rivals", action="store_true", help="a plain rule, accelerate, largest remainder")
    parser.add_argument("--parallax", type=Path, metavar="FOLDER", help="its layer allocator, from a checkout there")
    parser.add_argument("--replicas", action="store_true", help="only: several chains against one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="growth as an SVG")
    arguments = parser.parse_args()
    report = Report()
    points: list[tuple[int, int, float]] = []
    if arguments.replicas:
        replicas(report, quick=arguments.quick)
    else:
        points = everything(report, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.data, indent=1))
    if arguments.plot and points:
        arguments.plot.write_text(svg(points))
    print(f"\n{len(report.failed)} targets missed" + (": " + "; ".join(report.failed) if report.failed else ""))
    return 1 if report.failed else 0


def svg(points: Sequence[tuple[int, int, float]]) -> str:
    """Milliseconds over layers x nodes, both logarithmic."""
    wide, high, edge = 640, 360, 50
    xs = [math.log10(layers * nodes) for layers, nodes, _ in points]
    ys = [math.log10(max(ms, 0.1)) for _, _, ms in points]
    low, top = min(ys), max(*ys, min(ys) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            edge + (x - xs[0]) / (xs[-1] - xs[0]) * (wide - 2 * edge),
            high - edge - (y - low) / (top - low) * (high - 2 * edge),
        )

    places = [at(x, y) for x, y in zip(xs, ys, strict=True)]
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in places)
    labels = "".join(
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3"/><text x="{x:.0f}" y="{y - 8:.0f}" text-anchor="middle">'
        f"{layers}x{nodes}: {ms:.0f} ms</text>"
        for (x, y), (layers, nodes, ms) in zip(places, points, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="11">'
        f'<polyline points="{line}" fill="none" stroke="currentColor"/>{labels}</svg>\n'
    )


if __name__ == "__main__":
    raise SystemExit(main())
