"""Random draws as pure functions of (seed, step, row or slot): no generator is passed around."""

from __future__ import annotations

import numpy as np

from engine.arrays import Floats, Ints, Keys


def _mix(z: Keys) -> Keys:
    """One round of the splitmix64 finaliser (Steele, Lea, Flood 2014), elementwise on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_keys(seed: int, step: tuple[int, ...], items: Ints) -> Keys:
    """Return one uint64 for each item (a row or a slot): a pure function of (seed, step, item)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.zeros(1, dtype=np.uint64)
        for word in (seed, *step):
            state = _mix(state + golden + np.uint64(word & 0xFFFFFFFFFFFFFFFF))
        return _mix(_mix(state + golden * (items.astype(np.uint64) + np.uint64(1))))


def random_uniform(seed: int, step: tuple[int, ...], items: Ints) -> Floats:
    """Return u(seed, step, item) in [0, 1) for each item, float64 with 53 random bits."""
    return (random_keys(seed, step, items) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_subset(n: int, m: int, seed: int, step: tuple[int, ...]) -> Ints:
    """Return m distinct numbers of 0..n-1, the first m of a permutation that is a function of (seed, step).

    In time and memory O(m): a six-round Feistel network on the next even power of two, walked along its cycles until
    it lands below n.
    """
    half = max(1, -(-max(1, n - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    keys = random_keys(seed, step, np.arange(6, dtype=np.int64))

    def permute(values: Keys) -> Keys:
        left, right = values >> np.uint64(half), values & mask
        with np.errstate(over="ignore"):
            for key in keys:
                left, right = right, left ^ (_mix(right + key) & mask)
        return (left << np.uint64(half)) | right

    found = permute(np.arange(m, dtype=np.uint64))
    while len(outside := np.flatnonzero(found >= n)):
        found[outside] = permute(found[outside])
    return found.astype(np.int64)
