"""Influence on a model's loss: gradients, Hessian products, inverse-Hessian products and the scores of a batch.

Pure functions on torch modules. With l_i(theta) the loss of image i and theta the influenced parameters, all others
constants:

    v        = sum over a reference set of grad l_i                                        `reference_gradient`
    H h      = Hessian of the mean loss of a batch, times h                                `hessian_product`
    h_0 = v;  h <- v + (1 - damp) h - S^-1 H h,  another labelled batch every step         `lissa`
    score(u) = - h . grad l_u                                                              `scores`

Sources: Liu et al., ICCV 2021 (ISAL), and its released code; Agarwal et al., JMLR 2017 (LiSSA); Pearlmutter 1994 (Hessian
products). The lowest score is that of the image whose loss, trained on, should lower the reference loss the most.
Deviations: a step may take several labelled images (their mean loss) where ISAL takes one; the division by the number of
images scored, a constant, is the caller's; ISAL takes a backward pass an image where forward mode does all at once.

A model is used in the mode it is in, which should be evaluation: batch norm then uses its running statistics, and the
images of a batch don't depend on one another. Neither its parameters nor its buffers are changed.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from engine.schema import InputError, Progress, RunError, no_progress

Gradient = dict[str, torch.Tensor]
"""Of some parameters by name, each of its parameter's shape, dtype and device."""

Losses = Callable[[torch.nn.Module], torch.Tensor]
"""A model -> (r,) losses of the r images of one batch, differentiable, each of its own image alone."""

TOLERANCE = 1e-3
"""Relative difference from a backward pass by which forward mode is found wrong (not rounding: float32 gives 1e-5)."""
GROWTH = 10.0
"""LiSSA has diverged when h is so many times longer than a convergent recursion can make it."""


_AFFINE = ("weight", "bias")
"""Of a batch norm, as `torch.nn.functional.batch_norm` names them."""


@dataclass(frozen=True)
class Recursion:
    """LiSSA's constants. `scale`: one for all parameters, or by parameter name for each that is influenced.

    Raises InputError for a `damp` outside [0, 1), a scale that is not positive, or no restarts.
    """

    damp: float = 0.01
    scale: Mapping[str, float] | float = 1e4
    restarts: int = 4
    steps: int = 250

    def __post_init__(self) -> None:
        scales = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        if not 0 <= self.damp < 1:
            raise InputError(f"damp is {self.damp}; it must be at least 0 and below 1")
        if not all(0 < value < math.inf for value in scales):
            raise InputError(f"scale is {self.scale}; it must be positive")
        if self.restarts < 1 or self.steps < 0:
            raise InputError(f"{self.restarts} restarts of {self.steps} steps; at least one restart, and steps from 0")

    def scale_of(self, name: str) -> float:
        """Return a parameter's scale; raises InputError where the table lacks it."""
        if not isinstance(self.scale, Mapping):
            return self.scale
        if name not in self.scale:
            raise InputError(f"no scale for parameter {name!r}: the table has {_some(list(self.scale))}")
        return self.scale[name]


def _some(names: Sequence[str]) -> str:
    """Return a few names for a message."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "") if names else "none"


def influenced(model: torch.nn.Module, parameters: str, head: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the parameters whose gradients count, in the model's order.

    `parameters` is "all" (every tensor with ndim != 1: no biases, no norms, as ISAL's code has it), "head" (those of
    `head` with ndim != 1), or a regular expression, searched for in every name, which takes all that it matches.
    Raises InputError where that is none, or no expression.
    """
    every = dict(model.named_parameters())
    if parameters in ("all", "head"):
        among = every if parameters == "all" else set(head)
        found = tuple(name for name, parameter in every.items() if name in among and parameter.ndim != 1)
    else:
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise InputError(
                f"parameters {parameters!r} is no regular expression: {error}; or give all or head. "
                f"The model's parameters: {_some(list(every))}"
            ) from error
        found = tuple(name for name in every if pattern.search(name))
    if not found:
        raise InputError(f"parameters {parameters!r} matches none of the model's; it has {_some(list(every))}")
    return found


class _Bound(torch.nn.Module):
    """A model with its losses, so that `functional_call` can put other tensors into the model while they are taken."""

    def __init__(self, model: torch.nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self) -> torch.Tensor:
        return self.losses(self.model)


