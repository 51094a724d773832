"""From a pool and what was chosen of it to a small folder of images with their labels, and nothing else of the pool.

Images stand in the order of their pool rows, so that what holds some of them is read once. A job is up to 1,024 of them; it
writes one deterministic file, or several of up to 64 MiB, and finished jobs are skipped when the same command is run again.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine import session
from engine.arrays import Ints
from engine.chosen import SHOWN, Chosen
from engine.chunks import listed_pool
from engine.folders import begin
from engine.images import ImageSet, publish_images
from engine.labels import Labels
from engine.places import Place
from engine.records import Part, Rules, Wanted, finished_parts, make_parts
from engine.schema import InputError, Progress, RunError, nearest, no_progress
from engine.sources import Pool, save_pool
from engine.sources.listing import extents

JOB_IMAGES = 1024
HERE = 2048
"""Up to so many images are gathered in this process, where Ray would take longer to start."""
MOST_LEFT_OUT = 0.01
"""Share of a test pool's images that may be unreadable."""
LISTED = 100
"""Images left out that the manifest names; it counts them all."""
LISTING = "listing"

Job = tuple[int, int]
"""Places [start, stop) among the chosen rows."""


def jobs_of(pool: Pool, rows: Ints) -> list[Job]:
    """Cut ascending rows into jobs: JOB_IMAGES each at most, an extent of a container in one job if it fits."""
    if "start" not in pool.listing.schema.names:
        ends = [*range(JOB_IMAGES, len(rows), JOB_IMAGES), len(rows)]
        return list(zip([0, *ends[:-1]], ends, strict=True))
    ends, begun, at = list[int](), 0, 0
    for _, places in extents(pool.listing, rows):
        if at > begun and at + len(places) - begun > JOB_IMAGES:
            ends.append(at)
            begun = at
        at += len(places)
        while at - begun > JOB_IMAGES:
            begun += JOB_IMAGES
            ends.append(begun)
    ends.append(at)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _task(
    batch: dict[str, Any], where: str, listing: str, digest: str, addresses: tuple[str, str], rules: Any
) -> dict[str, list[str]]:
    """Do the jobs of a batch of Ray Data; our own errors travel as results, without Ray's stack around them."""
    import ray

    pool, done = listed_pool(listing, digest, addresses), []
    for start, rows in zip(batch["start"], batch["rows"], strict=True):
        found: dict[str, Any]
        try:
            parts = make_parts(Place(where), pool, int(start), np.asarray(rows, dtype=np.int64), ray.get(rules))
            found = {"parts": [dataclasses.asdict(part) for part in parts]}
        except (InputError, RunError) as error:
            found = {"failed": str(error), "input": isinstance(error, InputError)}
        done.append(json.dumps(found))
    return {"done": done}


def _on_ray(place: Place, pool: Pool, jobs: Sequence[Job], rows: Ints, rules: Rules) -> Iterator[list[Part]]:
    """Do jobs by tasks of one Ray Data execution; yield the parts of each, in any order.

    The listing that the tasks read lies beside the parts while they run, and not longer: it names the whole pool.
    """
    import ray
    import ray.data

    # named by what it lists: a worker keeps the last one open
    listing = place.at(LISTING, f"{pool.listing.digest[:16]}.arrow")
    save_pool(pool, listing)
    try:
        items = [{"start": start, "rows": rows[start:stop].tolist()} for start, stop in jobs]
        given = {
            "where": place.absolute,
            "listing": listing.absolute,
            "digest": pool.digest,
            "addresses": pool.addresses,
            "rules": ray.put(rules),
        }
        data = ray.data.from_items(items, override_num_blocks=len(items))
        done = data.map_batches(_task, batch_size=1, num_cpus=1, fn_kwargs=given)
        with session.waiting() as moved:
            for batch in done.iter_batches(batch_size=1, prefetch_batches=0):
                moved()
                for text in batch["done"]:
                    found = json.loads(text)
                    if "failed" in found:
                        raise (InputError if found["input"] else RunError)(found["failed"])
                    yield [Part(**part) for part in found["parts"]]
    finally:
        place.at(LISTING).remove()


def _here(place: Place, pool: Pool, jobs: Sequence[Job], rows: Ints, rules: Rules) -> Iterator[list[Part]]:
    return (list(make_parts(place, pool, start, rows[start:stop], rules)) for start, stop in jobs)


def _codes(names: Sequence[str] | None, wanted: Sequence[str] | None) -> tuple[int, ...] | None:
    """Return the wanted class of each class there is, -1 for one that is not wanted; None: any number stays as it is."""
    if wanted is None:
        return None if names is None else tuple(range(len(names)))
    place_of = {name: code for code, name in enumerate(wanted)}
    return tuple(range(len(wanted)) if names is None else (place_of.get(name, -1) for name in names))


