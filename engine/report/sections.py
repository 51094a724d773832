"""From what was found to the sections of the page that show images: picks, map, copies; and those that are tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.arrays import Floats, Ints
from engine.page import Section, number
from engine.page.charts import Chart, colour_of, plain, symbol_of
from engine.report.balance import Balance
from engine.report.copies import COMPARED, MOST_BITS, PAIRS_SHOWN, Alike, Excluded, PickCopies, shown_pairs
from engine.report.projection import SAID, Map
from engine.report.subjects import Subject, labelled_before
from engine.report.thumbnails import Album, Tile
from engine.store import FeatureStore

Near = dict[str, tuple[Ints, Floats]]
PICK_COLUMNS = ("rank", "id", "row")
REJECTED_SHOWN = 100
OPEN_PICKS = 56
"""Picks that are seen at once; the others unfold."""


def _pick_tiles(subject: Subject, album: Album, most: int) -> list[tuple[str, Tile]]:
    """Return the tiles of the first picks, each with its caption."""
    table = subject.table.slice(0, most)
    columns = {name: table[name].to_pylist() for name in table.schema.names if name not in PICK_COLUMNS}
    tiles = []
    for place, row in enumerate(subject.rows[:most].tolist()):
        more = [("pick", f"{place + 1:,}"), *((name.replace("_", " "), values[place]) for name, values in columns.items())]
        more = [(name, value) for name, value in more if value == value]  # NaN: the method has no such figure
        label = album.label(row)
        tile = album.tile(row, f"{subject.name}, pick {place + 1:,}" + (f": {label}" if label else ""), more)
        tiles.append((f"{place + 1:,}" + (f"\n{label}" if label else ""), tile))
    return tiles


def _neighbour_rows(subject: Subject, album: Album, near: tuple[Ints, Floats]) -> list[dict[str, Any]]:
    """Return for each of the first picks its tile and those of its nearest unlabelled images."""
    rows = []
    for place, (found, distances) in enumerate(zip(*near, strict=True)):
        pick = int(subject.rows[place])
        beside = [
            (number(distance), album.tile(int(row), f"near pick {place + 1:,}: {album.label(int(row)) or album.id(int(row))}",
                                          [("distance", float(distance))]))
            for row, distance in zip(found, distances, strict=True)
            if row >= 0
        ]  # fmt: skip
        title = f"{subject.name}, pick {place + 1:,}"
        rows.append({"pick": (f"pick {place + 1:,}", album.tile(pick, title)), "near": beside})
    return rows


def _groups(subject: Subject, found: Map | None, sampled: Ints, tiles: Sequence[tuple[str, Tile]]) -> list[dict[str, Any]]:
    """Return the picks by the map's groups: each group's share of the sampled pool and of the picks, and its tiles."""
    if found is None or not len(sampled):
        return []
    group_of = dict(zip(found.rows.tolist(), found.groups.tolist(), strict=True))
    pool = Counter(group_of[row] for row in sampled.tolist())
    mine = [group_of[row] for row in subject.rows.tolist() if row in group_of]
    counts = Counter(mine)
    return [
        {
            "number": group + 1,
            "pool": pool[group] / len(sampled),
            "picks": counts[group] / max(1, len(mine)),
            "count": counts[group],
            "tiles": [(caption, tile) for caption, tile in tiles if group_of.get(tile.row) == group],
        }
        for group in range(int(found.groups.max(initial=0)) + 1)
    ]


def picks_section(
    subjects: Sequence[Subject], album: Album, most: int, near: Near, found: Map | None, sampled: Ints
) -> Section:
    """Return the section of the picks: in pick order, by group, and with their nearest unlabelled images."""
    each = []
    for index, subject in enumerate(subjects):
        tiles = _pick_tiles(subject, album, most)
        each.append(
            {
                "name": subject.name,
                "index": index,
                "total": len(subject.rows),
                "tiles": tiles,
                "groups": _groups(subject, found, sampled, tiles),
                "near": _neighbour_rows(subject, album, near[subject.uri]) if subject.uri in near else [],
                "missing": sum(tile.reason is not None for _, tile in tiles),
            }
        )
    return Section("picks", "What was selected", "picks", {"each": each, "open": OPEN_PICKS})


def _trace(name: str, rows: Ints, found: Map, first: int, marker: dict[str, Any]) -> Chart:
    places = found.places[np.searchsorted(found.rows, rows)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name),
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "customdata": list(range(first, first + len(rows))),
        "hoverinfo": "none",
        "marker": marker,
    }


def _saying(name: str) -> Callable[[int], str]:
    """Return what a pick is called, by its place from 1."""
    return lambda place: f"{name}, pick {place:,}"


def map_section(
    subjects: Sequence[Subject], album: Album, found: Map, sampled: Ints, shown: dict[str, Ints], num_vectors: int, how: str
) -> Section:
    """Return the section of the map: the sampled pool, what was labelled before, and each selection's `shown` picks."""
    points, data = list[dict[str, Any]](), list[Chart]()

    def add(name: str, rows: Ints, marker: dict[str, Any], say: Callable[[int], str]) -> None:
        data.append(_trace(name, rows, found, len(points), marker))
        for place, row in enumerate(rows.tolist()):
            label = album.label(row)
            tile = album.tile(row, say(place + 1) + (f": {label}" if label else ""))
            points.append({"title": tile.title, "facts": tile.facts, "row": row, "reason": tile.reason})

    picked = np.unique(np.concatenate([sampled[:0], *shown.values()]))
    labelled = np.intersect1d(labelled_before(subjects), found.rows)
    add("pool", np.setdiff1d(sampled, picked), {"size": 5, "color": "var(--pool)", "opacity": 0.55}, lambda _: "pool")
    if len(labelled):
        cross = {"size": 7, "symbol": "x-thin", "line": {"width": 1.5, "color": "var(--text)"}}
        add("labelled before", labelled, cross, lambda _: "labelled before")
    for index, subject in enumerate(subjects):
        marker = {
            "size": 9,
            "color": colour_of(index),
            "symbol": symbol_of(index),
            "line": {"width": 1, "color": "var(--panel)"},
        }
        add(subject.name, shown[subject.uri], marker, _saying(subject.name))
    hidden = {"visible": False, "showgrid": False}
    layout = {
        "xaxis": hidden, "yaxis": {**hidden, "scaleanchor": "x"}, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}, "dragmode": "pan",
        "hovermode": "closest", "legend": {"orientation": "h", "x": 0, "y": 0, "yanchor": "bottom", "itemsizing": "constant"},
    }  # fmt: skip
    clipped = [(s.name, len(shown[s.uri]), len(s.rows)) for s in subjects if len(shown[s.uri]) < len(s.rows)]
    without = sum(point["reason"] is not None for point in points)
    return Section(
        "map",
        "Where in the pool",
        "map",
        {
            "chart": {"data": data, "layout": layout, "points": points},
            "sampled": len(sampled),
            "total": num_vectors,
            "clipped": clipped,
            "how": SAID[how],
            "without": without,
            "points": len(points),
        },
    )


