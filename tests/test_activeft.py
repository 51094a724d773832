"""`activeft` against autograd on the losses as they are written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_contract import clustered

from engine.select.activeft import Options, Scales, _start_key, activeft, objective, snap
from engine.shards import Request, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)
SCALES = Scales(2.0**40, 2.0**40, 2.0**36)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def released_loss(x: torch.Tensor, t: torch.Tensor, labeled: torch.Tensor, tau: float, balance: float) -> torch.Tensor:
    """The released code's loss, as written: the whole (n, b) matrix, autograd through everything not detached."""
    free = torch.nn.functional.normalize(t, dim=1)
    every = torch.cat([free, labeled])
    product = x @ every.T / tau
    s, c = product.max(dim=1)
    repel = torch.exp(every.detach() @ every.T / tau).sum(dim=0)
    mine = c < len(t)
    return -(s[mine] - torch.log(torch.exp(s[mine]) + balance * repel[c[mine]])).sum() / len(x)


def paper_loss(x: torch.Tensor, t: torch.Tensor, labeled: torch.Tensor, tau: float, balance: float) -> torch.Tensor:
    free = torch.nn.functional.normalize(t, dim=1)
    every = torch.cat([free, labeled])
    s, c = (x @ every.T / tau).max(dim=1)
    others = torch.exp(free @ every.T / tau) * (1 - torch.eye(len(free), len(every)))
    return -s[c < len(t)].sum() / len(x) + balance * torch.log(others.sum(dim=1)).mean()


LOSSES = {"released": released_loss, "paper": paper_loss}


@pytest.mark.parametrize("num_labeled", [0, 5])
@pytest.mark.parametrize("balance", [1.0, 0.3])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_equals_autograd(name: str, balance: float, num_labeled: int) -> None:
    x = unit(clustered(700, 24))
    t = unit(clustered(40, 24, seed=9))
    labeled = x[:num_labeled]
    options = Options(objective=name, balance=balance)
    loss, gradient = objective(from_array(x, block_rows=64), np.concatenate([t, labeled]), 40, options, SCALES, None)
    free = torch.from_numpy(t).double().requires_grad_()
    expected = LOSSES[name](torch.from_numpy(x).double(), free, torch.from_numpy(labeled).double(), 0.07, balance)
    expected.backward()
    along = (gradient * t).sum(axis=1, keepdims=True)
    moved = gradient - along * t
    reference = free.grad.numpy()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert np.linalg.norm(moved - reference) <= 1e-5 * np.linalg.norm(reference)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_curve_equals_autograd_with_torch_adam(name: str) -> None:
    x = unit(clustered(400, 16, seed=1))
    shards = from_array(x, block_rows=64)
    prepare(shards, NOTHING)
    steps = list(activeft(shards, Request(20, 0, NOTHING), Options(steps=100, objective=name)))
    ours = [step.objective for step in steps[:-1]]
    _, start = _start_key(from_array(x).blocks[0], 0, 20)
    t = torch.from_numpy(x[start]).clone().requires_grad_()
    adam = torch.optim.Adam([t], lr=1e-3)
    theirs = []
    for _ in range(100):
        adam.zero_grad()
        loss = LOSSES[name](torch.from_numpy(x), t, torch.empty(0, 16), 0.07, 1.0)
        loss.backward()
        adam.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)
    assert ours[-1] < ours[0]


def test_snap_by_hand() -> None:
    """The second vector prefers row 0 as well, which is taken: it gets its next best."""
    x = unit(np.array([[1, 0], [0.9, 0.1], [0, 1]], dtype=np.float32))
    shards = from_array(x)
    prepare(shards, NOTHING)
    rows, products = snap(shards, x[[0, 0]], Request(2, 0, NOTHING))
    assert rows.tolist() == [0, 1]
    assert products[0] == pytest.approx(1.0)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_snap_equals_a_full_sort(width: int) -> None:
    x = unit(clustered(200, 8))
    vectors = unit(np.repeat(clustered(10, 8, seed=4), 6, axis=0) + 0.01 * clustered(60, 8, seed=5))
    shards = from_array(x, block_rows=64)
    labeled = np.arange(0, 200, 4)
    prepare(shards, labeled)
    expected: list[int] = []
    for vector in vectors.astype(np.float64):
        order = np.argsort(-(x.astype(np.float64) @ vector), kind="stable")
        expected.append(next(int(row) for row in order if row not in expected and row % 4))
    assert snap(shards, vectors, Request(len(vectors), 0, labeled), width)[0].tolist() == expected


def test_batches_give_the_whole_pool_when_they_hold_it_all() -> None:
    x = unit(clustered(300, 12))
    shards = from_array(x, block_rows=64)
    prepare(shards, NOTHING)
    whole = list(activeft(shards, Request(9, 0, NOTHING), Options(steps=15)))[-1]
    batch = list(activeft(shards, Request(9, 0, NOTHING), Options(steps=15, batch=300)))[-1]
    some = list(activeft(shards, Request(9, 0, NOTHING), Options(steps=15, batch=50)))[-1]
    assert whole.gains.tolist() == batch.gains.tolist()
    assert some.gains.tolist() != whole.gains.tolist()
