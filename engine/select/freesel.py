"""`freesel`: images drawn by the distance of their patterns (Xie et al., NeurIPS 2023; GEAL, Xie et al. 2021).

Distances to what is taken only ever shrink, so both ways of sampling work in rounds of many picks, exactly. D^2:
candidates are drawn independently from stale distances and accepted by the ratio to the current ones. Farthest first:
the patterns of largest distance are candidates, and the best of them is right while it beats the largest left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block, Ranked, merge_smallest, smallest
from engine.canonical import canonical_norms, canonical_sqdist, normalize
from engine.draws import random_uniform
from engine.nearest import Centres, nearer
from engine.schema import Opt
from engine.select.picking import draw
from engine.select.seeding import drawn, places_drawn
from engine.shards import Request, Shards, Step, close, take_patterns

CANDIDATES = 1024
"""Patterns that a round looks at."""
IMAGES_AT_ONCE = 1024
"""Images by whose patterns distances are lowered at once where there are many already."""
FIRST_KEY, BLOCK_DRAW, ACCEPT_DRAW, REST_KEY = 41, 42, 43, 44
PATTERN_BITS = 16
PLACE_MASK = (1 << PATTERN_BITS) - 1
"""A pattern is known by its image's row and its place among that image's: row * 2^16 + place."""

PRESETS = {"freesel": "d2", "geal": "d2", "geal-v1": "fds"}
"""How each published form samples; they differ otherwise in the patterns that `embed` makes."""


@dataclass(frozen=True)
class Options:
    """Options of `freesel`."""

    preset: Annotated[str, Opt("Which published form; sets `sampling`.", choices=tuple(PRESETS))] = "freesel"
    sampling: Annotated[
        str | None, Opt("d2 draws by squared distance, fds takes the farthest. Default: the preset's.", choices=("d2", "fds"))
    ] = None


def unit(x: torch.Tensor, norms: Floats | None = None) -> torch.Tensor:
    """Return the rows of x (m, d) at length 1; x itself where they all are, to float32's rounding, or zero."""
    norms = canonical_norms(x) if norms is None else norms
    lengths = np.where(np.abs(norms - 1) <= 2.0**-20, 1.0, norms)
    return x if np.isin(lengths, (0.0, 1.0)).all() else normalize(x, lengths)


def _state(block: Block) -> None:
    """Begin with no distance known; D is half the squared distance of the unit vectors, which is what is kept."""
    if "sqdist" not in block.state:
        block.state["sqdist"] = np.full(len(block.rows), np.inf)
        block.state["open"] = block.eligible.copy()


def _lower(block: Block, centres: Centres, taken: Ints) -> None:
    """Lower distances by the unit vectors of new images, and close those images."""
    _state(block)
    block.state["open"] &= block.eligible & ~np.isin(block.rows, taken)
    if len(block.rows):
        x = unit(block.x, block.norms)
        new = nearer(x, centres, block.norms if x is block.x else canonical_norms(x), block.state["sqdist"])
        block.state["sqdist"][new.rows] = new.sqdist


def _codes(block: Block, at: Ints) -> Ints:
    """Return what the patterns at some places of the block are known by."""
    return (block.rows[at] << PATTERN_BITS) + at - np.searchsorted(block.rows, block.rows[at])


def _farthest(block: Block, m: int) -> Ranked:
    """Return the m open patterns of largest distance (negated squared distance), the smaller code of equal ones first."""
    at = np.flatnonzero(block.state["open"])
    return smallest(-block.state["sqdist"][at], _codes(block, at), m)


def _mass(block: Block) -> float:
    """Return the block's mass of squared D (times 4)."""
    d2 = np.where(block.state["open"], block.state["sqdist"] ** 2, 0.0)
    block.state["cumulative"] = np.cumsum(d2)
    return float(block.state["cumulative"][-1]) if len(d2) else 0.0


