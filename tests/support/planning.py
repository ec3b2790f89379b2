"""Small models and clusters to plan, and the truth about them by trying everything."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence

from planner.cluster import Cluster, Link, Node
from planner.errors import Infeasible, InvalidInput
from planner.plan import Plan, PlanOptions
from planner.problem.cost import layer_flop, layer_traffic_bytes, node_memory_bytes, payload_bytes, roofline_s
from planner.profile import Layer, ModelProfile
from planner.strategies.make import make_plan


def outcome(model: ModelProfile, machines: Cluster, options: PlanOptions) -> Plan | Infeasible | InvalidInput:
    """The plan, or why there is none."""
    try:
        return make_plan(model, machines, options)
    except (Infeasible, InvalidInput) as error:
        return error


def profile(
    flops: Sequence[float],
    bytes_: Sequence[int] | None = None,
    *,
    tied: bool = False,
    shares: Sequence[int] = (),
    activation_bytes: int = 8,
) -> ModelProfile:
    """A model of those layers; the last if `tied`, and those that `shares` names, use the first one's weights."""
    sizes = list(bytes_) if bytes_ is not None else [0] * len(flops)
    layers = []
    for at, (flop, size) in enumerate(zip(flops, sizes, strict=True)):
        uses = at > 0 and (at in shares or (tied and at == len(flops) - 1))
        layers.append(
            Layer(
                name=f"layers.{at}",
                index=at,
                layer_type="decoder",
                weight_bytes=0 if uses else size,
                tied_to="layers.0" if uses else None,
                tied_bytes=sizes[0] if uses else 0,
                activation_bytes=activation_bytes,
                compute_required=flop,
            )
        )
    return ModelProfile(model_name="test/model", revision="r1", sequence_length=4, layers=tuple(layers))


def cluster(
    rates: Sequence[float],
    memory: Sequence[int] | None = None,
    *,
    bandwidth: Sequence[float | None] | None = None,
    link: Link | None = None,
    links: dict[tuple[str, str], Link] | None = None,
) -> Cluster:
    """Nodes a, b, c, ... with those figures."""
    return Cluster(
        nodes=tuple(
            Node(
                node_id=f"n{at}",
                flop_per_s=rate,
                memory_bytes=memory[at] if memory is not None else 10**6,
                memory_bytes_per_s=bandwidth[at] if bandwidth is not None else None,
            )
            for at, rate in enumerate(rates)
        ),
        default_link=link or Link(),
        links=links or {},
    )


def moved_bytes(model: ModelProfile, before: Mapping[str, str], after: Mapping[str, str]) -> int:
    """Bytes that the nodes of `after` (layer -> node) fetch beside what they have `before`, weight by weight."""
    shared = {layer.tied_to: layer.tied_bytes for layer in model.layers if layer.tied_to}

    def weights(holder: Mapping[str, str]) -> dict[tuple[str, str], int]:
        found = {}
        for layer in model.layers:
            node = holder[layer.name]
            found[node, layer.name] = layer.weight_bytes - shared.get(layer.name, 0)
            owner = layer.name if layer.name in shared else layer.tied_to
            if owner is not None:
                found[node, f"shared {owner}"] = shared[owner]
        return found

    there = weights(before)
    return sum(size for piece, size in weights(after).items() if piece not in there)


def layer_seconds(model: ModelProfile, machines: Cluster, options: PlanOptions) -> list[list[float]]:
    """[node][layer] seconds, from the figures alone."""
    return [
        [
            roofline_s(
                layer_flop(layer, model, phase=options.phase),
                layer_traffic_bytes(layer, model, phase=options.phase),
                node,
            )
            for layer in model.layers
        ]
        for node in machines.nodes
    ]


def assignments(model: ModelProfile, machines: Cluster, *, contiguous: bool) -> Iterator[tuple[int, ...]]:
    """Every way to give layers to nodes (all, or as one stage a node)."""
    layers, nodes = len(model.layers), len(machines.nodes)
    if not contiguous:
        yield from itertools.product(range(nodes), repeat=layers)
        return
    for stages in range(1, min(layers, nodes) + 1):
        for cuts in itertools.combinations(range(1, layers), stages - 1):
            edges = (0, *cuts, layers)
            for order in itertools.permutations(range(nodes), stages):
                yield tuple(
                    node for node, (a, b) in zip(order, itertools.pairwise(edges), strict=True) for _ in range(a, b)
                )


