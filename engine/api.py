"""The few names a notebook needs: arrays or feature stores in, pool rows and figures out.

>>> import numpy as np
>>> from engine import evaluate_rows, open_features, select_rows
>>> rng = np.random.default_rng(0)
>>> y = rng.integers(0, 4, 500)
>>> X = np.eye(4, 16)[y] + 0.2 * rng.normal(size=(500, 16))
>>> pool, test = open_features(X[:400], labels=y[:400]), open_features(X[400:], labels=y[400:])
>>> rows = select_rows(pool, "kmeans", 4, random_state=0)
>>> rows.shape, sorted(y[rows].tolist())
((4,), [0, 1, 2, 3])
>>> found = evaluate_rows(pool, rows, test, metrics=("knn", "coverage"))
>>> found["knn_1"], found["class_coverage"]
(100.0, 100.0)
>>> more = select_rows(pool, "coreset", "1%", labeled=rows)
>>> len(more), np.intersect1d(more, rows).size
(4, 0)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.canonical import normalize
from engine.checks import check_finite, check_predictions
from engine.evaluate import Known, Labelled, check_metrics, measure
from engine.placement import open_shards
from engine.reading import check_same_pool
from engine.runner import run_method
from engine.schema import InputError, build_options, parse_budgets
from engine.select import Strategy, check_labels, check_vectors, strategy_options
from engine.shards import Request, Shards, from_array
from engine.store import FeatureStore
from engine.verbs import MeasureOptions
from engine.verbs.shared import ShardOptions

RandomState = int | np.random.RandomState | np.random.Generator | None
"""As in scikit-learn: a seed, a generator that one is drawn from, or None for another every time."""

ARRAY = "the array"
"""What an array is called in errors."""


@dataclass(frozen=True)
class Features:
    """Vectors to select from: an array in memory, `x` (n, d) float32, or a `store`; row i of an array is pool row i."""

    x: npt.NDArray[np.float32] | None
    store: FeatureStore | None
    labels: Ints | None
    classes: npt.NDArray[Any] | None = None

    @property
    def rows(self) -> Ints:
        """The pool rows that have a vector, ascending (n,)."""
        return np.arange(len(self.x), dtype=np.int64) if self.x is not None else self._of().rows

    @property
    def known(self) -> Known:
        """What is known of the images beside their vectors."""
        return Known(ARRAY, self.rows, self.labels) if self.store is None else Known.of(self.store)

    def _of(self) -> FeatureStore:
        assert self.store is not None
        return self.store

    def vectors(self, normalized: bool) -> npt.NDArray[np.float32]:
        """Return the vectors (n, d) float32."""
        x = self._of().vectors() if self.x is None else self.x
        return np.asarray(normalize(torch.from_numpy(x)).numpy() if normalized else x)


def open_features(source: str | PathLike[str] | npt.ArrayLike | Features, labels: npt.ArrayLike | None = None) -> Features:
    """Open a feature store by its path, or an array (n, d), as features to select from.

    `labels` (n,) belong to an array: class numbers from 0 (-1 for none), or any values, which become classes in sorted
    order. Raises InputError where that can't be.
    """
    if isinstance(source, Features):
        if labels is not None:
            raise InputError("labels are given for features that are open already: give them to open_features with the array")
        return source
    if isinstance(source, str | PathLike):
        if labels is not None:
            raise InputError(f"labels are given for {str(source)!r}: a feature store has its own")
        return Features(None, FeatureStore.of_vectors(str(source)), None)
    x = np.ascontiguousarray(source, dtype=np.float32)
    if x.ndim != 2 or not x.size:
        raise InputError(f"features are an array of shape {x.shape}: they are (n, d), with a row and a column at least")
    if labels is None:
        return Features(x, None, None)
    given = np.asarray(labels)
    if given.shape != (len(x),):
        raise InputError(f"labels have shape {given.shape}: they are one for each of {len(x)} rows")
    if given.dtype.kind in "iu" and given.min() >= -1:
        return Features(x, None, given.astype(np.int64))
    classes, coded = np.unique(given, return_inverse=True)
    return Features(x, None, coded.astype(np.int64), classes)


def _seed(random_state: RandomState) -> int:
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if random_state is None or isinstance(random_state, np.random.Generator):
        return int(np.random.default_rng(random_state).integers(2**31))
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer) or random_state < 0:
        raise InputError(f"random_state is {random_state!r}: it takes a whole number from 0, a numpy generator or None")
    return int(random_state)


def _rows(given: Sequence[int] | Ints | None, pool: Ints, what: str) -> Ints:
    """Return pool rows, ascending and distinct; raises InputError for one that is not in the pool."""
    if given is None:
        return np.empty(0, dtype=np.int64)
    rows = np.asarray(given)
    if rows.size and (rows.ndim != 1 or rows.dtype.kind not in "iu"):
        raise InputError(f"{what} has shape {rows.shape} and dtype {rows.dtype}: it takes pool rows, whole numbers")
    rows = np.unique(rows.astype(np.int64))
    strange = rows[~np.isin(rows, pool)]
    if len(strange):
        raise InputError(f"{what} names row {strange[0]}, which has no vector among the {len(pool)} of the pool")
    return rows


@contextlib.contextmanager
def _shards(
    features: Features, strategy: Strategy | None, normalized: bool, probs: Any, where: ShardOptions
) -> Iterator[Shards]:
    """Open features as shards, with what a strategy reads of them; the vectors of a store stay where they are."""
    columns = strategy.columns if strategy else ()
    if features.store is not None:
        predictions = FeatureStore(str(probs)) if probs is not None else None
        if predictions is not None:
            check_same_pool(features.store, predictions)
        with open_shards(features.store, where, normalized, columns, predictions) as shards:
            yield shards
        return
    arrays = {} if probs is None else {"probs": np.asarray(probs, dtype=np.float32)}
    if any(values.ndim != 2 or len(values) != len(features.rows) for values in arrays.values()):
        raise InputError(f"probs have shape {arrays['probs'].shape}: they are (n, classes) for {len(features.rows)} rows")
    local = from_array(features.vectors(normalized), features.labels if "label" in columns else None, predictions=arrays)
    try:
        check_finite(local, ARRAY)
        check_predictions(local, "probs")
        yield local
    finally:
        local.close()


def _check_reads(strategy: Strategy, name: str, features: Features, probs: Any) -> None:
    if "probs" not in strategy.predictions:
        if strategy.predictions:
            raise InputError(f"strategy {name!r} reads what an encoder wrote: use `coresift select`")
        if probs is not None:
            raise InputError(f"strategy {name!r} reads no probabilities: leave probs out")
    elif probs is None:
        raise InputError(f"strategy {name!r} reads a model's probabilities: give probs, (n, classes), or a store's path")
    if features.store is not None:
        check_vectors(strategy, features.store)
        check_labels(strategy, features.store)
    elif "label" in strategy.columns and (features.labels is None or (features.labels < 0).any()):
        raise InputError(f"strategy {name!r} reads the labels of all rows: give them to open_features")


def select_rows(
    features: str | PathLike[str] | npt.ArrayLike | Features,
    strategy: str,
    budget: int | str,
    *,
    labeled: Sequence[int] | Ints | None = None,
    exclude: Sequence[int] | Ints | None = None,
    random_state: RandomState = 0,
    normalize: bool = True,
    probs: Any = None,
    workers: int | None = None,
    address: str | None = None,
    **options: Any,
) -> Ints:
    """Return the pool rows that a strategy picks, in pick order, (budget,) int64; nothing is written.

    `budget` is a number of new labels, or a percentage ("2%"). `labeled` and `exclude` are pool rows. `probs` (n, classes)
    is what a model gave, for strategies that read it (a path where `features` are a store). `options` are the strategy's own
    (`coresift strategies` lists them). `workers` and `address` are for a store: as on the command line. The same picks as
    `coresift select` makes of a store of these vectors with this seed. Raises InputError for what can't be.
    """
    pool = open_features(features)
    row, method, chosen = strategy_options(strategy, options)
    _check_reads(row, strategy, pool, probs)
    taken, left_out = _rows(labeled, pool.rows, "labeled"), _rows(exclude, pool.rows, "exclude")
    available = len(pool.rows) - len(np.union1d(taken, left_out))
    counts = parse_budgets(str(budget), len(pool.rows), available)
    if len(counts) > 1:
        raise InputError(f"budget {budget!r} is {len(counts)} budgets: give one")
    where = build_options(ShardOptions, {"workers": workers, "address": address}, "select_rows")
    with _shards(pool, row, normalize, probs, where) as shards:
        step = run_method(method, shards, Request(counts[0], _seed(random_state), taken, left_out), chosen)
    return step.picks


def _test(pool: Features, test: Features) -> Labelled:
    """Return the labelled test vectors; raises InputError where they don't fit the pool."""
    known = test.known
    if known.labels is None or (known.labels < 0).any():
        raise InputError("the test features have images without a label: a test set has one for each")
    x = torch.from_numpy(test.vectors(normalized=True))
    dim = pool.x.shape[1] if pool.x is not None else pool._of().dim
    if x.shape[1] != dim:
        raise InputError(f"the test features have {x.shape[1]} floats a row, the pool {dim}: embed both the same way")
    if pool.classes is None or test.classes is None:
        return Labelled(x, known.labels)
    at = np.searchsorted(pool.classes, test.classes).clip(max=len(pool.classes) - 1)
    strange = test.classes[pool.classes[at] != test.classes]
    if len(strange):
        raise InputError(f"the test features have class {str(strange[0])!r}, which the pool has not")
    return Labelled(x, at[known.labels])


