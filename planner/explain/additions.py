"""The fewest bytes more, over all nodes together, with which a model fits: each way to cut it has a price.

Both searches go through counts of what is alike (nodes for contiguous stages, layers where any may be anywhere), so
that they are exact for all but very mixed clusters and models; there, a rule stands in.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from planner.problem.arrays import SLACK, Floats, Ints, Problem

#: Stands for "must not be"; two of them and a price are still an integer.
_NEVER = 2**61
#: Entries of tables, operations on tables and contents of a node up to which all is tried.
_MOST_ENTRIES, _MOST_STEPS, _MOST_CONTENTS = 50_000_000, 30_000, 4_000


def least_excess(problem: Problem, *, staged: bool) -> Ints | None:
    """The (L,) nodes of layers whose nodes lack the fewest bytes in all, and of those on the fewest nodes.

    Shares of the compute, pins and the time budget are kept; None if they leave no way, or none was found.

    Args:
        problem: What does not fit.
        staged: Whether each node holds one run of layers.
    """
    prices = _Prices(problem)
    return _stages(problem, prices) if staged else _contents(problem, prices)


def lacking(problem: Problem, nodes: Ints) -> dict[int, int]:
    """Node -> bytes by which its memory has to grow to hold what `nodes` gives it, where it has to."""
    used, prices = problem.memory_used(nodes), _Prices(problem)
    over = np.flatnonzero(used > problem.capacity).tolist()
    return {node: int(prices.missing(node, used[node : node + 1])[0]) for node in over}


class _Prices:
    """What a load costs on a node: bytes that its memory lacks for it, then one for a node that lacks any."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.weight = problem, len(problem.nodes) + 1
        budget = problem.options.time_budget_s
        self.budget_s = math.inf if budget is None else budget * (1 + SLACK)
        self.limited = budget is not None or bool(np.isfinite(problem.flop_cap).any())

    def missing(self, node: int, load: Ints) -> Ints:
        """Bytes by which the node's memory has to grow for loads that are more than it has room for."""
        problem = self.problem
        wanted = load + problem.options.reserve_bytes + problem.peak_bytes
        share = problem.options.max_memory_share.get(problem.nodes[node].node_id, 1.0)
        size = np.ceil(wanted / share).astype(np.int64)
        size += np.floor(size * share).astype(np.int64) < wanted
        size -= np.floor((size - 1) * share).astype(np.int64) >= wanted
        return size - problem.nodes[node].memory_bytes

    def of(self, node: int, load: Ints, flop: Floats, seconds: Floats) -> Ints:
        """The price of each load, `_NEVER` where it takes too much of the compute or time."""
        over = load > self.problem.capacity[node]
        price = np.where(over, self.missing(node, load) * self.weight + 1, 0)
        allowed = (flop <= self.problem.flop_cap[node] * (1 + SLACK)) & (seconds <= self.budget_s)
        return np.where(allowed, price, _NEVER)


# -- contiguous stages ----------------------------------------------------------------------------------------------
def _stages(problem: Problem, prices: _Prices) -> Ints | None:
    count = len(problem.kind)
    memory = _stage_memory(problem)
    flop = _runs(problem.flop)
    tables: dict[int, Ints] = {}
    members: dict[tuple[object, ...], list[int]] = defaultdict(list)
    held = set(problem.pinned.tolist())
    for at, node in enumerate(problem.nodes):
        share = problem.options.max_memory_share.get(node.node_id)
        alike = (node.memory_bytes, share, float(problem.flop_cap[at]), problem.seconds[at].tobytes())
        members[(*alike, at if at in held else -1)].append(at)
    classes = list(members.values())
    states = math.prod(len(nodes) + 1 for nodes in classes)
    for nodes in classes:
        at = nodes[0]
        foreign = _runs(((problem.pinned >= 0) & (problem.pinned != at)).astype(np.float64))
        price = prices.of(at, memory, flop, _runs(problem.seconds[at][problem.kind]))
        price[(foreign > 0) | np.tri(count + 1, dtype=bool)] = _NEVER
        tables[at] = price
    tries = states * len(classes)
    if tries > _MOST_STEPS or tries * (count + 1) ** 2 > _MOST_ENTRIES:
        orders = [sorted(range(len(problem.nodes)), key=lambda at: (sign * int(problem.capacity[at]), at))
                  for sign in (-1, 1)]  # fmt: skip
        of = {at: tables[nodes[0]] for nodes in classes for at in nodes}
        found = [_in_order(order, of, count) for order in orders]
        return min(found, key=lambda each: each[0])[1]
    start = np.full(count + 1, _NEVER, dtype=np.int64)
    start[0] = 0
    sizes = [len(nodes) + 1 for nodes in classes]
    best: dict[tuple[int, ...], Ints] = {}
    came: dict[tuple[int, ...], tuple[Ints, Ints]] = {}
    for state in np.ndindex(*sizes):
        least, by, since = start.copy(), np.full(count + 1, -1), np.arange(count + 1)
        for at in np.flatnonzero(state).tolist():
            before = best[tuple(n - (kind == at) for kind, n in enumerate(state))]
            price, first = _one_more(before, tables[classes[at][0]])
            lower = price < least
            least, by, since = np.where(lower, price, least), np.where(lower, at, by), np.where(lower, first, since)
        best[state], came[state] = least, (by, since)
    state, end = tuple(size - 1 for size in sizes), count
    if best[state][end] >= _NEVER:
        return None
    answer, left = np.zeros(count, dtype=np.int64), [list(nodes) for nodes in classes]
    while any(state):
        by, since = came[state]
        chosen, begin = int(by[end]), int(since[end])
        if chosen < 0:
            break
        answer[begin:end] = left[chosen].pop(0)
        state, end = tuple(n - (kind == chosen) for kind, n in enumerate(state)), begin
    return answer


