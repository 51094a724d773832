"""`probcover`: `maxherding` with a top-hat kernel, which is greedy max coverage by balls (Yehuda et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from engine.schema import Opt
from engine.select.maxherding import tophat
from engine.shards import Request, Shards, Step


@dataclass(frozen=True)
class Options:
    """Options of `probcover`."""

    delta: Annotated[float | None, Opt("Radius of the balls. Default: the largest `purity` allows.", min=0)] = None
    clusters: Annotated[int, Opt("k-means clusters whose purity gives `delta`: as many as classes.", min=1)] = 10
    purity: Annotated[float, Opt("Share of the balls of radius `delta` that hold one cluster only.", min=0, max=1)] = 0.95
    candidates: Annotated[
        int, Opt("Rows that may be picked; of more eligible ones a seeded sample: an approximation.", min=1)
    ] = 20_000


def probcover(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick again and again the candidate whose ball of radius `delta` covers most rows that no ball covers yet.

    `gain` is the share of the pool that a pick is first to cover, the objective the share covered. Covered rows drop out
    of the count, so this is `maxherding` with k = 1 within `delta` and 0 beyond: labelled rows, ties, candidates and what
    follows full coverage are as there. The default radius is the one of `purity.pure_sqradius` (alpha = 0.95).
    Deviations: balls are closed (the released code's are open, and it is given the radius); of several best candidates
    the first is taken (the released code notes that the paper's runs drew among the five best); candidates are a sample
    above 20,000 eligible rows.
    """
    if request.budget == 0:
        yield Step(0, 0, np.empty(0, dtype=np.int64), np.empty(0))
        return
    yield from tophat(shards, request, options.delta, options.clusters, options.purity, options.candidates)
