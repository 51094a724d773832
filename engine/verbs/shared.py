"""What several verbs' options share: annotated types of single options, and groups of options as base classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import MAX_PIXELS, Opt

Out = Annotated[str, Opt("Folder to write; goes on where it stopped, refuses another run's.", metavar="DIR", result=False)]
Overwrite = Annotated[bool, Opt("Empty the output folder first if it holds another run of coresift.", result=False)]
Address = Annotated[str | None, Opt("Ray cluster to join; a local one is started where it is needed.", result=False)]
Seed = Annotated[int, Opt("Seed of every random draw.", min=0)]
Normalize = Annotated[bool, Opt("L2-normalise the vectors first, as the papers do.")]
Workers = Annotated[
    int | None,
    Opt(
        "0 computes in this process, N on N Ray actors. Default: this process if the features fit, else the cluster.",
        min=0,
        result=False,
    ),
]
Exclude = Annotated[
    str | None,
    Opt("What may not be picked: a dedup folder, ids (.txt), pool rows (.json, .npy), or column:NAME.", result=False),
]
Labeled = Annotated[
    str | None,
    Opt(
        "What is labelled already: a selection folder, also one of a pool that has grown since; ids (.txt), pool rows (.json, "
        ".npy), or column:NAME of the features, where it is true or holds a value.",
        result=False,
    ),
]
Predictions = Annotated[
    str | None,
    Opt(
        "What `predict` wrote of the same pool: probabilities or boxes, for the strategies that read a model's predictions. "
        "Default: FEATURES, if it holds some.",
        metavar="DIR",
        result=False,
    ),
]
Memory = Annotated[
    str | None,
    Opt("Vectors a shard may hold in memory (4GiB); more are read on every use. Default: half of what is free.", result=False),
]
Device = Annotated[
    str, Opt("Where vectors are worked on; auto is a GPU if there is one.", choices=("auto", "cpu", "cuda"), result=False)
]
Precision = Annotated[
    str,
    Opt(
        "Of the fast products, which never decide what they can't: it changes the time, not the picks.",
        choices=("float32", "tf32", "bf16"),
        result=False,
    ),
]

MaxRejected = Annotated[str, Opt("Share (1%) or count of bad images above which the run fails.", result=False)]
DecodeWorkers = Annotated[
    str | int,
    Opt(
        "Ray tasks, a CPU each, that read and decode ahead of each actor; 0: the actor itself does. auto: the CPUs that "
        "actors on GPUs leave, else 0.",
        metavar="N|auto",
        result=False,
    ),
]
ReferencePool = Annotated[
    str | None,
    Opt(
        "`influence`, `gradient_similarity`: labelled pool whose loss is to fall. Default: what finetune --hold-out kept.",
        metavar="POOL",
        result=False,
    ),
]
ReferenceLabels = Annotated[str | None, Opt("Labels of --reference, apart from it.", result=False)]
EncoderOption = Annotated[
    tuple[str, ...],
    Opt(
        "Option of `influence`, `gradient_similarity`, `stability`: see `coresift encoders`. Repeatable.",
        metavar="NAME=VALUE",
        result=False,
        repeat=True,
    ),
]
LinearEpochs = Annotated[int, Opt("Epochs of the linear probe.", min=1)]


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """How the columns and files of a pool are read."""

    images: Annotated[
        str | None, Opt("COCO, lists: folder of the images they name. Default: found beside the file.", metavar="DIR")
    ] = None
    split: Annotated[str | None, Opt("datasets, VOC: which split. Default: train, trainval.")] = None
    image_column: Annotated[
        str | None,
        Opt("Tables: column of the images. Default: image, img; or uri, path, file_name, image_path, url."),
    ] = None
    label_column: Annotated[str | None, Opt("Tables, tar: column of the labels. Default: label, labels or fine_label.")] = None
    id_column: Annotated[str | None, Opt("Tables: column of the ids. Default: id, if there, else the images' paths.")] = None
    metadata_column: Annotated[
        tuple[str, ...],
        Opt("Tables, tar: a further column to keep. Repeatable. Default: all that can be.", metavar="NAME", repeat=True),
    ] = ()
    max_pixels: Annotated[int, Opt("Images with more pixels are rejected before they are decoded.", min=1)] = MAX_PIXELS


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """How an RGB image becomes a network's input, where that is not the model's own way."""

    image_size: Annotated[int | None, Opt("Input side in px. Default: the model's own.", min=8, max=4096)] = None
    mean: Annotated[tuple[float, ...] | None, Opt("Pixel mean in 0..1, one value or three. Default: the model's own.")] = None
    std: Annotated[tuple[float, ...] | None, Opt("Pixel std in 0..1, one value or three. Default: the model's own.")] = None
    interpolation: Annotated[
        str | None, Opt("Resize filter. Default: the model's own.", choices=("bilinear", "bicubic", "lanczos", "nearest"))
    ] = None
    crop_pct: Annotated[
        float | None, Opt("Share of the resized image that the crop keeps. Default: the model's own.", min=0.05, max=1)
    ] = None
    crop_mode: Annotated[
        str | None, Opt("center crops, squash resizes both sides, border pads.", choices=("center", "squash", "border"))
    ] = None


@dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """How a pool goes through a network: who does it, and how the vectors are stored."""

    dtype: Annotated[str, Opt("How vectors are stored.", choices=("float32", "float16"))] = "float32"
    max_rejected: MaxRejected = "1%"
    workers: Annotated[
        str | int | None,
        Opt(
            "Ray actors: N, or MIN:MAX as the cluster has room; 0 works in this process. Default: one for each GPU, else CPU, "
            "that the cluster can have.",
            metavar="N|MIN:MAX",
            result=False,
        ),
    ] = None
    decode_workers: DecodeWorkers = "auto"
    cpus_per_worker: Annotated[int, Opt("CPU threads of an actor; another number may round differently.", min=1)] = 1
    gpus_per_worker: Annotated[
        float | None, Opt("GPUs of an actor. Default: 1 if the cluster has one.", min=0, result=False)
    ] = None


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Where the vectors of a feature store are worked on."""

    workers: Workers = None
    memory_per_shard: Memory = None
    device: Device = "auto"
    precision: Precision = "float32"
    address: Address = None
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class ConditionOptions:
    """What picks must satisfy together, by columns of the features; rows without a value are the group `null`."""

    quota: Annotated[
        tuple[str, ...],
        Opt(
            "Exactly so many picks of a value: label=cat:50,dog:20. The rest of the budget goes to other values. Repeatable.",
            metavar="COLUMN=VALUE:COUNT,...",
            result=False,
            repeat=True,
        ),
    ] = ()
    balance: Annotated[
        str | None,
        Opt(
            "Column over whose values the picks are split evenly; a value with too few gives all, the others the rest.",
            metavar="COLUMN",
            result=False,
        ),
    ] = None
    cap: Annotated[
        tuple[str, ...],
        Opt(
            "At most N of each value (video=3), counting what is labelled already. Repeatable.",
            metavar="COLUMN=N",
            result=False,
            repeat=True,
        ),
    ] = ()
    where: Annotated[
        str | None,
        Opt(
            "Which images may be picked: width >= 640 and label in ('cat', 'dog') and not (blur is None); also + - * /, "
            ".startswith('x'), .endswith, .contains, .matches; column('other name').",
            metavar="EXPRESSION",
            result=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured of a selection, on stored features."""

    metrics: Annotated[tuple[str, ...], Opt("Which, comma-separated.", choices=("knn", "linear", "coverage"))] = (
        "knn",
        "linear",
        "coverage",
    )
    neighbors: Annotated[tuple[int, ...], Opt("k of the k-NN accuracies.", min=1)] = (1, 20)
    linear_epochs: LinearEpochs = 100
    emd_sample: Annotated[
        int, Opt("Pool rows in the earth mover's distance (exact on this seeded sample).", min=1, max=20000)
    ] = 2000
