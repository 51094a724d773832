"""What a worker feeds its model with: a step's parts for training, batches of prepared images for evaluation.

Both are made here or by processes ahead of the model (`loaders`): the same tensors, since every draw is seeded by what it
is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from engine.arrays import Ints
from engine.decode import BadImageError, decode
from engine.images import ImageSet, Record
from engine.inputs import Pixels
from engine.schema import InputError, RunError
from engine.tasks import Batch, Setup, Task, build_task
from engine.training.order import Order
from engine.training.seeds import COLLATE, EXAMPLE, seed_all

T = TypeVar("T")


class Part(NamedTuple):
    """A worker's part of a step: its batch (None where no worker has one), its number of images, and the step's."""

    batch: Batch | None
    size: int
    of: int


@dataclass(frozen=True)
class Pictures:
    """Images of an evaluation: pixels (r, ...) uint8, sizes (r, 2) in px, and their records without data."""

    pixels: Pixels
    sizes: Ints
    records: list[Record]


@dataclass(frozen=True)
class Source:
    """A task and its folder of images, opened in whichever process asks."""

    setup: Setup
    images: str

    def __reduce__(self) -> tuple[type[Source], tuple[Setup, str]]:
        return Source, (self.setup, self.images)  # what is open here stays here

    @cached_property
    def task(self) -> Task:
        """The task."""
        return build_task(self.setup)

    @cached_property
    def set(self) -> ImageSet:
        """The images."""
        return ImageSet(self.images)


@dataclass(frozen=True)
class TrainingParts:
    """The parts of one worker: item `step * accumulate + round`."""

    source: Source
    order: Order
    seed: int
    workers: int
    accumulate: int
    rank: int

    def __call__(self, item: int) -> Part:
        """Return a part; where others have images and this worker has none, the step's first image with size 0.

        Raises RunError for an image that can't be decoded, InputError for one that the task can't use.
        """
        step, turn = divmod(item, self.accumulate)
        parts, number = self.workers * self.accumulate, turn * self.workers + self.rank
        total = len(self.order.batch(step))
        draws = self.order.part(step, number, parts)
        size = len(draws)
        if not size and turn * self.workers >= total:
            return Part(None, 0, total)
        if not size:
            draws = self.order.part(step, 0, total)
        epoch = self.order.epoch_of(step)
        pairs = zip(draws.images.tolist(), draws.copies.tolist(), strict=True)
        examples = [self._example(epoch, index, copy) for index, copy in pairs]
        seed_all(self.seed, COLLATE, step, turn, self.rank)
        return Part(self.source.task.collate(examples), size, total)

    def _example(self, epoch: int, index: int, copy: int) -> Any:
        record = self.source.set.record(index)
        why = self.source.task.check(record)
        if why is not None:
            raise InputError(f"image {record.id!r} can't be trained on: {why}")
        seed_all(self.seed, EXAMPLE, epoch, record.row, copy)
        try:
            return self.source.task.example(record)
        except BadImageError as error:
            raise RunError(f"image {record.id!r} can't be decoded: {error}. Leave it out of the selection") from error


@dataclass(frozen=True)
class TestBatches:
    """The test images of one worker, `rank`, `rank + workers`, ...: item i is its i-th batch of `size`."""

    source: Source
    size: int
    workers: int
    rank: int
    max_pixels: int

    def __len__(self) -> int:
        return -(-len(range(self.rank, len(self.source.set), self.workers)) // self.size)

    def __call__(self, item: int) -> Pictures:
        """Return a batch; raises RunError for an image that can't be decoded."""
        mine = range(self.rank, len(self.source.set), self.workers)[item * self.size : (item + 1) * self.size]
        records = [self.source.set.record(index) for index in mine]
        pixels, sizes = [], []
        for record in records:
            try:
                image, size = decode(record.data, self.max_pixels)
                pixels.append(self.source.task.input.prepare(image))
            except BadImageError as error:
                raise RunError(f"test image {record.id!r} can't be decoded: {error}. Leave it out of --test") from error
            sizes.append(size)
        bare = [replace(record, data=b"") for record in records]
        return Pictures(np.stack(pixels), np.array(sizes, dtype=np.int64), bare)


@dataclass(frozen=True)
class _Items(torch.utils.data.Dataset[Any], Generic[T]):
    """A function of a number as torch has it; an error of ours is an item, so that it arrives as it was raised."""

    make: Callable[[int], T]

    def __getitem__(self, item: int) -> T | InputError | RunError:
        try:
            return self.make(item)
        except (InputError, RunError) as error:
            return type(error)(str(error))


def _as_it_is(item: T) -> T:
    return item


@dataclass(frozen=True)
class Here(Generic[T]):
    """make(item) for each of `items`, made as they are asked for."""

    make: Callable[[int], T]
    items: range

    def __iter__(self) -> Iterator[T]:
        return map(self.make, self.items)


class Ahead(Generic[T]):
    """The same, made by `loaders` processes that work ahead; they stay from one pass to the next.

    `pinned`: in memory that a GPU copies from without waiting.
    """

    def __init__(self, make: Callable[[int], T], items: range, loaders: int, pinned: bool) -> None:
        self.loader = torch.utils.data.DataLoader(
            _Items(make),
            batch_size=None,
            sampler=items,
            num_workers=loaders,
            collate_fn=_as_it_is,
            multiprocessing_context="spawn",
            persistent_workers=True,
            pin_memory=pinned,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[T]:
        for item in self.loader:
            if isinstance(item, (InputError, RunError)):
                raise item
            yield item


def feed(make: Callable[[int], T], items: range, loaders: int, pinned: bool) -> Iterable[T]:
    """Return make(item) for each of `items`, in order: made here, or by `loaders` processes."""
    return Ahead(make, items, loaders, pinned) if loaders and len(items) else Here(make, items)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch (tensors in lists, tuples and dicts) on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
