"""What nodes fetch to hold what they did not: the bytes of moves, without tied weights that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.problem.arrays import Ints, Problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Moving:
    """What every node holds now, and so what moving a layer takes.

    A node that holds a layer has the weights it shares too: its owner's, or a copy of those. What comes to that node
    later and shares them fetches only the rest.
    """

    problem: Problem
    #: (L,) usable node that holds each layer now, or -1.
    held: Ints

    def fetched(self, nodes: Ints) -> Ints:
        """(L,) bytes that are fetched for each layer if `nodes` (L,) come to hold them; once a node if shared."""
        moved = nodes != self.held
        found = np.where(moved, self._own, 0)
        brought: dict[tuple[int, int], int] = {}
        for layer, owner in self._tied:
            node, home = int(nodes[layer]), int(nodes[owner])
            if moved[layer] and home != node and (node, owner) not in self._there:
                known = brought.get((node, owner), 0)
                brought[node, owner] = max(known, int(self.problem.tied_bytes[layer]))
                found[layer] += brought[node, owner] - known
        for (node, owner), size in self._there.items():
            if moved[owner] and nodes[owner] == node:
                found[owner] = max(0, int(found[owner]) - size)
        return found

    def least(self) -> Ints:
        """(N, L) bytes that holding each layer takes each node at least; 0 where it does.

        Shared weights count for their owner alone: a layer that uses them may find them there, or come with it.
        """
        found = np.repeat(self._own[None, :], len(self.problem.nodes), axis=0)
        for (node, owner), size in self._there.items():
            found[node, owner] = max(0, int(found[node, owner]) - size)
        layers = np.flatnonzero(self.held >= 0)
        found[self.held[layers], layers] = 0
        return found

    def alone(self) -> Ints:
        """(N, L) the same if no other layer moves: shared weights that are not there come as well."""
        found = self.least()
        for layer, owner in self._tied:
            for node in range(len(found)):
                if node != self.held[layer] and (node, owner) not in self._there:
                    found[node, layer] += self.problem.tied_bytes[layer]
        return found

    def anywhere(self) -> Ints:
        """(L,) bytes that moving each layer to whichever node takes at least."""
        found = self._own.copy()
        for (node, owner), size in self._there.items():
            if node != self.held[owner]:
                found[owner] = min(int(found[owner]), max(0, int(self._own[owner]) - size))
        return found

    @cached_property
    def _own(self) -> Ints:
        return np.array([layer.weight_bytes for layer in self.problem.profile.layers], dtype=np.int64)

    @cached_property
    def _tied(self) -> list[tuple[int, int]]:
        """Each layer that uses another's weights, and that other."""
        tied = np.flatnonzero(self.problem.tied_to >= 0)
        return list(zip(tied.tolist(), self.problem.tied_to[tied].tolist(), strict=True))

    @cached_property
    def _there(self) -> Mapping[tuple[int, int], int]:
        """(node, owner) -> bytes of the owner's weights that the node has, whether it holds the owner or a copy."""
        there: dict[tuple[int, int], int] = {}
        for layer, owner in self._tied:
            for holder in (int(self.held[layer]), int(self.held[owner])):
                if holder >= 0:
                    size = int(self.problem.tied_bytes[layer])
                    there[holder, owner] = max(there.get((holder, owner), 0), size)
        return there
