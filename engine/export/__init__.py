"""Exports: a selection in the format of another tool. The EXPORTS table, one module a format.

A format is a function of a `Job` that returns the files it consists of. Images are read once, in pick order; they stay where
they are unless --copy is given.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.export.addresses import Addresses, shared
from engine.export.entries import HELD, Sink, class_folders, no_files, read_entries
from engine.export.guesses import read_guesses
from engine.export.job import Files, Job
from engine.export.output import Names, check_out, new_folder, write_file, write_ids
from engine.export.wanted import IDS, POOL, ROWS, Wanted, find_wanted
from engine.places import Place
from engine.retry import reached
from engine.schema import InputError, Progress, lookup, no_progress
from engine.verbs import ExportOptions


@dataclass(frozen=True)
class Format:
    """One kind of export.

    `writer` is module:function. `endings`: OUT is one file, called so; () where it is a folder. `below`: where copies go in
    the folder that --copy makes of it, None where there are none to make or they go into the file (`embeds`). `relative`:
    images are named below the pool's folder. `needs` as in `find_wanted`.
    """

    writer: str
    summary: str
    endings: tuple[str, ...] = ()
    below: str | None = None
    embeds: bool = False
    relative: bool = False
    links: bool = False
    guesses: bool = False
    hint: str = ""
    needs: frozenset[str] = frozenset((ROWS, IDS, POOL))

    def load(self) -> Callable[[Job], Files]:
        """Return the function that writes it."""
        module, _, name = self.writer.partition(":")
        writer: Callable[[Job], Files] = getattr(importlib.import_module(module), name)
        return writer


EXPORTS: dict[str, Format] = {
    "label-studio": Format(
        "engine.export.label_studio:write",
        "Label Studio tasks, with pre-annotations",
        (".json",),
        below="images",
        guesses=True,
        hint='its labelling setup must call the image $image; pre-annotations need <Choices name="choice" toName="image"> or '
        '<RectangleLabels name="label" toName="image">, as its templates do',
    ),
    "cvat": Format(
        "engine.export.cvat:write",
        "CVAT's dataset manifest, for its cloud storages",
        (".jsonl",),
        below="images",
        relative=True,
        hint="put it where the storage's names begin, and name it there as the storage's manifest",
    ),
    "coco": Format("engine.export.coco:write", "a COCO subset", (".json",), below="images", relative=True),
    "fiftyone": Format(
        "engine.export.fiftyone:write", "a FiftyOne data set, with tags and predictions", below="data", guesses=True
    ),
    "huggingface": Format(
        "engine.export.huggingface:write", "a data set of Hugging Face's datasets", (".parquet",), embeds=True
    ),
    "imagefolder": Format("engine.export.lists:imagefolder", "a folder a class, of links to the images", below="", links=True),
    "voc": Format("engine.export.voc:write", "a list for VOC's ImageSets/Main", (".txt",), below="JPEGImages", relative=True),
    "ids": Format("engine.export.lists:ids", "ids, one a line", (".txt",), needs=frozenset((IDS,))),
    "indices": Format("engine.export.lists:indices", "pool rows in pick order", (".json",), needs=frozenset((ROWS,))),
}


def _check(options: ExportOptions, form: Format) -> None:
    """Raise InputError for options that mean nothing to a format."""
    reads = POOL in form.needs
    if options.copy and not reads:
        raise InputError(f"--copy means nothing for {options.format}: it names images, and has none")
    if options.predictions and not form.guesses:
        able = ", ".join(name for name, other in EXPORTS.items() if other.guesses)
        raise InputError(f"--predictions means nothing for {options.format}: {able} take them")
    if options.uri_prefix and (not reads or form.links or (form.embeds and options.copy)):
        raise InputError(f"--uri-prefix means nothing for {options.format} here: no address is written")


def _addresses(options: ExportOptions, form: Format, wanted: Wanted, out: Place) -> Addresses:
    """Return how addresses are rewritten: by default those below the pool's folder, or of copies, lose what is before them."""
    usual = None
    if wanted.pool is not None and options.copy and (form.relative or not form.endings):
        inside = "images/" if options.format == "coco" else "JPEGImages/" if options.format == "voc" else ""
        usual = f"{shared(out.absolute).rstrip('/')}/{inside}"
    elif wanted.pool is not None and form.relative:
        usual = f"{shared(wanted.pool.base or wanted.pool.address).rstrip('/')}/"
    return Addresses.of(options.uri_prefix, usual)