def is_valid(model: ModelProfile, machines: Cluster, options: PlanOptions, nodes: Sequence[int]) -> bool:
    """Memory, shares, pins and exclusions kept; time is not looked at."""
    total = sum(layer_flop(layer, model, phase=options.phase) for layer in model.layers)
    for at, node in enumerate(machines.nodes):
        held = [layer for layer, home in zip(model.layers, nodes, strict=True) if home == at]
        if not held:
            continue
        if node.node_id in options.exclude:
            return False
        share = options.max_memory_share.get(node.node_id, 1.0)
        if node_memory_bytes(held) > max(0, math.floor(node.memory_bytes * share) - options.reserve_bytes):
            return False
        flop = sum(layer_flop(layer, model, phase=options.phase) for layer in held)
        if flop > options.max_compute_share.get(node.node_id, 1.0) * total * (1 + 1e-9):
            return False
    ids = [node.node_id for node in machines.nodes]
    return all(
        ids[home] == options.pins.get(layer.name, ids[home]) for layer, home in zip(model.layers, nodes, strict=True)
    )


def bottleneck_s(seconds: Sequence[Sequence[float]], nodes: Sequence[int]) -> float:
    """Seconds of the slowest node."""
    loads = [0.0] * len(seconds)
    for layer, node in enumerate(nodes):
        loads[node] += seconds[node][layer]
    return max(loads)


def latency_s(
    model: ModelProfile,
    machines: Cluster,
    options: PlanOptions,
    seconds: Sequence[Sequence[float]],
    nodes: Sequence[int],
) -> float:
    """Seconds of one pass, hops included."""
    total = sum(seconds[node][layer] for layer, node in enumerate(nodes))
    for at, (a, b) in enumerate(itertools.pairwise(nodes)):
        if a != b:
            link = machines.link(machines.nodes[a].node_id, machines.nodes[b].node_id)
            total += link.transfer_s(payload_bytes(model.layers[at], model, phase=options.phase))
    return total


def best(model: ModelProfile, machines: Cluster, options: PlanOptions, *, contiguous: bool) -> float:
    """The best objective there is within the time budget; infinity where nothing fits."""
    seconds = layer_seconds(model, machines, options)
    longest = math.inf if options.time_budget_s is None else options.time_budget_s * (1 + 1e-9)
    found = math.inf
    for nodes in assignments(model, machines, contiguous=contiguous):
        if bottleneck_s(seconds, nodes) > longest:
            continue
        value = (
            bottleneck_s(seconds, nodes)
            if options.objective == "throughput"
            else latency_s(model, machines, options, seconds, nodes)
        )
        if value < found and is_valid(model, machines, options, nodes):
            found = value
    return found


def encoder_decoder_case(seed: int, *, layers: int = 7, nodes: int = 3) -> tuple[ModelProfile, Cluster]:
    """A small case whose middle and last layer use the first one's weights, often tight in memory."""
    draw = random.Random(seed)
    count = draw.randint(3, layers)
    first, second = (draw.randint(1, 9), draw.randint(0, 5)), (draw.randint(1, 9), draw.randint(0, 5))
    middle = draw.randint(1, count - 2)
    kinds = [first] * (middle - 1) + [(draw.randint(0, 3), 0)] + [second] * (count - middle - 2)
    kinds = [(draw.randint(0, 3), draw.randint(1, 9)), *kinds, (draw.randint(1, 20), 0)]
    machines = draw.randint(1, nodes)
    total = sum(size for _, size in kinds)
    room = [draw.randint(1, max(1, int(total * draw.choice([0.5, 0.8, 1.0, 1.6])))) for _ in range(machines)]
    return (
        profile([f for f, _ in kinds], [b for _, b in kinds], shares=(middle, count - 1)),
        cluster(
            [draw.randint(1, 9) for _ in range(machines)], room, link=Link(latency_s=draw.choice([0.0, 0.1, 1.0]))
        ),
    )


def random_case(seed: int, *, layers: int = 6, nodes: int = 3, runs: bool = True) -> tuple[ModelProfile, Cluster]:
    """A small case, often tight in memory; layers in runs or all different."""
    draw = random.Random(seed)
    count = draw.randint(1, layers)
    if runs:
        common = (draw.randint(1, 9), draw.randint(0, 5))
        odd = [(draw.randint(0, 20), draw.randint(0, 9)) for _ in range(draw.randint(0, min(3, count - 1)))]
        split = draw.randint(0, len(odd))
        kinds = [*odd[:split], *[common] * (count - len(odd)), *odd[split:]]
    else:
        kinds = [(draw.randint(0, 20), draw.randint(0, 9)) for _ in range(count)]
    if not any(flop for flop, _ in kinds):
        kinds[0] = (1, kinds[0][1])
    machines = draw.randint(1, nodes)
    total = sum(size for _, size in kinds)
    room = [draw.randint(0, max(1, int(total * draw.choice([0.6, 1.0, 2.0])))) for _ in range(machines)]
    return (
        profile([f for f, _ in kinds], [b for _, b in kinds], tied=draw.random() < 0.3),
        cluster(
            [draw.randint(1, 9) for _ in range(machines)],
            room,
            bandwidth=[draw.choice([None, 1.0, 2.0, 5.0]) for _ in range(machines)],
            link=Link(latency_s=draw.choice([0.0, 0.1, 1.0]), bytes_per_s=draw.choice([None, 8.0, 80.0])),
        ),
    )
