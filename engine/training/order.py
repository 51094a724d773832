"""Which images each step takes: functions of (seed, epoch, position), so that any step can be had without those before it.

An epoch of n images is n draws, cut into consecutive batches; the last may be smaller. A batch is split into parts, one
for each worker and round of accumulation, by position modulo their number: sizes differ by one at most, neighbours go to
different workers, and the union of the parts is the same whatever their number.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from engine.arrays import Ints
from engine.draws import random_keys
from engine.schema import InputError
from engine.verbs import TrainingOptions

ORDER_KEY = 501
"""Keeps the draws of the order apart from other draws of the same seed."""


@dataclass(frozen=True)
class Draws:
    """Some of an epoch's draws: the images' indices, (k,) int64, and which copy of its image each draw is, (k,) int64."""

    images: Ints
    copies: Ints

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.images[part], self.copies[part])


@functools.lru_cache(maxsize=2)
def epoch_draws(num_images: int, repeats: int, seed: int, epoch: int) -> Draws:
    """Return the draws of an epoch, as many as there are images.

    A seeded permutation; with `repeats` m its first ceil(n/m) images, each m times in a row (repeated augmentation as
    DeiT's sampler does it: Hoffer et al. 2020, Touvron et al. 2021), cut to n. DeiT rounds an epoch down to a multiple of
    256 draws; we don't.
    """
    keys = random_keys(seed, (ORDER_KEY, epoch), np.arange(num_images, dtype=np.int64))
    chosen = np.argsort(keys, kind="stable")[: math.ceil(num_images / repeats)].astype(np.int64)
    copies = np.tile(np.arange(repeats, dtype=np.int64), len(chosen))
    return Draws(np.repeat(chosen, repeats)[:num_images], copies[:num_images])


@dataclass(frozen=True)
class Order:
    """The whole of a training's steps, over `num_images` images."""

    num_images: int
    batch_size: int
    repeats: int
    seed: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimiser steps of an epoch."""
        return math.ceil(self.num_images / self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, that a step, from 0, is in."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Draws:
        """Return the draws of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self.batch_size
        return epoch_draws(self.num_images, self.repeats, self.seed, epoch)[slice(start, start + self.batch_size)]

    def part(self, step: int, part: int, parts: int) -> Draws:
        """Return part `part` of the `parts` of a step; empty where a small batch has fewer draws than parts."""
        return self.batch(step)[slice(part, None, parts)]


def order_of(training: TrainingOptions, num_images: int, seed: int) -> Order:
    """Return the order of a training: `steps` in all where they are given, else `epochs`."""
    if num_images < 1:
        raise InputError("there are no images to train on")
    per_epoch = math.ceil(num_images / training.batch_size)
    total = training.epochs * per_epoch if training.steps is None else training.steps
    return Order(num_images, training.batch_size, training.repeats, seed, total)


def check_split(batch_size: int, workers: int, accumulate: int) -> None:
    """Raise InputError where a batch can't be split evenly over workers and accumulated parts."""
    parts = max(1, workers) * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else f"{parts}"
        raise InputError(
            f"batch_size {batch_size} can't be split over {max(1, workers)} workers x accumulate {accumulate} = {parts} "
            f"equal parts: the nearest that can is {near}"
        )
