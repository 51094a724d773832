"""How good is a selection, before anything is labelled: its coverage of the pool beside random draws of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.arrays import Floats, Ints
from engine.blocks import Block, merge_smallest, smallest
from engine.draws import random_keys
from engine.evaluate import earth_movers_distance
from engine.folders import Claim, publish
from engine.nearest import nearest_sqdist
from engine.placement import open_shards
from engine.places import Place
from engine.schema import InputError, Progress, no_progress, result_options
from engine.select import read_selection
from engine.shards import Shards, prepare, take_patterns
from engine.store import FeatureStore
from engine.verbs import AssessOptions

SAMPLE_KEY, DRAW_KEY = 11, 12
EDGES = np.linspace(0.0, 2.0, 201)
"""Of the histogram: two unit vectors are 2 apart at most."""
FIGURES = ("mean_distance", "covering_radius", "emd")


@dataclass(frozen=True)
class Cover:
    """How the first picks cover the measured rows, at each of p counts: mean distance and the largest, (p,) float64.

    `histogram` (200,) int64 counts the distances to all picks, in bins of 0.01.
    """

    mean: Floats
    radius: Floats
    histogram: Ints


def _measured(block: Block, seed: int, share: float) -> Ints:
    """Return the places of the rows that are measured: each image's draw is a function of its row."""
    if share >= 1:
        return np.arange(len(block.rows), dtype=np.int64)
    keys = random_keys(seed, (SAMPLE_KEY,), block.rows)
    return np.flatnonzero(keys < np.uint64(share * 2.0**64))


def _cover(
    block: Block, base: npt.NDArray[np.float32], picks: npt.NDArray[np.float32], ends: Ints, seed: int, share: float
) -> tuple[int, Floats, Floats, Ints]:
    """Return (vectors measured, sums (p,) and maxima (p,) of the distances to `base` and the first vectors, histogram)."""
    if "assessed" not in block.state:  # what was labelled before is the same for every draw
        at = _measured(block, seed, share)
        block.state["assessed"] = at, _lowered(block, at, np.full(len(at), np.inf), base)
    at, found = block.state["assessed"]
    sums, maxima, start = [], [], 0
    for stop in ends:
        found = _lowered(block, at, found, picks[start:stop])
        distance = np.sqrt(found)
        sums.append(distance.sum())
        maxima.append(distance.max(initial=0.0))
        start = int(stop)
    histogram, _ = np.histogram(np.sqrt(found).clip(0, EDGES[-1]), EDGES)
    return len(at), np.array(sums), np.array(maxima), histogram.astype(np.int64)


def _lowered(block: Block, at: Ints, found: Floats, centres: npt.NDArray[np.float32]) -> Floats:
    """Return the squared distances of some of the block's rows, lowered by further centres."""
    if not len(centres) or not len(at):
        return found
    import torch

    _, sqdist = nearest_sqdist(block.some(at), torch.from_numpy(centres), block.norms[at])
    return np.minimum(found, sqdist)


def cover(shards: Shards, labeled: Ints, picks: Ints, cuts: Ints, seed: int, share: float) -> Cover:
    """Return how the labelled rows and the first `cuts` (p,) of some picks cover a share of the pool's vectors.

    Sums are over blocks in their order, so that the number of shards never shows.
    """
    chosen, owner = take_patterns(shards, picks)
    ends = np.searchsorted(owner, cuts)  # an image may have several vectors
    given = shards.take(labeled).numpy(), chosen.numpy(), ends, seed, share
    counts, sums, maxima, histograms = zip(*shards.map(_cover, *given), strict=True)
    return Cover(np.sum(sums, axis=0) / max(1, sum(counts)), np.max(maxima, axis=0), np.sum(histograms, axis=0))


def _drawn(block: Block, seed: int, draw: int, m: int) -> tuple[npt.NDArray[np.uint64], Ints]:
    rows = np.unique(block.rows[block.eligible])
    return smallest(random_keys(seed, (DRAW_KEY, draw), rows), rows, m)


def random_picks(shards: Shards, m: int, seed: int, draw: int) -> Ints:
    """Return m eligible pool rows in random order, a function of (seed, draw)."""
    _, rows = shards.map(_drawn, seed, draw, m, combine=partial(merge_smallest, m))
    return np.asarray(rows, dtype=np.int64)


def cuts_of(num_picks: int, points: int) -> Ints:
    """Return distinct counts from 1 to `num_picks`, evenly on a log scale."""
    return np.unique(np.geomspace(1, num_picks, points).round().astype(np.int64))


def knee(counts: Sequence[int], values: Sequence[float]) -> int | None:
    """Return the count at which a falling curve is farthest below the straight line between its ends.

    That is Kneedle's (Satopaa et al. 2011) point of largest difference, without its smoothing; None where no point is below
    the line, or the curve has less than three points.
    """
    x, y = np.asarray(counts, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) < 3 or y[-1] >= y[0]:
        return None
    below = 1 - (x - x[0]) / (x[-1] - x[0]) - (y - y[-1]) / (y[0] - y[-1])
    at = int(below.argmax())
    return int(counts[at]) if below[at] > 0 else None


