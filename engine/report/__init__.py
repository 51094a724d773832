"""`report`: one self-contained HTML file about selections of a pool, and other folders beside them.

What costs a pass over the pool (coverage, neighbours, columns, hashes) is a pass over blocks or parts; what is drawn is of
samples, so that the page's size depends on what is shown and not on the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.arrays import Ints
from engine.assess import assess
from engine.folders import now, versions
from engine.page import GENERATOR, Page, Section, count, percent, render, signed
from engine.placement import open_shards
from engine.places import Place
from engine.report import copies, sections
from engine.report.balance import balance_of
from engine.report.coverage import coverage_section
from engine.report.neighbors import nearest_unlabelled
from engine.report.others import other_sections
from engine.report.projection import Map, map_of, sample_rows
from engine.report.provenance import Origin, command_of, of_features, of_selection
from engine.report.subjects import Subject, labelled_before, open_features, read_folders
from engine.report.thumbnails import (
    LARGE_PX,
    SMALL_PX,
    Album,
    Images,
    Thumbnails,
    cheap_rows,
    open_images,
    read_thumbnails,
    source_of,
)
from engine.schema import InputError, Progress, fields_of, no_progress
from engine.shards import Shards
from engine.store import FeatureStore
from engine.verbs import AssessOptions, ReportOptions

NEIGHBOUR_PICKS = 40
"""Picks of a selection whose neighbours are shown, the first ones."""
MAP_PICKS = 1000
"""Picks of a selection on the map, the first ones; as many labelled images, spread over their rows."""
NOTHING: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Vectors:
    """What is found from the vectors: coverage of each selection, neighbours of its first picks, and the map."""

    coverage: list[dict[str, Any]]
    near: sections.Near
    map: Map | None
    sampled: Ints


@dataclass(frozen=True)
class About:
    """What the page says of selections: at its top, in its sections, and of where they are from."""

    title: str
    lead: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    thumbnails: Thumbnails = field(default_factory=lambda: Thumbnails({}, {}))


def _check_out(options: ReportOptions) -> Place:
    """Return where the page goes; raises InputError where a folder, or a file that is no page of ours, stands there."""
    place = Place(options.out)
    if not options.out.endswith((".html", ".htm")):
        raise InputError(f"--out {options.out!r} is not an .html file: name one")
    if place.exists():
        try:
            ours = f'name="generator" content="{GENERATOR}"'.encode() in place.read()[:4096]
        except OSError:
            ours = False
        if not ours:
            raise InputError(f"--out {place.uri} exists and is not a page that coresift wrote: choose another")
    return place


def _shown_picks(subjects: Sequence[Subject]) -> dict[str, Ints]:
    return {subject.uri: subject.rows[:MAP_PICKS] for subject in subjects}


def _map_rows(subjects: Sequence[Subject], sampled: Ints) -> Ints:
    """Return the pool rows on the map, ascending."""
    labeled = labelled_before(subjects)
    labeled = labeled[:: -(-len(labeled) // MAP_PICKS) or 1]
    return np.unique(np.concatenate([sampled, labeled, *_shown_picks(subjects).values()]))


def _from_vectors(
    shards: Shards, store: FeatureStore, subjects: Sequence[Subject], options: ReportOptions, progress: Progress
) -> Vectors:
    """Return what is found from normalised vectors."""
    measured = list[dict[str, Any]]()
    for subject in subjects:
        asked = AssessOptions(features=store.place.uri, selection=subject.uri, draws=options.draws, seed=options.seed)
        measured.append(assess(shards, subject.rows, subject.selection.labeled, asked, progress))
    near: sections.Near = {}
    for subject in subjects if options.neighbors and options.thumbnails else ():
        some = subject.rows[: min(NEIGHBOUR_PICKS, options.thumbnails)]
        near[subject.uri] = nearest_unlabelled(shards, some, subject.after, options.neighbors)
        progress("neighbours", len(near), len(subjects), subject.name)
    if not options.map_images:
        return Vectors(measured, near, None, NOTHING)
    sampled = sample_rows(store, options.map_images, options.seed)
    progress("map", 0, 1, "")
    found = map_of(shards, _map_rows(subjects, sampled), options.projection, options.seed)
    progress("map", 1, 1, "")
    return Vectors(measured, near, found, sampled)


def _has_rivals(subject: Subject, store: FeatureStore) -> bool:
    """Return whether there are other picks to compare a selection's with."""
    free = store.num_vectors - len(np.intersect1d(subject.selection.labeled, store.rows))
    return 0 < len(subject.rows) < free


def _why_no_vectors(store: FeatureStore, subjects: Sequence[Subject]) -> str | None:
    """Return why nothing can be found from the vectors; None where it can."""
    if not store.holds_vectors:
        return "The features hold boxes or scores, not vectors, so there is no map, no coverage and no neighbours."
    if store.vectors_per_image > 1:
        return "The features hold several vectors an image, so there is no map, no coverage and no neighbours."
    if not all(_has_rivals(subject, store) for subject in subjects):
        return "A selection holds nothing, or all that could be picked: there is no coverage to compare, and no map."
    return None


