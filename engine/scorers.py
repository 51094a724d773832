"""Encoders that score: what labelling an image would be worth to a trained model, one number for each.

`influence` (Liu et al., ICCV 2021) and its rival `gradient_similarity` differentiate the model. What they need beside it, h,
is made once for a run (`engine/scoring.py`) and lies in the folder of their store.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.arrays import Ints
from engine.influence import Gradient, forward_mode_works, influenced, scores
from engine.inputs import Pixels
from engine.models import Models
from engine.places import Place
from engine.reference import keys_of, read_h
from engine.schema import InputError, RunError, build_options, parse_pairs
from engine.store import DETECTIONS, INFLUENCE
from engine.tasks import Task
from engine.tasks.calculus import EXPECTED_CLASSES
from engine.tasks.heads import features_once
from engine.verbs import SCORING, EmbedOptions, InfluenceOptions, SimilarityOptions

LEAST_SCORE = 0.1
"""Of a detector's pseudo boxes: the paper's for COCO (its code's default is 0.5)."""

Values = npt.NDArray[np.float32]


def option_pairs(options: EmbedOptions) -> dict[str, str]:
    """Return `--encoder-option` as name -> value."""
    pairs = parse_pairs(options.encoder_option, "--encoder-option")
    return {name.replace("-", "_"): value for name, value in pairs.items()}


def own_options(options: EmbedOptions, name: str) -> Any:
    """Return those of an encoder's own, checked; what is left open is None."""
    declared = SCORING[name]
    own = {field.name for field in fields(declared)}
    return build_options(
        declared, {key: value for key, value in option_pairs(options).items() if key in own}, f"encoder {name!r}"
    )


def check_plain(options: EmbedOptions, name: str) -> None:
    """Raise InputError for options that scores can't have: they are small differences, and of pixels as h was made of."""
    wrong = {
        "draft": options.draft,
        "compile": options.compile,
        "dtype": options.dtype != "float32",
        "precision": options.precision != "float32",
    }
    for flag, given in wrong.items():
        if given:
            raise InputError(
                f"--{flag} is not for --encoder {name}: scores are computed and stored as float32, of whole images"
            )


def resolved(given: Any, task: Task) -> Any:
    """Return options with what is left open filled in by the task; raises InputError for what its model can't have."""
    if not isinstance(given, SimilarityOptions):
        return given
    detector, calculus = task.column == DETECTIONS, task.calculus
    if detector and given.pseudo is not None:
        raise InputError(f"option pseudo is {given.pseudo!r}: a detector's pseudo labels are its boxes, see pseudo_score")
    if not detector and given.pseudo_score is not None:
        raise InputError(f"option pseudo_score is {given.pseudo_score}: it is for detectors' boxes, and this is a classifier")
    classes = len(task.setup.class_names)
    if given.pseudo == "expected" and classes <= EXPECTED_CLASSES:
        raise InputError(
            f"option pseudo is 'expected', and the model knows {classes} classes: of {EXPECTED_CLASSES} and fewer the expected "
            "gradient of the loss is 0 for every image. Use argmax"
        )
    filled: dict[str, Any] = {"parameters": given.parameters or calculus.parameters}
    filled |= {"pseudo_score": given.pseudo_score if given.pseudo_score is not None else LEAST_SCORE} if detector else {}
    filled |= {} if detector else {"pseudo": given.pseudo or "argmax"}
    if isinstance(given, InfluenceOptions):
        groups = calculus.scales
        if len(given.scale) not in (0, 1, len(groups)):
            raise InputError(
                f"option scale is {','.join(f'{value:g}' for value in given.scale)}: give one value for all, or one for "
                f"each of {', '.join(groups)}"
            )
        filled |= {"scale": given.scale or tuple(groups.values())}
        filled |= {"restarts": given.restarts or calculus.restarts, "steps": given.steps or calculus.steps}
    return replace(given, **filled)


class Scorer:
    """A checkpoint's model, what of it is differentiated, and h, once it is made: what both encoders share."""

    def __init__(self, options: EmbedOptions, models: Models, name: str) -> None:
        check_plain(options, name)
        self.checkpoint, self.task, self.model = models.trained
        self.seed, self.best = options.seed, options.best
        self.device, self.folder = models.device, models.folders.get(name)
        self.options = resolved(own_options(options, name), self.task)
        groups = self.task.heads(self.model)
        self.names = influenced(self.model, self.options.parameters, [own for group in groups.values() for own in group])

    @cached_property
    def h(self) -> tuple[Gradient, int]:
        """h on the model's device, and the number of images that scores are divided by."""
        assert self.folder is not None, "h is made for a store"
        return read_h(Place(self.folder), self.device)

    @cached_property
    def forward(self) -> bool:
        """Whether forward mode gives what backward passes do: tried on one image, the same one for every actor."""
        if not self.task.calculus.batched:
            return False
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        pixels, sizes = self.task.input.prepare(noise)[None], np.array([noise.size], dtype=np.int64)
        return forward_mode_works(self.model, self.names, lambda model: self.task.losses(model, pixels, sizes, [0], [0]))

    def score(self, batch: Pixels, rows: Ints, sizes: Ints) -> Values:
        """Return (r, 1) scores, NaN for an image of which the model says nothing.

        Raises RunError for a score that is not finite.
        """
        step = len(batch) if self.task.calculus.batched else 1
        parts = [slice(at, at + step) for at in range(0, len(batch), step)]
        return np.concatenate([self._some(batch[part], rows[part], sizes[part]) for part in parts])

    def _some(self, pixels: Pixels, rows: Ints, sizes: Ints) -> Values:
        (h, num_images), forward = self.h, self.forward  # before the features are held: it tries another image
        task, out = self.task, np.full((len(rows), 1), np.nan, dtype=np.float32)
        expected, least = self.options.pseudo == "expected", self.options.pseudo_score or 0.0
        with features_once(self.model, self.names):
            targets = task.pseudo(self.model, pixels, sizes, expected, least)
            if any(target is None for target in targets):  # then there is one image: the batch is not cut
                return out
            keys = keys_of(self.seed, rows.tolist())
            found = scores(self.model, self.names, h, lambda model: task.losses(model, pixels, sizes, targets, keys), forward)
        out[:, 0] = found.double().cpu().numpy() / num_images
        wrong = np.flatnonzero(~np.isfinite(out[:, 0]))
        if len(wrong):
            raise RunError(
                f"the score of row {rows[wrong[0]]} is {out[wrong[0], 0]}: the model's loss or its gradient is not finite"
            )
        return out

    def describe(self) -> dict[str, Any]:
        """Return whose scores they are, and by which options."""
        setup = self.checkpoint.setup
        return {
            "digest": self.checkpoint.digest(self.best),
            "task": setup.task,
            "model": setup.model,
            "class_names": list(setup.class_names),
            "options": asdict(self.options),
            "num_parameters": len(self.names),
        }


class InfluenceEncoder:
    """What training on an image would change of the loss on a reference set (ISAL), lower is better; needs --checkpoint."""

    column = INFLUENCE
    dim = vectors_per_image = 1
    name = "influence"

    def __init__(self, options: EmbedOptions, models: Models) -> None:
        self.scorer = Scorer(options, models, self.name)
        self.input = self.scorer.task.input

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> Values:
        """Return (len(batch), 1): - h . gradient / the number of the pool's images; NaN for an image without pseudo labels."""
        return self.scorer.score(batch, rows, sizes)

    def describe(self) -> dict[str, Any]:
        """Return whose scores they are, and by which options."""
        return self.scorer.describe()


class SimilarityEncoder(InfluenceEncoder):
    """How alike an image's gradient and the reference set's are: influence without the Hessian; needs --checkpoint."""

    name = "gradient_similarity"
