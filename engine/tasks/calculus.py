"""How a task's losses are differentiated, where the options of the influence encoder leave it open."""

from __future__ import annotations

from dataclasses import dataclass

EXPECTED_CLASSES = 10
"""Classes that an expected loss takes in. Over all classes its gradient is 0: that of the softmax's own cross entropy."""


@dataclass(frozen=True)
class Calculus:
    """`parameters`, `restarts`, `steps`: those options' defaults; `scale` of parameters outside the head, `scales` by the
    head's groups.

    `batched`: the losses of a batch are independent of each other, and may go through forward mode together; else images
    are taken one at a time, by one backward pass each.
    """

    parameters: str
    restarts: int
    steps: int
    scale: float
    scales: dict[str, float]
    batched: bool