def _one_more(before: Ints, table: Ints) -> tuple[Ints, Ints]:
    """Prices of the first layers with a further node, which holds the last of them or none, and where it begins."""
    total = np.minimum(before[:, None] + table, _NEVER)
    np.fill_diagonal(total, before)  # it holds none
    first = total.argmin(axis=0)
    return total[first, np.arange(len(first))], first


def _in_order(order: list[int], tables: dict[int, Ints], count: int) -> tuple[int, Ints | None]:
    """The least price with stages in this order of nodes, some of which may hold nothing; and the layers' nodes."""
    least = np.full(count + 1, _NEVER, dtype=np.int64)
    least[0] = 0
    steps = []
    for at in order:
        least, first = _one_more(least, tables[at])
        steps.append(first)
    if least[count] >= _NEVER:
        return _NEVER, None
    answer, end = np.zeros(count, dtype=np.int64), count
    for at, since in zip(reversed(order), reversed(steps), strict=True):
        answer[int(since[end]) : end] = at
        end = int(since[end])
    return int(least[count]), answer


def _runs(cost: Floats) -> Floats:
    """(L + 1, L + 1) cost of the layers from one number up to another."""
    total = np.concatenate(([0.0], np.cumsum(cost)))
    runs: Floats = total[None, :] - total[:, None]
    return runs


