"""Why conditions on picks can't be met: which of them, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.arrays import Ints
from engine.ledger import Groups, network
from engine.schema import InputError

SAID = 12
"""Groups that an error names, at most."""
SUSPECTS = 64
"""Quotas among which the fewest that contradict one another are sought, at most."""


@dataclass(frozen=True)
class Known:
    """What a column's groups are called, how many rows the store has of each, and how many are labelled, (groups,)."""

    names: list[str]
    rows: Ints
    labeled: Ints

    def of(self, code: int, eligible: int) -> str:
        """Return where the rows of a group are, if not all of them are eligible."""
        labeled, out = int(self.labeled[code]), int(self.rows[code] - self.labeled[code]) - eligible
        parts = [f"{labeled:,} labelled"] if labeled else []
        parts += [f"{out:,} excluded or left out"] if out else []
        return f" (of {self.rows[code]:,}: {', '.join(parts)})" if parts else ""


def report(groups: list[Groups], known: list[Known], budget: int, caps: Mapping[str, int]) -> None:
    """Raise InputError where a column alone can't be met: each quota that asks too much, the sum of quotas, what caps leave."""
    wrong = []
    for column, about in zip(groups, known, strict=True):
        there, short = column.counts, []
        for code in np.flatnonzero(column.low > np.minimum(column.high, there)):
            asked = f"{column.column}={about.names[code]} asks for {column.low[code]:,}"
            capped = column.high[code] < min(column.low[code], there[code])
            eligible = f"{there[code]:,} are eligible{about.of(int(code), int(there[code]))}"
            short.append(f"{asked}, and " + (f"--cap leaves {column.high[code]:,}" if capped else eligible))
        if short:
            wrong.append(
                "--quota " + "; ".join(short[:SAID]) + (f"; and {len(short) - SAID:,} more" if len(short) > SAID else "")
            )
            continue
        wanted, most = int(column.low.sum()), int(np.minimum(column.high, there).sum())
        if wanted > budget:
            wrong.append(f"--quota {column.column}=... asks for {wanted:,} in all, and the budget is {budget:,}")
        elif most < budget:
            wrong.append(_too_few(column, most, budget, caps))
    if wrong:
        raise InputError(f"the conditions can't be met: {'. '.join(wrong)}. {_way_out()}")


def _too_few(column: Groups, most: int, budget: int, caps: Mapping[str, int]) -> str:
    asked, name = int(column.low.sum()), column.column
    capped = f"--cap {name}={caps[name]}" if name in caps else ""
    if not asked:
        return f"{capped} leaves {most:,} of {len(column.codes):,} images, and the budget is {budget:,}"
    rest = f"other values have{f', with {capped},' if capped else ''} {most - asked:,} eligible images"
    return f"--quota {name}=... asks for {asked:,} of a budget of {budget:,}, and {rest} for the other {budget - asked:,}"


def _way_out() -> str:
    return "Eligible is what is neither labelled nor excluded nor left out by --where: ask for less, or change the budget"


def check_together(groups: list[Groups], names: list[list[str]], cells: Ints, counts: Ints, budget: int) -> InputError:
    """Return the error of columns that can each be met, but not together: the fewest quotas that contradict one another."""
    bounds = [(column.low, column.high) for column in groups]
    free = [(np.zeros_like(low), high) for low, high in bounds]

    def met(some: list[tuple[Ints, Ints]], least: int) -> bool:
        return network(cells, counts, some, least, budget)[0] is not None

    low, high = 0, budget
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if met(free, middle) else (low, middle - 1)
    columns = " and ".join(column.column for column in groups)
    if low < budget:
        together = f"what {columns} allow together is {low:,} picks, and the budget is {budget:,}"
        return InputError(f"the conditions can't be met: {together}. {_way_out()}")
    asked = [(i, int(code)) for i, column in enumerate(groups) for code in np.flatnonzero(column.low)]
    kept = set(asked)
    for one in asked if len(asked) <= SUSPECTS else []:
        fewer = kept - {one}
        if not met(_only(bounds, fewer), budget):
            kept = fewer
    said = "; ".join(f"{groups[i].column}={names[i][code]} {groups[i].low[code]:,}" for i, code in sorted(kept)[:SAID])
    _, short = network(cells, counts, _only(bounds, kept), budget, budget)
    return InputError(
        f"the conditions can't be met: --quota {said} contradict one another, or the caps, in a budget of {budget:,}: each can "
        f"be met, together they lack {short:,} images. {_way_out()}"
    )


def _only(bounds: list[tuple[Ints, Ints]], kept: set[tuple[int, int]]) -> list[tuple[Ints, Ints]]:
    """Return the bounds with the lower ones of some groups alone; an upper one stays."""
    some = [(np.zeros_like(low), high) for low, high in bounds]
    for column, code in kept:
        some[column][0][code] = bounds[column][0][code]
    return some
