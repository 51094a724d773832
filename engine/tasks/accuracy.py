"""How often a classifier is right: over all images, in its best five, class by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TOP = 5


def accuracy(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], class_names: Sequence[str]
) -> list[tuple[str, float | None, str]]:
    """Return top-1, the mean of the classes' own, top-5 where there are more classes than that, then each class's top-1.

    probabilities (n, classes), labels (n,); all figures in percent. Of equal probabilities the smaller class counts as the
    higher. A class without an image has no value, and is left out of the mean.
    """
    if not len(labels):
        return [("top1", None, "no image with a label")]
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    found = order == labels[:, None]
    results: list[tuple[str, float | None, str]] = [("top1", 100 * float(found[:, 0].mean()), f"% of {len(labels):,} images")]
    counts = np.bincount(labels, minlength=len(class_names))
    right = np.bincount(labels[found[:, 0]], minlength=len(class_names))
    shares = [100 * hit / count if count else None for hit, count in zip(right.tolist(), counts.tolist(), strict=True)]
    seen = [share for share in shares if share is not None]
    results.append(("mean_class_top1", sum(seen) / len(seen), f"%, mean of {len(seen)} of {len(class_names)} classes"))
    if len(class_names) > TOP:
        results.append(("top5", 100 * float(found.any(axis=1).mean()), f"% of {len(labels):,} images"))
    for name, share, count in zip(class_names, shares, counts.tolist(), strict=True):
        results.append((f"top1/{name}", share, f"% of {count:,} images" if count else "no image of this class"))
    return results
