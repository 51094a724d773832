"""Learning curves of rounds, side by side: labels against metric, and the labels that a strategy saves.

A strategy saves 1 - L_s / L_b of the labels, where L_s and L_b are those that it and the baseline need for the same metric:
each run's curve is linear between its rounds, and where it dips, the first place counts at which it reaches the metric. The
metric is the lower one of what the two reached in the end, so that both did. Runs are paired by their seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.arrays import Floats
from engine.folders import Claim, publish, read_manifest, read_run
from engine.page import Page, render
from engine.page.curves import curves_section
from engine.places import Place
from engine.schema import InputError, Progress, nearest, no_progress, result_options
from engine.store import table_bytes
from engine.verbs import CurvesOptions

FILE = "rounds.parquet"
SAME = {"subject_digest": "subject", "test_digest": "test set"}
"""What runs must share to be compared, as their manifests and people call it."""


@dataclass(frozen=True)
class Curve:
    """One run: `labeled` (r,) ascending, and the metric after each round, `values` (r,) float64."""

    name: str
    seed: int
    uri: str
    metric: str
    labeled: Floats
    values: Floats


def labels_for(curve: Curve, level: float) -> float | None:
    """Return the labels after which a curve first reaches `level`, between rounds in a straight line; None if it never does."""
    reached = np.flatnonzero(curve.values >= level)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(curve.labeled[0])
    low, high = curve.values[after - 1], curve.values[after]
    share = (level - low) / (high - low)
    return float(curve.labeled[after - 1] + share * (curve.labeled[after] - curve.labeled[after - 1]))


def saved(curve: Curve, baseline: Curve) -> dict[str, Any]:
    """Return what a run saved beside a baseline's of the same seed: the level, the labels of both, the share in %."""
    level = min(float(curve.values[-1]), float(baseline.values[-1]))
    ours, theirs = labels_for(curve, level), labels_for(baseline, level)
    assert ours is not None  # both end at that level or above
    assert theirs is not None
    share = 100 * (1 - ours / theirs)
    return {"level": level, "labels": ours, "baseline_labels": theirs, "saved": share}


def _named(text: str) -> tuple[str | None, str]:
    """Split NAME=DIR; a folder whose own name holds a `=` is one."""
    name, equals, uri = text.partition("=")
    return (name, uri) if equals and "/" not in name and not Place(text).exists() else (None, text)


def _read(text: str, metric: str | None) -> tuple[Curve, dict[str, Any]]:
    """Return a run's curve and manifest; raises InputError where it is no finished run, or lacks the metric."""
    name, uri = _named(text)
    place = Place(uri)
    manifest = read_manifest(place)
    if manifest is None or manifest["kind"] != "rounds":
        begun = manifest is None and read_run(place) is not None
        why = "is unfinished: run the command that began it again" if begun else "is not a folder that `coresift rounds` wrote"
        raise InputError(
            f"{uri} {why}" if place.exists() else f"{uri} does not exist: give folders that `coresift rounds` wrote"
        )
    table = pq.read_table(pa.BufferReader(place.at(FILE).read())).to_pylist()
    wanted = metric or manifest["criterion"]
    measured = sorted({row["metric"] for row in table})
    if wanted not in measured:
        raise InputError(
            f"--metric {wanted!r} is not measured in {uri}{nearest(wanted, measured)} (one of: {', '.join(measured)})"
        )
    rows = [row for row in table if row["metric"] == wanted]
    undefined = next((row["round"] for row in rows if row["value"] is None), None)
    if undefined is not None:
        raise InputError(f"{uri} has no value of {wanted} after round {undefined}: choose another --metric")
    labeled, values = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("labeled", "value"))
    return Curve(name or manifest["strategy"], manifest["seed"], uri, wanted, labeled, values), manifest


def read_curves(
    runs: Sequence[str], metric: str | None, progress: Progress = no_progress
) -> tuple[list[Curve], dict[str, Any]]:
    """Return the curves of runs, and their digests by folder.

    Raises InputError where two can't be compared: of another pool or test set, another metric, the same name and seed.
    """
    curves, digests = list[Curve](), dict[str, Any]()
    first: dict[str, Any] = {}
    for text in runs:
        curve, manifest = _read(text, metric)
        first = first or manifest
        for key, what in SAME.items():
            if manifest[key] != first[key]:
                raise InputError(f"{curve.uri} and {curves[0].uri} have another {what}: their curves can't be compared")
        if curves and curve.metric != curves[0].metric:
            raise InputError(f"{curve.uri} measures {curve.metric}, {curves[0].uri} {curves[0].metric}: give --metric")
        twice = next((other for other in curves if (other.name, other.seed) == (curve.name, curve.seed)), None)
        if twice is not None:
            raise InputError(
                f"{twice.uri} and {curve.uri} are both {curve.name}, seed {curve.seed}: name one, NAME={curve.uri}"
            )
        curves.append(curve)
        digests[curve.uri] = manifest["files"][FILE]["sha256"]
        progress("curves", len(curves), len(runs), curve.name)
    return curves, digests


