"""What a selection is worth on stored features: 1-NN, k-NN, a linear probe, and how well it covers the pool.

All on L2-normalised vectors (Pourahmadi et al. 2021; Xie et al. 2023). The training set is what was labelled before
the selection, and its picks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.blocks import Block, merge_smallest, smallest
from engine.canonical import normalize
from engine.draws import random_keys
from engine.evaluate_model import FOR_MODELS, evaluate_model, given_of, is_checkpoint
from engine.folders import Claim, publish
from engine.nearest import nearest
from engine.placement import open_shards
from engine.places import Place
from engine.probe import accuracy, train_head
from engine.schema import InputError, Progress, no_progress, result_options
from engine.select import read_selection
from engine.select.quality import distances
from engine.shards import Shards
from engine.store import FeatureStore
from engine.verbs import EvaluateOptions, MeasureOptions

EMD_KEY = 7


@dataclass(frozen=True)
class Labelled:
    """Vectors (n, d) float32, normalised where nothing else is said, and their labels (n,)."""

    x: torch.Tensor
    y: Ints


@dataclass(frozen=True)
class Known:
    """What is known of a pool's images beside their vectors: their rows (n,), ascending, and labels (n,), -1 for none."""

    uri: str
    rows: Ints
    labels: Ints | None
    vectors_per_image: int = 1

    @classmethod
    def of(cls, store: FeatureStore) -> Known:
        """Return what a store says."""
        return cls(store.place.uri, store.rows, store.labels if store.has_labels else None, store.vectors_per_image)

    def labels_of(self, rows: Ints) -> Ints:
        """Return the labels of some rows; raises InputError where one has none."""
        found = np.full(len(rows), -1) if self.labels is None else self.labels[np.searchsorted(self.rows, rows)]
        if (found < 0).any():
            raise InputError(f"{int((found < 0).sum())} of the {len(rows)} labelled images have no label in {self.uri}")
        return found


Result = tuple[str, float | None, str]
"""(metric, value, note); the value is None where the metric is not defined, and the note says why."""


def read_test(uri: str, store: FeatureStore, normalized: bool = True) -> Labelled:
    """Open a labelled test store; raises InputError when its dimension, classes or labels don't fit `store`."""
    test = FeatureStore.of_vectors(uri)
    if test.dim != store.dim:
        raise InputError(f"{uri} has vectors of {test.dim} floats, {store.place.uri} of {store.dim}: embed both the same way")
    if test.class_names and store.class_names and test.class_names != store.class_names:
        raise InputError(f"{uri} and {store.place.uri} don't have the same classes: {test.class_names} and {store.class_names}")
    if (test.labels < 0).any():
        raise InputError(f"{uri} has {int((test.labels < 0).sum())} images without a label: a test store has one for each")
    x = torch.from_numpy(test.vectors())
    return Labelled(normalize(x) if normalized else x, test.labels)


def knn_accuracy(train: Labelled, test: Labelled, k: int) -> float:
    """Return the share of test rows that get their own label from a vote of their k nearest picks (L2), in percent.

    Equal votes go to the class with the nearest pick among them, equal distances to the earlier pick.
    """
    if k == 1:
        found = train.y[nearest(test.x, train.x)]
        return 100 * float((found == test.y).mean())
    classes, coded = np.unique(train.y, return_inverse=True)
    right = 0
    wide = train.x.double()
    squares = (wide * wide).sum(dim=1)
    for start in range(0, len(test.y), 1024):
        part = slice(start, start + 1024)
        distance = torch.addmm(squares, test.x[part].double(), wide.T, alpha=-2).numpy()
        votes = coded[np.argsort(distance, axis=1, kind="stable")[:, :k]]
        line = np.arange(len(votes))[:, None]
        score = np.zeros((len(votes), len(classes)))
        np.add.at(score, (line, votes), 1.0)
        rank = np.full(score.shape, k)
        np.minimum.at(rank, (np.broadcast_to(line, votes.shape), votes), np.broadcast_to(np.arange(k), votes.shape))
        right += int((classes[(score - rank / (k + 1)).argmax(axis=1)] == test.y[part]).sum())
    return 100 * right / len(test.y)


def linear_accuracy(train: Labelled, test: Labelled, epochs: int, seed: int) -> float:
    """Return the test accuracy, in percent, of one linear layer on normalised features after its last epoch (`probe`)."""
    classes = int(max(train.y.max(), test.y.max())) + 1
    return accuracy(train_head(train.x, train.y, classes, epochs, seed), test.x, test.y)


def _sample(block: Block, seed: int, m: int) -> tuple[npt.NDArray[np.uint64], Ints]:
    rows = np.unique(block.rows)  # an image's patterns are drawn together
    return smallest(random_keys(seed, (EMD_KEY,), rows), rows, m)


