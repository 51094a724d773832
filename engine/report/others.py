"""Sections of folders that are not selections: comparisons, rounds, curves, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.compare import comparison_section
from engine.curves import curve_table, read_curves, saved_by_seed, saved_table
from engine.page import Section
from engine.page.curves import curves_section
from engine.report.subjects import Other

BASELINE = "random"


def _rows(other: Other, file: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(other.place.at(file).read())).to_pylist()
    return rows


def _rounds(found: Sequence[Other]) -> Section:
    """Return the section of all rounds together: curves, and labels saved where there are runs of random."""
    curves, _ = read_curves([other.place.address for other in found], None)
    metric, shares, notes = curves[0].metric, list[dict[str, Any]](), list[str]()
    bases = {curve.seed for curve in curves if curve.name == BASELINE}
    if bases:
        paired = [curve for curve in curves if curve.seed in bases]
        shares = [{**row, "metric": metric} for row in saved_table(list(saved_by_seed(paired, BASELINE)))]
        if len(paired) < len(curves):
            notes.append(f"Labels saved are of the seeds that {BASELINE} was run with, too.")
    else:
        notes.append(f"Labels saved are told beside {BASELINE}, of which no rounds were given.")
    return curves_section("rounds", "Rounds", {metric: curve_table(curves)}, shares, BASELINE, notes)


def _curves(other: Other, id: str) -> Section:
    manifest = other.manifest
    shares = [{**row, "metric": manifest["metric"]} for row in manifest["saved"]]
    return curves_section(id, "Learning curves", {manifest["metric"]: manifest["table"]}, shares, manifest["baseline"])


def other_sections(others: Sequence[Other]) -> list[Section]:
    """Return the sections of folders that are not selections, in the order given, rounds together and metrics together.

    Raises InputError for rounds that can't be compared.
    """
    sections, together = list[Section](), dict[str, list[Other]]()
    for other in others:
        together.setdefault(other.kind, []).append(other)
    for kind, found in together.items():
        if kind == "rounds":
            sections.append(_rounds(found))
        elif kind == "metrics":
            tables = [(other.uri, other.manifest["metrics"]) for other in found]
            sections.append(Section("metrics", "Metrics", "metrics", {"tables": tables}))
        else:
            for number, other in enumerate(found, start=1):
                id = f"{kind}-{number}"
                sections.append(
                    comparison_section(_rows(other, "results.parquet"), id) if kind == "comparison" else _curves(other, id)
                )
    return sections
