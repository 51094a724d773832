"""Options of the verbs that train and use models: finetune, predict; and what a recipe may set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import ActorOptions, Address, Out, Overwrite, PoolOptions, PreprocessingOptions, Seed


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a model is trained, whatever its task: what a recipe sets, and `--option` overrides."""

    epochs: Annotated[int, Opt("Passes over the training images.", min=1)] = 100
    steps: Annotated[int | None, Opt("Optimiser steps in all, instead of epochs.", min=1)] = None
    batch_size: Annotated[int, Opt("Images of an optimiser step, over all workers.", min=1)] = 128
    accumulate: Annotated[int, Opt("Parts in which a worker takes its share of a step's images.", min=1)] = 1
    repeats: Annotated[
        int, Opt("Repeated augmentation: an epoch takes 1/repeats of the images, each this often.", min=1, max=100)
    ] = 1
    optimizer: Annotated[str, Opt("Which.", choices=("sgd", "adam", "adamw"))] = "sgd"
    lr: Annotated[float, Opt("Learning rate; of the head, where backbone_lr is given.", min=0)] = 0.01
    backbone_lr: Annotated[float | None, Opt("Learning rate of the backbone. Default: lr.", min=0)] = None
    lr_batch_size: Annotated[
        int | None, Opt("Batch size that the rates are for: they grow linearly with the batch. Default: any.", min=1)
    ] = None
    layer_decay: Annotated[float, Opt("Rate of a layer over that of the one above it.", min=0.01, max=1)] = 1.0
    momentum: Annotated[float, Opt("SGD.", min=0, max=1)] = 0.9
    nesterov: Annotated[bool, Opt("SGD.")] = False
    weight_decay: Annotated[float, Opt("Weight decay.", min=0)] = 0.0
    decay_1d: Annotated[bool, Opt("Whether biases and norms decay, too.")] = True
    schedule: Annotated[str, Opt("Of the rate.", choices=("constant", "step", "cosine"))] = "constant"
    milestones: Annotated[
        tuple[float, ...], Opt("step: epochs (with --option steps: steps) at which the rate falls.", min=0)
    ] = ()
    gamma: Annotated[float, Opt("step: what the rate is multiplied by.", min=0, max=1)] = 0.1
    min_lr: Annotated[float, Opt("cosine: the rate at the end, whatever lr_batch_size.", min=0)] = 0.0
    warmup: Annotated[float, Opt("Epochs (with steps: steps) of linear warm-up.", min=0)] = 0.0
    warmup_lr: Annotated[float, Opt("The rate at which warm-up begins, whatever lr_batch_size.", min=0)] = 0.0
    clip_grad: Annotated[float | None, Opt("Largest norm of the gradient.", min=0)] = None
    ema_decay: Annotated[
        float | None, Opt("Keep an exponential moving average of the weights, and evaluate that.", min=0, max=1)
    ] = None
    precision: Annotated[str, Opt("Of the network's products (autocast).", choices=("float32", "bf16"))] = "float32"
    freeze_norm: Annotated[bool, Opt("Keep batch norms as they are: running statistics, weight, bias.")] = False
    eval_epochs: Annotated[
        int | None, Opt("Epochs (with steps: steps) between two evaluations on --test. Default: the end only.", min=1)
    ] = None


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(TrainingOptions):
    """How a classifier is trained."""

    mode: Annotated[
        str,
        Opt(
            "finetune all, linear: a head on the frozen backbone, scratch: random weights.",
            choices=("finetune", "linear", "scratch"),
        ),
    ] = "finetune"
    normalize: Annotated[bool, Opt("L2-normalise the features before the head.")] = False
    small_stem: Annotated[bool, Opt("ResNets: 3x3 convolution of stride 1 and no pooling first, for images of 32 px.")] = False
    label_smoothing: Annotated[float, Opt("Share of the target that all classes get.", min=0, max=0.99)] = 0.0
    drop_path: Annotated[float, Opt("Stochastic depth.", min=0, max=0.99)] = 0.0
    crop: Annotated[
        str,
        Opt(
            "resized: random resized crop; pad: a random crop of the image padded by 4 px; none: as in evaluation.",
            choices=("resized", "pad", "none"),
        ),
    ] = "resized"
    crop_scale: Annotated[tuple[float, ...], Opt("resized: least and largest share of the image's area.", min=0, max=1)] = (
        0.08,
        1.0,
    )
    flip: Annotated[bool, Opt("Flip half of the images from left to right.")] = True
    color_jitter: Annotated[float, Opt("Strength.", min=0, max=1)] = 0.0
    rand_augment: Annotated[str | None, Opt("timm's RandAugment or AutoAugment, e.g. rand-m9-mstd0.5-inc1.")] = None
    erasing: Annotated[float, Opt("Chance of random erasing.", min=0, max=1)] = 0.0
    mixup: Annotated[float, Opt("alpha.", min=0)] = 0.0
    cutmix: Annotated[float, Opt("alpha.", min=0)] = 0.0


