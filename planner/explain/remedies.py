"""Changes with which a request fits that does not: more bytes, a node more, fewer pins or shares, a shorter context.

Each was tried: a change is only offered if the plan with it was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from planner.cluster import Cluster, Node
from planner.explain.additions import lacking, least_excess
from planner.explain.reports import need_text
from planner.plan import PlanOptions
from planner.problem.arrays import Ints, Problem, build, usable_bytes
from planner.profile import ModelProfile

#: Answers a problem with the (L,) node of each layer, or None where it finds no plan.
Solver = Callable[[Problem], Ints | None]
_Change = tuple[dict[str, Any], str]

#: Contexts are searched up to this many tokens.
MOST_TOKENS = 16_777_216
#: Seconds that a refusal may take to look for what would help.
_LONGEST_S = 2.0
#: Nodes up to which each is tried in every way; with more those that may need least.
_FEW = 16
#: Sums of layers' bytes up to which a node's memory is looked for among them. Where there are more, layers are too
#: different for the least to be found for certain: fewer nodes are tried, and the last thousandth is not looked for.
_MOST_SUMS, _FEWER, _NEAR = 20_000, 4, 1_000


def overfull(problem: Problem) -> dict[int, int]:
    """Node -> bytes of what is pinned to it, where these alone are too many."""
    found: dict[int, int] = {}
    for node in np.unique(problem.pinned[problem.pinned >= 0]).tolist():
        mine = problem.pinned == node
        copies: dict[int, int] = {}
        for layer in np.flatnonzero(mine & (problem.tied_to >= 0)).tolist():
            owner = int(problem.tied_to[layer])
            if not mine[owner]:  # it comes along, or what is shared is copied
                copies[owner] = max(copies.get(owner, 0), int(problem.tied_bytes[layer]))
        held = int(problem.memory[mine].sum()) + sum(copies.values())
        if held > problem.capacity[node]:
            found[node] = held
    return found


class _TooLong(Exception):
    """The caller has waited long enough for a refusal."""


def remedies(problem: Problem, solver: Solver, *, staged: bool) -> list[tuple[dict[str, Any], str]]:
    """Changes that were tried and work, as data and in words.

    The smallest of each sort, unless that takes more than `_LONGEST_S`: then one that is enough, or none. Of memory,
    the smallest in all, over however many nodes, and the smallest on a single one.

    Args:
        problem: What does not fit; its time budget is kept.
        solver: How plans are looked for.
        staged: Whether each node holds one run of layers.
    """
    deadline = time.monotonic() + _LONGEST_S

    def timely(changed: Problem) -> Ints | None:
        if time.monotonic() > deadline:
            raise _TooLong
        return solver(changed)

    def several(problem: Problem, solver: Solver) -> _Change | None:
        return _memory_of_several(problem, solver, staged=staged)

    found: list[_Change] = []
    for look in (several, _memory, _node, _pins, _shares, _context):
        with contextlib.suppress(_TooLong):
            change = look(problem, timely)
            if change is not None:
                found.append(change)
    if len(found) > 1 and found[1][0].get("extra_bytes", math.inf) <= sum(
        found[0][0].get("extra_bytes_by_node", {}).values()
    ):
        del found[0]
    return found


def _memory(problem: Problem, solver: Solver) -> _Change | None:
    extra = _more_bytes(problem, solver)
    if extra is None:
        return None
    node_id, size = extra
    text = f"{need_text(size)} more memory on {node_id}"
    return {"change": "memory", "node_id": node_id, "extra_bytes": size}, text


def _memory_of_several(problem: Problem, solver: Solver, *, staged: bool) -> _Change | None:
    """The fewest bytes more in all, where these are on several nodes: one node alone would need more."""
    nodes = least_excess(problem, staged=staged)
    if nodes is None or len(lacking(problem, nodes)) < 2:
        return None
    raised = np.maximum(problem.capacity, problem.memory_used(nodes))
    # What just fits is hard to find among many different layers: then with more room, of which not all is used.
    rooms = [raised, *(problem.capacity + int(problem.memory.max()) // parts for parts in (16, 8, 4, 2, 1))]
    tries = (solver(dataclasses.replace(problem, capacity=room)) for room in rooms)
    found = next((answer for answer in tries if answer is not None), None)
    if found is None:
        return None
    extra = {problem.nodes[node].node_id: size for node, size in lacking(problem, found).items()}
    parts = _few([f"{need_text(size)} on {node_id}" for node_id, size in extra.items()])
    text = f"{need_text(sum(extra.values()))} more memory in all ({parts})"
    return {"change": "memory", "extra_bytes_by_node": extra}, text


def _node(problem: Problem, solver: Solver) -> _Change | None:
    twin = _one_node_more(problem, solver)
    if twin is None:
        return None
    text = f"one more node like {twin.node_id} ({need_text(twin.memory_bytes)})"
    return {"change": "node", "like": twin.node_id, "memory_bytes": twin.memory_bytes}, text


def _pins(problem: Problem, solver: Solver) -> _Change | None:
    over = overfull(problem)
    pinned = np.flatnonzero(problem.pinned >= 0).tolist()
    pinned.sort(key=lambda layer: (int(problem.pinned[layer]) not in over, -int(problem.memory[layer]), layer))

    def works(lifted: list[int]) -> bool:
        pins = problem.pinned.copy()
        pins[lifted] = -1
        return solver(dataclasses.replace(problem, pinned=pins)) is not None

    lifted = _needed(pinned, works)
    if not lifted:
        return None
    names = [problem.profile.layers[layer].name for layer in lifted]
    few = _few([f"{name} on {problem.options.pins[name]}" for name in names])
    return {"change": "pins", "layers": names}, f"{few} not pinned"


def _shares(problem: Problem, solver: Solver) -> _Change | None:
    capped = np.flatnonzero(np.isfinite(problem.flop_cap)).tolist()
    capped.sort(key=lambda node: (-float(problem.rate[node]), node))

    def works(lifted: list[int]) -> bool:
        caps = problem.flop_cap.copy()
        caps[lifted] = math.inf
        return solver(dataclasses.replace(problem, flop_cap=caps)) is not None

    lifted = _needed(capped, works)
    if not lifted:
        return None
    ids = [problem.nodes[node].node_id for node in lifted]
    return {"change": "max_compute_share", "node_ids": ids}, f"no limit to the compute of {_few(ids)}"


def _few(texts: list[str]) -> str:
    """The first three, and how many there are beside them."""
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} others" if len(texts) > 3 else "")


def _context(problem: Problem, solver: Solver) -> _Change | None:
    asked = problem.profile.sequence_length
    if not any(layer.kv_cache_bytes for layer in problem.profile.layers):
        return None
    tokens = longest_context(problem.profile, problem.cluster, problem.options, solver, too_long=asked)
    if not tokens:
        return None
    text = f"a context of {tokens:,} tokens at most (asked: {asked:,})"
    return {"change": "sequence_length", "sequence_length": tokens}, text


def _needed(limits: list[int], works: Callable[[list[int]], bool]) -> list[int]:
    """Which of the user's limits to lift, none of them in vain, ascending; none if that is not what is in the way."""
    if not limits or not works(limits):
        return []
    low, high = 1, len(limits)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if works(limits[:middle]) else (middle + 1, high)
    lifted = limits[:high]
    for one in limits[:high] if high <= _FEW else []:
        fewer = [other for other in lifted if other != one]
        if fewer and works(fewer):
            lifted = fewer
    return sorted(lifted)