def _figures(mine: Sequence[float], draws: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return each figure beside the random draws' mean and standard deviation; `draws` is (draws, figures)."""
    mean, std = draws.mean(axis=0), draws.std(axis=0, ddof=1)
    return [
        {
            "metric": name,
            "value": float(value),
            "random_mean": float(mean[i]),
            "random_std": float(std[i]),
            "draws": len(draws),
            "worse": bool(value > mean[i] + std[i]),
        }
        for i, (name, value) in enumerate(zip(FIGURES, mine, strict=True))
    ]


def _curve(cuts: Ints, mine: Cover, draws: Sequence[Cover]) -> list[dict[str, Any]]:
    """Return a point for each count: the figures of the first picks, and those of the random draws."""
    means, radii = np.stack([draw.mean for draw in draws]), np.stack([draw.radius for draw in draws])
    return [
        {
            "num_picks": int(count),
            "mean_distance": float(mine.mean[i]),
            "covering_radius": float(mine.radius[i]),
            "random_mean_distance": float(means[:, i].mean()),
            "random_std_mean_distance": float(means[:, i].std(ddof=1)),
            "random_covering_radius": float(radii[:, i].mean()),
            "random_std_covering_radius": float(radii[:, i].std(ddof=1)),
        }
        for i, count in enumerate(cuts)
    ]


def _histogram(mine: Cover, draws: Sequence[Cover]) -> dict[str, list[float]]:
    """Return the distances' histogram beside the mean one of the draws, from the first bin that any needs to the last."""
    random = np.mean([draw.histogram for draw in draws], axis=0)
    used = np.flatnonzero(mine.histogram + random)
    part = slice(int(used[0]), int(used[-1]) + 1)
    return {
        "edges": EDGES[part.start : part.stop + 1].round(2).tolist(),
        "selection": mine.histogram[part].tolist(),
        "random": random[part].tolist(),
    }


def _warnings(figures: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{figure['metric']} is worse than that of random picks: {figure['value']:.4g}, random {figure['random_mean']:.4g} ± "
        f"{figure['random_std']:.2g} over {figure['draws']} draws"
        for figure in figures
        if figure["worse"]
    ]


def assess(
    shards: Shards, picks: Ints, labeled: Ints, options: AssessOptions, progress: Progress = no_progress
) -> dict[str, Any]:
    """Return what `assess_selection` does, of picks (b,) in pick order on shards of normalised vectors."""
    prepare(shards, labeled)
    share = min(1.0, options.sample / shards.n)
    cuts = cuts_of(len(picks), options.points)
    chosen = [picks, *(random_picks(shards, len(picks), options.seed, draw) for draw in range(options.draws))]
    covers, values = [], []
    for number, rows in enumerate(chosen):
        covers.append(cover(shards, labeled, rows, cuts, options.seed, share))
        every = np.union1d(labeled, rows)
        emd, note = earth_movers_distance(shards, every, options.emd_sample, options.seed)
        values.append((covers[-1].mean[-1], covers[-1].radius[-1], emd))
        progress("assess", number + 1, len(chosen), "")
    mine, draws = covers[0], covers[1:]
    figures = _figures(values[0], np.array(values[1:]))
    return {
        "num_picks": len(picks),
        "num_labeled": len(labeled),
        "figures": figures,
        "curve": _curve(cuts, mine, draws),
        "knee": knee(cuts.tolist(), mine.mean.tolist()),
        "histogram": _histogram(mine, draws),
        "warnings": _warnings(figures),
        "sample": None if share >= 1 else int(mine.histogram.sum()),
        "emd": note,
    }


def assess_selection(options: AssessOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure how well a selection covers its pool; return the facts, and publish them as assessment/ if `out` is given.

    `figures`: mean distance of a pool row to its nearest pick, the largest (covering radius), and the earth mover's distance,
    each beside the mean and standard deviation of `draws` random selections of the same size with the same labelled rows;
    `worse` where it is more than a standard deviation above that mean. `curve`: the first two for the first picks, in pick
    order. `knee`: the count at which the curve of the mean distance bends most. `histogram`: of the distances. `sample`:
    vectors measured, None for all. Raises InputError where there is nothing to compare with: no pick, or no other row to draw.
    """
    store = FeatureStore.of_vectors(options.features)
    selection = read_selection(options.selection, store)
    free = store.num_vectors - len(np.intersect1d(selection.labeled, store.rows))
    if not len(selection.picks) or free == len(selection.picks):
        what = "nothing" if not len(selection.picks) else "all that could be picked"
        raise InputError(f"{options.selection} holds {what}: there is nothing to compare it with")
    claim = None
    if options.out:
        inputs = {"features": store.digest, "selection": selection.manifest["digest"]}
        reads = [options.features, options.selection]
        claim = Claim.of(Place(options.out), "assessment", inputs, result_options(options), options.overwrite, reads)
        published = claim.published()
        if published is not None:
            return published
    with open_shards(store, options, True, ()) as shards:
        facts = assess(shards, selection.picks, selection.labeled, options, progress)
    if claim is None:
        return facts
    claim.take()
    return publish(claim.place, facts)
