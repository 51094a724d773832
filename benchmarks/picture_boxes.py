"""Draw what a detector finds on a few images of a pool, side by side.

    python benchmarks/picture_boxes.py PREDICTIONS POOL --out boxes.jpg [--images 5] [--score 0.5]

PREDICTIONS is a feature store of POOL that `coresift predict` wrote with a detector; the first images are drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.decode import decode
from engine.pictures import draw_boxes
from engine.schema import MAX_PIXELS
from engine.sources import open_pool, read
from engine.store import FeatureStore, detections_numpy

WIDTH_PX = 480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("predictions")
    parser.add_argument("pool")
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--score", type=float, default=0.5)
    known = parser.parse_args()
    store = FeatureStore(known.predictions)
    found = detections_numpy(store.read_column(store.column))
    drawn = []
    for sample, boxes in zip(read(open_pool(known.pool), 0, known.images), found, strict=False):
        image, _ = decode(sample.data, MAX_PIXELS)
        kept = boxes[boxes[:, 4] >= known.score]
        picture = draw_boxes(image, kept, store.manifest["class_names"])
        drawn.append(picture.resize((WIDTH_PX, round(picture.height * WIDTH_PX / picture.width))))
        print(f"{sample.id}: {len(kept)} boxes of {len(boxes)} with a score of {known.score} or more")
    strip = Image.new("RGB", (WIDTH_PX * len(drawn), max(picture.height for picture in drawn)))
    for place, picture in enumerate(drawn):
        strip.paste(picture, (WIDTH_PX * place, 0))
    strip.save(known.out, quality=85)


if __name__ == "__main__":
    main()