def _draw(block: Block, owner: Ints, targets: Floats) -> tuple[Ints, Ints, Floats]:
    """Return (slots, codes, squared distances) of the draws that fell in this block."""
    slots, at = places_drawn(block, owner, targets)
    return slots, _codes(block, at), block.state["sqdist"][at]


class _Candidates:
    """Patterns on the driver, with all patterns of their images: an image may be taken, which lowers the others.

    `current` holds squared distances to what is taken, within `error`, and canonical ones where `settled`. A float64
    product of the candidates with all patterns here (m, P) decides what it can.
    """

    def __init__(self, shards: Shards, codes: Ints, sqdist: Floats) -> None:
        self.codes, self.stale, self.current = codes, sqdist, sqdist.copy()
        self.settled = np.ones(len(codes), dtype=np.bool_)
        images, self.image = np.unique(codes >> PATTERN_BITS, return_inverse=True)
        vectors, owner = take_patterns(shards, images)
        self.x = unit(vectors)
        self.starts = np.searchsorted(owner, np.arange(len(images) + 1))
        self.at = self.starts[self.image] + (codes & PLACE_MASK)
        self.taken = np.zeros(len(self.x), dtype=np.bool_)
        wide = self.x.double()
        squares, mine = (wide * wide).sum(dim=1), torch.from_numpy(self.at)
        product = torch.addmm(squares[None, :], wide[mine], wide.T, alpha=-2)
        self.pairwise = product.add_(squares[mine][:, None]).numpy()
        self.error = 16 * (self.x.shape[1] + 4) * 2.0**-53

    def settle(self, which: Ints) -> None:
        """Make the current distances of some candidates canonical."""
        which = which[~self.settled[which]]
        if len(which) == 0:
            return
        taken = np.flatnonzero(self.taken)
        approximate = self.pairwise[np.ix_(which, taken)]
        pairs = np.argwhere(approximate <= approximate.min(axis=1, keepdims=True) + 2 * self.error)
        exact = canonical_sqdist(self.x, self.at[which[pairs[:, 0]]], self.x, taken[pairs[:, 1]])
        self.current[which] = self.stale[which]
        np.minimum.at(self.current, which[pairs[:, 0]], exact)
        self.settled[which] = True

    def farthest(self) -> tuple[float, int, int]:
        """Return (squared distance, code, index) of the farthest candidate, the smaller code of equal ones."""
        contenders = np.flatnonzero(self.current >= self.current.max() - 2 * self.error)
        self.settle(contenders)
        tied = contenders[self.current[contenders] == self.current[contenders].max()]
        best = int(tied[self.codes[tied].argmin()])
        return float(self.current[best]), int(self.codes[best]), best

    def beyond(self, index: int, sqdist: float) -> bool:
        """Return whether a candidate's squared distance is above `sqdist`."""
        if abs(self.current[index] - sqdist) <= 2 * self.error:
            self.settle(np.array([index]))
        return bool(self.current[index] > sqdist)

    def take(self, index: int) -> float:
        """Take a candidate's image: close its patterns, lower the others'; return the candidate's D."""
        self.settle(np.array([index]))
        gain = 0.5 * float(self.current[index])
        image = self.image[index]
        low, high = self.starts[image], self.starts[image + 1]
        self.taken[low:high] = True
        lowest = self.pairwise[:, low:high].min(axis=1)
        self.settled &= lowest > self.current + 2 * self.error
        np.minimum(self.current, lowest, out=self.current)
        self.close(index)
        return gain

    def close(self, index: int) -> None:
        """Leave a candidate's image out from here on."""
        own = self.image == self.image[index]
        self.current[own], self.settled[own] = -np.inf, True


Taken = tuple[Ints, list[float]]
"""The codes of the patterns whose images a round took, in order, and their D."""