def _stage_memory(problem: Problem) -> Ints:
    """(L + 1, L + 1) bytes of a stage of the layers from one number up to another, with copies of tied weights."""
    total = np.concatenate(([0], np.cumsum(problem.memory)))
    memory = total[None, :] - total[:, None]
    cut = np.arange(len(total))

    def holds(layer: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return (cut[:, None] <= layer) & (layer < cut[None, :])

    for owner in np.unique(problem.tied_to[problem.tied_to >= 0]).tolist():
        copy = np.zeros_like(memory)
        for layer in np.flatnonzero(problem.tied_to == owner).tolist():
            np.maximum(copy, np.where(holds(layer) & ~holds(owner), problem.tied_bytes[layer], 0), out=copy)
        memory += copy
    return memory


# -- any layer anywhere ---------------------------------------------------------------------------------------------
def _contents(problem: Problem, prices: _Prices) -> Ints | None:
    free = np.flatnonzero(problem.pinned < 0).tolist()
    owners = set(problem.tied_to.tolist())
    kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for layer in free:
        tied = int(problem.tied_to[layer])
        role = (tied, int(problem.tied_bytes[layer]) if tied >= 0 else 0, layer if layer in owners else -1)
        by = int(problem.kind[layer]) if prices.limited else -1
        kinds[int(problem.memory[layer]), role, by].append(layer)
    # What costs nothing that is looked at here goes anywhere.
    idle = [] if prices.limited else [key for key in kinds if key[0] == 0 and key[1] == (-1, 0, -1)]
    answer = np.where(problem.pinned >= 0, problem.pinned, 0)
    groups = [layers for key, layers in kinds.items() if key not in idle]
    sizes = tuple(len(layers) + 1 for layers in groups)
    contents = math.prod(sizes)
    if contents > _MOST_CONTENTS or contents * len(problem.nodes) > _MOST_STEPS:
        return _where_it_costs_least(problem, prices, answer, free)
    counts = np.array(list(np.ndindex(*sizes)), dtype=np.int64).reshape(contents, len(groups))
    least = np.full(sizes, _NEVER, dtype=np.int64)
    least[(0,) * len(sizes)] = 0
    taken = []
    seen: dict[tuple[object, ...], Ints] = {}
    pinned = set(problem.pinned.tolist())
    for at, node in enumerate(problem.nodes):
        share = problem.options.max_memory_share.get(node.node_id)
        alike = (node.memory_bytes, share, float(problem.flop_cap[at]), problem.seconds[at].tobytes(),
                 at if at in pinned else -1)  # fmt: skip
        if alike not in seen:
            seen[alike] = _content_prices(problem, prices, at, groups, counts)
        least, chosen = _with_node(least, seen[alike], counts, sizes)
        taken.append(chosen)
    if least.flat[-1] >= _NEVER:
        return None
    state, left = np.array(sizes) - 1, [list(layers) for layers in groups]
    for at in range(len(problem.nodes) - 1, -1, -1):
        content = counts[taken[at][tuple(state)]]
        for kind, count in enumerate(content.tolist()):
            for _ in range(count):
                answer[left[kind].pop()] = at
        state = state - content
    return answer


def _with_node(least: Ints, price: Ints, counts: Ints, sizes: tuple[int, ...]) -> tuple[Ints, Ints]:
    """The least prices with a further node, and the content that it then has."""
    after = np.full(sizes, _NEVER, dtype=np.int64)
    chosen = np.zeros(sizes, dtype=np.int64)
    for index in np.flatnonzero(price < _NEVER).tolist():
        content = counts[index].tolist()
        rest = least[tuple(slice(0, size - n) for size, n in zip(sizes, content, strict=True))] + price[index]
        there = tuple(slice(n, None) for n in content)
        lower = rest < after[there]
        after[there] = np.where(lower, rest, after[there])
        chosen[there] = np.where(lower, index, chosen[there])
    return after, chosen


def _content_prices(problem: Problem, prices: _Prices, at: int, groups: list[list[int]], counts: Ints) -> Ints:
    """The price of each content on a node, beside what is pinned to it."""
    mine = problem.pinned == at
    first = [layers[0] for layers in groups]
    load = counts @ problem.memory[first] + problem.memory[mine].sum()
    seconds = problem.seconds[at][problem.kind]
    for owner in np.unique(problem.tied_to[problem.tied_to >= 0]).tolist():
        if mine[owner]:
            continue
        tied = np.flatnonzero(mine & (problem.tied_to == owner))
        copy = np.full(len(counts), int(problem.tied_bytes[tied].max(initial=0)), dtype=np.int64)
        absent = np.ones(len(counts), dtype=np.bool_)
        for kind, layer in enumerate(first):
            if problem.tied_to[layer] == owner:
                np.maximum(copy, np.where(counts[:, kind] > 0, problem.tied_bytes[layer], 0), out=copy)
            if layer == owner:
                absent = counts[:, kind] == 0
        load = load + np.where(absent, copy, 0)
    return prices.of(
        at,
        load,
        counts @ problem.flop[first] + problem.flop[mine].sum(),
        counts @ seconds[first] + seconds[mine].sum(),
    )


def _where_it_costs_least(problem: Problem, prices: _Prices, answer: Ints, free: list[int]) -> Ints | None:
    """Layers one by one, the largest first, each to the node that lacks least with it, and of those the fullest."""
    count = len(problem.nodes)
    load = np.zeros(count, dtype=np.int64)
    np.add.at(load, problem.pinned[problem.pinned >= 0], problem.memory[problem.pinned >= 0])
    flop, seconds = np.zeros(count), np.zeros(count)
    for layer in np.flatnonzero(problem.pinned >= 0).tolist():
        flop[problem.pinned[layer]] += problem.flop[layer]
        seconds[problem.pinned[layer]] += problem.seconds[problem.pinned[layer], problem.kind[layer]]
    for layer in sorted(free, key=lambda layer: (-int(problem.memory[layer]), layer)):
        held = load + int(problem.memory[layer])
        took = seconds + problem.seconds[:, problem.kind[layer]]
        more = np.maximum(held, problem.capacity) - np.maximum(load, problem.capacity)
        never = (flop + problem.flop[layer] > problem.flop_cap * (1 + SLACK)) | (took > prices.budget_s)
        if never.all():
            return None
        node = int(np.lexsort((np.abs(problem.capacity - held), more, never))[0])
        answer[layer] = node
        load[node], seconds[node] = held[node], took[node]
        flop[node] += problem.flop[layer]
    return answer
