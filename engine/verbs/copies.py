"""Options of the verb that finds copies: dedup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import Labeled, Out, Seed, ShardOptions


@dataclass(frozen=True, kw_only=True)
class DedupOptions(ShardOptions):
    """Find images that are copies of others: what `select --exclude` leaves out; or of another pool's (--against).

    Of a group of copies one is kept: of labelled, then larger images, then smaller rows the first; by embedding, of the
    farthest from its cluster's centre. By embedding, copies are sought within k-means clusters (SemDeDup), and those on two
    sides of a border between clusters are not found; --clusters 1 finds all.
    """

    features: Annotated[str, Opt("Feature store written by embed or import.", positional=True)]
    out: Out
    by: Annotated[
        str,
        Opt(
            "What tells a copy: equal bytes, perceptual hashes, vectors, or hashes that whitened vectors confirm.",
            choices=("exact", "phash", "embedding", "both"),
        ),
    ] = "embedding"
    against: Annotated[
        str | None,
        Opt("Another feature store: which images have a copy there? Nothing is sought within FEATURES.", result=False),
    ] = None
    labeled: Labeled = None
    max_bits: Annotated[int, Opt("`phash`, `both`: copies differ in at most so many of a hash's 64 bits.", min=0, max=15)] = 4
    wide_bits: Annotated[
        int, Opt("`both`: so many bits, if the whitened vectors agree. Beyond 7 large pools take long.", min=0, max=15)
    ] = 14
    min_cosine: Annotated[
        float,
        Opt("`both`: whitened vectors agree if their cosine is above this; pools below 256 images have none.", min=0, max=1),
    ] = 0.55
    eps: Annotated[float, Opt("`embedding`: copies have a cosine above 1 - eps to a kept image.", min=1e-6, max=1)] = 0.05
    clusters: Annotated[
        int | None,
        Opt("`embedding`: k-means clusters; 1 is exact. Default: 1 up to 8192 images, else the root of a twentieth.", min=1),
    ] = None
    iterations: Annotated[int, Opt("`embedding`: Lloyd steps; stops early once no row moves.", min=0, max=100_000)] = 20
    seed: Seed = 0
