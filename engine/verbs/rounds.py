"""Options of the active-learning loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import (
    Address,
    ConditionOptions,
    DecodeWorkers,
    Device,
    EncoderOption,
    LinearEpochs,
    MaxRejected,
    Memory,
    Normalize,
    Out,
    Overwrite,
    ReferenceLabels,
    ReferencePool,
    Seed,
)
from engine.verbs.training import ModelOptions


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(ConditionOptions, ModelOptions):
    """Label in rounds: select, take labels, train, let the new model read the pool, select again.

    On a pool of images a network is trained in every round, on a feature store a linear head. Every round trains from the
    same weights, never from the round before. Where a strategy needs a reference set and none is given, a tenth of the labels
    are held out for it. Round 0 is the start. More --rounds make a finished run longer. Ends with exit
    code 3 where labels are awaited.
    """

    subject: Annotated[str, Opt("Pool of images, or a feature store (a linear head on its vectors).", positional=True)]
    out: Out
    strategy: Annotated[str, Opt("How to pick from round 1 on: see `coresift strategies`.")]
    oracle: Annotated[
        str,
        Opt(
            "Who labels the picks: `column` or column:NAME (the subject's own labels), a file (as finetune's --labels), "
            "or an existing folder, in which they are asked for and awaited.",
            metavar="column|FILE|DIR",
            result=False,
        ),
    ]
    test: Annotated[
        str,
        Opt(
            "What every round's model is measured on: a labelled pool, or feature store.", metavar="POOL|FEATURES", result=False
        ),
    ]
    start: Annotated[str, Opt("Labels of round 0: a count, or a percentage of the pool.", metavar="N|P%", result=False)] = (
        "1000"
    )
    add: Annotated[
        str,
        Opt("Labels that each later round adds; or a number for each of them: 2000,4000,6000.", metavar="N|P%", result=False),
    ] = "1000"
    rounds: Annotated[
        int, Opt("Trainings in all, the start's included: start + (rounds - 1) x add labels at the end.", min=1, result=False)
    ] = 10
    start_strategy: Annotated[str, Opt("How to pick the start; all but random need features.")] = "random"
    features: Annotated[
        str | None,
        Opt("Images: a feature store of the pool, that the start is picked from.", metavar="DIR", result=False),
    ] = None
    fixed_features: Annotated[
        bool, Opt("Images: strategies that read vectors read those of --features in every round, not the new model's.")
    ] = False
    strategy_option: Annotated[
        tuple[str, ...], Opt("Option of the strategy. Repeatable.", metavar="NAME=VALUE", result=False, repeat=True)
    ] = ()
    start_option: Annotated[
        tuple[str, ...], Opt("Option of the start's strategy. Repeatable.", metavar="NAME=VALUE", result=False, repeat=True)
    ] = ()
    normalize: Normalize = True
    reference: ReferencePool = None
    reference_labels: ReferenceLabels = None
    encoder_option: EncoderOption = ()
    linear_epochs: LinearEpochs = 100
    linear_rate: Annotated[
        float, Opt("Adam's rate for the linear head; the low-budget paper's head that entropy reads has 0.001.", min=1e-9)
    ] = 0.01
    keep_models: Annotated[
        str,
        Opt(
            "Whose weights, gathered images and predictions stay: all rounds', the last one's, none.",
            choices=("all", "last", "none"),
            result=False,
        ),
    ] = "last"
    seed: Seed = 0
    embed_workers: Annotated[
        int | None,
        Opt(
            "Ray actors that embed and select; 0 works in this process. Default: as embed and select choose.",
            min=0,
            result=False,
        ),
    ] = None
    decode_workers: DecodeWorkers = "auto"
    max_rejected: MaxRejected = "1%"
    memory_per_shard: Memory = None
    device: Device = "auto"
    address: Address = None
    overwrite: Overwrite = False
