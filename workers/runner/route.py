"""The chain of a pass, found by each node for itself from the traced data flow: who runs what, and what reaches whom.

The plan's chain says who holds what. What a pass needs of it, and in which order, the model's own code says: a prompt
of an encoder-decoder visits the encoder's nodes, a later token does not. Each node traces the same code on the same
shapes and knows what every other holds. So all find the same chain, and a frame that is not its next one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from planner.errors import Conflict
from planner.megaphone import check_arrival, digest
from planner.plan import Hop
from workers.runtime.dataflow import Trace, plan_visit
from workers.runtime.payload import Handoff

#: More visits than any model has layers.
_MOST_STEPS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a node holds of a model."""

    #: Paths of the units whose weights are all there.
    units: frozenset[str]
    #: Names of single weights and buffers beside those.
    names: frozenset[str] = frozenset()

    def can(self, key: str) -> bool:
        """As `Stage.can`."""
        if key[0] not in "=~":
            return key in self.units
        name = key[1:]
        return name in self.names or any(name[:end] in self.units for end, sign in enumerate(name) if sign == ".")


class Route:
    """One pass's chain."""

    def __init__(
        self, found: Trace, *, start: str, holders: Mapping[str, Holder], plan_id: str, revision: str
    ) -> None:
        """Follow the pass from `start` through the nodes.

        Raises:
            Conflict: If no node holds what comes next.
        """
        self._found = found
        self._parts = {
            call.key(at): part
            for call in found.calls
            for at, part in enumerate(call.parts)
            if isinstance(part, Tensor)
        }
        #: Step -> what this node's shard runs there.
        self._mine: dict[int, tuple[str, ...]] = {}
        self.hops: list[Hop] = []
        #: Of each hop: the values that reach it.
        self._arriving: list[frozenset[str]] = []
        node, sender, arriving = start, None, frozenset[str]()
        while True:
            visit = plan_visit(found, arriving, holders[node].can)
            names = tuple(path for path, _ in visit.compute)
            check = {"plan_id": plan_id, "revision": revision, "from": sender, "layers_digest": digest(names)}
            self.hops.append(
                Hop(step=len(self.hops) + 1, node_id=node, layer_names=names, next_nodes=(), check=check)
            )
            self._arriving.append(arriving)
            if visit.next_module is None:
                return
            following = holder_of(visit.next_module, holders)
            if following is None or len(self.hops) >= _MOST_STEPS or (following == node and not names):
                raise Conflict(
                    f"no node of the plan holds {visit.next_module}, which comes after step {len(self.hops)}",
                    details={"module": visit.next_module, "nodes": sorted(holders)},
                )
            node, sender, arriving = following, node, visit.hand_on

    def check(self, step: int, handoff: Handoff, *, receiver: str, sender: str, holder: Holder) -> None:
        """Check that `handoff` is what reaches `receiver` at `step` of this pass.

        Raises:
            Conflict: If not; names sender, receiver and difference.
        """
        if not 1 < step <= len(self.hops) or self.hops[step - 1].node_id != receiver:
            has = [hop.step for hop in self.hops if hop.node_id == receiver]
            raise Conflict(
                f"node {receiver} has no step {step} in this pass (it has {has}), and {sender} sent it one",
                details={"step": step, "from": sender, "to": receiver},
            )
        hop, expected = self.hops[step - 1], self._arriving[step - 1]
        if handoff.values.keys() != expected:
            wrong = sorted(handoff.values.keys() ^ expected)
            raise Conflict(
                f"step {step} on {receiver} expects {len(expected)} tensors, {sender} sent {len(handoff.values)}; "
                f"{wrong[0]} is {'missing' if wrong[0] in expected else 'not among them'}",
                details={"step": step, "tensors": wrong[:20]},
            )
        size = sum(value.numel() * value.element_size() for value in handoff.values.values())
        due = {name: self._due(name, value, step, sender) for name, value in handoff.values.items()}
        check_arrival(
            Hop(
                step=step,
                node_id=receiver,
                layer_names=hop.layer_names,
                next_nodes=(),
                check={**hop.check, "payload_bytes": sum(due.values())},
            ),
            plan_id=str(handoff.plan_id),
            revision=handoff.revision,
            sender=sender,
            payload=size,
            layer_names=self._runs(step, holder),
        )

    def _runs(self, step: int, holder: Holder) -> tuple[str, ...]:
        """What the shard of `holder` would run at that step."""
        if step not in self._mine:
            visit = plan_visit(self._found, self._arriving[step - 1], holder.can)
            self._mine[step] = tuple(path for path, _ in visit.compute)
        return self._mine[step]

    def _due(self, name: str, value: Tensor, step: int, sender: str) -> int:
        """The bytes that a value has to have: those of the trace, but that one length may have grown since."""
        like = self._parts.get(name)
        if like is None:  # a weight that is lent; its size is its holder's to know
            return value.numel() * value.element_size()
        grown = {found - traced for found, traced in zip(value.shape, like.shape, strict=False) if found != traced}
        if value.dtype != like.dtype or value.ndim != like.ndim or len(grown) > 1:
            raise Conflict(
                f"step {step} expects {name} as {like.dtype} {tuple(like.shape)}, got {value.dtype} "
                f"{tuple(value.shape)} from {sender}",
                details={"step": step, "tensor": name, "from": sender},
            )
        return value.numel() * value.element_size()


def holder_of(module: str, holders: Mapping[str, Holder]) -> str | None:
    """The first node that holds a unit, or a single weight of this name."""
    return next((node for node, holder in holders.items() if holder.can(module) or holder.can(f"={module}")), None)