@dataclass(frozen=True, kw_only=True)
class DetectOptions(TrainingOptions):
    """How a detector is trained."""

    max_size: Annotated[
        int | None, Opt("Longer side in px, at most; image_size is the shorter one. Default: the model's own.", min=8, max=8192)
    ] = None
    trainable_layers: Annotated[
        int | None, Opt("Stages of the backbone that are trained, from the top. Default: the model's own.", min=0, max=6)
    ] = None
    augment: Annotated[
        str, Opt("flip: half of the images; ssd: colours, zoom out, crops by overlap, flip.", choices=("none", "flip", "ssd"))
    ] = "flip"
    score_threshold: Annotated[float, Opt("Boxes below this score are dropped.", min=0, max=1)] = 0.05
    nms_threshold: Annotated[float, Opt("Overlap (IoU) above which the lower box goes.", min=0, max=1)] = 0.5
    max_boxes: Annotated[int, Opt("Boxes of an image, at most.", min=1, max=1000)] = 100


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PoolOptions, PreprocessingOptions):
    """Which model is trained on a pool's images, from what weights, on what it is measured, and who trains it."""

    recipe: Annotated[str | None, Opt("A published training recipe, or a .toml file: see `coresift recipes`.")] = None
    task: Annotated[str | None, Opt("Default: the recipe's.", choices=("classify", "detect"))] = None
    model: Annotated[
        str | None,
        Opt(
            "classify: any timm model. detect: fcos, fasterrcnn, retinanet, ssd, ssdlite, with :BACKBONE of timm, or a "
            "torchvision name. Default: the recipe's."
        ),
    ] = None
    weights: Annotated[
        str | None,
        Opt(
            "FILE (.safetensors, .pth), a checkpoint folder, `hub` (the model's own), `random`. Default: the recipe's, or hub."
        ),
    ] = None
    model_option: Annotated[
        tuple[str, ...],
        Opt(
            "Constructor argument of the model (detect: of its backbone), e.g. pad_type=same. Repeatable.",
            metavar="NAME=VALUE",
            repeat=True,
        ),
    ] = ()
    option: Annotated[
        tuple[str, ...],
        Opt(
            "Training option over the recipe's, e.g. epochs=30: see `coresift recipes`. Repeatable.",
            metavar="NAME=VALUE",
            result=False,
            repeat=True,
        ),
    ] = ()
    hold_out: Annotated[
        str | None,
        Opt(
            "Labelled images to keep from training, a share or a count, by a seeded draw: OUT/heldout, the reference set of "
            "`embed --encoder influence`.",
            metavar="10%|COUNT",
            result=False,
        ),
    ] = None
    test_split: Annotated[str | None, Opt("datasets, VOC: which split of --test. Default: train, trainval.", result=False)] = (
        None
    )
    test_labels: Annotated[str | None, Opt("Labels of --test, apart from it.", result=False)] = None
    workers: Annotated[int, Opt("Ray Train workers; 0 trains in this process.", min=0)] = 0
    cpus_per_worker: Annotated[int, Opt("CPU threads of a worker; another number may round differently.", min=1)] = 1
    gpus_per_worker: Annotated[
        float | None, Opt("GPUs of a worker. Default: 1 if the cluster has one.", min=0, result=False)
    ] = None
    deepspeed: Annotated[str | None, Opt("Shard the training state over the workers.", choices=("zero1", "zero2", "zero3"))] = (
        None
    )
    loaders: Annotated[
        int, Opt("Processes of a worker that decode and augment ahead of it; 0: itself.", min=0, result=False)
    ] = 0
    checkpoint_steps: Annotated[
        int | None, Opt("Steps between two checkpoints. Default: an epoch, and 100 at least.", min=1, result=False)
    ] = None
    max_failures: Annotated[int, Opt("How often the workers are started again when one dies.", min=0, result=False)] = 3


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ModelOptions):
    """Finetune a classifier or a detector on a selection."""

    pool: Annotated[str, Opt("The pool that was selected from: any that embed takes.", positional=True)]
    out: Out
    selection: Annotated[
        str,
        Opt(
            "What to train on: a selection folder (and what it was told is labelled), ids (.txt), rows (.json, .npy), or all.",
            result=False,
        ),
    ]
    labels: Annotated[
        str | None,
        Opt(
            "Labels apart from the pool: CSV or Parquet with id and label, or COCO .json. Read for the selection only.",
            result=False,
        ),
    ] = None
    test: Annotated[str | None, Opt("Labelled pool to evaluate on.", metavar="POOL", result=False)] = None
    seed: Seed = 0
    address: Address = None
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class PredictOptions(PoolOptions, ActorOptions):
    """Write a trained model's probabilities or boxes for every image of a pool, as a feature store."""

    pool: Annotated[str, Opt("Any pool that embed takes.", positional=True)]
    checkpoint: Annotated[str, Opt("Checkpoint folder that finetune wrote.", metavar="DIR", result=False)]
    out: Out
    best: Annotated[bool, Opt("Use the weights of the best evaluation instead of the last.")] = False
    batch_size: Annotated[
        int | None, Opt("Images in a batch. Default: 16 on a CPU, 256 on a GPU; detectors 4 and 16.", min=1, max=65536)
    ] = None
    precision: Annotated[str, Opt("Of the network's products (autocast).", choices=("float32", "bf16"))] = "float32"
    address: Address = None
    overwrite: Overwrite = False
