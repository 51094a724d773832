"""The learning rate of each step, as a function of the step alone.

Where epochs rule, rates change between epochs, as in the papers; where `steps` rule, with every step. Milestones and
warm-ups that are no whole number of epochs fall inside one, to the step.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.schema import InputError
from engine.verbs import TrainingOptions

Rate = Callable[[int], float]
"""Step, from 0 -> learning rate, before a parameter's own scale."""


def base_rate(training: TrainingOptions) -> float:
    """Return `lr`, grown linearly with the batch where the rates are for a batch size of their own (Goyal et al. 2017).

    `min_lr` and `warmup_lr` are absolute, as in the released recipes (DeiT, ActiveFT).
    """
    grown = 1.0 if training.lr_batch_size is None else training.batch_size / training.lr_batch_size
    return training.lr * grown


def rate_of(training: TrainingOptions, steps_per_epoch: int, total_steps: int) -> Rate:
    """Return the rate of every step of a training.

    constant: `lr`. step: times `gamma` from each milestone on. cosine: from `lr` to `min_lr`, which the step (epoch) after
    the last would have; warm-up takes the place of the curve's beginning (timm's CosineLRScheduler). Warm-up rises
    linearly from `warmup_lr`, which its first step (epoch) has, to the rate it leads to. Raises InputError for a warm-up
    as long as the training.
    """
    unit = 1 if training.steps is not None else steps_per_epoch
    whole = unit > 1 and training.warmup == int(training.warmup)
    length = total_steps / unit
    if training.warmup and training.warmup >= length:
        name = "steps" if training.steps is not None else "epochs"
        raise InputError(f"warmup {training.warmup:g} is as long as the training, {length:g} {name}: give a shorter one")
    after = _after_warmup(training, unit, length)
    first = base_rate(training)

    def rate(step: int) -> float:
        now = step // unit if whole else step / unit
        if now < training.warmup:
            return training.warmup_lr + now * (first - training.warmup_lr) / training.warmup
        return after(step)

    return rate


def _after_warmup(training: TrainingOptions, unit: int, length: float) -> Rate:
    """Return the rate of a step after warm-up; `unit` is the steps of an epoch, or 1; `length` all of them, in units."""
    first = base_rate(training)
    if training.schedule == "constant":
        return lambda step: first
    if training.schedule == "step":
        # timm's MultiStepLRScheduler falls one epoch before its milestones; the papers' code (torch's) falls at them
        return lambda step: first * training.gamma ** sum(step >= unit * milestone for milestone in training.milestones)
    return _cosine(first, training.min_lr, unit, length)


def _cosine(first: float, last: float, unit: int, length: float) -> Rate:
    """Return timm's cosine between two rates; it sees whole units of `length`."""
    import torch
    from timm.scheduler.cosine_lr import CosineLRScheduler

    if length <= 1:
        return lambda step: first
    holder = torch.optim.SGD([torch.zeros(1)], lr=first)
    schedule = CosineLRScheduler(holder, t_initial=int(length), lr_min=last)

    def rate(step: int) -> float:
        schedule.step(step // unit)
        return float(holder.param_groups[0]["lr"])

    return rate