def _images(found: Images, store: FeatureStore, large: Ints, small: Ints, progress: Progress) -> Thumbnails:
    """Return large thumbnails of some rows, and small ones of others."""
    first = read_thumbnails(found, large, store, LARGE_PX, progress, "images")
    rest = np.setdiff1d(small, large)
    cheap = cheap_rows(found, rest)
    second = read_thumbnails(found, cheap, store, SMALL_PX, progress, "images of the map")
    unread = {int(row): "not read for the map: too many files" for row in np.setdiff1d(rest, cheap)}
    return Thumbnails(first.images | second.images, first.reasons | second.reasons, unread)


def _headline(subject: Subject, store: FeatureStore, seen: dict[str, Any] | None) -> str:
    """Return what is told of a selection at the top: its size, and its mean distance beside random draws."""
    size = f"{count(len(subject.rows))} picks, {percent(len(subject.rows) / store.num_rows)}"
    figure = next((f for f in seen["figures"] if f["metric"] == "mean_distance"), None) if seen else None
    if not figure or not figure["random_mean"]:
        return size
    return f"{size}; mean distance {signed(100 * (figure['value'] / figure['random_mean'] - 1))}\u00a0% beside random"


def _about_selections(subjects: Sequence[Subject], store: FeatureStore, options: ReportOptions, progress: Progress) -> About:
    """Return what the page says of selections."""
    found, excluded = open_images(options, store), copies.read_dedup(options.dedup, store) if options.dedup else None
    lacking = _why_no_vectors(store, subjects)
    seen = Vectors([], {}, None, NOTHING)
    if lacking is None:
        with open_shards(store, options, True, ()) as shards:
            seen = _from_vectors(shards, store, subjects, options, progress)
    before, names = labelled_before(subjects), [subject.name for subject in subjects]
    hashes = copies.hashes_of(store)
    groups = copies.alike(hashes, store.rows) if hashes is not None else None
    near_copies = [copies.copies_of_picks(hashes, store.rows, s.rows) for s in subjects] if hashes is not None else []
    balance = balance_of(store, before, [subject.after for subject in subjects], names, progress)
    beside = [rows[rows >= 0] for rows, _ in seen.near.values()]
    first = [subject.rows[: options.thumbnails] for subject in subjects]
    large = np.unique(np.concatenate([*first, *beside, copies.shown_rows(groups, near_copies, excluded)]))
    small = seen.map.rows if seen.map else NOTHING
    thumbnails = _images(found, store, large, small, progress)
    album = Album(store, np.concatenate([large, small]), thumbnails)
    made = [sections.picks_section(subjects, album, options.thumbnails, seen.near, seen.map, seen.sampled)]
    if seen.map:
        shown = _shown_picks(subjects)
        made.append(sections.map_section(subjects, album, seen.map, seen.sampled, shown, store.num_vectors, options.projection))
    if seen.coverage:
        made.append(coverage_section(subjects, seen.coverage))
    made.append(sections.balance_section(subjects, balance))
    made.append(sections.copies_section(subjects, album, groups, near_copies, excluded, store.num_vectors))
    made.append(sections.rejected_section(store))
    what = "A selection" if len(subjects) == 1 else f"{len(subjects)} selections"
    facts = [("images in the pool", count(store.num_rows)), ("with features", count(store.num_vectors))]
    facts += [("labelled before", count(len(before)))] if len(before) else []
    for number, subject in enumerate(subjects):
        facts.append((subject.name, _headline(subject, store, seen.coverage[number] if seen.coverage else None)))
    lead = f"{what} of {source_of(store, options)}." + (f" {lacking}" if lacking else "")
    origins = [*(of_selection(subject, store.place.uri) for subject in subjects), of_features(store)]
    return About("Selection report", lead, facts, made, origins, thumbnails)


def report(options: ReportOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the page; return what it holds, ready for JSON: `out`, `bytes`, `sections`, `num_images`, `num_unreadable`, `why`.

    `why` is the first reason why an image is a grey tile. Raises InputError for folders that can't be shown together, features
    or a pool that are not those of the selections, and an `out` that is not to be written over.
    """
    subjects, others = read_folders(options.folders)
    place = _check_out(options)
    if options.dedup and not subjects:
        raise InputError("--dedup is shown beside a selection: give one")
    store = open_features(subjects, options.features) if subjects else None
    about = About("coresift report", "What folders that coresift wrote hold, side by side.")
    if store is not None:
        about = _about_selections(subjects, store, options, progress)
    facts = {"origins": about.origins, "made": now(), "versions": versions()}
    made = [*about.sections, *other_sections(others), Section("provenance", "Provenance", "provenance", facts)]
    command = command_of(
        "report", ReportOptions, {field.name: getattr(options, field.name) for field in fields_of(ReportOptions)}
    )
    images, reasons = about.thumbnails.images, about.thumbnails.reasons
    data = render(Page(about.title, about.lead, made, images, about.facts, command))
    place.write(data)
    counts = {"num_images": len(images), "num_unreadable": len(reasons), "why": next(iter(reasons.values()), None)}
    return {"out": place.uri, "bytes": len(data), "sections": [section.id for section in made], **counts}
