"""Influence: forward mode against backward passes, Hessian products, LiSSA's fixed point, and what a score is to tell."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from scipy.stats import spearmanr
from torch.nn.functional import cross_entropy

from benchmarks.retraining import L2, Retraining, losses_of
from engine import influence
from engine.influence import Gradient, Losses, Recursion, influenced, lissa, scores
from engine.schema import InputError, RunError

CLASSES = 5


def network(name: str, images: torch.Tensor) -> torch.nn.Module:
    """A timm network with random weights, whose batch norms have the statistics of these images."""
    torch.manual_seed(0)
    small = {"img_size": images.shape[-1], "depth": 2} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=CLASSES, **small)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(images)
    return model.eval().requires_grad_(False)


def classes_of(images: torch.Tensor, labels: torch.Tensor) -> Losses:
    return lambda model: cross_entropy(model(images), labels, reduction="none")


def direction(model: torch.nn.Module, names: tuple[str, ...], seed: int = 1) -> Gradient:
    drawn = torch.Generator().manual_seed(seed)
    at = {name: model.get_parameter(name).detach() for name in names}
    return {name: p.std() * torch.randn(p.shape, generator=drawn, dtype=p.dtype) for name, p in at.items()}


def state_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def small(seed: int = 0) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Two layers whose Hessian is easily formed, float64, with 12 images."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
    return model, torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))


def full_hessian(model: torch.nn.Module, names: tuple[str, ...], losses: Losses) -> torch.Tensor:
    """The Hessian of the mean loss in the flat parameters, by torch's own."""
    shapes = [model.get_parameter(name).shape for name in names]

    def mean(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return influence._losses_at(model, losses, given).mean()

    return torch.autograd.functional.hessian(mean, flat_of({name: model.get_parameter(name).detach() for name in names}))


def flat_of(gradient: Gradient) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in gradient.values()])


# --- which parameters


def test_parameters_by_their_names() -> None:
    model = small()[0]
    assert influenced(model, "all", ()) == ("0.weight", "2.weight")
    assert influenced(model, "head", ["2.bias", "2.weight"]) == ("2.weight",)
    assert influenced(model, r"^2\.", ()) == ("2.weight", "2.bias")
    assert influenced(model, "bias", ()) == ("0.bias", "2.bias")


@pytest.mark.parametrize(("given", "said"), [("layer4", "matches none"), ("(", "no regular expression"), ("head", "none")])
def test_parameters_that_match_nothing(given: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        influenced(small()[0], given, ())
    assert repr(given) in str(error.value)
    assert "0.weight" in str(error.value)


# --- scores


@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "mobilenetv2_100"])
def test_forward_mode_gives_what_backward_passes_give(name: str, target: str) -> None:
    torch.manual_seed(3)
    images, labels = torch.randn(6, 3, 48, 48), torch.randint(CLASSES, (6,))
    if target == "probabilities":
        labels = torch.randn(6, CLASSES).softmax(dim=1)
    model = network(name, images)
    before = state_of(model)
    names, losses = influenced(model, "all", ()), classes_of(images, labels)
    h = direction(model, names)
    found, expected = (f(model, names, h, losses) for f in (influence.forward_scores, influence.backward_scores))
    assert found.shape == (6,)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    large = expected.abs() >= 0.1 * expected.abs().max()
    assert found[large].numpy() == pytest.approx(expected[large].numpy(), rel=1e-3)
    assert state_of(model) == before


def test_norms_whose_weights_are_influenced() -> None:
    images, labels = torch.randn(3, 3, 32, 32), torch.randint(CLASSES, (3,))
    model = network("resnet18", images).double()
    names, losses = influenced(model, "bn|fc", ()), classes_of(images.double(), labels)
    h = direction(model, names)
    found, expected = (f(model, names, h, losses) for f in (influence.forward_scores, influence.backward_scores))
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-9)


def test_the_sign_is_minus_the_derivative() -> None:
    model, x, y = small()
    names, h = ("0.weight", "2.weight"), direction(small()[0], ("0.weight", "2.weight"))
    moved, eps = small()[0], 1e-6
    with torch.no_grad():
        for name in names:
            moved.get_parameter(name).add_(h[name], alpha=eps)
        slope = (classes_of(x, y)(moved) - classes_of(x, y)(model)) / eps
    found = scores(model, names, h, classes_of(x, y))
    assert found.numpy() == pytest.approx(-slope.numpy(), rel=1e-4)
    for some in (slice(2, 3), slice(5, 9)):
        again = influence.backward_scores(model, names, h, classes_of(x[some], y[some]))
        assert again.numpy() == pytest.approx(found[some].numpy(), rel=1e-12)


