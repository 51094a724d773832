"""The global random generators, set to functions of what is being done, and put back as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from engine.draws import random_keys

BUILD, EXAMPLE, COLLATE, PART = 511, 512, 513, 514
"""What is drawn for: a model's first weights; an image's augmentation; mixing images; dropout and the like in a step."""


def seed_all(seed: int, purpose: int, *place: int) -> None:
    """Seed torch, numpy and random by (seed, purpose, place).

    torch's generators of GPUs are left alone for examples and their mixing: those are made on the CPU.
    """
    key = int(random_keys(seed, (purpose, *place), np.zeros(1, np.int64))[0])
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    if purpose in (EXAMPLE, COLLATE):
        torch.default_generator.manual_seed(key >> 1)
    else:
        torch.manual_seed(key >> 1)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put the generators and torch's number of threads back, at the end of the block, as they were."""
    threads, numbers, words = torch.get_num_threads(), np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        np.random.set_state(numbers)
        random.setstate(words)
