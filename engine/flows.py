"""Whole numbers on the arcs of a graph, between bounds, as much into each node as out of it: a circulation.

Whether picks can still be completed is such a question where constraints are on groups that form at most two families, each
nested: so much in all goes down one tree of groups, through the cells (which group of the one, which of the other), and up
the other tree. A lower bound can be raised by one exactly where the flow has room already or can be led around a cycle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, maximum_flow

from engine.arrays import Bools, Ints

LARGEST = 2**31 - 1
"""What scipy's flows can count."""


@dataclass
class Circulation:
    """Arcs from `tail` to `head` (a,), their bounds `low` and `high`, and a flow between these, int64.

    Raising lower bounds is for good; what cannot be raised once never can be again, because the flows left only get fewer.
    """

    nodes: int
    tail: Ints
    head: Ints
    low: Ints
    high: Ints
    flow: Ints

    def copy(self) -> Circulation:
        """Return one whose bounds and flow may be changed."""
        return replace(self, low=self.low.copy(), high=self.high.copy(), flow=self.flow.copy())

    def raise_low(self, arc: int) -> bool:
        """Raise an arc's lower bound by one; False, and nothing is changed, where no flow would be left."""
        if not self.can_rise(arc):
            return False
        self.low[arc] += 1
        return True

    def can_rise(self, arc: int) -> bool:
        """Return whether an arc's lower bound can be raised by one; the flow is led so that it can be."""
        if self.flow[arc] > self.low[arc]:
            return True
        return bool(self.flow[arc] < self.high[arc]) and self._lead_around(arc)

    def _lead_around(self, arc: int) -> bool:
        """Send one more along an arc and back to its tail by a shortest way through arcs that have room."""
        came_by, forward = np.full(self.nodes, -1, dtype=np.int64), np.zeros(self.nodes, dtype=np.bool_)
        start, end = int(self.head[arc]), int(self.tail[arc])
        seen = np.zeros(self.nodes, dtype=np.bool_)
        seen[start] = True
        up, down = self.flow < self.high, self.flow > self.low
        up[arc] = down[arc] = False
        while not seen[end]:
            along = np.flatnonzero(up & seen[self.tail] & ~seen[self.head])
            against = np.flatnonzero(down & seen[self.head] & ~seen[self.tail])
            if not len(along) and not len(against):
                return False
            came_by[self.tail[against]], forward[self.tail[against]] = against, False
            came_by[self.head[along]], forward[self.head[along]] = along, True
            seen[self.tail[against]] = seen[self.head[along]] = True
        self.flow[arc] += 1
        node = end
        while node != start:
            step = int(came_by[node])
            self.flow[step] += 1 if forward[node] else -1
            node = int(self.tail[step] if forward[node] else self.head[step])
        return True

    def fixed(self, arcs: Ints) -> Bools:
        """Return which of some arcs have a lower bound that can't be raised: those of no cycle with room, all at once."""
        up, down = self.flow < self.high, self.flow > self.low
        tail = np.concatenate([self.tail[up], self.head[down]])
        head = np.concatenate([self.head[up], self.tail[down]])
        graph = csr_array((np.ones(len(tail), dtype=np.int8), (tail, head)), shape=(self.nodes, self.nodes))
        _, part = connected_components(graph, directed=True, connection="strong")
        around = up[arcs] & (part[self.tail[arcs]] == part[self.head[arcs]])
        fixed: Bools = ~(around | down[arcs])
        return fixed


def circulation(nodes: int, tail: Ints, head: Ints, low: Ints, high: Ints) -> tuple[Circulation | None, int]:
    """Return a circulation between bounds (no two arcs join the same nodes), or None, and how much of the lower bounds fails.

    Lower bounds become what a node has too much or too little of, which a maximum flow carries from the ones to the others.
    """
    if (low > high).any():
        return None, int(np.maximum(low - high, 0).sum())
    low, high = low.astype(np.int64), np.minimum(high, LARGEST).astype(np.int64)
    flow = low.copy()
    excess = np.bincount(head, low, nodes).astype(np.int64) - np.bincount(tail, low, nodes).astype(np.int64)
    wanted = int(excess[excess > 0].sum())
    if wanted:
        over, under = np.flatnonzero(excess > 0), np.flatnonzero(excess < 0)
        source, sink = np.full(len(over), nodes), np.full(len(under), nodes + 1)
        room = np.concatenate([high - low, excess[over], -excess[under]])
        ends = np.concatenate([tail, source, under]), np.concatenate([head, over, sink])
        graph = csr_array((np.minimum(room, LARGEST).astype(np.int32), ends), shape=(nodes + 2, nodes + 2))
        found = maximum_flow(graph.tocsr(), nodes, nodes + 1)
        if found.flow_value < wanted:
            return None, wanted - int(found.flow_value)
        flow += np.asarray(found.flow[tail, head]).reshape(-1)
    return Circulation(nodes, tail, head, low, high, flow), 0
