"""A trained model's predictions for every image of a pool: embedding by the encoder of its task."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from engine.checkpoints import Checkpoint
from engine.embed import embed
from engine.schema import Progress, no_progress
from engine.tasks import build_task
from engine.verbs import EmbedOptions, PredictOptions


def predict(options: PredictOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Write probabilities or boxes of every image as a feature store, as `embed --checkpoint` does; return its manifest."""
    encoder = build_task(Checkpoint(options.checkpoint).setup).column
    given = {field.name: getattr(options, field.name) for field in fields(options)}

    def shown(stage: str, done: int, total: int, note: str) -> None:
        progress("predict", done, total, note)

    return embed(EmbedOptions(encoder=encoder, **given), shown)