def _take_farthest(shards: Shards, request: Request, before: int) -> Taken | None:
    """Take the farthest candidates while they beat what was left behind; None where all distances are zero."""
    m = CANDIDATES
    negated, codes = shards.map(_farthest, m + 1, combine=partial(merge_smallest, m + 1))
    if negated[0] == 0:
        return None
    bound = (float(negated[m]), int(codes[m])) if len(codes) > m else (np.inf, -1)
    candidates = _Candidates(shards, codes[:m], -negated[:m])
    made: list[int] = []
    gains: list[float] = []
    while request.lacking(before + len(made)):
        sqdist, code, best = candidates.farthest()
        if sqdist <= 0 or (-sqdist, code) > bound:
            break
        if request.ledger.takes(code >> PATTERN_BITS):
            made.append(best)
            gains.append(candidates.take(best))
        else:
            candidates.close(best)
    return codes[made], gains


def _take_drawn(shards: Shards, request: Request, before: int, number: int) -> Taken | None:
    """Draw candidates by stale D^2 and take them by the ratio of the current one to it; None where all are zero."""
    seed = request.seed
    found = drawn(shards, np.array(shards.map(_mass)), _draw, CANDIDATES, seed, (BLOCK_DRAW, number))
    if found is None:
        return None
    codes, stale = found
    candidates = _Candidates(shards, codes, stale)
    made: list[int] = []
    gains: list[float] = []
    for slot, u in enumerate(random_uniform(seed, (ACCEPT_DRAW, number), np.arange(len(codes), dtype=np.int64))):
        if not request.lacking(before + len(made)):
            break
        passes = candidates.beyond(slot, float(np.sqrt(u) * stale[slot]))
        if passes and request.ledger.takes(int(codes[slot]) >> PATTERN_BITS):
            made.append(slot)
            gains.append(candidates.take(slot))
    return codes[made], gains


def freesel(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Repeatedly draw a pattern and pick its image; `gain` is the pattern's D, `pattern` its place in the image.

    D is the smallest cosine distance, 1 - cos, to any pattern of an image picked or labelled. `d2` draws with
    probability proportional to D squared, `fds` takes the largest D, the smaller row of equal ones. The first image is
    seeded and uniform (gain empty, pattern -1), unless there are labelled ones. Once every D is zero the rest is
    seeded too (gain 0, pattern -1). Smaller budgets are prefixes. A vector of zeros counts as at D 0.5 from any other.
    """
    sampling = options.sampling or PRESETS[options.preset]
    last, nothing = request.resume, np.empty(0, dtype=np.int64)
    rows = last.picks if last else nothing
    gains: list[float] = last.gains.tolist() if last else []
    places = last.columns["pattern"] if last else nothing
    number = int(last.arrays["round"]) if last else 0
    if request.budget and not len(rows) and not len(request.labeled):
        rows, gains, places = draw(shards, request, (FIRST_KEY,), nothing, 1), [np.nan], np.array([-1])
    new = np.concatenate([request.labeled, rows])
    while True:
        note, columns = f"{number} rounds", {"pattern": places}
        total, arrays = request.total(len(rows)), {"round": np.array(number)}
        yield Step(len(rows), total, rows, np.array(gains), note, columns=columns, arrays=arrays)
        if len(rows) == total:
            return
        close(shards, request.ledger)
        for start in range(0, len(new), IMAGES_AT_ONCE):
            chunk = new[start : start + IMAGES_AT_ONCE]
            shards.map(_lower, Centres.of(unit(shards.take(chunk))), chunk)
        fds = sampling == "fds"
        found = _take_farthest(shards, request, len(rows)) if fds else _take_drawn(shards, request, len(rows), number)
        if found is None:
            new = draw(shards, request, (REST_KEY,), rows)
            gains, added = gains + [0.0] * len(new), np.full(len(new), -1)
        else:
            new, added = found[0] >> PATTERN_BITS, found[0] & PLACE_MASK
            gains = gains + found[1]
        rows, places = np.concatenate([rows, new]), np.concatenate([places, added])
        number += 1
