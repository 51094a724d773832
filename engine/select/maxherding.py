"""`maxherding`: greedy generalised coverage (Bae, Noh, Sutherland 2024), lazily and exactly.

The coverage of a set of picks is the mean over the pool of max over picks p of k(x, p). What a candidate would add to
it only ever shrinks (it is submodular), so what it was worth some picks ago is a bound on what it is worth now: each
round measures the candidates of largest bound in one product, and a pick is made as soon as the best one measured
since the last pick beats every other's bound. As picks cover more, a candidate would add something to fewer rows. Once
those pairs are few enough to keep, they are kept, and greedy goes on among them without the vectors (`columns`). Either
way the picks are those of one-at-a-time greedy over all candidates.

Kernel values are taken of exact squared distances and rounded to whole numbers, and those are summed. Cost: about
candidates * n * d for the first bounds and again for the second pick, as much for the next few dozen picks together
(on features of real images), and for finding the pairs; the picks after that cost little. The pairs take no more memory
than the vectors. The driver holds the candidates' vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from engine.arrays import Bools, Ints
from engine.blocks import fixed_point_scale, smallest
from engine.ledger import Ledger
from engine.schema import Opt
from engine.select.columns import LazyGreedy
from engine.select.exact import exact_step, norm_of_longest
from engine.select.kernels import Kernel, link, measure, settle_links
from engine.select.lloyd import Matrix
from engine.select.picking import draw, first_of_permutation
from engine.select.purity import pure_sqradius
from engine.shards import Request, Shards, Step, close

SAMPLE_KEY, REST_KEY = 3001, 3002
FEWEST, MOST = 32, 2048
"""Candidates measured in a round."""
EDGE_FLOATS = 5
"""Floats of a vector that take the memory of an edge: edges are kept once there are n * d / 5 or fewer."""
LARGEST_UNIT = 2.0**36
"""A Gaussian kernel's value is a multiple of 2^-36, or a coarser one in pools of more than 2^25 rows."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Options:
    """Options of `maxherding`."""

    kernel: Annotated[str, Opt("Gaussian, or top-hat: 1 within `delta`, else 0.", choices=("gaussian", "tophat"))] = "gaussian"
    sigma: Annotated[float, Opt("Of the Gaussian exp(-|x - p|^2 / (2 sigma^2)).", min=1e-6, max=1e6)] = 0.5**0.5
    delta: Annotated[float | None, Opt("Radius of the top-hat. Default: the largest `purity` allows.", min=0)] = None
    clusters: Annotated[int, Opt("k-means clusters whose purity gives `delta`: as many as classes.", min=1)] = 10
    purity: Annotated[float, Opt("Share of the balls of radius `delta` that hold one cluster only.", min=0, max=1)] = 0.95
    candidates: Annotated[
        int, Opt("Rows that may be picked; of more eligible ones a seeded sample: an approximation.", min=1)
    ] = 20_000


def _best(bounds: Ints, among: Bools) -> tuple[int, int]:
    """Return (-bound, candidate) of the largest bound, the first of several; (1, candidate) where there is none."""
    keys = np.where(among, -bounds, 1)
    first = int(keys.argmin())
    return int(keys[first]), first


def _one_selection(shards: Shards, request: Request) -> Ints:
    """Return the rows of one selection, drawn, that meets the conditions, so that a sample can too; none without any."""
    if not request.ledger.bound:
        return np.empty(0, dtype=np.int64)
    drawn = replace(request, ledger=Ledger(request.terms))
    rows = draw(shards, drawn, (SAMPLE_KEY,), np.empty(0, dtype=np.int64))
    close(shards, request.ledger)
    return rows


