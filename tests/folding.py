"""Shards that fold otherwise than those of the engine."""

from __future__ import annotations

from engine.shards import LocalShards


class Backwards(LocalShards):
    """Folds results from the right instead of from the left: the same where `combine` is associative, exactly."""

    def map(self, fn, *args, combine=None, at=None):  # type: ignore[no-untyped-def]
        results = LocalShards.map(self, fn, *args, at=at)
        if combine is None:
            return results
        folded = results[-1]
        for result in results[-2::-1]:
            folded = combine(result, folded)
        return folded
