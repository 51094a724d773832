"""A linear head on stored vectors: the model that a selection is measured with, and that rounds train on features."""

from __future__ import annotations

import torch

from engine.arrays import Ints
from engine.canonical import single_thread

LINEAR_RATE, LINEAR_BATCH = 0.01, 128


def train_head(x: torch.Tensor, y: Ints, classes: int, epochs: int, seed: int, rate: float = LINEAR_RATE) -> torch.nn.Linear:
    """Return one linear layer trained on vectors x (n, d) float32 and their labels y (n,), 0 <= y < classes.

    Adam, by default rate 0.01, batch 128, x0.1 at half and three quarters of the epochs (100 in the paper, Pourahmadi et al.
    2021), no weight decay. Deviation: stored features, so no augmentation. On one thread: more of them don't pay for products
    this small, and would round otherwise.
    """
    with single_thread():
        return _trained(x, torch.from_numpy(y), classes, epochs, seed, rate)


def _trained(x: torch.Tensor, labels: torch.Tensor, classes: int, epochs: int, seed: int, rate: float) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], classes)
    bound = x.shape[1] ** -0.5
    with torch.no_grad():
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4], gamma=0.1)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(labels), generator=generator), LINEAR_BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return head


def accuracy(head: torch.nn.Linear, x: torch.Tensor, y: Ints) -> float:
    """Return the share of vectors x (n, d) whose likeliest class is their label y (n,), in percent."""
    with torch.inference_mode():
        found = head(x).argmax(dim=1).numpy()
    return 100 * float((found == y).mean())
