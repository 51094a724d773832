"""Nearest centres while centres move: most rows need comparing only with the centres that moved far, or not at all.

A block keeps for each row an upper bound on the distance to its own centre and a lower bound on the distance to every
other (Hamerly 2010). A step compares all rows with the centres that moved far, in one product, and loosens the lower
bound by how far the others moved at most. Only rows whose bounds then meet are compared with all centres. How far is far
decides nothing but the time: the driver takes what promises the fewest comparisons, by the gaps that the blocks report.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.canonical import canonical_sqdist, rows_at
from engine.nearest import SLACK, TILE_ELEMENTS, Centres, distance_bound, margin_of, search
from engine.products import score_error, scores

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Shares of the centres that may be taken for those that moved far."""
AGAIN = 1.2
"""What comparing a row with all centres costs where it stands among others that are not, against where all are."""
UPKEEP = 25
"""Comparisons that a row's bounds cost to keep and to tighten."""
WORTH = 0.85
"""Share of the comparisons that a plan must leave at most to be worth its trouble."""
GAPS = 2.0 ** np.arange(-24, 3, 0.25)
"""Edges of the bins in which gaps between bounds are counted, relative to the longest vector."""
NO_GAPS = np.zeros(len(GAPS) + 1, dtype=np.int64)


@dataclass(frozen=True)
class Motion:
    """How far each centre moved (k,), and which moved far, by their numbers; every other moved `rest` at most."""

    moves: Floats
    far: Ints
    rest: float


def plan(before: torch.Tensor, after: torch.Tensor, gaps: Ints, longest: float) -> Motion | None:
    """Return what a step that ends with centres `after` (k, d) has to compare; None where that is everything.

    `gaps` counts rows by the gap between their bounds, in the bins of GAPS times `longest`.
    """
    k, every = len(before), np.arange(len(before), dtype=np.int64)
    moves = SLACK * np.sqrt(canonical_sqdist(before, every, after, every))
    order = np.argsort(-moves, kind="stable")
    below = np.cumsum(gaps) / max(1, gaps.sum())
    best, cost = 0, WORTH
    for count in {*(int(share * k) for share in SHARES), int((moves > 0).sum())}:
        rest = moves[order[count]] if count < k else 0.0
        met = below[np.searchsorted(GAPS * longest, rest + moves.mean())]
        expected = (count + UPKEEP) / k + AGAIN * met
        if expected < cost:
            best, cost = count, expected
    return Motion(moves, np.sort(order[:best]), float(moves[order[best]])) if cost < WORTH else None


def count_gaps(block: Block, longest: float) -> Ints:
    """Count a block's rows by the gap between their bounds, in the bins of GAPS times `longest`, the last one open."""
    gap = block.state["lower"] - block.state["upper"]
    return np.bincount(np.searchsorted(GAPS * longest, gap), minlength=len(GAPS) + 1)


class Bounded:
    """One block's side of one Lloyd step: its nearest centres, and the bounds that are kept in its state."""

    def __init__(self, block: Block, centres: Centres) -> None:
        self.block, self.centres, self.state = block, centres.to(block.x.device), block.state

    def fresh(self) -> Ints:
        """Return every row's nearest centre, (r,), and make bounds."""
        rows = len(self.block.rows)
        self.state["upper"], self.state["lower"] = np.empty(rows), np.empty(rows)
        return self._compare_with_all(np.arange(rows, dtype=np.int64), np.empty(rows, dtype=np.int64))

    def after(self, motion: Motion) -> Ints:
        """Return every row's nearest centre after the centres moved, (r,), and keep the bounds true.

        Where some centres have become equal everything is compared: bounds are on distinct ones.
        """
        if len(self.centres.kept) < len(self.centres.column):
            return self.fresh()
        index: Ints = self.state["cluster"].copy()
        upper, lower = self.state["upper"], self.state["lower"]
        upper += motion.moves[index]
        lower -= motion.rest
        if len(motion.far):
            self._compare_with_far(motion.far, index)
        rows = np.flatnonzero(upper * SLACK >= lower)
        self._tighten(rows, index[rows])
        return self._compare_with_all(rows[upper[rows] * SLACK >= lower[rows]], index)

    def _some(self, rows: Ints) -> torch.Tensor:
        return self.block.x if len(rows) == len(self.block.rows) else rows_at(self.block.x, rows)

    def _error(self, rows: Ints | slice) -> Floats:
        error: Floats = score_error(self.block.x.shape[1], self.block.norms[rows], self.centres.largest)
        return error

    def _compare_with_far(self, far: Ints, own: Ints) -> None:
        """Lower the bounds to what the product with some centres says; `own` (r,) are the rows' own centres."""
        c, half, x = rows_at(self.centres.c, far), self.centres.half[torch.from_numpy(far)], self.block.x
        place = np.minimum(np.searchsorted(far, own), len(far) - 1)
        step = min(len(x), max(64, TILE_ELEMENTS // len(far))) or 1
        tile = x.new_empty((step, len(far)))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            score = scores(half, x[part], c, out=tile[: len(x) - start])
            mine = np.flatnonzero(far[place[part]] == own[part])
            at = torch.from_numpy(mine), torch.from_numpy(place[part][mine])
            own_score, error, norms = score[at].clone(), self._error(part), self.block.norms[part]
            score[at] = torch.inf
            self.state["upper"][start + mine] = distance_bound(own_score, error[mine], norms[mine])
            below = distance_bound(score.amin(dim=1), -error, norms)
            np.minimum(self.state["lower"][part], below, out=self.state["lower"][part])

    def _tighten(self, rows: Ints, own: Ints) -> None:
        """Set the upper bounds of some rows to what the product with their own centres says."""
        x = self._some(rows)
        half = self.centres.half[torch.from_numpy(own)]
        score = half - torch.einsum("rd,rd->r", x, rows_at(self.centres.c, own))
        self.state["upper"][rows] = distance_bound(score, self._error(rows), self.block.norms[rows])

    def _compare_with_all(self, rows: Ints, index: Ints) -> Ints:
        """Write some rows' nearest centres among all into `index`, and their bounds; return `index`."""
        if len(rows) == 0:
            return index
        x = self._some(rows)
        error, norms = self._error(rows), self.block.norms[rows]
        found = search(x, self.centres, self.centres.half, margin_of(error, x), canonical_sqdist)
        index[rows] = self.centres.kept[found.column]
        self.state["upper"][rows] = distance_bound(found.best, error, norms)
        equal = len(self.centres.kept) < len(self.centres.column)
        self.state["lower"][rows] = 0.0 if equal else distance_bound(found.second, -error, norms)
        return index
