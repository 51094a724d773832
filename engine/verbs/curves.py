"""Options of the verb that compares finished rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import Out, Overwrite


@dataclass(frozen=True, kw_only=True)
class CurvesOptions:
    """Compare finished rounds: labels against metric, and the labels that each strategy saves beside a baseline."""

    runs: Annotated[
        tuple[str, ...],
        Opt(
            "Folders that `rounds` wrote; NAME=DIR calls a run something else than its strategy.", positional=True, repeat=True
        ),
    ]
    out: Out
    metric: Annotated[str | None, Opt("Which. Default: the one by which the runs choose checkpoints.")] = None
    baseline: Annotated[str, Opt("Strategy beside which labels are saved; none: no such table.")] = "random"
    overwrite: Overwrite = False