def _check(parts: Sequence[Part], pool: Pool, wanted: Wanted, names: Sequence[str] | None) -> None:
    """Raise InputError for images without what they need, where `strict` or if none has it, and for unknown classes.

    RunError where too many can't be read.
    """
    unlabelled = [entry for part in parts for entry in part.unlabelled]
    broken = [entry for part in parts for entry in part.left_out]
    seen = sum(part.stop - part.start for part in parts)
    what = "boxes" if wanted.boxes else "label"
    if unlabelled and (wanted.strict or len(unlabelled) == seen):
        shown = "; ".join(f"{entry['id']!r}: {entry['reason']}" for entry in unlabelled[:SHOWN])
        raise InputError(
            f"{len(unlabelled):,} of {seen:,} images of pool {pool.uri!r} have no {what}: {shown}"
            f"{'; ...' if len(unlabelled) > SHOWN else ''}. {wanted.way_out}"
        )
    unknown = sum((Counter(part.unknown) for part in parts), Counter[str]())
    if unknown:
        code, known = next(iter(unknown)), wanted.class_names or names or ()
        name = names[int(code)] if names and 0 <= int(code) < len(names) else code
        raise InputError(
            f"{unknown.total():,} labels of {seen:,} images of pool {pool.uri!r} are of {len(unknown)} unknown classes, such "
            f"as {name!r}{nearest(name, known)}: those known are {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}"
        )
    if len(broken) > MOST_LEFT_OUT * seen:
        raise RunError(
            f"{len(broken):,} of {seen:,} images of pool {pool.uri!r} can't be used, above {MOST_LEFT_OUT:.0%}: "
            + "; ".join(f"{entry['id']!r}: {entry['reason']}" for entry in broken[:SHOWN])
        )


def _finish(place: Place, parts: list[Part], pool: Pool, wanted: Wanted, labels: Labels | None) -> None:
    """Check what was gathered and publish it."""
    names = labels.class_names if labels is not None else pool.class_names
    _check(parts, pool, wanted, names)
    left_out = [entry for part in parts for entry in (*part.left_out, *part.unlabelled)]
    entries = [{key: getattr(part, key) for key in ("name", "num_images", "sha256", "bytes")} for part in parts]
    counts = ("num_boxes", "num_without_boxes") if wanted.boxes else ()
    facts = {
        **{key: sum(getattr(part, key) for part in parts) for key in counts},
        "num_labels_unused": labels.num_unused if labels is not None else 0,
        "num_labels_unknown": labels.num_unknown if labels is not None else 0,
        "boxes_left_out": labels.left_out if labels is not None else dict(pool.detail.get("boxes_left_out") or {}),
        "num_left_out": len(left_out),
        "left_out": sorted(left_out, key=lambda entry: int(entry["row"]))[:LISTED],
        "max_label": max(part.max_label for part in parts),
    }
    publish_images(place, entries, wanted.class_names or names or (), facts)


def _gather(
    place: Place, pool: Pool, rows: Ints, rules: Rules, address: str | None, here: bool, progress: Progress
) -> list[Part]:
    """Return the parts of all chosen rows, in order: those of an earlier run, and those made now."""
    names = frozenset(place.at("parts").names())
    kept = {job: finished_parts(place, *job, names) for job in jobs_of(pool, rows)}
    parts, todo = [part for own in kept.values() for part in own or ()], [job for job, own in kept.items() if own is None]
    if todo and not here:
        session.connect(address)
    done = sum(part.stop - part.start for part in parts)
    progress("gather", done, len(rows), "")
    for own in (_here if here else _on_ray)(place, pool, todo, rows, rules) if todo else ():
        if rules.wanted.strict and not any(part.num_images for part in own):
            _check(own, pool, rules.wanted, None)  # not one has what it needs: the others won't
        parts += own
        done += sum(part.stop - part.start for part in own)
        progress("gather", done, len(rows), "")
    return sorted(parts, key=lambda part: part.start)


def gather(
    pool: Pool,
    chosen: Chosen,
    place: Place,
    wanted: Wanted,
    labels: Labels | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    here: bool | None = None,
) -> ImageSet:
    """Write the chosen images of a pool, with their labels, to a published images/ folder; return it.

    Labels come from the pool, or, where they are given apart, from there alone. `here` says whether they are gathered in
    this process or by Ray; by default few are gathered here, unless a cluster is named. Raises InputError for images
    without what the task needs (see `Wanted`), for classes that are not known, and a pool that is not the one that was
    selected from; then the folder is gone. RunError for an image that can't be read, or a place that can't be reached.
    """
    names = labels.class_names if labels is not None else pool.class_names
    rules = Rules(wanted, labels, chosen.ids, _codes(names, wanted.class_names))
    classes = list(wanted.class_names) if wanted.class_names else None
    options = {"boxes": wanted.boxes, "strict": wanted.strict, "max_pixels": wanted.max_pixels, "class_names": classes}
    digests = {"pool": pool.digest, "chosen": chosen.digest, "labels": labels.digest if labels else None}
    if begin(place, "images", digests, options, overwrite) is None:
        here = address is None and len(chosen.rows) <= HERE if here is None else here
        try:
            _finish(place, _gather(place, pool, chosen.rows, rules, address, here, progress), pool, wanted, labels)
        except InputError:
            place.remove()  # another input is needed, so none of this is
            raise
    return ImageSet(place.address)


__all__ = ["Wanted", "gather", "jobs_of"]
