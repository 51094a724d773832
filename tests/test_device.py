"""Vectors on another device: every strategy keeps its tensors where they belong, and picks the same.

No GPU is needed. `Far` stands for a tensor on a CUDA device: it computes on the CPU, but refuses what a real one would,
mixing with tensors that are not there and being read as numpy. What a real device alone can show (kernels, speed, its own
rounding) it cannot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_contract import QUICK, clustered, shards_of
from test_invariance import same
from torch.overrides import TorchFunctionMode

from engine.runner import run_method
from engine.schema import InputError
from engine.select import STRATEGIES, strategy_options
from engine.shards import LocalShards, Request

LABELED = np.array([5, 17, 140], dtype=np.int64)
THERE = torch.device("cuda:7")
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
"""Where CUDA takes an index that is in the host's memory."""


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        return _tensors(list(values.values()))
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []


class Far(torch.Tensor):
    """A tensor that behaves as if it were on THERE."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert a tensor on a device to numpy: copy it to the host first")
        if func == torch.Tensor.device.__get__:
            return THERE
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        here = [t for t in _tensors((args, kwargs)) if not isinstance(t, Far) and t.ndim]
        if here and func not in INDEXING:
            raise RuntimeError(f"{func.__name__}: tensors on two devices")
        return super().__torch_function__(func, types, args, kwargs)


class Device(TorchFunctionMode):
    """While it is entered, what is moved to or made on THERE is Far."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        goes = func is torch.Tensor.to and THERE in args[1:]
        if goes:
            args = (args[0], *(arg for arg in args[1:] if arg != THERE))
            result = func(*args, **kwargs) if len(args) > 1 or kwargs else args[0]
            return result.as_subclass(Far)
        if kwargs.get("device") == THERE:
            del kwargs["device"]
            return func(*args, **kwargs).as_subclass(Far)
        return func(*args, **kwargs)


def run(name: str, shards: LocalShards) -> Any:
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    return run_method(method, shards, Request(40, 0, LABELED), options)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_vectors_may_live_on_a_device(name: str) -> None:
    x = clustered()
    expected = run(name, shards_of(x))
    shards = shards_of(x)
    for block in shards.blocks:  # predictions stay in the host's memory
        assert isinstance(block.data, torch.Tensor)
        block.data = block.data.as_subclass(Far)
    with Device():
        assert same(run(name, shards), expected)


def test_the_stand_in_refuses_what_a_device_would() -> None:
    far, here = torch.ones(3, 2).as_subclass(Far), torch.ones(3, 2)
    with pytest.raises(TypeError, match="copy it to the host"):
        far.numpy()
    with pytest.raises(RuntimeError, match="two devices"):
        far + here
    with pytest.raises(RuntimeError, match="two devices"):
        far.gather(1, torch.zeros(3, 1, dtype=torch.long))
    with Device():
        assert isinstance(here.to(far.device), Far)
        assert isinstance(torch.zeros(2, device=far.device), Far)
    assert not isinstance(far.cpu(), Far)
    assert isinstance(far[torch.tensor([0])], Far)


def test_a_device_that_is_not_there_is_an_error() -> None:
    from engine.placement import _device

    with pytest.raises(InputError, match="this machine has no CUDA device that torch can use; pass auto or cpu"):
        _device("cuda", 0, "this machine")
    assert _device("auto", 0, "here") == "cpu"
    assert _device("auto", 2, "here") == "cuda"
    assert _device("cpu", 2, "here") == "cpu"


@pytest.mark.parametrize("asked", ["tf32", "bf16"])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_precision_changes_no_pick(name: str, asked: str) -> None:
    shards = shards_of(clustered())
    assert same(run(name, LocalShards(shards.blocks, shards.d, asked)), run(name, shards_of(clustered())))


@pytest.mark.parametrize("asked", ["float32", "tf32", "bf16"])
def test_scores_are_within_their_error(asked: str) -> None:
    from engine import products

    rng = np.random.default_rng(0)
    x, c = (torch.from_numpy((rng.standard_normal((n, 300)) * 7).astype(np.float32)) for n in (200, 90))
    half = (0.5 * c.double().square().sum(dim=1)).float()
    with products.precision(asked):
        found = products.scores(half, x, c).double()
        error = products.score_error(300, x.double().norm(dim=1).numpy(), float(c.double().norm(dim=1).max()))
    exact = 0.5 * c.double().square().sum(dim=1) - x.double() @ c.double().T
    off = (found - exact).abs().amax(dim=1).numpy()
    assert (off <= error).all()
    assert (asked == "bf16") == bool(off.max() > 1e-2)
    assert products.score_error(300, 1.0, 1.0) < 1e-4
