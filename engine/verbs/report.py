"""Options of the verb that writes a page about selections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import Address, Device, Memory, PoolOptions, Precision, Seed, Workers


@dataclass(frozen=True, kw_only=True)
class ReportOptions(PoolOptions):
    """Write one HTML file that shows selections: their images, where in the pool they lie, how well they cover it.

    It holds all that it shows and opens without a network. Of large pools samples are shown, and the page says so.
    """

    folders: Annotated[
        tuple[str, ...],
        Opt(
            "Selections of the same features; also folders that compare, rounds, curves and evaluate wrote, a section each.",
            positional=True,
            repeat=True,
        ),
    ]
    out: Annotated[str, Opt("HTML file to write, over an older report.", metavar="FILE", result=False)]
    features: Annotated[
        str | None, Opt("Where the features are now. Default: where the selections say.", metavar="DIR", result=False)
    ] = None
    pool: Annotated[str | None, Opt("Where the pool of images is now. Default: where the features say.", result=False)] = None
    dedup: Annotated[str | None, Opt("Folder that dedup wrote: its near copies are shown.", metavar="DIR", result=False)] = None
    thumbnails: Annotated[int, Opt("Picks shown of each selection, the first ones.", min=0, max=5000)] = 200
    neighbors: Annotated[int, Opt("Nearest unlabelled images shown of each of the first picks; 0: none.", min=0, max=20)] = 4
    map_images: Annotated[
        int, Opt("Images of the pool on the map, a seeded sample, beside the picks; 0: no map.", min=0, max=5000)
    ] = 1500
    projection: Annotated[str, Opt("Of the map: t-SNE keeps neighbours together, PCA distances.", choices=("tsne", "pca"))] = (
        "tsne"
    )
    draws: Annotated[int, Opt("Random selections that coverage is compared with.", min=2, max=1000)] = 10
    seed: Seed = 0
    workers: Workers = None
    memory_per_shard: Memory = None
    device: Device = "auto"
    precision: Precision = "float32"
    address: Address = None