def earth_movers_distance(shards: Shards, picks: Ints, sample: int, seed: int) -> tuple[float, str]:
    """Return the exact earth mover's distance (L2) from a seeded sample of the pool to the picks, equal weights each.

    At most `sample` pool rows and `sample` picks take part; the note says how many did.
    """
    import ot

    _, rows = shards.map(_sample, seed, sample, combine=partial(merge_smallest, sample))
    if len(picks) > sample:
        _, picks = smallest(random_keys(seed, (EMD_KEY,), picks), picks, sample)
    cost = torch.cdist(shards.take(rows).double(), shards.take(picks).double()).numpy()
    value, log = ot.emd2([], [], cost, numItermax=10_000_000, log=True, return_matrix=False)
    if log.get("warning"):
        raise ArithmeticError(f"earth mover's distance did not converge: {log['warning']}")
    return float(value), f"exact on {len(rows):,} pool rows and {len(picks):,} picks"


def coverage(known: Known, shards: Shards, rows: Ints, sample: int, seed: int) -> Iterator[Result]:
    """Yield how well the labelled rows cover the pool, with labels where there are any and without."""
    if known.labels is not None:
        classes = np.unique(known.labels[known.labels >= 0])
        mine = known.labels[np.searchsorted(known.rows, rows)]
        share = 100 * float(np.isin(classes, mine).mean())
        yield "class_coverage", share, f"% of {len(classes)} classes"
    mean, radius = distances(shards, rows)
    yield "mean_distance", mean, "L2, pool row to its nearest pick"
    yield "covering_radius", radius, "L2, the farthest pool row"
    value, note = earth_movers_distance(shards, rows, sample, seed)
    yield "emd", value, note


def measure(
    known: Known, shards: Shards, rows: Ints, test: Labelled | None, options: MeasureOptions, seed: int
) -> Iterator[Result]:
    """Yield every metric asked for, for the labelled pool rows `rows`; `shards` hold the normalised vectors."""
    if "coverage" in options.metrics:
        yield from coverage(known, shards, rows, options.emd_sample, seed)
    if test is None:
        return
    if known.vectors_per_image > 1:
        raise InputError(f"{known.uri} has up to {known.vectors_per_image} vectors an image: only --metrics coverage")
    train = Labelled(shards.take(rows), known.labels_of(rows))
    for k in options.neighbors if "knn" in options.metrics else ():
        enough = k <= len(rows)
        note = "% top-1, L2 on normalised features" if enough else f"needs {k} picks, there are {len(rows)}"
        yield f"knn_{k}", knn_accuracy(train, test, k) if enough else None, note
    if "linear" in options.metrics:
        yield "linear", linear_accuracy(train, test, options.linear_epochs, seed), "% top-1, stored features, no augmentation"


def check_metrics(metrics: tuple[str, ...], test: str | None) -> None:
    """Raise InputError when a metric needs a test store and there is none."""
    needs = [name for name in metrics if name in ("knn", "linear")]
    if needs and test is None:
        raise InputError(f"metrics {', '.join(needs)} need --test FEATURES; or ask for --metrics coverage")


def evaluate(options: EvaluateOptions, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Measure a selection, or a checkpoint; return [{metric, value, note}], and publish it as metrics/ if `out` is given."""
    if is_checkpoint(options.subject):
        return evaluate_model(options, progress)
    given = given_of(options, FOR_MODELS)
    if given:
        raise InputError(f"{', '.join(given)}: for checkpoints, and {options.subject} is none; leave that out")
    store = FeatureStore.of_vectors(options.subject)
    if options.selection is None:
        raise InputError(f"{options.subject} holds features: give --selection DIR, what was selected from them")
    check_metrics(options.metrics, options.test)
    selection = read_selection(options.selection, store)
    test = read_test(options.test, store) if options.test else None
    place = Place(options.out) if options.out else None
    claim = None
    if place:
        inputs = {
            "features": store.digest,
            "selection": selection.manifest["digest"],
            "test": FeatureStore(options.test).digest if options.test else None,
        }
        reads = [uri for uri in (options.subject, options.selection, options.test) if uri]
        identity = {name: value for name, value in result_options(options).items() if name not in FOR_MODELS}
        claim = Claim.of(place, "metrics", inputs, identity, options.overwrite, reads)
        published = claim.published()
        if published is not None:
            return list(published["metrics"])
    rows = np.union1d(selection.picks, selection.labeled)
    with open_shards(store, options, True, ()) as shards:
        results = []
        for metric, value, note in measure(Known.of(store), shards, rows, test, options, options.seed):
            results.append({"metric": metric, "value": value, "note": note})
            progress("evaluate", len(results), 0, metric)
    if claim:
        claim.take()
        publish(claim.place, {"metrics": results, "num_labeled": len(rows)})
    return results
