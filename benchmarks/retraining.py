"""What a score is to tell: by how much the reference loss changes when an image is added and training starts again.

Softmax regression with a small L2 penalty on the pixels of scikit-learn's handwritten digits, float64: convex, so the
optimum after each addition is known, and so is the Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from engine.influence import Gradient, Losses

CLASSES, L2 = 10, 0.01


def losses_of(x: np.ndarray, y: np.ndarray, l2: float = 0.0) -> Losses:
    """Return the losses of images x (r, d) with classes y (r,), the penalty in each of them."""
    pixels, target = torch.from_numpy(x), torch.from_numpy(y)

    def losses(model: torch.nn.Module) -> torch.Tensor:
        assert isinstance(model, torch.nn.Linear)
        loss = torch.nn.functional.cross_entropy(model(pixels), target, reduction="none")
        return loss + l2 / 2 * model.weight.square().sum()

    return losses


def _gradient(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the gradient of the training loss, mean and penalty, (CLASSES, d)."""
    residual = softmax(x @ w.T, axis=1) - np.eye(CLASSES)[y]
    return residual.T @ x / len(x) + L2 * w


def hessian(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the Hessian of the training loss in the flat weights, (CLASSES d, CLASSES d)."""
    p, d = softmax(x @ w.T, axis=1), x.shape[1]
    whole = np.empty((CLASSES, d, CLASSES, d))
    for a in range(CLASSES):
        for b in range(CLASSES):
            whole[a, :, b, :] = (x * (p[:, a] * ((a == b) - p[:, b]))[:, None]).T @ x / len(x)
    return whole.reshape(CLASSES * d, -1) + L2 * np.eye(CLASSES * d)


def optimum(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the weights of least training loss, from w, by Newton steps; a factor serves as long as it is good enough."""
    before = np.inf
    for _ in range(100):
        factor = cho_factor(hessian(x, w))
        while (size := np.abs(gradient := _gradient(x, y, w)).max()) > 1e-11:
            if size > before / 4:
                before = np.inf
                break
            w, before = w - cho_solve(factor, gradient.ravel()).reshape(w.shape), size
        else:
            return w
    raise RuntimeError(f"no optimum in 100 factors: the gradient is still {size}")


@dataclass
class Retraining:
    """Digits to train on, to measure the loss on, and to add, one at a time, as what the model takes them for."""

    num_labeled: int = 200
    num_reference: int = 500
    num_pool: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        data = load_digits()
        pixels = data.data[:, data.data.std(axis=0) > 0]
        x = np.column_stack([(pixels - pixels.mean(axis=0)) / pixels.std(axis=0), np.ones(len(pixels))])
        order = np.random.default_rng(self.seed).permutation(len(x))
        ends = np.cumsum([self.num_labeled, self.num_reference, self.num_pool])
        labeled, reference, pool, _ = np.split(order, ends)
        self.labeled = x[labeled], data.target[labeled].astype(np.int64)
        self.reference = x[reference], data.target[reference].astype(np.int64)
        self.w = optimum(*self.labeled, np.zeros((CLASSES, x.shape[1])))
        self.pool = x[pool], (x[pool] @ self.w.T).argmax(axis=1)

    @property
    def model(self) -> torch.nn.Module:
        """The trained model; its only parameter is `weight`, whose last column is the bias."""
        model = torch.nn.Linear(self.w.shape[1], CLASSES, bias=False, dtype=torch.float64)
        model.load_state_dict({"weight": torch.from_numpy(self.w)})
        return model

    def direct(self, v: Gradient) -> Gradient:
        """Return the inverse Hessian's product with v, by a direct solve."""
        solved = cho_solve(cho_factor(hessian(self.labeled[0], self.w)), v["weight"].numpy().ravel())
        return {"weight": torch.from_numpy(solved.reshape(self.w.shape))}

    def _reference_loss(self, w: np.ndarray) -> float:
        x, y = self.reference
        return -float(log_softmax(x @ w.T, axis=1)[np.arange(len(y)), y].sum())

    @cached_property
    def changes(self) -> np.ndarray:
        """The change of the summed reference loss when one image of the pool is added, (num_pool,) float64."""
        (x, y), (extra, labels) = self.labeled, self.pool
        with threadpool_limits(1):  # small matrices: threads that wait for one another cost more than they save
            after = [
                optimum(np.vstack([x, extra[i : i + 1]]), np.append(y, labels[i : i + 1]), self.w) for i in range(len(labels))
            ]
            return np.array([self._reference_loss(w) for w in after]) - self._reference_loss(self.w)
