"""What embedding costs: a few hundred images of the real pool through the real encoders, in this process, on one worker."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from engine.encoders import encoder_names
from engine.pipeline import PartEncoder, Stores, Todo
from engine.places import Place
from engine.schema import Progress, no_progress
from engine.sources import columns_of, open_pool, save_pool
from engine.store import SCORES, part_rows, vectors_numpy
from engine.verbs import EmbedOptions
from jobs.work import Work

STAGES = ("read_s", "decode_s", "encode_s", "write_s")
SHARES = (1, 3, 3)
"""Relative sizes of the pieces that are embedded one after the other, spread over the pool: what is done once for a part and
what is done for each image come apart, and the large ones tell the spread.
"""
WHOLE = 16
"""Rows of which a piece has a multiple, where it can: the encoder's batch on a CPU."""
PART_DRIVER_S = 0.02
"""What a part costs the driver: a row of Ray Data, an entry of the manifest. Taken, not measured here."""


@dataclass(frozen=True)
class Stored:
    """What one encoder writes: floats of a vector, vectors and bytes of an image."""

    dim: int
    vectors: float
    row_bytes: float
    column: str


@dataclass(frozen=True)
class Piece:
    """Rows embedded as one part, and the seconds that took: by the clock, and of the CPU."""

    rows: int
    clock_s: float
    cpu_s: float


@dataclass(frozen=True)
class Embedded:
    """A probe of a pool: the clock's seconds by stage an image, on one worker, and the pieces that they are from.

    `fixed_s` is what is done once: the pool is listed, the network is built, its first batch. `by_cpu`: the worker is one
    thread on a CPU, so its CPU time is what it takes where nothing else runs; and what it waits for a `remote` pool.
    """

    pool_rows: int
    rows: int
    rejected: int
    fixed_s: float
    stages: dict[str, float]
    pieces: tuple[Piece, ...]
    image_bytes: float
    stored: dict[str, Stored]
    device: str
    memory: float
    by_cpu: bool
    remote: bool

    def _times(self) -> list[float]:
        return [piece.cpu_s if self.by_cpu else piece.clock_s for piece in self.pieces]

    @property
    def split(self) -> tuple[float, float]:
        """The seconds of a part, whatever its rows, and of each of its rows: a line through the pieces."""
        rows, times = [piece.rows for piece in self.pieces], self._times()
        if len(set(rows)) > 1:
            row_s, part_s = np.polyfit(rows, times, 1)
            if row_s > 0 and part_s > 0:
                return float(part_s), float(row_s)
        return 0.0, sum(times) / sum(rows)

    @property
    def share(self) -> float:
        """What a row takes of a worker of its own, of what the clock's stages took here."""
        clock = sum(self.stages.values()) - (self.stages["read_s"] if self.remote and self.by_cpu else 0.0)
        return min(1.0, self.split[1] / max(1e-9, clock))

    def seconds(self, *stages: str) -> float:
        """Return the seconds that some stages take an image, or all, on a CPU (or GPU) of its own."""
        waits = self.remote and self.by_cpu
        return sum(self.stages[s] * (1.0 if s == "read_s" and waits else self.share) for s in stages or STAGES)

    @property
    def spread(self) -> float:
        """How far the large pieces' times are from their mean, relative to it (one standard deviation)."""
        large = [time for time, piece in zip(self._times(), self.pieces, strict=True) if piece.rows == self.pieces[-1].rows]
        return float(np.std(large) / np.mean(large))


def can_probe(options: EmbedOptions) -> str | None:
    """Return why an embedding can't be measured before the job is run; None where it can."""
    scored = [name for name in encoder_names(options.encoder) if name in (*SCORES, "gradient_similarity")]
    if scored:
        return f"encoder {scored[0]} needs the gradient of a reference set, which is made when it runs"
    if options.checkpoint is not None and not Place(options.checkpoint).at("manifest.json").exists():
        return f"checkpoint {Place(options.checkpoint).uri} is not there yet"
    return None


