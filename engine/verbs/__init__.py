"""The options of every verb, declared once: the command line, job files and docs read them from here.

One dataclass a verb, each field `Annotated[type, Opt(help, range)]`. Options with `result=False` change how the work
is done, never what comes out.
"""

from engine.verbs.assess import AssessOptions
from engine.verbs.copies import DedupOptions
from engine.verbs.curves import CurvesOptions
from engine.verbs.export import ExportOptions, ImportLabelsOptions
from engine.verbs.features import (
    CompareOptions,
    DemoOptions,
    EmbedOptions,
    EvaluateOptions,
    ImportOptions,
    SelectOptions,
)
from engine.verbs.report import ReportOptions
from engine.verbs.rounds import RoundsOptions
from engine.verbs.scoring import SCORING, InfluenceOptions, SimilarityOptions, StabilityOptions
from engine.verbs.shared import ConditionOptions, MeasureOptions, PoolOptions, PreprocessingOptions
from engine.verbs.table import JOB_VERBS, VERBS, Verb
from engine.verbs.training import (
    ClassifyOptions,
    DetectOptions,
    FinetuneOptions,
    ModelOptions,
    PredictOptions,
    TrainingOptions,
)

__all__ = [
    "JOB_VERBS",
    "SCORING",
    "VERBS",
    "AssessOptions",
    "ClassifyOptions",
    "CompareOptions",
    "ConditionOptions",
    "CurvesOptions",
    "DedupOptions",
    "DemoOptions",
    "DetectOptions",
    "EmbedOptions",
    "EvaluateOptions",
    "ExportOptions",
    "FinetuneOptions",
    "ImportLabelsOptions",
    "ImportOptions",
    "InfluenceOptions",
    "MeasureOptions",
    "ModelOptions",
    "PoolOptions",
    "PredictOptions",
    "PreprocessingOptions",
    "ReportOptions",
    "RoundsOptions",
    "SelectOptions",
    "SimilarityOptions",
    "StabilityOptions",
    "TrainingOptions",
    "Verb",
]
