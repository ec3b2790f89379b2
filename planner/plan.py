"""Who holds what: allocation, stages, the accepted plan with its prediction and reasons.

Invariants, checked by `check_allocation` on every plan before anyone sees it: each layer is on exactly one node
(a duplicated tied weight is counted where it is duplicated), no node is over its memory, and no node is over the
plan's time budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from planner.cluster import Cluster, Link
from planner.profile import Unit

Objective = Literal["throughput", "latency"]
Phase = Literal["prefill", "decode"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
PHASES: tuple[Phase, ...] = get_args(Phase)
#: What may be asked for; `planner.strategies.make` has the function of each.
STRATEGIES = ("greedy", "pipeline", "equal", "memory")

#: node_id -> indices of the layers it holds, ascending.
Allocation = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the user asks of a plan; the cluster and the profile say the rest."""

    strategy: str = "greedy"
    objective: Objective = "throughput"
    phase: Phase = "prefill"
    #: Seconds a node's part of one pass may take; None: the smallest that works.
    time_budget_s: float | None = None
    #: Layer name -> node_id that must hold it.
    pins: Mapping[str, str] = field(default_factory=dict)
    #: node_ids left out.
    exclude: frozenset[str] = frozenset()
    #: node_id -> largest fraction of its memory that may be used, from 0 to 1.
    max_memory_share: Mapping[str, float] = field(default_factory=dict)
    #: node_id -> largest fraction of the total compute it may be given, from 0 to 1.
    max_compute_share: Mapping[str, float] = field(default_factory=dict)
    #: Bytes kept free on every node.
    reserve_bytes: int = 0
    #: Whether peak activations count against a node's memory, beside weights and KV cache.
    count_activations: bool = False
    #: Plan with `compute_min` (what kernels that skip masked work execute) where it is known.
    use_compute_min: bool = False
    #: Plan a checkpoint that lacks tensors of its model.
    allow_missing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Contiguous layers [start, end) on one node, executed in the order of `rank`."""

    rank: int
    node_id: str
    start: int
    end: int
    layer_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the plan should cost, and how far from the best it can be."""

    #: The slowest node's seconds for one pass; bounds throughput.
    bottleneck_s: float
    #: Seconds of one pass through the chain, links included.
    latency_s: float
    #: No plan on these nodes has a smaller value of the objective, in seconds.
    lower_bound_s: float
    #: objective / lower_bound_s - 1.
    gap: float
    #: Whether the bound was proven to be reached.
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node's part in the plan, used or not, and why."""

    node_id: str
    used: bool
    #: One sentence with the numbers.
    reason: str
    #: What stops the node from taking more: "compute", "memory", "pin", "excluded", "share" or None.
    limit: str | None = None
    flop: float = 0
    seconds: float = 0
    memory_used_bytes: int = 0
    memory_free_bytes: int = 0
    #: GFLOP/s the node offered, a field of the williw protocol.
    compute_power: float = 0
    #: flop / (flop_per_s * time_budget_s), at most 1.
    compute_utilization: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One link of the Megaphone chain: what passes from one step's node to the next."""

    node_id: str
    step: int
    layer_names: tuple[str, ...]
    #: node_ids that receive this step's output; empty at the end of the chain.
    next_nodes: tuple[str, ...]
    #: Bytes handed on; the link they take, None at the end of the chain; seconds it needs for them.
    payload_bytes: int = 0
    #: Of them: keys and values of layers that later ones share (Gemma 3n, Gemma 4).
    shared_kv_bytes: int = 0
    link: Link | None = None
    transfer_s: float = 0
    compute_s: float = 0
    #: What the receiver checks before it runs.
    check: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Megaphone:
    """The start node announces the work to all, runs its part and passes the rest along the chain."""

    start_node: str
    chain: tuple[Hop, ...]
    #: node_ids of the steps that a request of text alone takes, where it takes another way: images have layers of
    #: their own. Empty: it takes the chain.
    text_chain: tuple[str, ...] = ()
    #: What the start node tells everyone: {"to": [...], "plan_id": ..., "digest": ..., ...}.
    announcement: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An accepted allocation with its prediction and reasons."""

    #: Digest of this document (`planner.wire.identity`): it stands for this one and no other, for ever.
    plan_id: str
    model_name: str
    revision: str | None
    model_type: str | None
    unit: Unit
    strategy: str
    objective: Objective
    phase: Phase
    batch_size: int
    sequence_length: int
    #: The budget that no node exceeds, in seconds: the one asked for, or the smallest found.
    time_budget_s: float
    total_compute: float
    total_layers: int
    #: node_id -> names of the layers it holds, in execution order; nodes without layers are absent.
    allocation: Mapping[str, tuple[str, ...]]
    stages: tuple[Stage, ...]
    predicted: Prediction
    nodes: tuple[NodeReport, ...]
    megaphone: Megaphone
    #: Why the profile's FLOP, KV cache or activations are estimates, as the profile says it; what is predicted from
    #: them is no better. Empty: they were counted.
    approximate: tuple[str, ...] = ()
    #: The model's tensors that the checkpoint lacks, and that were allowed to be missing; None: not checked.
    missing_tensors: tuple[str, ...] | None = None
    #: What the plan was made for: the nodes as they were used (by id, without device names), their links, and the
    #: options. None in plans of earlier releases.
    cluster: Cluster | None = None
    options: PlanOptions | None = None
    #: "sha256:<hex>" of the metadata that it was made from; None in plans of earlier releases.
    metadata_digest: str | None = None
    generated_at: str | None = None
