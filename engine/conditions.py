"""What a selection must satisfy, read from the options and held against a store before any work: quotas, an even split, caps,
a condition on rows, a sum to spend. What can't be met is an error that says by how much.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Bools, Floats, Ints
from engine.draws import random_keys
from engine.flows import LARGEST
from engine.infeasible import Known, check_together, report
from engine.ledger import Groups, Network, Terms, cells_of, fill, network
from engine.schema import InputError, nearest, parse_pairs
from engine.store import FeatureStore
from engine.verbs import ConditionOptions
from engine.where import parse_where, rows_where

NULL = "null"
"""The group of rows without a value."""
BALANCE_KEY = 71
LISTED = 100
"""Groups of a column that a manifest lists, at most: those with most picks."""


@dataclass(frozen=True)
class Asked:
    """The conditions as they were asked for: counts by column and value, a column, most by column, a text, a sum."""

    quota: dict[str, dict[str, int]]
    balance: str | None
    cap: dict[str, int]
    where: str | None
    total: Fraction | None = None
    cost_column: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns whose groups have conditions."""
        return list(dict.fromkeys([*self.quota, *([self.balance] if self.balance else []), *self.cap]))

    def facts(self) -> dict[str, Any]:
        """Return what was asked for, as a manifest says it: only what was."""
        said: dict[str, Any] = {"quota": self.quota, "balance": self.balance, "cap": self.cap, "where": self.where}
        said |= {"budget_cost": None if self.total is None else float(self.total), "cost_column": self.cost_column}
        return {name: value for name, value in said.items() if value}


def _quota(text: str) -> tuple[str, dict[str, int]]:
    """Parse `column=value:count,...`; a value with a comma stands, with its count, in double quotes."""
    column, equals, rest = text.partition("=")
    if not equals or not column.strip():
        raise InputError(f"--quota {text!r} is not of the form column=value:count,value:count")
    counts: dict[str, int] = {}
    for part in next(csv.reader([rest], skipinitialspace=True), []):
        value, colon, count = part.rpartition(":")
        if not colon or not count.strip().isdigit():
            raise InputError(f"--quota {text!r}: {part!r} is not of the form value:count, with a whole number of picks")
        if value.strip() in counts:
            raise InputError(f"--quota {text!r} names {value.strip()!r} twice")
        counts[value.strip()] = int(count)
    if not counts:
        raise InputError(f"--quota {text!r} is not of the form column=value:count,value:count")
    return column.strip(), counts


def _total(text: str) -> Fraction:
    try:
        value = Decimal(text.replace("_", ""))
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or value <= 0:
        raise InputError(
            f"--budget-cost {text!r} is not a positive number: give what there is to spend, in the unit of the costs"
        )
    return Fraction(value)


def asked_of(options: ConditionOptions, budget_cost: str | None = None, cost_column: str | None = None) -> Asked | None:
    """Return the conditions in some options, None where there are none; raises InputError for what can't be read."""
    quota: dict[str, dict[str, int]] = {}
    for text in options.quota:
        column, counts = _quota(text)
        twice = counts.keys() & quota.get(column, {}).keys()
        if twice:
            raise InputError(f"--quota names {column}={sorted(twice)[0]} twice")
        quota.setdefault(column, {}).update(counts)
    cap = {}
    for column, most in parse_pairs(options.cap, "--cap").items():
        if not most.isdigit() or not int(most):
            raise InputError(f"--cap {column}={most}: give how many of one {column} there may be, 1 or more")
        cap[column] = int(most)
    if options.balance in quota:
        raise InputError(f"--balance {options.balance} and --quota {options.balance}=... both say how many: leave one out")
    if (budget_cost is None) != (cost_column is None):
        raise InputError("--budget-cost needs --cost-column, and --cost-column needs --budget-cost")
    if budget_cost is not None and (quota or options.balance):
        raise InputError("--budget-cost leaves open how many picks there will be, so there is no --quota or --balance of them")
    total = None if budget_cost is None else _total(budget_cost)
    found = Asked(quota, options.balance, cap, options.where, total, cost_column)
    return found if found.facts() else None


@dataclass(frozen=True)
class Column:
    """A column as groups: the code of each row of the store, and what each group is called, the nulls' last."""

    name: str
    codes: Ints
    names: list[str]
    classes: list[str] | None = None

    @property
    def counts(self) -> Ints:
        """How many rows of the store each group has."""
        return np.bincount(self.codes, minlength=len(self.names))

    def code_of(self, flag: str, value: str) -> int:
        """Return a group's code by its name, or a label by its number; raises InputError for one that is not there."""
        if value in self.names:
            return self.names.index(value)
        if self.name == "label" and value.isdigit() and self.classes and int(value) < len(self.classes):
            return self.code_of(flag, self.classes[int(value)])
        listed = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
        raise InputError(f"{flag}: {self.name} has no value {value!r}{nearest(value, self.names)} (one of: {listed})")