def _facts(
    options: ExportOptions, form: Format, wanted: Wanted, job: Job, addresses: Addresses, sink: Sink | None
) -> dict[str, Any]:
    notes = [*wanted.notes, *([form.hint] if form.hint else [])]
    if addresses.keys:
        notes.append(
            f"{addresses.keys:,} addresses have keys, which are not handed over: the tool needs a storage of its own, "
            "with keys; --uri-prefix says how it calls that"
        )
    if addresses.local and options.format == "label-studio":
        notes.append(
            f"{addresses.local:,} images are files here, which Label Studio shows as /data/local-files/?d=PATH, PATH being "
            "below its LOCAL_FILES_DOCUMENT_ROOT: --uri-prefix ROOT/=/data/local-files/?d="
        )
    made = len(sink.entries) if sink is not None else 0
    facts: dict[str, Any] = {"format": options.format, "out": Place(options.out).uri, "num_images": len(wanted.ids)}
    facts |= {"num_links": made} if form.links and not options.copy else {"num_copies": len(wanted.ids) if job.copies else 0}
    if job.guesses is not None:
        facts["num_predictions"] = len(job.guesses.found)
    return {**facts, "notes": notes}


def _sink(options: ExportOptions, form: Format, wanted: Wanted, place: Place) -> Sink | None:
    """Return where images are put below the folder that is written, None where they stay; `place` is its temporary name."""
    links = form.links and not options.copy
    if wanted.pool is None or not (links or options.copy):
        return None
    classes = class_folders(wanted.pool) if form.links else None
    names = Names(stems=options.format == "voc")
    return Sink(place, shared(Place(options.out).absolute), form.below or "", links, classes, names)


def _write(
    options: ExportOptions, form: Format, wanted: Wanted, place: Place, folder: bool, progress: Progress
) -> dict[str, Any]:
    """Write an export to a folder, or a file; return what was written."""
    copies, reads = options.copy, POOL in form.needs
    guesses = read_guesses(options.predictions, wanted, options.min_score) if options.predictions else None
    addresses = _addresses(options, form, wanted, Place(options.out))
    sink = _sink(options, form, wanted, place) if folder else None
    embeds = form.embeds and copies
    entries = read_entries(wanted, addresses, sink, embeds, options.max_pixels, progress) if reads else iter(())
    with tempfile.TemporaryDirectory(prefix="coresift-export-") as scratch:
        job = Job(wanted, entries, guesses, copies, Path(scratch))
        files = form.load()(job)
        if options.uri_prefix:
            addresses.check()
        for name, data in files.items():
            write_file(place.at(*name.split("/")) if folder else place, data)
    if folder:
        unnamed = zip([""] * len(wanted.ids), wanted.ids, wanted.rows.tolist(), strict=True)
        write_ids(place, sink.entries if sink is not None else list(unnamed))
    return _facts(options, form, wanted, job, addresses, sink)


def export(options: ExportOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Write a selection in another tool's format; return what was written: format, out, num_images, num_copies, notes.

    Nothing is there under OUT's name until all of it is. Raises InputError for unusable input, or an OUT that is there
    already; RunError for an image that can't be read, or a place that can't be reached.
    """
    form = lookup(options.format, EXPORTS, "format")
    _check(options, form)
    out = Place(options.out)
    folder = not form.endings or (options.copy and not form.embeds)
    with reached(options.out):
        reads = [uri for uri in (*options.selection, options.pool, options.features, options.predictions) if uri]
        check_out(out, folder, form.endings, options.overwrite, reads)
    wanted = find_wanted(options, form.needs)
    if wanted.pool is not None and POOL in form.needs and wanted.pool.kind in HELD and not options.copy:
        raise no_files(wanted.pool)
    if form.links and not options.copy and out.remote:
        raise InputError(f"--out {out.uri}: links are made on this machine's disk alone: pass --copy, or choose another --out")
    with reached(options.out), new_folder(out) if folder else nullcontext(out) as place:
        return _write(options, form, wanted, place, folder, progress)
