"""Options of assess."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import Seed, ShardOptions


@dataclass(frozen=True, kw_only=True)
class AssessOptions(ShardOptions):
    """Before anything is labelled: how well does a selection cover its pool, beside random draws of the same size?

    Also how far a smaller budget would have come, and where more picks begin to add little (the knee). On L2-normalised
    vectors, as `evaluate` measures.
    """

    features: Annotated[str, Opt("Feature store that was selected from.", positional=True)]
    selection: Annotated[str, Opt("What was selected: a folder that select wrote.", metavar="DIR", result=False)]
    out: Annotated[str | None, Opt("Folder to publish the figures in.", metavar="DIR", result=False)] = None
    draws: Annotated[int, Opt("Random selections to compare with.", min=2, max=1000)] = 10
    points: Annotated[
        int, Opt("Budgets on the curve, from 1 to that of the selection, evenly on a log scale.", min=2, max=200)
    ] = 16
    sample: Annotated[
        int, Opt("Pool rows that distances are measured on, about: a seeded sample of a larger pool.", min=100)
    ] = 200_000
    emd_sample: Annotated[
        int, Opt("Pool rows in the earth mover's distance (exact on this seeded sample).", min=1, max=20000)
    ] = 1000
    seed: Seed = 0