def _lookup(flag: str, name: str, store: FeatureStore) -> pa.ChunkedArray:
    if name not in store.columns:
        raise InputError(
            f"{flag}: the features have no column {name!r}{nearest(name, store.columns)} (one of: {', '.join(store.columns)})"
        )
    return store.read_column(name)


def read_groups(flag: str, name: str, store: FeatureStore) -> Column:
    """Return a column of a store as groups, in the order of their values; labels are called as their classes are."""
    values = _lookup(flag, name, store)
    if pa.types.is_nested(values.type):
        raise InputError(f"{flag}: {name} is {values.type}, which makes no groups")
    values = values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
    if name == "label":
        values = pc.if_else(pc.less(values, 0), pa.scalar(None, values.type), values)
    coded = values.combine_chunks().dictionary_encode()
    order = pc.array_sort_indices(coded.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    names = [str(value) for value in coded.dictionary.take(pa.array(order)).to_pylist()]
    if pa.types.is_boolean(values.type):
        names = [value.lower() for value in names]
    if name == "label" and store.class_names:
        names = [store.class_names[int(code)] if int(code) < len(store.class_names) else code for code in names]
    indices = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    missing = indices < 0
    codes = np.where(missing, len(names), rank[indices] if len(rank) else 0)
    return Column(name, codes, [*names, NULL] if missing.any() else names, store.class_names)


def _read_costs(name: str, store: FeatureStore, eligible: Bools) -> Floats:
    """Return what the eligible rows cost, as they are written; raises InputError for a cost that is none."""
    values = _lookup("--cost-column", name, store)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)):
        raise InputError(f"--cost-column: {name} is {values.type}, and a cost is a number")
    if pa.types.is_float32(values.type) or pa.types.is_float16(values.type):  # 0.1 is to mean 0.1, not what float32 makes of it
        values = values.cast(pa.string())
    costs = values.cast(pa.float64()).fill_null(np.nan).to_numpy()[eligible]
    bad = np.flatnonzero(~(np.isfinite(costs) & (costs > 0)))
    if len(bad):
        row = int(store.rows[eligible][bad[0]])
        raise InputError(
            f"--cost-column: {name} of row {row} ({store.ids(np.array([row]))[0]}) is {costs[bad[0]]:g}, and a cost is above 0 "
            f"and finite; {len(bad):,} of the eligible images have no such cost: leave them out by --where or --exclude"
        )
    return np.asarray(costs, dtype=np.float64)


def _where(text: str, store: FeatureStore) -> Bools:
    """Return which of the store's rows a condition leaves, (n,), read a block at a time."""
    where = parse_where(text, store.columns)
    rows_where(where, store.schema.empty_table().select(where.columns), store.class_names)
    masks = []
    for index in range(store.num_blocks):
        table = store.read_block(index, ["row", *(name for name in where.columns if name != "row")])
        masks.append(rows_where(where, table, store.class_names).to_numpy(zero_copy_only=False))
    return np.concatenate([*masks, np.empty(0, dtype=np.bool_)])


