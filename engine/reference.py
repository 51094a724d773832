"""What influence is measured against: labelled images, the gradient of their loss, and h, made of both once for a run.

The pool's own labels are never read: those here are of the images that the checkpoint was trained on, of those that its
training held out, or of a pool that was given for this.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from engine.checkpoints import HELDOUT, IMAGES, Checkpoint
from engine.chosen import read_chosen
from engine.decode import decode
from engine.draws import random_keys, random_uniform
from engine.folders import read_manifest
from engine.gather import Wanted, gather
from engine.images import ImageSet
from engine.influence import Gradient, Losses, Recursion, lissa, reference_gradient
from engine.labels import Labels, read_labels
from engine.places import Place
from engine.retry import reached
from engine.schema import MAX_PIXELS, InputError, Progress
from engine.sources import Pool, columns_of, open_pool
from engine.tasks import Task
from engine.verbs import EmbedOptions, InfluenceOptions

H = "h.safetensors"
"""The file of a store's folder that holds h, and the number of images that scores are divided by."""
NUM_IMAGES = "num_images"
KEY, DRAW = 73, 79
"""Keys of the draws: of what an image's loss draws itself, and of the images of LiSSA's steps."""
BATCH = 16
"""Reference images whose losses are differentiated at once, where they are independent."""


@dataclass(frozen=True)
class Reference:
    """The labelled images whose loss is to fall: a folder of a checkpoint, or a pool of its own, with its labels."""

    folder: ImageSet | None = None
    pool: Pool | None = None
    labels: Labels | None = None

    def inputs(self) -> dict[str, Any]:
        """Return the digests of it all."""
        if self.pool is None:
            return {"heldout": self.folder.digest if self.folder is not None else None}
        return {"pool": self.pool.digest, "labels": self.labels.digest if self.labels is not None else None}

    @contextlib.contextmanager
    def opened(self, task: Task, progress: Progress) -> Iterator[ImageSet]:
        """Give the images; those of a pool are gathered for as long as this lasts.

        Raises InputError where one has no label, or boxes, or a class that the model does not know.
        """
        if self.pool is None:
            assert self.folder is not None
            yield self.folder
            return
        boxes, names = task.column == "detections", task.setup.class_names
        way_out = "Label them (--reference-labels), name the column (--label-column), or leave them out of --reference"
        wanted = Wanted(boxes, strict=True, max_pixels=MAX_PIXELS, class_names=names, way_out=way_out)
        with tempfile.TemporaryDirectory(prefix="coresift-") as folder:
            place = Place(f"{folder}/{IMAGES}")
            yield gather(self.pool, read_chosen("all", self.pool), place, wanted, self.labels, progress=progress, here=True)


def open_reference(options: EmbedOptions, checkpoint: Checkpoint, pool: Pool) -> Reference:
    """Return the reference set of a run: --reference, or what the checkpoint's training held out.

    Raises InputError where there is neither, or where it is the pool itself.
    """
    if options.reference is None:
        place = checkpoint.place.at(HELDOUT)
        if read_manifest(place) is None:
            raise InputError(
                f"{checkpoint.place.uri} has no held-out images, and --encoder {options.encoder} needs a labelled set beside: "
                "train it with `finetune --hold-out 10%`, or give --reference POOL, labelled images that it was not trained on"
            )
        return Reference(folder=ImageSet(place.address))
    with reached(options.reference):
        found = open_pool(options.reference, replace(columns_of(options), split=None))
    if found.digest == pool.digest:
        raise InputError(
            f"--reference {found.uri!r} is the pool itself: its labels are what is to be chosen. Give labelled images apart "
            "from it, or leave it out and train with `finetune --hold-out 10%`"
        )
    if options.reference_labels is None:
        return Reference(pool=found)
    with reached(options.reference_labels):
        names, every = checkpoint.setup.class_names, read_chosen("all", found)
        labels = read_labels(options.reference_labels, found, every, names, options.id_column, options.label_column)
    return Reference(pool=found, labels=labels)


