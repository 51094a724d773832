"""Brute-force references: short, slow, float64, and written from the papers' definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest


def sqdist(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances of every row of x to the vector y, in float64."""
    return ((x.astype(np.float64) - y.astype(np.float64)) ** 2).sum(axis=1)


Allow = Callable[[int, list[int]], bool]


def anything(row: int, made: list[int]) -> bool:
    """No conditions."""
    return True


def coreset(
    x: np.ndarray, budget: int, labeled: list[int], first: int | None, eligible: np.ndarray, allow: Allow = anything
) -> list[int]:
    """k-center greedy, one at a time among what is allowed; ties go to the smaller row."""
    nearest, picks = np.full(len(x), np.inf), list(labeled)
    if first is not None:
        picks.append(first)
    for row in picks:
        nearest = np.minimum(nearest, sqdist(x, x[row]))
    made = picks[len(labeled) :]
    while len(made) < budget:
        open_rows = np.array([row for row in range(len(x)) if eligible[row] and row not in made])
        order = open_rows[np.argsort(-nearest[open_rows], kind="stable")].tolist()
        made.append(next(row for row in order if allow(row, made)))
        nearest = np.minimum(nearest, sqdist(x, x[made[-1]]))
    return made


def nearest_centre(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each row; ties go to the smaller index."""
    return np.stack([sqdist(x, c) for c in centres], axis=1).argmin(axis=1)


def lloyd(x: np.ndarray, centres: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
    """Plain Lloyd steps from given centres; returns the centres and the inertia."""
    centres = centres.astype(np.float64)
    for _ in range(steps):
        owner = nearest_centre(x, centres)
        centres = np.stack(
            [x[owner == j].astype(np.float64).mean(axis=0) if (owner == j).any() else c for j, c in enumerate(centres)]
        )
    owner = nearest_centre(x, centres)
    return centres, float(sum(sqdist(x[owner == j], c).sum() for j, c in enumerate(centres)))


def d2_sequence_probability(x: np.ndarray, sequence: tuple[int, ...]) -> float:
    """Probability that one-at-a-time D^2 sampling (first row uniform) draws exactly this sequence."""
    probability, nearest = 1 / len(x), sqdist(x, x[sequence[0]])
    for row in sequence[1:]:
        probability *= nearest[row] / nearest.sum()
        nearest = np.minimum(nearest, sqdist(x, x[row]))
    return float(probability)


def typiclust(x: np.ndarray, centres: np.ndarray, budget: int, labeled: list[int], eligible: np.ndarray, k: int) -> list[int]:
    """The most typical row of the least covered, then largest, cluster, one at a time; k nearest of the whole cluster."""
    owner = nearest_centre(x, centres)
    size, covered = np.bincount(owner, minlength=len(centres)), np.bincount(owner[labeled], minlength=len(centres))
    near = [
        np.sort(np.sqrt(sqdist(np.delete(x[owner == owner[i]], (owner[:i] == owner[i]).sum(), 0), x[i]))) for i in range(len(x))
    ]
    mean = [d[:k].mean() if len(d) else np.inf for d in near]
    made: list[int] = []
    while len(made) < budget:
        left = [i for i in range(len(x)) if eligible[i] and i not in made]
        large = [i for i in left if size[owner[i]] > 5] or left
        cluster = min((covered[owner[i]], -size[owner[i]], owner[i]) for i in large)[2]
        made.append(min((mean[i], i) for i in left if owner[i] == cluster)[1])
        covered[cluster] += 1
    return made


def coverage(
    k: np.ndarray, budget: int, labeled: list[int], eligible: np.ndarray, allow: Allow = anything
) -> tuple[list[int], list[float]]:
    """One-at-a-time greedy maximum of mean_i max_p k[i, p]: picks and what each adds; ties go to the smaller row."""
    best = k[:, labeled].max(axis=1, initial=0.0)
    made, gains = [], []
    while len(made) < budget:
        open_rows = np.array([row for row in range(len(k)) if eligible[row] and row not in made])
        added = np.maximum(k[:, open_rows] - best[:, None], 0).mean(axis=0)
        best_first = np.argsort(-added, kind="stable").tolist()
        at = next(at for at in best_first if allow(int(open_rows[at]), made))
        made.append(int(open_rows[at]))
        gains.append(float(added[at]))
        best = np.maximum(best, k[:, made[-1]])
    return made, gains


def neighbor_similarity(x: np.ndarray, k: int) -> np.ndarray:
    """Cosine of each row and itself and its k most similar other rows (ties: smaller row), at least 0; 0 elsewhere."""
    x = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True).astype(np.float32)).astype(np.float64)
    cosine = np.minimum(x @ x.T, 1.0)
    keep = np.eye(len(x), dtype=bool)
    for i in range(len(x)):
        keep[i, [j for j in np.argsort(-cosine[i], kind="stable") if j != i][:k]] = True
    return np.where(keep, np.maximum(cosine, 0), 0.0)


def near_copies(x: np.ndarray, order: list[int], eps: float) -> dict[int, int]:
    """Each near copy and the first kept row it is like, rows taken in `order`; a copy leads no other."""
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    kept: list[int] = []
    found = {}
    for row in order:
        like = [other for other in kept if unit[row] @ unit[other] > 1 - eps]
        if like:
            found[row] = like[0]
        else:
            kept.append(row)
    return found


def check_frequencies(counts: Mapping[tuple[int, ...], int], expected: Mapping[tuple[int, ...], float], trials: int) -> None:
    """Hold how often each outcome was drawn against how often it should be, by a chi-square test; rare ones are one cell."""
    assert sum(expected.values()) == pytest.approx(trials)
    assert sum(counts[s] for s in expected) == trials
    rare = [s for s in expected if expected[s] < 5]
    cells = [(counts[s], expected[s]) for s in expected if s not in rare]
    cells += [(sum(counts[s] for s in rare), sum(expected[s] for s in rare))] if rare else []
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 3.3 * np.sqrt(2 * freedom) + 3.5  # about p = 0.001; seeds are fixed