def _losses_at(model: torch.nn.Module, losses: Losses, given: Gradient) -> torch.Tensor:
    """Return the losses (r,) with the tensors given in place of their parameters.

    All other parameters are constants: without a graph where nothing given has reached yet. Buffers are copies, so that
    a model left in training mode can't write to its own.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    bound = {f"model.{name}": tensor for name, tensor in (tensors | given).items()}
    values = functional_call(_Bound(model, losses), bound, ())
    assert isinstance(values, torch.Tensor)
    assert values.ndim == 1, "Losses give one loss an image, (r,)"
    return values


def _leaves(model: torch.nn.Module, names: Sequence[str]) -> Gradient:
    """Return the influenced parameters as leaves of a graph of their own."""
    return {name: model.get_parameter(name).detach().requires_grad_() for name in names}


def _gradients(of: torch.Tensor, leaves: Gradient, keep: bool = False, graph: bool = False) -> Gradient:
    """Return the gradient of a scalar; of what it does not depend on, zeros."""
    inputs = tuple(leaves.values())
    if not of.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(of, inputs, retain_graph=keep or graph, create_graph=graph, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _dot(a: Gradient, b: Gradient) -> torch.Tensor:
    """Return the sum of all products, a scalar."""
    return torch.stack([torch.dot(a[name].reshape(-1), b[name].reshape(-1)) for name in a]).sum()


def reference_gradient(model: torch.nn.Module, names: Sequence[str], batches: Iterable[Losses]) -> Gradient:
    """Return v, the sum over all images of all batches of the gradient of their losses.

    Raises InputError where there are no batches, RunError where a gradient is not finite.
    """
    total: Gradient | None = None
    for number, losses in enumerate(batches):
        with torch.enable_grad():
            leaves = _leaves(model, names)
            new = _gradients(_losses_at(model, losses, leaves).sum(), leaves)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new.values()):
            raise RunError(f"the gradient of reference batch {number} is not finite: look at the model's weights and losses")
        total = new if total is None else {name: total[name].add_(new[name]) for name in names}
    if total is None:
        raise InputError("there are no reference images: the reference gradient needs at least one")
    return total


def hessian_product(model: torch.nn.Module, names: Sequence[str], losses: Losses, h: Gradient) -> Gradient:
    """Return H h, H the Hessian of the mean of the losses in the influenced parameters.

    By two backward passes: the gradient of h . gradient. Forward mode over a backward pass (Pearlmutter's own way) took 5
    to 57 % longer on ResNet-18 and a ViT, at batch 1 and 8 (benchmarks/results/influence.md). Attention is taken apart into
    its products: its fused kernels can't be differentiated twice.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaves = _leaves(model, names)
        first = _gradients(_losses_at(model, losses, leaves).mean(), leaves, graph=True)
        return _gradients(_dot(first, h), leaves)


def lissa(
    model: torch.nn.Module,
    names: Sequence[str],
    v: Gradient,
    draw: Callable[[int, int], Losses],
    recursion: Recursion,
    progress: Progress | None = None,
) -> Gradient:
    """Return the mean over the restarts of h after all steps of h <- v + (1 - damp) h - S^-1 H h, from h = v.

    `draw(restart, step)` gives the labelled images of a step, H is that of their mean loss; it is called once a step, in
    order. S is each parameter's scale. The fixed point is (S^-1 H + damp I)^-1 v; the scale is not divided out, as in
    ISAL's code. v is left as it is.

    Raises RunError where h is not finite, or longer than GROWTH times what a convergent recursion can make it. With
    |h|_S^2 = sum of S |h|^2, (1 - damp) I - S^-1 H is symmetric in |.|_S, and of norm at most 1 - damp where
    0 <= S^-1 H <= 2 (1 - damp): so |h|_S <= |v|_S (1 + (1 - damp) + (1 - damp)^2 + ...).
    """
    tell = progress or no_progress
    scale = {name: recursion.scale_of(name) for name in names}
    length = math.sqrt(sum(_squares(v, scale).values()))
    total = {name: torch.zeros_like(v[name]) for name in names}
    for restart in range(recursion.restarts):
        h, limit = {name: v[name].clone() for name in names}, length
        for step in range(recursion.steps):
            product = hessian_product(model, names, draw(restart, step), h)
            for name in names:
                h[name].mul_(1 - recursion.damp).sub_(product[name], alpha=1 / scale[name]).add_(v[name])
            limit = length + (1 - recursion.damp) * limit
            reached = _check(h, scale, limit, restart, step)
            done = restart * recursion.steps + step + 1
            tell("inverse Hessian", done, recursion.restarts * recursion.steps, f"|h| / |v| = {reached / (length or 1):.3g}")
        for name in names:
            total[name].add_(h[name], alpha=1 / recursion.restarts)
    return total


def _squares(h: Gradient, scale: Mapping[str, float]) -> dict[str, float]:
    """Return S |h|^2 of each parameter."""
    lengths = torch.stack([torch.linalg.vector_norm(h[name]) for name in scale]).tolist()
    return {name: scale[name] * value * value for name, value in zip(scale, lengths, strict=True)}


def _check(h: Gradient, scale: Mapping[str, float], limit: float, restart: int, step: int) -> float:
    """Return |h|_S; raises RunError that names the parameter to blame where it is not finite or too long."""
    squares = _squares(h, scale)
    length = math.sqrt(sum(squares.values()))
    if length <= GROWTH * limit:
        return length
    lost = [name for name, value in squares.items() if not math.isfinite(value)]
    worst = lost[0] if lost else max(squares, key=lambda name: squares[name])
    what = "is not finite" if lost else f"grows without bound ({length / (limit or 1):.3g} times what it may be)"
    raise RunError(
        f"the inverse-Hessian product {what} in step {step} of restart {restart}, most of all at {worst!r}: "
        f"raise its scale, now {scale[worst]:g}"
    )


def _tangent(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor's tangent, if it carries one."""
    return None if tensor is None else forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]


class _FusedNorms(TorchFunctionMode):
    """Inside, batch norm on running statistics is one pass over values and one over tangents: it is linear in its input.

    torch's own derivative takes several, a third of the time of a MobileNetV2. Norms whose weights carry tangents are
    left to it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not batch_norm or kwargs["training"] or any(_tangent(kwargs[name]) is not None for name in _AFFINE):
            return func(*args, **kwargs)
        x, mean, variance = args
        if (tangent := _tangent(x)) is None:
            return func(*args, **kwargs)
        bias = None if kwargs["bias"] is None else torch.zeros_like(kwargs["bias"])
        moved = func(tangent, torch.zeros_like(mean), variance, **(kwargs | {"bias": bias}))
        value = func(forward_ad.unpack_dual(x).primal, mean, variance, **kwargs)  # type: ignore[no-untyped-call]
        return forward_ad.make_dual(value, moved)  # type: ignore[no-untyped-call]


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Inside, tensors may carry tangents; no graph is kept, and attention is taken apart into products that know them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _FusedNorms():
            yield


def forward_scores(model: torch.nn.Module, names: Sequence[str], h: Gradient, losses: Losses) -> torch.Tensor:
    """Return - h . grad l of each image of a batch, (r,), by one forward pass of dual numbers for all of them.

    The losses are a function of the influenced parameters; the derivative in direction h is that of every entry at once.
    Each layer with such parameters does three products where a plain pass does one. Raises NotImplementedError or
    RuntimeError where an operator has no forward derivative; `forward_mode_works` says so before.
    """
    with _forward_mode():
        at = {name: model.get_parameter(name).detach() for name in names}
        dual: Gradient = {name: forward_ad.make_dual(at[name], h[name]) for name in names}  # type: ignore[no-untyped-call]
        primal, tangent = forward_ad.unpack_dual(_losses_at(model, losses, dual))  # type: ignore[no-untyped-call]
        found: torch.Tensor = torch.zeros_like(primal) if tangent is None else tangent.neg()
    return found


def backward_scores(model: torch.nn.Module, names: Sequence[str], h: Gradient, losses: Losses) -> torch.Tensor:
    """Return the same by one backward pass an image: the reference, and what every operator allows.

    The losses are taken once. A backward pass through one entry costs as much as through all, so give batches of one
    image where several would share no work.
    """
    with torch.enable_grad():
        leaves = _leaves(model, names)
        values = _losses_at(model, losses, leaves)
        last = len(values) - 1
        found = [-_dot(_gradients(value, leaves, keep=i < last), h) for i, value in enumerate(values)]
    return torch.stack(found).to(values.dtype) if found else values.detach()


def forward_mode_works(model: torch.nn.Module, names: Sequence[str], losses: Losses) -> bool:
    """Say whether forward mode gives what backward passes give, by trying both on one batch, in a seeded direction.

    One backward pass checks a weighted sum of all scores: an operator without a forward derivative raises, but losses that
    build their targets under `no_grad`, which stops no tangents, are wrong in silence (Faster R-CNN's).
    """
    drawn = torch.Generator().manual_seed(0)
    at = {name: model.get_parameter(name).detach() for name in names}
    h = {name: torch.randn(p.shape, generator=drawn, dtype=p.dtype).to(p.device) for name, p in at.items()}
    try:
        found = forward_scores(model, names, h, losses)
    except NotImplementedError:
        return False
    except RuntimeError as error:
        if "jvp is not implemented" in str(error):  # an operator written in C++
            return False
        raise
    weights = torch.randn(found.shape, generator=drawn, dtype=found.dtype).to(found.device)
    with torch.enable_grad():
        leaves = _leaves(model, names)
        expected = -_dot(_gradients((weights * _losses_at(model, losses, leaves)).sum(), leaves), h)
    weighted = weights * found
    return bool((weighted.sum() - expected).abs() <= TOLERANCE * torch.linalg.vector_norm(weighted))


def scores(
    model: torch.nn.Module, names: Sequence[str], h: Gradient, losses: Losses, forward: bool | None = None
) -> torch.Tensor:
    """Return - h . grad l of each image of a batch, (r,), in forward mode or by backward passes.

    `forward` is what `forward_mode_works` said of the model's first batch; None asks it of this one, which costs a
    forward and a backward pass more.
    """
    if forward is None:
        forward = forward_mode_works(model, names, losses)
    return (forward_scores if forward else backward_scores)(model, names, h, losses)