def open_labelled(checkpoint: Checkpoint) -> ImageSet:
    """Return the images that a checkpoint was trained on; raises InputError where they are not in its folder."""
    place = checkpoint.place.at(IMAGES)
    if read_manifest(place) is None:
        raise InputError(
            f"{place.uri} does not hold the images that the checkpoint was trained on, and --encoder influence reads them: "
            "give the folder as finetune wrote it, or use --encoder gradient_similarity"
        )
    return ImageSet(place.address)


def keys_of(seed: int, rows: Sequence[int]) -> list[int]:
    """Return the key of each image, by its row: what seeds the draws of its loss."""
    drawn = random_keys(seed, (KEY,), np.array(rows, dtype=np.int64)) >> np.uint64(1)
    return [int(key) for key in drawn]


def losses_of(task: Task, images: ImageSet, indices: Sequence[int], seed: int) -> Losses:
    """Return the losses of some labelled images, prepared as for evaluation: without augmentation."""
    records = [images.record(index) for index in indices]
    decoded = [decode(record.data, MAX_PIXELS)[0] for record in records]
    pixels = np.stack([task.input.prepare(image) for image in decoded])
    sizes = np.array([image.size for image in decoded], dtype=np.int64)
    targets, keys = task.targets(records, sizes), keys_of(seed, [record.row for record in records])
    return lambda model: task.losses(model, pixels, sizes, targets, keys)


def make_v(
    task: Task, model: torch.nn.Module, names: Sequence[str], images: ImageSet, seed: int, progress: Progress
) -> Gradient:
    """Return v, the gradient of the summed loss of the reference images."""
    size, total = BATCH if task.calculus.batched else 1, len(images)

    def batches() -> Iterator[Losses]:
        for start in range(0, total, size):
            yield losses_of(task, images, range(start, min(start + size, total)), seed)
            progress("reference gradient", min(start + size, total), total, "")

    return reference_gradient(model, names, batches())


def make_h(
    task: Task,
    model: torch.nn.Module,
    names: Sequence[str],
    v: Gradient,
    images: ImageSet,
    options: InfluenceOptions,
    seed: int,
    progress: Progress,
) -> Gradient:
    """Return h by LiSSA over the labelled images.

    Those of a step are drawn with replacement: a function of (seed, restart, step, slot), unlike ISAL's shuffled passes,
    so that a step can be looked at by itself.
    """
    scale = scales_of(task, model, names, options.scale)
    assert options.restarts is not None
    assert options.steps is not None
    slots = np.arange(options.images, dtype=np.int64)

    def draw(restart: int, step: int) -> Losses:
        chosen = (random_uniform(seed, (DRAW, restart, step), slots) * len(images)).astype(np.int64)
        return losses_of(task, images, chosen.tolist(), seed)

    return lissa(model, names, v, draw, Recursion(options.damp, scale, options.restarts, options.steps), progress)


def scales_of(task: Task, model: torch.nn.Module, names: Sequence[str], given: Sequence[float]) -> dict[str, float]:
    """Return each parameter's scale: the one given for all, or its group's; outside the head the task's own."""
    groups = task.heads(model)
    by_group = dict(zip(groups, given, strict=True)) if len(given) > 1 else dict.fromkeys(groups, given[0])
    rest = given[0] if len(given) == 1 else task.calculus.scale
    scale = {name: by_group[group] for group, own in groups.items() for name in own}
    return {name: scale.get(name, rest) for name in names}


def write_h(place: Place, h: Gradient, num_images: int) -> None:
    """Write h, and how many images are scored, to the folder of a store."""
    tensors = {name: value.cpu().contiguous() for name, value in h.items()}
    place.at(H).write(save({**tensors, NUM_IMAGES: torch.tensor(num_images)}))


def read_h(place: Place, device: str) -> tuple[Gradient, int]:
    """Return what `write_h` wrote: h on a device, and the number of images."""
    tensors = load(place.at(H).read())
    num_images = int(tensors.pop(NUM_IMAGES))
    return {name: value.to(device) for name, value in tensors.items()}, num_images
