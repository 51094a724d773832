"""The main job on a pool that comes with a dependency: scikit-learn's handwritten digits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from engine.compare import compare
from engine.embed import embed
from engine.folders import begin, publish
from engine.places import Place
from engine.schema import Progress, no_progress
from engine.select import STRATEGIES
from engine.verbs import CompareOptions, DemoOptions, EmbedOptions

NUM_TEST = 500
BUDGETS = "10,20,50,100"
SEEDS = 3


def write_digits(place: Place, overwrite: bool) -> None:
    """Write the 1,797 digits (8 x 8 px, 16 greys) as PNGs, a folder a class: pool/ and test/ (500, a seeded draw)."""
    from sklearn.datasets import load_digits

    if begin(place, "images", {}, {"test": NUM_TEST}, overwrite) is not None:
        return
    digits = load_digits()
    test = set(np.random.default_rng(0).permutation(len(digits.target))[:NUM_TEST].tolist())
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(buffer, format="PNG")
        split = "test" if index in test else "pool"
        place.at(split, str(label), f"digit-{index:04d}.png").write(buffer.getvalue())
    publish(place, {"num_images": len(digits.target)})


def demo(options: DemoOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Embed the digits, select with every strategy that reads vectors alone, evaluate; return the comparison."""
    out = Place(options.out)
    write_digits(out.at("images"), options.overwrite)
    for split in ("pool", "test"):
        embed(
            EmbedOptions(
                pool=out.at("images", split).address,
                out=out.at("features", split).address,
                encoder="pixels",
                workers=options.workers,
                address=options.address,
                overwrite=options.overwrite,
            ),
            progress,
        )
    alone = tuple(name for name, strategy in STRATEGIES.items() if not (strategy.columns or strategy.predictions))
    return compare(
        CompareOptions(
            features=out.at("features", "pool").address,
            test=out.at("features", "test").address,
            out=out.at("compare").address,
            strategies=alone,
            budget=BUDGETS,
            seeds=SEEDS,
            neighbors=(1,),
            overwrite=options.overwrite,
        ),
        progress,
    )