def _sums(problem: Problem) -> Ints | None:
    """Every number of bytes that a node may come to hold, and perhaps some more; None if there are too many."""
    found = np.zeros(1, dtype=np.int64)
    copies = {int(owner): int(problem.tied_bytes[problem.tied_to == owner].max()) for owner in problem.tied_to}
    parts = [(int(size), int((problem.memory == size).sum())) for size in np.unique(problem.memory).tolist() if size]
    for size, count in [*parts, *((size, 1) for owner, size in copies.items() if owner >= 0)]:
        if len(found) * (count + 1) > 10 * _MOST_SUMS:
            return None
        found = np.unique(found[:, None] + size * np.arange(count + 1)[None, :])
        if len(found) > _MOST_SUMS:
            return None
    return found


def _more_bytes(problem: Problem, solver: Solver) -> tuple[str, int] | None:
    """The node and the fewest bytes more on it with which a plan is found; None if no single node's are enough."""
    capacity, over = problem.capacity, overfull(problem)
    if len(over) > 1:
        return None
    sums, needed = _sums(problem), int(problem.memory.sum())
    # No node fills more of its memory than whole layers do.
    filled = capacity if sums is None else sums[np.searchsorted(sums, capacity, side="right") - 1]
    least = np.maximum(capacity + 1, needed - filled.sum() + filled)
    if sums is not None:
        least = np.maximum(least, sums[np.minimum(np.searchsorted(sums, least), len(sums) - 1)])
    order = sorted(over or range(len(capacity)), key=lambda node: (_extra(problem, node, int(least[node])), node))
    pinned, few = set(problem.pinned.tolist()), _FEW if sums is not None else _FEWER
    order = order[:few] + [node for node in order[few:] if node in pinned]
    best: tuple[int, int] | None = None
    seen: set[tuple[object, ...]] = set()
    most = needed + int(problem.tied_bytes.sum())
    for node in order:
        limit = most
        if best is not None:
            wider = dataclasses.replace(
                problem.nodes[node], memory_bytes=problem.nodes[node].memory_bytes + best[1] - 1
            )
            limit = min(most, usable_bytes(wider, problem.options, problem.peak_bytes))
        alike = (int(capacity[node]), float(problem.flop_cap[node]), problem.seconds[node].tobytes(), limit)
        if alike in seen and not (problem.pinned == node).any():
            continue
        seen.add(alike)
        try:
            held = _fewest_bytes(problem, solver, node, sums, (int(least[node]), limit))
        except _TooLong:
            break
        if held is not None:
            best = (node, _extra(problem, node, held))
    return None if best is None else (problem.nodes[best[0]].node_id, best[1])