def ranges(num_rows: int, wanted: int) -> list[tuple[int, int]]:
    """Return the ranges of rows that a probe embeds: a few first, then pieces of SHARES, spread over the pool."""
    total = min(num_rows, wanted)
    first = max(1, min(WHOLE, total // 8))
    unit = max(1, (total - first) // sum(SHARES))
    unit -= unit % WHOLE if unit > WHOLE else 0
    found, end = [(0, first)], first
    for number, share in enumerate(SHARES):
        start = max(end, num_rows * number // len(SHARES))
        end = min(start + unit * share, num_rows)
        if start < end:
            found.append((start, end))
    return found


def probe(
    options: EmbedOptions, wanted: int, progress: Progress = no_progress
) -> tuple[Embedded, dict[str, npt.NDArray[np.float32]]]:
    """Embed about `wanted` images of a pool into a temporary folder; return what it took, and each encoder's vectors."""
    names, device = encoder_names(options.encoder), "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="coresift-plan-") as folder:
        began = time.perf_counter(), time.process_time()
        pool = open_pool(options.pool, columns_of(options))
        save_pool(pool, Place(folder).at("pool.arrow"))
        places = {name: f"{folder}/{name}" for name in names}
        stores = Stores(f"{folder}/pool.arrow", pool.digest, places, pool.addresses)
        first, *pieces = ranges(pool.num_rows, wanted)
        try:
            encoder = PartEncoder(replace(options, out=folder), stores, device)
            entries = [encoder.encode_part(Todo(*first, names))]
            fixed, fixed_cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            times = list[Piece]()
            for done, piece in enumerate(pieces or [first]):
                progress("probe", done + 1, len(pieces) + 1, "parts embedded")
                before = time.perf_counter(), time.process_time()
                entries.append(encoder.encode_part(Todo(*piece, names)))
                took = time.perf_counter() - before[0], time.process_time() - before[1]
                times.append(Piece(piece[1] - piece[0], *took))
        finally:
            torch.set_num_threads(threads)
        tables = {name: _tables(places[name], entries, name) for name in names}
    counted = entries[1:] or entries
    rows = sum(entry["stop"] - entry["start"] for entry in counted)
    stages = {stage: sum(entry["spent"][stage] for entry in counted) / rows for stage in STAGES}
    told = [entry["stores"][names[0]] for entry in entries]
    by_cpu = device == "cpu" and options.cpus_per_worker == 1
    spent = [piece.cpu_s if by_cpu else piece.clock_s for piece in times]
    images = pa.chunked_array([chunk for table in tables[names[0]] for chunk in table["bytes"].chunks])
    found = Embedded(
        pool_rows=pool.num_rows,
        rows=sum(entry["stop"] - entry["start"] for entry in entries),
        rejected=sum(entry["num_rejected"] for entry in told),
        fixed_s=max(0.0, (fixed_cpu if by_cpu else fixed) - (first[1] - first[0]) * sum(spent) / rows),
        stages=stages,
        pieces=tuple(times),
        image_bytes=float(pa.compute.mean(images).as_py() or 0.0),
        stored={name: _stored(tables[name], [entry["stores"][name] for entry in entries], encoder, name) for name in names},
        device=device,
        memory=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        by_cpu=by_cpu,
        remote=Place(options.pool).remote,
    )
    vectors = {name: _vectors(tables[name], found.stored[name]) for name in names}
    return found, vectors


def _tables(place: str, entries: Sequence[dict[str, Any]], name: str) -> list[pa.Table]:
    files = [Place(place).at("parts", entry["stores"][name]["name"]) for entry in entries]
    return [pa.ipc.open_file(pa.BufferReader(file.read())).read_all() for file in files]


def _stored(tables: list[pa.Table], entries: list[dict[str, Any]], encoder: PartEncoder, name: str) -> Stored:
    images = max(1, sum(len(table) for table in tables))
    vectors = sum(entry.get("num_patterns", entry.get("num_detections", entry["num_vectors"])) for entry in entries)
    made = encoder.encoders[name]
    return Stored(made.dim, vectors / images, sum(table.nbytes for table in tables) / images, made.column)


def _vectors(tables: list[pa.Table], stored: Stored) -> npt.NDArray[np.float32]:
    if stored.column == "detections":
        return np.empty((0, stored.dim), dtype=np.float32)
    return np.concatenate([vectors_numpy(table[stored.column]).astype(np.float32) for table in tables])


def work_of(
    found: Embedded, rows: int, options: EmbedOptions, gpus: int, cpus: int, encode_rate: float | None
) -> tuple[Work, str]:
    """Return what embedding so many rows takes, and what was taken for granted of its rate.

    With an `encode_rate`, images a second of a worker on a GPU, its node's other CPUs decode for it.
    """
    parts = -(-rows // part_rows(rows))
    given = options.gpus_per_worker if options.gpus_per_worker is not None else float(gpus > 0)
    said, row_s = f"measured on {found.rows:,} images, ± {found.spread:.0%}", found.seconds()
    if encode_rate:
        spare = max(0, cpus - gpus * options.cpus_per_worker)
        ahead = spare / gpus if gpus and given else 0.0
        decode = found.seconds("read_s", "decode_s")
        busy = max(1 / encode_rate, decode / ahead) if ahead >= 1 else 1 / encode_rate + decode
        row_s = busy + found.seconds("write_s")
        bound = "decoding" if ahead >= 1 and decode / ahead > 1 / encode_rate else "encoding"
        said = f"encode rate assumed, decoding measured on one CPU ({found.rows:,} images): {bound} bounds a worker"
    work = Work(
        worker_s=row_s * rows + found.split[0] * parts,
        pieces=parts,
        fixed_s=found.fixed_s,
        driver_s=PART_DRIVER_S * parts,
        read=found.image_bytes * rows,
        gpus_each=given if gpus else 0.0,
        cpus_each=float(options.cpus_per_worker),
    )
    return work, said