def _groups(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.name, []).append(curve)
    return groups


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean and sample standard deviation; none of one value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "seeds": len(values)}


def curve_table(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return a row for each strategy and number of labels: the metric's mean and standard deviation over the seeds."""
    rows = []
    for name, group in _groups(curves).items():
        for labels in sorted({int(n) for curve in group for n in curve.labeled}):
            values = [float(curve.values[curve.labeled == labels][0]) for curve in group if labels in curve.labeled]
            rows.append({"strategy": name, "labeled": labels, **_spread(values)})
    return rows


def saved_by_seed(curves: Sequence[Curve], baseline: str) -> Iterator[dict[str, Any]]:
    """Yield, for each run but the baseline's, what it saved beside the baseline's run of the same seed.

    Raises InputError where there is no such run.
    """
    groups = _groups(curves)
    if baseline not in groups:
        known = f"{nearest(baseline, groups)} (one of: {', '.join(groups)})"
        raise InputError(f"--baseline {baseline!r} is none of the runs{known}: give its runs, too, or --baseline none")
    rivals = {curve.seed: curve for curve in groups[baseline]}
    for name, group in groups.items():
        for curve in group if name != baseline else ():
            if curve.seed not in rivals:
                raise InputError(
                    f"{curve.uri} has seed {curve.seed}, and no run of {baseline} has: give one, or leave this out"
                )
            yield {"strategy": name, "seed": curve.seed, **saved(curve, rivals[curve.seed])}


def saved_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each strategy: the share of labels saved, mean and standard deviation over the seeds, and the level."""
    table = []
    for name in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == name]
        level = float(np.mean([row["level"] for row in mine]))
        table.append({"strategy": name, "level": level, **_spread([row["saved"] for row in mine])})
    return table


def picture(rows: Sequence[dict[str, Any]], metric: str, shares: Sequence[dict[str, Any]], baseline: str) -> bytes:
    """Return an HTML page with a curve for each strategy, its spread, and the labels saved; it needs no network."""
    section = curves_section("curves", "Curves", {metric: rows}, [{**row, "metric": metric} for row in shares], baseline)
    return render(Page("Learning curves", f"{metric} after training, by the number of labels.", [section]))


def curves(options: CurvesOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Compare finished rounds; return the manifest of a curves/ folder.

    Its `table` has a row for each strategy and number of labels, `saved` one for each strategy but the baseline, where there is
    one. Also writes both as Parquet (curves.parquet with every single value, saved.parquet with every seed) and curves.html.
    """
    if not options.runs:
        raise InputError("coresift curves needs runs: give folders that `coresift rounds` wrote")
    found, digests = read_curves(options.runs, options.metric, progress)
    by_seed = []
    if options.baseline != "none":
        by_seed = list(saved_by_seed(found, options.baseline))
    metric, place = found[0].metric, Place(options.out)
    identity = {**result_options(options), "metric": metric, "names": [curve.name for curve in found]}
    claim = Claim.of(place, "curves", {"runs": digests}, identity, options.overwrite, [curve.uri for curve in found])
    published = claim.published()
    if published is not None:
        return published
    claim.take()
    table = curve_table(found)
    every = [
        {"strategy": curve.name, "seed": curve.seed, "labeled": int(labels), "metric": metric, "value": float(value)}
        for curve in found
        for labels, value in zip(curve.labeled, curve.values, strict=True)
    ]
    place.at("curves.parquet").write(table_bytes(pa.Table.from_pylist(every)))
    if by_seed:
        place.at("saved.parquet").write(table_bytes(pa.Table.from_pylist(by_seed)))
    saved_rows = saved_table(by_seed)
    place.at("curves.html").write(picture(table, metric, saved_rows, options.baseline))
    facts = {"metric": metric, "baseline": options.baseline, "table": table, "saved": saved_rows}
    return publish(place, {**facts, "num_runs": len(found)})
