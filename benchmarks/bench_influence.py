"""How much faster is forward mode than one backward pass an image, and do the scores mean anything?

    python benchmarks/bench_influence.py [--models resnet18,...] [--weights mobilenetv2_100=FILE] [--image-size 96]

Scores of a batch in the direction of a random h, all parameters with ndim != 1: forward mode, one backward pass an image
at batch 1, and, as a floor, two plain forward passes; one after the other, again and again. One Hessian product at batch 1
and 8: by two backward passes, as the engine takes it, and by forward mode over a backward pass. One thread; seconds are the
process's CPU time, medians of the repeats. Random weights get batch norms with the statistics of the batch. Then, on
scikit-learn's digits, rank correlations of scores with what retraining gives (`retraining.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import timm
import torch
from data import machine
from retraining import L2, Retraining, losses_of
from scipy.stats import spearmanr
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from engine import influence
from engine.influence import Gradient, Losses, Recursion

MODELS = "vit_tiny_patch16_224,resnet18,mobilenetv2_100"


def network(name: str, images: torch.Tensor, weights: dict[str, str]) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"img_size": images.shape[-1]} if "vit" in name or "deit" in name else {}
    if name in weights:  # those of the MobileNetV2 that the project measures with are made for TensorFlow's padding
        options |= {"checkpoint_path": weights[name]} | ({"pad_type": "same"} if name == "mobilenetv2_100" else {})
    model = timm.create_model(name, **options)
    if name not in weights:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            model(images)
    return model.eval().requires_grad_(False)


def classes_of(images: torch.Tensor, labels: torch.Tensor) -> Losses:
    return lambda model: cross_entropy(model(images), labels, reduction="none")


def direction(model: torch.nn.Module, names: tuple[str, ...]) -> Gradient:
    at = {name: model.get_parameter(name) for name in names}
    return {name: p.std() * torch.randn(p.shape) for name, p in at.items()}


def forward_over_reverse(model: torch.nn.Module, names: tuple[str, ...], losses: Losses, h: Gradient) -> Gradient:
    at = {name: model.get_parameter(name) for name in names}
    gradient = torch.func.grad(lambda given: influence._losses_at(model, losses, given).mean())
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore", FutureWarning)
        return torch.func.jvp(gradient, (at,), (h,))[1]


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, object]]:
    """Return each run's median CPU seconds over interleaved repeats after one that is not counted, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, object] = {}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.process_time()
            results[name] = run()
            if turn:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def of_scores(name: str, size: int, batch: int, repeats: int, weights: dict[str, str]) -> dict[str, object]:
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size)
    model = network(name, images, weights)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    names, losses = influence.influenced(model, "all", ()), classes_of(images, labels)
    h, alone = direction(model, names), [classes_of(images[i : i + 1], labels[i : i + 1]) for i in range(batch)]

    def plain() -> None:
        with torch.no_grad():
            losses(model)
            losses(model)

    seconds, results = timed(
        {
            "forward": lambda: influence.forward_scores(model, names, h, losses),
            "backward": lambda: torch.cat([influence.backward_scores(model, names, h, one) for one in alone]),
            "plain": plain,
        },
        repeats,
    )
    apart = difference(results["forward"], results["backward"])
    row: dict[str, object] = {"model": name, "px": size, "batch": batch, **seconds, "difference": apart}
    row["in float64"] = exactly(model, names, h, images[:4], labels[:4])
    row["ratio"] = seconds["backward"] / seconds["forward"]
    return row


def exactly(model: torch.nn.Module, names: tuple[str, ...], h: Gradient, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the difference in float64, where no ReLU takes rounding for a change of sign."""
    wide, x = model.double(), x.double()
    h = {name: tensor.double() for name, tensor in h.items()}
    forward = influence.forward_scores(wide, names, h, classes_of(x, y))
    alone = [classes_of(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    return difference(forward, torch.cat([influence.backward_scores(wide, names, h, one) for one in alone]))


def of_products(name: str, size: int, batch: int, repeats: int, weights: dict[str, str]) -> dict[str, object]:
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    model = network(name, torch.randn(8, 3, size, size), weights)
    names, losses = influence.influenced(model, "all", ()), classes_of(images, labels)
    h = direction(model, names)
    ways = {"two backward passes": influence.hessian_product, "forward over reverse": forward_over_reverse}
    seconds, results = timed({way: (lambda run=run: run(model, names, losses, h)) for way, run in ways.items()}, repeats)
    first, second = (torch.cat([t.reshape(-1) for t in results[way].values()]) for way in ways)
    return {"model": name, "px": size, "batch": batch, **seconds, "difference": difference(second, first)}


def of_retraining(seed: int) -> dict[str, float]:
    """Return Spearman's rank correlation with the change that retraining gives, for each h."""
    case = Retraining(seed=seed)
    model, names, pool, (x, y) = case.model, ("weight",), losses_of(*case.pool), case.labeled

    def draw(restart: int, step: int) -> Losses:
        at = np.random.default_rng((restart, step)).integers(len(x), size=1)
        return losses_of(x[at], y[at], L2)

    v = influence.reference_gradient(model, names, [losses_of(*case.reference)])
    ways = {"exact": case.direct(v), "LiSSA": influence.lissa(model, names, v, draw, Recursion()), "gradient similarity": v}
    found = {way: influence.scores(model, names, h, pool, forward=True).numpy() for way, h in ways.items()}
    ranks = {way: float(spearmanr(values, case.changes).statistic) for way, values in found.items()}
    return ranks | {"LiSSA to gradient similarity": float(spearmanr(found["LiSSA"], found["gradient similarity"]).statistic)}


def show(rows: list[dict[str, object]]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = (f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names)
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--weights", action="append", default=[], metavar="MODEL=FILE")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, models = dict(pair.split("=", 1) for pair in options.weights), options.models.split(",")
    print(machine(), "timm", timm.__version__)
    scores = [of_scores(name, options.image_size, options.batch, options.repeats, weights) for name in models]
    show(scores)
    products = [of_products(n, options.image_size, batch, options.repeats, weights) for n in models[:2] for batch in (1, 8)]
    show(products)
    ranks = [{"seed": seed, **of_retraining(seed)} for seed in range(options.seeds)]
    show(ranks)
    print(json.dumps({"scores": scores, "products": products, "ranks": ranks, "machine": machine()}))


if __name__ == "__main__":
    main()