def test_buffers_of_a_model_in_training_mode_are_left_alone() -> None:
    model, x, y = small()
    model = torch.nn.Sequential(model, torch.nn.BatchNorm1d(3).double()).train()
    before, names = state_of(model), influenced(model, "all", ())
    v = influence.reference_gradient(model, names, [classes_of(x, y)])
    influence.hessian_product(model, names, classes_of(x, y), v)
    influence.backward_scores(model, names, v, classes_of(x, y))
    influence.forward_scores(model, names, v, classes_of(x, y))
    assert state_of(model) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_what_the_losses_do_not_depend_on() -> None:
    model, x, y = small()
    names = influenced(model, "all", ())
    h = direction(model, names)

    def body(m: torch.nn.Module) -> torch.Tensor:
        return m[0](x).sum(dim=1)

    linear = influence.hessian_product(model, names, body, h)
    assert all(not tensor.any() for tensor in linear.values())
    assert not influence.reference_gradient(model, names, [body])["2.weight"].any()
    constant = lambda m: x.sum(dim=1)  # noqa: E731
    assert not influence.forward_scores(model, names, h, constant).any()
    assert not influence.backward_scores(model, names, h, constant).any()
    assert influence.backward_scores(model, names, h, classes_of(x[:0], y[:0])).shape == (0,)


