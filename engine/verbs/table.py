"""The verbs that do work: whose options they take, and which function does it. The command line and job files read it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.schema import Progress
from engine.verbs.assess import AssessOptions
from engine.verbs.copies import DedupOptions
from engine.verbs.curves import CurvesOptions
from engine.verbs.features import (
    CompareOptions,
    DemoOptions,
    EmbedOptions,
    EvaluateOptions,
    ImportOptions,
    SelectOptions,
)
from engine.verbs.rounds import RoundsOptions
from engine.verbs.training import FinetuneOptions, PredictOptions


@dataclass(frozen=True)
class Verb:
    """A verb: the dataclass of its options, and `module:function`, called as function(options, progress)."""

    options: type[Any]
    function: str
    in_jobs: bool = True

    def load(self) -> Callable[[Any, Progress], Any]:
        """Import the function and return it."""
        module, _, name = self.function.partition(":")
        found: Callable[[Any, Progress], Any] = getattr(importlib.import_module(module), name)
        return found


VERBS: dict[str, Verb] = {
    "embed": Verb(EmbedOptions, "engine.embed:embed_all"),
    "import": Verb(ImportOptions, "engine.ingest:import_features"),
    "dedup": Verb(DedupOptions, "engine.dedup:dedup"),
    "select": Verb(SelectOptions, "engine.select:select"),
    "assess": Verb(AssessOptions, "engine.assess:assess_selection"),
    "finetune": Verb(FinetuneOptions, "engine.finetune:finetune"),
    "predict": Verb(PredictOptions, "engine.predict:predict"),
    "evaluate": Verb(EvaluateOptions, "engine.evaluate:evaluate"),
    "compare": Verb(CompareOptions, "engine.compare:compare"),
    "curves": Verb(CurvesOptions, "engine.curves:curves"),
    "rounds": Verb(RoundsOptions, "engine.rounds:rounds"),
    "demo": Verb(DemoOptions, "engine.demo:demo", in_jobs=False),
}
"""In the order of the command's help."""

JOB_VERBS = tuple(name for name, verb in VERBS.items() if verb.in_jobs)
"""What a step of a job may be: verbs that write a folder."""