class _Herd:
    """The driver's candidates: `bounds` (m,) on what each would add, -1 once picked; what is `fresh` is exact.

    `links` (m,) bound the rows that each would add something to.
    """

    def __init__(self, shards: Shards, request: Request, kernel: Kernel, limit: int) -> None:
        self.shards, self.request, self.kernel = shards, request, kernel
        nothing = np.empty(0, dtype=np.int64)
        _, rows = first_of_permutation(shards, request.seed, (SAMPLE_KEY,), nothing, min(limit, shards.n) + 1)
        self.sampled = len(rows) > limit
        self.rows = np.union1d(rows[:limit], _one_selection(shards, request) if self.sampled else nothing)
        self.x: Matrix = shards.take(self.rows).numpy()
        self.bounds = np.full(len(self.rows), round(kernel.unit) * shards.n, dtype=np.int64)
        self.links = np.full(len(self.rows), shards.n, dtype=np.int64)
        self.fresh = np.zeros(len(self.rows), dtype=np.bool_)
        self.picks, self.gains = nothing, nothing
        if request.resume and "bounds" in request.resume.arrays:
            arrays = request.resume.arrays
            self.bounds, self.links, self.gains = arrays["bounds"].copy(), arrays["links"].copy(), arrays["units"]
            self.picks = request.resume.picks[: len(self.gains)]
        self.pending = self.x[:0]
        self.width = FEWEST
        self.covered = self.cover(np.concatenate([request.labeled, self.picks]))

    def _measure(self, new: Matrix, batch: Matrix) -> Ints:
        found: Ints = self.shards.map(measure, new, batch, self.kernel, combine=np.add)
        return found

    def cover(self, rows: Ints) -> int:
        """Count rows as picked; return the coverage, in units, summed over the pool."""
        total = 0
        for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
            new = self.shards.take(rows[start : start + ROWS_AT_ONCE]).numpy()
            total = int(self._measure(np.concatenate([self.pending, new]), self.x[:0])[-1, 0])
            self.pending = self.x[:0]
        return total

    def advance(self) -> bool:
        """Measure the candidates of largest bound, and pick where that settles it; False once none allowed adds anything."""
        keys, batch = smallest(np.where(self.fresh, 1, -self.bounds), np.arange(len(self.rows)), self.width)
        batch = batch[keys < 0]
        if len(batch):
            found = self._measure(self.pending, self.x[batch])[:-1]
            self.bounds[batch], self.links[batch] = found.T
            self.fresh[batch], self.pending = True, self.x[:0]
        best, rival = _best(self.bounds, self.fresh), _best(self.bounds, ~self.fresh)
        if min(best[0], rival[0]) >= 0:
            return False
        if best < rival:
            if self.request.ledger.takes(int(self.rows[best[1]])):
                self._pick(best[1])
                self.width = max(FEWEST, self.width // 2)
            else:
                self.bounds[best[1]] = -1
        else:
            self.width = min(MOST, 2 * self.width)
        return True

    def _pick(self, index: int) -> None:
        self.picks, self.gains = np.append(self.picks, self.rows[index]), np.append(self.gains, self.bounds[index])
        self.covered += int(self.bounds[index])
        self.pending = self.x[index : index + 1]
        self.bounds[index] = -1
        self.fresh[:] = False

    def worth_linking(self) -> bool:
        """Return whether the pairs left fit, and enough picks are due to make up for finding them all."""
        left = self.bounds > 0
        fit = int(self.links[left].sum()) * EDGE_FLOATS <= self.shards.n * self.shards.d
        return fit and self.request.lacking(len(self.picks)) * 2 * FEWEST >= int(left.sum())

    def link(self) -> Iterator[int]:
        """Find the pairs of a row and a candidate that would add to it; yield of how many candidates they are found."""
        left = np.flatnonzero(self.bounds > 0)
        for start in range(0, max(1, len(left)), MOST):
            part = left[start : start + MOST]
            self.shards.map(link, self.pending, self.x[part], self.rows[part], self.kernel)
            self.pending = self.x[:0]
            yield start + len(part)

    def settled(self) -> LazyGreedy:
        """Return the greedy that goes on from here among the pairs found, with this one's picks and bounds."""
        self.shards.map(settle_links)
        greedy = LazyGreedy(self.shards, self.request, self.rows, self.bounds >= 0, self.picks, self.gains)
        greedy.measure(self.picks[:0])
        self.bounds, self.links = greedy.bounds, greedy.degree
        return greedy


@dataclass(frozen=True)
class _Steps:
    """What makes the steps of a run: their number, the scale of gains, what goes into every note and journal."""

    request: Request
    scale: float
    note: str
    arrays: dict[str, Any]

    def of(self, herd: _Herd, greedy: _Herd | LazyGreedy, what: str, rest: Ints) -> Step:
        """Return the picks so far and `rest` as a step; gains and objective are means over the pool."""
        gains = np.concatenate([greedy.gains / self.scale, np.full(len(rest), np.nan if herd.sampled else 0.0)])
        arrays = {**self.arrays, "bounds": herd.bounds.copy(), "links": herd.links.copy(), "units": greedy.gains}
        note = f"{self.note}{len(herd.rows):,} candidates{' (a sample)' if herd.sampled else ''}{what}"
        picks = np.concatenate([greedy.picks, rest])
        return Step(len(picks), self.request.total(len(picks)), picks, gains, note, greedy.covered / self.scale, arrays=arrays)


def herd(
    shards: Shards, request: Request, kernel: Kernel, limit: int, arrays: dict[str, Any], note: str = ""
) -> Iterator[Step]:
    """Yield the greedy maximum of coverage by `kernel`; `arrays` and `note` go into every step."""
    steps = _Steps(request, kernel.unit * shards.n, note, arrays)
    nothing = np.empty(0, dtype=np.int64)
    greedy: _Herd | LazyGreedy
    greedy = dense = _Herd(shards, request, kernel, limit)
    while request.lacking(len(greedy.picks)):
        if isinstance(greedy, _Herd) and dense.worth_linking():
            for done in dense.link():
                yield steps.of(dense, dense, f", pairs of {done:,}", nothing)
            greedy = dense.settled()
        if not greedy.advance():
            break
        yield steps.of(dense, greedy, "", nothing)
    rest = draw(shards, request, (REST_KEY,), greedy.picks)
    if len(rest) and dense.sampled:
        greedy.covered = dense.cover(np.concatenate([greedy.picks[len(dense.picks) :], rest]))
    yield steps.of(dense, greedy, "", rest)


def tophat(shards: Shards, request: Request, delta: float | None, clusters: int, purity: float, limit: int) -> Iterator[Step]:
    """Yield the greedy maximum of the share of the pool within `delta` (by default the radius of `purity`) of a pick."""
    step = exact_step(max(shards.map(norm_of_longest)), shards.d)
    sqradius = delta * delta if delta is not None else np.nan
    if request.resume and "sqradius" in request.resume.arrays:
        sqradius = float(request.resume.arrays["sqradius"][0])
    elif delta is None:
        for note, found in pure_sqradius(shards, request.seed, clusters, purity, step):
            sqradius = found
            yield Step(0, request.budget, np.empty(0, dtype=np.int64), np.empty(0), note)
    kernel = Kernel(step, 1.0, None, sqradius)
    kept = {"sqradius": np.array([sqradius])}
    yield from herd(shards, request, kernel, limit, kept, f"radius {np.sqrt(sqradius):.4g}, ")


def maxherding(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick again and again the candidate that adds most to the coverage: the pool's mean of max over picks of k(x, p).

    k is a Gaussian, or with `kernel=tophat` that of `probcover`. Every row counts in the mean, eligible or not; labelled
    rows count as picked from the start; ties go to the smaller row. `gain` is what a pick adds to the mean, the
    objective the mean attained. Once no candidate adds anything, what is left of the budget follows a seeded permutation
    of the eligible rows, with a gain of 0 (unknown, where candidates are a sample). Smaller budgets are prefixes.

    The default sigma makes k = exp(-|x - p|^2), which is what the authors' released code computes for its length scale
    of 1, on normalised features. Deviations: candidates are a sample above 20,000 eligible rows (the mean is still over
    all rows; under conditions a drawn selection that meets them is added to it); vectors are rounded to 2^-24.5 of the
    longest or finer, and values of k to 2^-36 (see `exact`).
    """
    if request.budget == 0:
        yield Step(0, 0, np.empty(0, dtype=np.int64), np.empty(0))
    elif options.kernel == "tophat":
        o = options
        yield from tophat(shards, request, o.delta, o.clusters, o.purity, o.candidates)
    else:
        step = exact_step(max(shards.map(norm_of_longest)), shards.d)
        kernel = Kernel(step, min(LARGEST_UNIT, fixed_point_scale(shards.n, 1.0)), options.sigma)
        yield from herd(shards, request, kernel, options.candidates, {})
