"""What a pool is made of, and what is labelled of it: classes and metadata, before the picks and after, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Ints
from engine.schema import Progress
from engine.store import OWN_COLUMNS, FeatureStore

MOST_VALUES = 2000
"""Different values of a column beyond which it is not one of categories."""
SHOWN = 20
"""Values of a column that are shown, the most common ones."""
FEW = 12
"""Up to so many different numbers are categories."""
LEAST_SHARE = 0.5
"""A column of texts with more different values than this share of its rows names images, and is left out."""
SHAPES = ("width", "height", "bytes")
QUARTILES = (0, 25, 50, 75, 100)


@dataclass
class Values:
    """What a column holds in a group of rows: how often each category occurs, and the numbers."""

    counts: Counter[str] = field(default_factory=Counter)
    numbers: list[npt.NDArray[np.float64]] = field(default_factory=list)
    many: bool = False

    def add(self, column: pa.ChunkedArray) -> None:
        """Take in a part's values."""
        column = column.drop_null()
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            self.numbers.append(column.cast(pa.float64()).to_numpy())
        if pa.types.is_floating(column.type) or self.many:
            return
        for entry in column.value_counts().to_pylist():
            self.counts[str(entry["values"])] += entry["counts"]
        self.many = len(self.counts) > MOST_VALUES


@dataclass(frozen=True)
class Share:
    """One category: its share of 1 of the pool, of what was labelled before, and of what is after each selection."""

    name: str
    pool: float
    before: float | None
    after: list[float]


@dataclass(frozen=True)
class Categories:
    """A column of categories: the most common ones, and how many others there are."""

    column: str
    shares: list[Share]
    others: int
    unseen: list[int]
    """Categories of the pool that no labelled image has, after each selection."""

    @property
    def largest(self) -> float:
        """The largest share shown."""
        return max(value for share in self.shares for value in (share.pool, share.before or 0.0, *share.after))


@dataclass(frozen=True)
class Numbers:
    """A column of numbers: least, quartiles and largest of the pool, and after each selection."""

    column: str
    groups: list[tuple[str, list[float]]]


@dataclass(frozen=True)
class Balance:
    """What a pool's columns hold, and those that were left out, with the reason."""

    categories: list[Categories]
    numbers: list[Numbers]
    left_out: dict[str, str]
    unlabelled: int


def _named(column: pa.ChunkedArray, names: Sequence[str] | None) -> pa.ChunkedArray:
    """Return class numbers as the names of the classes."""
    if not names:
        return column
    known = pa.array([*names])
    inside = pc.if_else(pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names))), column, None)
    return pa.chunked_array([known.take(chunk) for chunk in inside.chunks], pa.string())


def _prepared(store: FeatureStore, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as it is counted: classes by name, of boxes their classes."""
    if name == "boxes":
        labels = [chunk.flatten().field("label") for chunk in column.chunks]
        return _named(pa.chunked_array(labels, pa.int64()), store.class_names)
    if name == "label":
        return _named(pc.if_else(pc.less(column, 0), None, column), store.class_names)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return column.cast(pa.timestamp("us")).cast(pa.date32()).cast(pa.string())
    return column


def countable(store: FeatureStore) -> tuple[list[str], dict[str, str]]:
    """Return the columns of a store that are counted, and those left out with the reason."""
    wanted, left_out = list[str](), dict[str, str]()
    for column in store.schema:
        kind = column.type
        if column.name == store.column or column.name in set(OWN_COLUMNS) - {"label", *SHAPES}:
            continue
        simple = (
            pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind)
            or pa.types.is_floating(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        )  # fmt: skip
        if simple or column.name == "boxes":
            wanted.append(column.name)
        else:
            left_out[column.name] = f"holds {kind}"
    return wanted, left_out


def _categories(name: str, groups: Sequence[Values], before: bool) -> Categories:
    """Return the shares of a column's categories; the groups are the pool, those labelled before, and after each."""
    pool, was, *after = (values.counts for values in groups)
    totals = [max(1, counts.total()) for counts in after]
    shares = [
        Share(
            value,
            count / pool.total(),
            was[value] / max(1, was.total()) if before else None,
            [counts[value] / total for counts, total in zip(after, totals, strict=True)],
        )
        for value, count in sorted(pool.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    ]
    unseen = [sum(value not in counts for value in pool) for counts in after]
    return Categories(name, shares, max(0, len(pool) - SHOWN), unseen)


def _numbers(name: str, groups: Sequence[Values], titles: Sequence[str]) -> Numbers:
    """Return the quartiles of a column in each group that has some."""
    found = []
    for title, values in zip(titles, groups, strict=True):
        held = np.concatenate([np.empty(0), *values.numbers])
        held = held[np.isfinite(held)]
        if len(held):
            found.append((title, [float(value) for value in np.percentile(held, QUARTILES)]))
    return Numbers(name, found)


def balance_of(store: FeatureStore, labeled: Ints, after: Sequence[Ints], names: Sequence[str], progress: Progress) -> Balance:
    """Return what a pool holds, beside what is labelled before the picks and after those of each selection (ascending rows)."""
    wanted, left_out = countable(store)
    of: dict[str, list[Values]] = {name: [Values() for _ in range(2 + len(after))] for name in wanted}
    rows_of = (None, labeled, *after)
    for number, part in enumerate(store.manifest["parts"]):
        table = store.read_part(part["name"], ["row", *wanted])
        rows = table["row"].to_numpy()
        masks = [None if given is None else pa.array(np.flatnonzero(np.isin(rows, given))) for given in rows_of]
        for name in wanted:
            column = _prepared(store, name, table[name]) if name != "boxes" else table[name]
            for values, mask in zip(of[name], masks, strict=True):
                some = column if mask is None else column.take(mask)
                values.add(_prepared(store, name, some) if name == "boxes" else some)
        progress("balance", number + 1, len(store.manifest["parts"]), "")
    categories, numbers = list[Categories](), list[Numbers]()
    titles = ("pool", "labelled before", *names)
    for name, groups in of.items():
        pool: Any = groups[0]
        distinct, total = len(pool.counts), pool.counts.total()
        if pool.numbers and name != "label" and (distinct > FEW or not pool.counts):
            numbers.append(_numbers(name, groups, titles))
        elif pool.many or (distinct > SHOWN and distinct > LEAST_SHARE * total):
            left_out[name] = (
                "has a value of its own for most images" if distinct > LEAST_SHARE * total else "has too many values"
            )
        elif distinct > (1 if name not in ("label", "boxes") else 0):
            categories.append(_categories(name, groups, bool(len(labeled))))
        elif distinct == 1:
            left_out[name] = f"is {next(iter(pool.counts))} everywhere"
        elif name != "label":
            left_out[name] = "is empty"
    order = {"label": 0, "boxes": 1}
    categories.sort(key=lambda found: order.get(found.column, 2))
    return Balance(categories, numbers, left_out, store.num_vectors - store.num_labeled)