def evaluate_rows(
    features: str | PathLike[str] | npt.ArrayLike | Features,
    rows: Sequence[int] | Ints,
    test: str | PathLike[str] | Features | None = None,
    *,
    metrics: Sequence[str] = ("knn", "linear", "coverage"),
    neighbors: Sequence[int] = (1, 20),
    linear_epochs: int = 100,
    random_state: RandomState = 0,
) -> dict[str, float | None]:
    """Return what labelled pool rows are worth, metric -> value, as `coresift evaluate` measures: on L2-normalised vectors.

    `knn` and `linear` need `test`, features with labels, and labels of the rows; a metric that is not defined is None.
    Raises InputError for what can't be.
    """
    pool = open_features(features)
    given = {"metrics": metrics, "neighbors": neighbors, "linear_epochs": linear_epochs}
    options = build_options(MeasureOptions, {name: _plain(value) for name, value in given.items()}, "evaluate_rows")
    check_metrics(options.metrics, None if test is None else ARRAY)
    chosen = _rows(rows, pool.rows, "rows")
    if not len(chosen):
        raise InputError("rows is empty: give pool rows")
    held = None if test is None else _test(pool, open_features(test))
    with _shards(pool, None, True, None, ShardOptions()) as shards:
        return {name: value for name, value, _ in measure(pool.known, shards, chosen, held, options, _seed(random_state))}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
