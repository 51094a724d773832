"""Options of the verbs that make and use features: embed, import, select, evaluate, compare, demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import (
    ActorOptions,
    Address,
    ConditionOptions,
    EncoderOption,
    Exclude,
    Labeled,
    MeasureOptions,
    Normalize,
    Out,
    Overwrite,
    PoolOptions,
    Predictions,
    PreprocessingOptions,
    ReferenceLabels,
    ReferencePool,
    Seed,
    ShardOptions,
)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(PoolOptions, PreprocessingOptions, ActorOptions):
    """Embed a pool of images: one vector for each."""

    pool: Annotated[
        str,
        Opt(
            "Image folder; Parquet, Arrow; CSV or text list; datasets folder or hf://owner/name; COCO .json; VOC folder; "
            "tar shards; CIFAR's or SVHN's own files.",
            positional=True,
        ),
    ]
    out: Out
    encoder: Annotated[
        str,
        Opt("What to compute: see `coresift encoders`. Several (embedding,patterns) read each image once: DIR/<encoder>."),
    ] = "embedding"
    backbone: Annotated[str, Opt("Any timm model, by its hub name.")] = "vit_small_patch16_224.dino"
    weights: Annotated[str, Opt("FILE (.safetensors, .pth), `hub` for timm's own, `random` for none.")] = "hub"
    checkpoint: Annotated[
        str | None,
        Opt(
            "Folder that finetune wrote: its backbone and preprocessing instead; all that reads a trained model needs it.",
            metavar="DIR",
            result=False,
        ),
    ] = None
    best: Annotated[bool, Opt("Of --checkpoint: the weights of the best evaluation, not the last.", result=False)] = False
    model_option: Annotated[
        tuple[str, ...],
        Opt("Constructor argument of the backbone, e.g. pad_type=same. Repeatable.", metavar="NAME=VALUE", repeat=True),
    ] = ()
    pooling: Annotated[str, Opt("Which vector: the model's own, class token, mean.", choices=("model", "cls", "mean"))] = (
        "model"
    )
    pixels_size: Annotated[int, Opt("Side in px of the `pixels` encoder's image.", min=1, max=256)] = 8
    num_patterns: Annotated[
        int, Opt("`patterns`: most vectors of an image; 1 is their mean, GEAL v1 has 25.", min=1, max=1000)
    ] = 5
    attention_ratio: Annotated[
        float, Opt("`patterns`: share of the attention that the local features kept carry.", min=0, max=1)
    ] = 0.5
    pattern_metric: Annotated[
        str, Opt("`patterns`: how local features are clustered; GEAL v1: cosine.", choices=("euclidean", "cosine"))
    ] = "euclidean"
    reference: ReferencePool = None
    reference_labels: ReferenceLabels = None
    encoder_option: EncoderOption = ()
    seed: Seed = 0
    batch_size: Annotated[
        int | None, Opt("Images in a batch of the encoder. Default: 16 on a CPU, 256 on a GPU.", min=1, max=65536)
    ] = None
    channels_last: Annotated[bool, Opt("Channels-last memory format: faster for convolutions.")] = True
    precision: Annotated[
        str, Opt("Of the network; bf16 is faster on GPUs made for it, and coarser.", choices=("float32", "bf16"))
    ] = "float32"
    compile: Annotated[bool, Opt("Compile the network first (torch.compile): minutes that long runs win back.")] = False
    draft: Annotated[
        bool, Opt("Decode JPEGs of twice the wanted size or more at a half, quarter or eighth: faster, other pixels.")
    ] = False
    reuse: Annotated[
        tuple[str, ...],
        Opt(
            "Features of an earlier state of the pool: images that they have are not encoded again. Repeatable.",
            metavar="DIR",
            result=False,
            repeat=True,
        ),
    ] = ()
    address: Address = None
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Make a feature store of vectors you have already."""

    file: Annotated[
        str,
        Opt(".npy (n, d); .npz with `features`, and `ids`, `labels`; Parquet or Arrow with a vector column.", positional=True),
    ]
    out: Out
    column: Annotated[str | None, Opt("Parquet, Arrow: the vector column. Default: the only one.")] = None
    label_column: Annotated[
        str | None, Opt("Column of the labels; `last`: the last of the vector's own columns, as the ActiveFT tools write.")
    ] = None
    id_column: Annotated[str | None, Opt("Parquet, Arrow: the id column. Default: id, if there.")] = None
    holds: Annotated[
        str, Opt("What a vector is: an embedding, or the probability of each class.", choices=("embedding", "probs"))
    ] = "embedding"
    dtype: Annotated[str, Opt("How vectors are stored.", choices=("float32", "float16"))] = "float32"
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class SelectOptions(ConditionOptions, ShardOptions):
    """Pick the images worth labelling."""

    features: Annotated[str, Opt("Feature store written by embed or import.", positional=True)]
    out: Out
    strategy: Annotated[str, Opt("How to pick: see `coresift strategies`.")]
    budget: Annotated[
        str | None, Opt("New labels: a count, a percentage of the pool, or several: 100,500,1%.", result=False)
    ] = None
    labeled: Labeled = None
    exclude: Exclude = None
    budget_cost: Annotated[
        str | None,
        Opt(
            "What there is to spend, instead of --budget: picks are made until what is left pays for none. An image that costs "
            "more than is left is passed over; gain is not weighed against cost.",
            metavar="TOTAL",
            result=False,
        ),
    ] = None
    cost_column: Annotated[
        str | None,
        Opt("Column of the features: what an image costs, in the unit of --budget-cost.", metavar="COLUMN", result=False),
    ] = None
    predictions: Predictions = None
    seed: Seed = 0
    option: Annotated[
        tuple[str, ...], Opt("Option of the strategy. Repeatable.", metavar="NAME=VALUE", result=False, repeat=True)
    ] = ()
    normalize: Normalize = True
    journal_s: Annotated[
        float, Opt("Seconds between two entries of the journal that an unfinished run goes on from.", min=0, result=False)
    ] = 10.0


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(PoolOptions, MeasureOptions, ShardOptions):
    """Measure what a selection is worth on stored features, or a trained model on a labelled pool."""

    subject: Annotated[str, Opt("Feature store the selection was made from, or a checkpoint folder.", positional=True)]
    selection: Annotated[str | None, Opt("Features: selection folder.", metavar="DIR", result=False)] = None
    test: Annotated[
        str | None,
        Opt(
            "Features: labelled feature store to test on, needed by knn and linear. Checkpoint: labelled pool.",
            metavar="FEATURES|POOL",
            result=False,
        ),
    ] = None
    labels: Annotated[
        str | None,
        Opt("Checkpoint: labels of --test apart from it: CSV or Parquet with id and label, or COCO .json.", result=False),
    ] = None
    best: Annotated[bool, Opt("Checkpoint: the weights of the best evaluation instead of the last.")] = False
    batch_size: Annotated[
        int | None,
        Opt("Checkpoint: images in a batch. Default: 16 on a CPU, 256 on a GPU; detectors 4 and 16.", min=1, max=65536),
    ] = None
    max_rejected: Annotated[
        str, Opt("Checkpoint: share (1%) or count of bad images above which the run fails.", result=False)
    ] = "1%"
    seed: Seed = 0
    out: Annotated[str | None, Opt("Folder to write the metrics to. Default: only print.", metavar="DIR", result=False)] = None


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ConditionOptions, MeasureOptions, ShardOptions):
    """Strategies x budgets x seeds on one feature store: one table."""

    features: Annotated[str, Opt("Feature store to select from.", positional=True)]
    out: Out
    strategies: Annotated[tuple[str, ...], Opt("Comma-separated; options after colons: kmeans:restarts=1:seeding=random.")]
    budget: Annotated[str, Opt("Budgets: 100,500,1%.")]
    test: Annotated[str | None, Opt("Labelled feature store to test on.", metavar="FEATURES", result=False)] = None
    exclude: Exclude = None
    predictions: Predictions = None
    seeds: Annotated[int, Opt("Seeds 0..N-1.", min=1, max=1000)] = 3


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Run the main job on scikit-learn's handwritten digits: embed, select, evaluate, compare."""

    out: Annotated[str, Opt("Folder to write.", metavar="DIR", result=False)] = "coresift-demo"
    workers: Annotated[int | None, Opt("Ray actors for embedding; 0 embeds in this process.", min=0, result=False)] = None
    address: Address = None
    overwrite: Overwrite = False