def balance_section(subjects: Sequence[Subject], found: Balance) -> Section:
    """Return the section of classes and metadata."""
    names = [subject.name for subject in subjects]
    data = {"names": names, "found": found, "has_before": bool(len(labelled_before(subjects)))}
    return Section("balance", "Balance", "balance", data)


def copies_section(
    subjects: Sequence[Subject],
    album: Album,
    groups: Alike | None,
    near: Sequence[PickCopies],
    excluded: Excluded | None,
    num_vectors: int,
) -> Section:
    """Return the section of images that look alike."""

    def tile(row: int, more: Sequence[tuple[str, Any]] = ()) -> tuple[str, Tile]:
        label = album.label(int(row))
        return label or album.id(int(row)), album.tile(int(row), album.id(int(row)), more)

    picks = []
    for subject, copies in zip(subjects, near, strict=True) if near else ():
        pairs = [
            {"pick": tile(pick), "other": tile(other, [("different bits", int(bits))]), "bits": int(bits)}
            for pick, other, bits in list(zip(copies.picks, copies.others, copies.bits, strict=True))[:PAIRS_SHOWN]
        ]
        inside = np.isin(copies.others, subject.rows)
        picks.append(
            {
                "name": subject.name,
                "compared": copies.compared,
                "with_copy": len(np.unique(copies.picks)),
                "both_picked": len(np.unique(copies.picks[inside])),
                "pairs": pairs,
                "more": max(0, len(copies.picks) - PAIRS_SHOWN),
            }
        )
    left_out = None
    if excluded:
        at = shown_pairs(excluded)
        similarity = [None] * len(at) if excluded.similarity is None else [float(excluded.similarity[i]) for i in at]
        left_out = {
            "count": len(excluded.rows),
            "picked": [(s.name, len(np.intersect1d(s.rows, excluded.rows))) for s in subjects],
            "pairs": [
                {"left_out": tile(excluded.rows[i]), "kept": tile(excluded.kept[i]), "similarity": value}
                for i, value in zip(at, similarity, strict=True)
            ],
        }
    largest = [(size, [tile(row) for row in rows]) for size, rows in groups.largest] if groups else []
    data = {
        "hashed": groups is not None, "groups": groups, "largest": largest, "picks": picks, "excluded": left_out,
        "bits": MOST_BITS, "most": COMPARED, "total": num_vectors,
    }  # fmt: skip
    return Section("copies", "Near copies", "copies", data)


def rejected_section(store: FeatureStore) -> Section:
    """Return the section of the images that can't be used, with the reasons."""
    total, rows, reasons = int(store.manifest.get("num_rejected") or 0), list[dict[str, Any]](), Counter[str]()
    place = store.place.at("rejected.parquet")
    if total and place.exists():
        table = pq.read_table(pa.BufferReader(place.read()))
        reasons.update(reason.split(":")[0] for reason in table["reason"].to_pylist())
        rows = table.slice(0, REJECTED_SHOWN).to_pylist()
    data = {"total": total, "of": store.num_rows, "rows": rows, "reasons": reasons.most_common()}
    return Section("rejected", "Rejected images", "rejected", data)