class Twice(torch.autograd.Function):
    """An operator that knows no forward mode."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def own_target(x: torch.Tensor) -> Losses:
    def losses(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            target = model(x).square()
        return (model(x) - target).square().sum(dim=1)

    return losses


def test_forward_mode_is_tried() -> None:
    model, x, y = small()
    names = influenced(model, "all", ())
    h = direction(model, names)
    unknown: Losses = lambda m: cross_entropy(Twice.apply(m(x)), y, reduction="none")  # noqa: E731
    assert influence.forward_mode_works(model, names, classes_of(x, y))
    assert not influence.forward_mode_works(model, names, unknown)
    assert not influence.forward_mode_works(model, names, own_target(x)), "no_grad stops no tangents"
    for losses in (unknown, own_target(x)):
        expected = influence.backward_scores(model, names, h, losses)
        assert torch.equal(scores(model, names, h, losses), expected)
        assert torch.equal(scores(model, names, h, losses, forward=False), expected)

    def broken(m: torch.nn.Module) -> torch.Tensor:
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        influence.forward_mode_works(model, names, broken)


# --- gradients and Hessians


def test_reference_gradient_is_a_sum_over_images() -> None:
    model, x, y = small()
    names = influenced(model, "all", ())
    whole = influence.reference_gradient(model, names, [classes_of(x, y)])
    parts = influence.reference_gradient(model, names, [classes_of(x[:5], y[:5]), classes_of(x[5:], y[5:])])
    cross_entropy(model(x), y, reduction="sum").backward()
    for name in names:
        assert whole[name].numpy() == pytest.approx(model.get_parameter(name).grad.numpy(), rel=1e-12)
        assert parts[name].numpy() == pytest.approx(whole[name].numpy(), rel=1e-12)


def test_reference_gradient_of_nothing_and_not_finite() -> None:
    model, x, y = small()
    with pytest.raises(InputError, match="no reference images"):
        influence.reference_gradient(model, ("0.weight",), [])
    with pytest.raises(RunError, match="batch 1 is not finite"):
        influence.reference_gradient(model, ("0.weight",), [classes_of(x, y), classes_of(x * math.inf, y)])


def test_hessian_product_by_the_whole_hessian() -> None:
    model, x, y = small()
    names, losses = influenced(model, "all", ()), classes_of(x, y)
    h = direction(model, names)
    found = flat_of(influence.hessian_product(model, names, losses, h))
    assert found.numpy() == pytest.approx((full_hessian(model, names, losses) @ flat_of(h)).numpy(), rel=1e-9)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_hessian_product_by_differences_of_gradients(name: str) -> None:
    """Fused attention, batch norm on running statistics and in-place operators among them; float64."""
    torch.manual_seed(3)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(CLASSES, (2,))
    model, losses = network(name, images).double(), classes_of(images.double(), labels)
    names = influenced(model, "all", ())
    h, eps, ends = direction(model, names), 1e-5, []
    before = state_of(model)
    found = influence.hessian_product(model, names, losses, h)
    assert state_of(model) == before
    for sign in (-1, 1):
        moved = network(name, images).double()
        for key in names:
            moved.get_parameter(key).add_(h[key], alpha=sign * eps)
        ends.append(flat_of(influence.reference_gradient(moved, names, [losses])) / len(labels))
    expected = (ends[1] - ends[0]) / (2 * eps)
    assert torch.linalg.vector_norm(flat_of(found) - expected) <= 1e-3 * torch.linalg.vector_norm(expected)


# --- LiSSA


@pytest.mark.parametrize("scale", [20.0, {"0.weight": 5.0, "2.weight": 40.0}])
def test_lissa_reaches_its_fixed_point(scale: dict[str, float] | float) -> None:
    model, x, y = small()
    names, losses, damp = influenced(model, "all", ()), classes_of(x, y), 0.1
    v = influence.reference_gradient(model, names, [losses])
    kept = {name: tensor.clone() for name, tensor in v.items()}
    h = lissa(model, names, v, lambda restart, step: losses, Recursion(damp, scale, 1, 400))
    each = [scale[name] if isinstance(scale, dict) else scale for name in names for _ in range(v[name].numel())]
    inverse = torch.diag(1 / torch.tensor(each, dtype=torch.float64)) @ full_hessian(model, names, losses)
    expected = torch.linalg.solve(inverse + damp * torch.eye(len(each), dtype=torch.float64), flat_of(v))
    assert flat_of(h).numpy() == pytest.approx(expected.numpy(), rel=1e-6)
    assert all(torch.equal(v[name], kept[name]) for name in names)


def test_lissa_averages_restarts_and_draws_in_order() -> None:
    model, x, y = small()
    names, asked, told = influenced(model, "all", ()), [], []

    def draw(restart: int, step: int) -> Losses:
        asked.append((restart, step))
        at = slice(3 * restart + step, 3 * restart + step + 1)
        return classes_of(x[at], y[at])

    v = influence.reference_gradient(model, names, [classes_of(x, y)])
    both = lissa(model, names, v, draw, Recursion(0.01, 10.0, 2, 3), lambda *facts: told.append(facts))
    assert asked == [(restart, step) for restart in range(2) for step in range(3)]
    assert [facts[1:3] for facts in told] == [(done, 6) for done in range(1, 7)]
    first = lissa(model, names, v, draw, Recursion(0.01, 10.0, 1, 3))
    second = lissa(model, names, v, lambda restart, step: draw(1, step), Recursion(0.01, 10.0, 1, 3))
    assert flat_of(both).numpy() == pytest.approx(((flat_of(first) + flat_of(second)) / 2).numpy(), rel=1e-12)
    h = {name: v[name].clone() for name in names}
    for step in range(3):
        product = influence.hessian_product(model, names, draw(0, step), h)
        h = {name: v[name] + 0.99 * h[name] - product[name] / 10 for name in names}
    assert flat_of(first).numpy() == pytest.approx(flat_of(h).numpy(), rel=1e-12)
    unmoved = lissa(model, names, v, draw, Recursion(steps=0))
    assert flat_of(unmoved).numpy() == pytest.approx(flat_of(v).numpy(), rel=1e-12)


def test_lissa_that_diverges_names_step_and_group() -> None:
    model, x, y = small()
    names = influenced(model, "all", ())
    v = influence.reference_gradient(model, names, [classes_of(x, y)])
    scale = {"0.weight": 1e4, "2.weight": 1e-2}
    with pytest.raises(RunError, match=r"grows .* in step \d+ of restart 0, .*'2.weight': raise its scale, now 0.01"):
        lissa(model, names, v, lambda restart, step: classes_of(x, y), Recursion(scale=scale))

    def draw(restart: int, step: int) -> Losses:
        return classes_of(x * math.nan if step == 2 else x, y)

    with pytest.raises(RunError, match="not finite in step 2 of restart 0"):
        lissa(model, names, v, draw, Recursion(steps=5))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"damp": 1.0}, "damp is 1.0"),
        ({"damp": -0.1}, "damp is -0.1"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": {"a": 1.0, "b": -1.0}}, "must be positive"),
        ({"restarts": 0}, "0 restarts"),
        ({"steps": -1}, "-1 steps"),
    ],
)
def test_constants_out_of_range(given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recursion(**given)


def test_a_scale_for_every_parameter() -> None:
    model, x, y = small()
    v = influence.reference_gradient(model, ("2.weight",), [classes_of(x, y)])
    with pytest.raises(InputError, match=r"no scale for parameter '2\.weight': the table has 0\.weight"):
        lissa(model, ("2.weight",), v, lambda restart, step: classes_of(x, y), Recursion(scale={"0.weight": 1.0}))


# --- what a score is to tell


def rank_correlation(values: torch.Tensor, changes: np.ndarray) -> float:
    return float(spearmanr(values.numpy(), changes).statistic)


def one_at_a_time(case: Retraining) -> Callable[[int, int], Losses]:
    x, y = case.labeled

    def draw(restart: int, step: int) -> Losses:
        at = np.random.default_rng((restart, step)).integers(len(x), size=1)
        return losses_of(x[at], y[at], L2)

    return draw


def test_the_score_tells_what_training_on_an_image_is_worth() -> None:
    """Lower score, larger fall of the reference loss; by the exact h, far better than by the gradient alone."""
    case = Retraining()
    model, names, pool = case.model, ("weight",), losses_of(*case.pool)
    v = influence.reference_gradient(model, names, [losses_of(*case.reference)])
    assert len(case.changes) >= 200
    assert case.changes.min() < 0 < case.changes.max()
    exact = rank_correlation(scores(model, names, case.direct(v), pool), case.changes)
    alone = rank_correlation(scores(model, names, v, pool), case.changes)
    found = rank_correlation(scores(model, names, lissa(model, names, v, one_at_a_time(case), Recursion()), pool), case.changes)
    print(f"Spearman: exact {exact:.3f}, LiSSA {found:.3f}, gradient similarity {alone:.3f}")
    assert exact >= 0.8
    assert exact > max(alone, found)
    assert min(alone, found) > 0.3
