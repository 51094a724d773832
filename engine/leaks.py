"""Which images of one pool have a copy in another: leaks from test to training images. Nothing is dropped on the way."""

from __future__ import annotations

import numpy as np
import torch

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block
from engine.copies import NOTHING, Copies, Decide, Prints
from engine.hamming import HashTable
from engine.schema import BLOCK_ROWS, Progress, no_progress
from engine.select.lloyd import Matrix
from engine.semdedup import cosine, pieces, similar
from engine.shards import Shards, prepare


def _most_similar(block: Block, others: Matrix, eps: float) -> tuple[Ints, Ints, Floats]:
    """Return (pool row, place of its most similar one of `others`, similarity) of the block's copies of some of those."""
    x, there, first = block.x, torch.tensor(others).to(block.x.device), 0
    found: list[tuple[Ints, Ints, Floats]] = []
    for piece in pieces(x, len(others)):
        i, j = similar(piece, there, eps).nonzero()
        similarity = cosine(piece, i, there, j)
        order = np.lexsort((j, -similarity, i))
        copy, at = np.unique(i[order], return_index=True)
        found.append((block.rows[copy + first], j[order][at], similarity[order][at]))
        first += len(piece)
    rows, place, similarity = (np.concatenate(part) for part in zip(*found, strict=True))
    return rows, place, similarity


def vector_leaks(shards: Shards, others: Shards, rows: Ints, eps: float, progress: Progress = no_progress) -> Copies:
    """Return the images of `shards` whose vector has a cosine above 1 - eps to one of `others`, with the most similar one.

    `rows` are the pool rows of `others`; of equally similar ones the smaller. All are compared with all.
    """
    prepare(shards, NOTHING)
    best: dict[int, tuple[float, int]] = {}
    for start in range(0, len(rows), BLOCK_ROWS):
        some = rows[start : start + BLOCK_ROWS]
        for copies, place, similarity in shards.map(_most_similar, others.take(some).numpy(), eps):
            for copy, kept, value in zip(copies.tolist(), some[place].tolist(), similarity.tolist(), strict=True):
                if copy not in best or value > best[copy][0]:
                    best[copy] = value, kept
        progress("dedup", start + len(some), len(rows), f"{len(best):,} copies")
    found = sorted((copy, kept, value) for copy, (value, kept) in best.items())
    columns = np.array(found, dtype=np.float64).reshape(-1, 3).T
    return Copies(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2])


def hash_leaks(prints: Prints, others: Prints, radius: int, decide: Decide, progress: Progress = no_progress) -> Copies:
    """Return the images that have a copy among `others` within `radius` bits, with the nearest one, then the smaller row.

    `decide` gets places in `prints` and in `others`.
    """
    table, found = HashTable(others.hashes, radius), [(NOTHING, NOTHING, NOTHING)]
    for i, j, bits in table.near(prints.hashes):
        copies = decide(i, j, bits)
        i, j, bits = i[copies], j[copies], bits[copies]
        order = np.lexsort((j, bits, i))
        copy, at = np.unique(i[order], return_index=True)
        found.append((copy, j[order][at], bits[order][at]))
        progress("dedup", int(i[-1]) + 1 if len(i) else 0, len(prints.rows), f"{sum(len(c) for c, _, _ in found):,} copies")
    copy, kept, bits = (np.concatenate(part) for part in zip(*found, strict=True))
    return Copies(prints.rows[copy], others.rows[kept], bits=bits)


def same_leaks(prints: Prints, others: Prints) -> Copies:
    """Return the images whose bytes are those of one of `others`, the one with the smallest row."""
    known = np.flatnonzero(others.content >= 0)
    content, first = np.unique(others.content[known], return_index=True)
    at = np.minimum(np.searchsorted(content, prints.content), max(0, len(content) - 1))
    same = np.flatnonzero(content[at] == prints.content) if len(content) else NOTHING
    return Copies(prints.rows[same], others.rows[known[first[at[same]]]])


def telling(prints: Prints, others: Prints) -> Decide:
    """Return what says which pairs of two pools are copies by their hashes: those of plain images only if bytes are equal."""

    def decide(i: Ints, j: Ints, bits: Ints) -> Bools:
        same = (prints.content[i] == others.content[j]) & (prints.content[i] >= 0)
        return np.asarray(same | ~(prints.plain[i] | others.plain[j]))

    return decide