def _extra(problem: Problem, at: int, capacity: int) -> int:
    """Bytes by which a node's memory has to grow for so much of it to be usable."""
    node, options = problem.nodes[at], problem.options

    def usable(memory_bytes: int) -> int:
        return usable_bytes(dataclasses.replace(node, memory_bytes=memory_bytes), options, problem.peak_bytes)

    share = options.max_memory_share.get(node.node_id, 1.0)
    size = math.ceil((capacity + options.reserve_bytes + problem.peak_bytes) / share)
    while usable(size) < capacity:
        size += 1
    while usable(size - 1) >= capacity:
        size -= 1
    return size - node.memory_bytes


def _fewest_bytes(
    problem: Problem, solver: Solver, at: int, sums: Ints | None, between: tuple[int, int]
) -> int | None:
    """The smallest usable memory of a node, in [least, most], with which a plan is found; None if there is none."""

    def held(limit: int) -> int | None:
        capacity = problem.capacity.copy()
        capacity[at] = limit
        nodes = solver(dataclasses.replace(problem, capacity=capacity))
        return None if nodes is None else int(problem.memory_used(nodes)[at])

    low, most = between
    high = held(most) if low <= most - (most // _NEAR if sums is None and most > _MOST_SUMS else 0) else None
    if high is None:
        return None
    while high > low:
        if sums is None:
            if high - low <= high // _NEAR and high > _MOST_SUMS:
                return high
            middle = (low + high - 1) // 2
        else:
            first, last = np.searchsorted(sums, (low, high)).tolist()
            if first >= last:
                break
            middle = int(sums[(first + last - 1) // 2])
        try:
            used = held(middle)
        except _TooLong:
            return high
        if used is None:
            low = middle + 1
        else:
            high = used
    return max(high, low)


def _one_node_more(problem: Problem, solver: Solver) -> Node | None:
    """The smallest node of which a second one would be enough."""
    taken = {node.node_id for node in problem.cluster.nodes}
    name = next(name for at in range(len(taken) + 1) if (name := f"another-{at}") not in taken)

    def works(node: Node) -> bool:
        twin = dataclasses.replace(node, node_id=name)
        cluster = dataclasses.replace(problem.cluster, nodes=(*problem.cluster.nodes, twin))
        return solver(build(problem.profile, cluster, problem.options)) is not None

    alike = {(n.memory_bytes, n.available_flop_per_s, n.memory_bytes_per_s): n for n in reversed(problem.nodes)}
    nodes = sorted(alike.values(), key=lambda n: (n.memory_bytes, n.available_flop_per_s, n.node_id))
    if overfull(problem) or not works(nodes[-1]):
        return None if len(nodes) > _FEW else next((node for node in nodes[:-1] if works(node)), None)
    if len(nodes) <= _FEW:
        return next(node for node in nodes if node is nodes[-1] or works(node))
    low, high = 0, len(nodes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if works(nodes[middle]) else (middle + 1, high)
    return nodes[high]


def longest_context(
    profile: ModelProfile, cluster: Cluster, options: PlanOptions, solver: Solver, *, too_long: int | None = None
) -> int | None:
    """The largest sequence length for which a plan is found at the profile's batch size; None if there is none.

    At most `MOST_TOKENS`, and no more than the model takes: of a longer sequence it reads no more, so that all would
    fit. `too_long` is a length that is known not to fit.
    """
    most = min(MOST_TOKENS, profile.longest_sequence or MOST_TOKENS) + 1

    def works(tokens: int) -> bool:
        at = profile.at(batch_size=profile.batch_size, sequence_length=tokens)
        return solver(build(at, cluster, options)) is not None

    if too_long == 1 or not works(1):
        return None
    low, high = 1, too_long or 2
    while too_long is None and high < most and works(high):
        low, high = high, high * 2
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low