@dataclass(frozen=True)
class Conditions:
    """The conditions of a selection on a store: from them the terms of each budget are made.

    `excluded` are all rows that may neither be picked nor are labelled, those that --where leaves out among them; `rows` the
    eligible ones. `columns` are the groups, `labeled` (groups,) of each how many rows are labelled. `left` is how many rows
    --where leaves of `num_vectors`.
    """

    asked: Asked
    excluded: Ints
    rows: Ints
    columns: list[Column]
    at: Ints
    labeled: list[Ints]
    left: int
    num_vectors: int
    costs: Floats | None

    def groups(self) -> list[Groups]:
        """Return each column's groups with their bounds; raises InputError for a value that is not there."""
        made = []
        for column, labeled in zip(self.columns, self.labeled, strict=True):
            low = np.zeros(len(column.names), dtype=np.int64)
            high = np.full(len(column.names), LARGEST, dtype=np.int64)
            if column.name in self.asked.cap:
                high = np.minimum(high, np.maximum(0, self.asked.cap[column.name] - labeled))
            for value, count in self.asked.quota.get(column.name, {}).items():
                code = column.code_of("--quota", value)
                low[code] = count
                high[code] = min(count, high[code])
            made.append(Groups(column.name, column.codes[self.at], low, high))
        return made

    def terms(self, budget: int, seed: int) -> tuple[Terms, list[Ints | None]]:
        """Return what picks must satisfy, and the even split of each column that has one (groups,), else None.

        Raises InputError, a report, where nothing can.
        """
        if self.costs is not None and self.asked.total is not None:
            if float(self.costs.min(initial=np.inf)) > float(self.asked.total):
                raise InputError(
                    f"--budget-cost {float(self.asked.total):g} pays for nothing: the cheapest costs {self.costs.min():g}"
                )
            budget = len(self.rows)
        groups = self.groups()
        names = [column.names for column in self.columns]
        least = 0 if self.costs is not None else budget
        report(
            groups,
            [Known(c.names, c.counts, of) for c, of in zip(self.columns, self.labeled, strict=True)],
            least,
            self.asked.cap,
        )
        shares: list[Ints | None] = [None] * len(groups)
        binding = [i for i, column in enumerate(groups) if column.binding or column.column == self.asked.balance]
        cell = np.zeros(len(self.rows), dtype=np.int64)
        found: Network | None = None
        if binding:
            some = [groups[i] for i in binding]
            cells, cell, counts = cells_of(some)
            found, _ = network(cells, counts, [(column.low, column.high) for column in some], least, budget)
            if found is None:
                raise check_together(some, [names[i] for i in binding], cells, counts, budget)
            for place, i in enumerate(binding):
                if groups[i].column == self.asked.balance:
                    order = np.argsort(random_keys(seed, (BALANCE_KEY,), np.arange(len(names[i]))), kind="stable")
                    shares[i] = fill(budget, found, place, order)
        return Terms(self.rows, cell, found, self.costs, self.asked.total), shares

    def budget(self) -> int:
        """Return about how many picks a sum pays for: as many as at the mean cost, at least one."""
        assert self.costs is not None
        assert self.asked.total is not None
        return int(np.clip(np.rint(float(self.asked.total) / self.costs.mean()), 1, len(self.rows)))

    def facts(self, picks: Ints, shares: Sequence[Ints | None]) -> dict[str, Any]:
        """Return what a manifest says of the conditions: what was asked, and each group's picks."""
        said: dict[str, Any] = {"asked": self.asked.facts(), "num_eligible": len(self.rows)}
        said |= {"num_where": self.left, "num_vectors": self.num_vectors} if self.asked.where else {}
        if self.costs is not None:
            at = np.searchsorted(self.rows, picks)
            said["cost_total"] = float(sum((Fraction(repr(float(cost))) for cost in self.costs[at]), Fraction(0)))
        said["groups"] = {}
        at = self.at[np.searchsorted(self.rows, picks)]
        for column, labeled, share in zip(self.columns, self.labeled, shares, strict=True):
            made, there = (np.bincount(column.codes[some], minlength=len(column.names)) for some in (at, self.at))
            quota = {column.code_of("--quota", value): m for value, m in self.asked.quota.get(column.name, {}).items()}
            order = np.argsort(-made, kind="stable")[:LISTED]
            said["groups"][column.name] = {
                "num_groups": len(column.names),
                "num_picked_groups": int((made > 0).sum()),
                "largest": int(made.max(initial=0)),
                "listed": [
                    {
                        "value": column.names[code],
                        "picked": int(made[code]),
                        "asked": int(share[code]) if share is not None else quota.get(int(code)),
                        "eligible": int(there[code]),
                        "labeled": int(labeled[code]),
                    }
                    for code in order
                ],
            }
        return said


def read_conditions(asked: Asked, store: FeatureStore, labeled: Ints, excluded: Ints) -> Conditions:
    """Hold conditions against a store; raises InputError for a column or value that is not there, or types that don't fit."""
    keep = _where(asked.where, store) if asked.where else np.ones(store.num_vectors, dtype=np.bool_)
    eligible = keep & ~np.isin(store.rows, np.union1d(labeled, excluded))
    if not eligible.any():
        what = f"--where {asked.where!r} leaves {int(keep.sum()):,} of {len(keep):,} images, and " if asked.where else ""
        raise InputError(f"{what}nothing is left to pick: all of it is labelled or excluded, or there was nothing")
    columns = [read_groups(_flag(asked, name), name, store) for name in asked.columns]
    mine = np.isin(store.rows, labeled)
    counts = [np.bincount(column.codes[mine], minlength=len(column.names)) for column in columns]
    costs = _read_costs(asked.cost_column, store, eligible) if asked.cost_column else None
    out = np.setdiff1d(np.union1d(excluded, store.rows[~keep]), labeled)
    at = np.flatnonzero(eligible)
    return Conditions(asked, out, store.rows[at], columns, at, counts, int(keep.sum()), len(keep), costs)


def _flag(asked: Asked, name: str) -> str:
    return "--quota" if name in asked.quota else "--balance" if name == asked.balance else "--cap"
