"""One request at a time, any layer anywhere: plans against every allocation there is, on instances that allow it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np

from planner.cluster import Cluster, Link, Node
from planner.errors import Infeasible
from planner.plan import PlanOptions
from planner.problem.arrays import build
from planner.profile import Layer, ModelProfile
from planner.strategies.make import make_plan


def anywhere_ratio(seed: int) -> float | None:
    """One request's time, any layer anywhere, over the least of all allocations, each of them tried."""
    draw = random.Random(seed)
    count, size = draw.choice([(3, 10), (4, 8)])
    layers = tuple(
        Layer(
            name=f"layers.{at}",
            index=at,
            layer_type="decoder",
            weight_bytes=draw.randint(1, 100),
            activation_bytes=draw.choice([8, 80]),
            compute_required=draw.uniform(0.2, 5.0),
        )
        for at in range(size)
    )
    profile = ModelProfile(model_name="benchmark/anywhere", revision="1", sequence_length=4, layers=layers)
    total = sum(layer.weight_bytes for layer in layers)
    nodes = tuple(
        Node(
            node_id=f"node{at}",
            flop_per_s=draw.uniform(0.5, 8.0),
            memory_bytes=int(total * draw.choice([0.3, 0.5, 0.8])),
        )
        for at in range(count)
    )
    links = {
        (a.node_id, b.node_id): Link(latency_s=draw.choice([0.0, 0.1, 1.0]), bytes_per_s=draw.choice([None, 80.0]))
        for a in nodes
        for b in nodes
        if a != b and seed % 3
    }
    cluster = Cluster(nodes=nodes, default_link=Link(latency_s=0.1, bytes_per_s=100.0), links=links)
    options = PlanOptions(strategy="greedy", objective="latency")
    if seed % 2:
        try:
            budget_s = 1.3 * make_plan(profile, cluster).predicted.bottleneck_s
        except Infeasible:
            return None
        options = dataclasses.replace(options, time_budget_s=budget_s)
    problem = build(profile, cluster, options)
    every = np.indices((count,) * size).reshape(size, -1)
    took = problem.seconds[every, problem.kind[:, None]]
    seconds = took.sum(axis=0)
    for source, target, payload in zip(every, every[1:], problem.payload.tolist(), strict=False):
        for a, b in itertools.permutations(range(count), 2):
            seconds[(source == a) & (target == b)] += problem.link(a, b).transfer_s(payload)
    for node in range(count):
        on = every == node
        seconds[problem.memory @ on > problem.capacity[node]] = math.inf
        seconds[(took * on).sum(axis=0) > (options.time_budget_s or math.inf) * (1 + 1e-9)] = math.inf
    truth = float(seconds.min())
    try:
        plan = make_plan(profile, cluster, options)
    except Infeasible:
        assert math.isinf(truth), "refused what fits"
        return None
    assert plan.predicted.lower_bound_s <= truth * (1 + 1e-9)
    return plan.predicted.latency_s / truth
