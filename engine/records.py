"""Samples of a pool -> images with their class, or their boxes, in parts of an images/ folder."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.arrays import Ints
from engine.chunks import pool_samples
from engine.decode import BadImageError, decode
from engine.folders import sha256_of
from engine.images import Record, boxes_of, images_table
from engine.labels import Labels
from engine.places import Place
from engine.schema import InputError, RunError
from engine.sources import Pool, Sample
from engine.sources.boxes import BOXES
from engine.store import part_bytes, part_name, part_schema

PART_BYTES = 64 << 20
"""Of image files in one part, at most, unless one alone has more."""


@dataclass(frozen=True)
class Wanted:
    """What the images are for.

    `boxes`: they need boxes, else a label. `strict`: an image that can't be used is an error; else it is left out and
    counted (test pools). `class_names`: what labels must mean, where that is settled already. `way_out` ends the error of
    images without what they need.
    """

    boxes: bool
    strict: bool
    max_pixels: int
    class_names: tuple[str, ...] | None = None
    way_out: str = "Label them (--labels), name the column (--label-column), or leave them out of the selection"


@dataclass(frozen=True)
class Rules:
    """What holds for every part. `ids`: what rows must be called, `codes`: the class of each class of the pool's or the
    file's, -1 for one that is not wanted; None: classes stay as they are.
    """

    wanted: Wanted
    labels: Labels | None
    ids: dict[int, str]
    codes: tuple[int, ...] | None


@dataclass
class Part:
    """Places [start, stop) among the chosen rows: what was counted in them, and the file.

    `left_out` are images that can't be read, `unlabelled` those without a class, or boxes: row, id, reason. `unknown` counts
    labels of unknown classes, by their code.
    """

    start: int
    stop: int
    num_images: int = 0
    num_boxes: int = 0
    num_without_boxes: int = 0
    max_label: int = -1
    left_out: list[dict[str, Any]] = field(default_factory=list)
    unlabelled: list[dict[str, Any]] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    name: str = ""
    sha256: str = ""
    bytes: int = 0

    def class_of(self, code: int | None, codes: Sequence[int] | None) -> int:
        """Return the class of a label, -1 where there is none or its class is unknown, which is counted."""
        if code is None:
            return -1
        known = code >= 0 and (codes is None or code < len(codes))
        found = (code if codes is None else codes[code]) if known else -1
        if found < 0:
            self.unknown[str(code)] = self.unknown.get(str(code), 0) + 1
        self.max_label = max(self.max_label, found)
        return found


class _NoTargetError(Exception):
    """This image has no class, or was not annotated with boxes; the message is the reason."""


def _file_of(sample: Sample, max_pixels: int) -> bytes:
    """Return an image's file, decoded once to see that it can be; decoded pixels become a PNG. Raises BadImageError."""
    if sample.error is not None:
        raise BadImageError(sample.error)
    if isinstance(sample.data, bytes):
        decode(sample.data, max_pixels)
        return sample.data
    buffer = io.BytesIO()
    sample.data.save(buffer, format="PNG")
    return buffer.getvalue()


def _targets(sample: Sample, rules: Rules) -> tuple[int | None, list[dict[str, Any]] | None]:
    """Return what the pool, or the labels given apart, say of an image: its label and its boxes."""
    labels = rules.labels
    if labels is None:
        return sample.label, sample.extra.get(BOXES.name)
    (at,) = labels.find([str(sample.row) if labels.by_row else sample.id]).tolist()
    if at < 0:
        return None, None
    code = int(labels.codes[at])
    return code if code >= 0 else None, labels.boxes[at].as_py() if labels.boxes is not None else None


def _record(sample: Sample, data: bytes, rules: Rules, part: Part) -> Record:
    """Return an image with what the task needs of it; raises _NoTargetError where it hasn't."""
    label, drawn = _targets(sample, rules)
    where = f" in {rules.labels.uri}" if rules.labels is not None else ""
    if rules.wanted.boxes:
        if drawn is None:
            raise _NoTargetError(f"no boxes: not annotated{where}")
        boxes, theirs, crowd = boxes_of(drawn)
        part.num_boxes += len(boxes)
        part.num_without_boxes += not len(boxes)
        classes = np.array([part.class_of(code, rules.codes) for code in theirs.tolist()], dtype=np.int64)
        return Record(sample.row, sample.id, data, -1, boxes, classes, crowd)
    if label is None:
        raise _NoTargetError(f"no label{where}")
    return Record(sample.row, sample.id, data, part.class_of(label, rules.codes), *boxes_of(None))


def _check_id(sample: Sample, pool: Pool, rules: Rules) -> None:
    expected = rules.ids.get(sample.row)
    if expected not in (None, sample.id):
        raise InputError(
            f"row {sample.row} of pool {pool.uri!r} is {sample.id!r}, and the selection calls it {expected!r}: give the pool "
            "that its features were embedded from, as it was then"
        )


def _add(sample: Sample, pool: Pool, rules: Rules, part: Part, records: list[Record], data: bytes) -> None:
    """Add an image to a part, or take note why it is left out."""
    try:
        records.append(_record(sample, data, rules, part))
        part.num_images += 1
    except _NoTargetError as reason:
        part.unlabelled.append({"row": sample.row, "id": sample.id, "reason": str(reason)})


def _write(place: Place, part: Part, records: list[Record]) -> Part:
    facts = {"facts": json.dumps(dataclasses.asdict(part))}
    data = part_bytes(images_table(records).replace_schema_metadata(facts))
    part.name = part_name(part.start)
    file = place.at("parts", part.name)
    file.write(data)
    part.sha256, part.bytes = sha256_of(file), data.size
    return part


def make_parts(place: Place, pool: Pool, start: int, rows: Ints, rules: Rules) -> Iterator[Part]:
    """Read the images of ascending rows, the first one at place `start`, and write them to parts of at most PART_BYTES.

    Yields each part once it is written. Raises InputError for an image that is not called what it must be, and, where
    `strict`, RunError for one that can't be read or decoded.
    """
    part, records, held = Part(start, start), list[Record](), 0
    for sample in pool_samples(pool, rows):
        _check_id(sample, pool, rules)
        try:
            data = _file_of(sample, rules.wanted.max_pixels)
        except BadImageError as error:
            if rules.wanted.strict:
                raise RunError(
                    f"image {sample.id!r} (row {sample.row} of pool {pool.uri!r}) can't be used: {error}. Mend it, or leave it "
                    "out of the selection"
                ) from error
            part.left_out.append({"row": sample.row, "id": sample.id, "reason": str(error)})
        else:
            if records and held + len(data) > PART_BYTES:
                yield _write(place, part, records)
                part, records, held = Part(part.stop, part.stop), [], 0
            _add(sample, pool, rules, part, records, data)
            held += len(data)
        part.stop += 1
    yield _write(place, part, records)


def finished_parts(place: Place, start: int, stop: int, names: frozenset[str]) -> list[Part] | None:
    """Return the parts of places [start, stop) that an earlier run wrote, None where it did not write them all.

    `names` are those of the files that are there.
    """
    found, at = list[Part](), start
    while at < stop:
        if part_name(at) not in names:
            return None
        file = place.at("parts", part_name(at))
        part = Part(**json.loads(part_schema(file).metadata[b"facts"]))
        part.name, part.sha256, part.bytes = file.name, sha256_of(file), file.fs.get_file_info(file.path).size
        found.append(part)
        at = part.stop
    return found
