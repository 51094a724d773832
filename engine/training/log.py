"""What a training writes as it goes: metrics.jsonl, a line a step and an evaluation, and the same for TensorBoard.

Both are one worker's. They stand in OUT where that is a local folder; for an object store they are kept in a temporary
one and put there with each checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from engine.places import Place

LINES, EVENTS = "metrics.jsonl", "tensorboard"
PLACE_OF_A_LINE = ("step", "epoch", "kind")


class Log:
    """The log of a training that goes on after `step` steps: what earlier runs wrote of later ones is cut off."""

    def __init__(self, out: Place, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.out = out
        self.temporary = tempfile.mkdtemp(prefix="coresift-log-") if out.remote else None
        self.folder = self.temporary or out.path
        file = os.path.join(self.folder, LINES)
        kept = [line for line in _lines(out.at(LINES)) if line["step"] <= step]
        events = os.path.join(self.folder, EVENTS)
        if out.at(EVENTS).exists():
            out.at(EVENTS).remove()
        self.file = open(f"{file}.tmp-new", "w+", encoding="utf-8")  # noqa: SIM115  open as long as the training runs
        self.board = SummaryWriter(events)
        for line in kept:
            self.write(line)
        self.file.flush()
        os.replace(f"{file}.tmp-new", file)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line: `step` (the steps done), `epoch`, `kind` (train, test) and its figures."""
        self.file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name not in PLACE_OF_A_LINE and value is not None:
                self.board.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def flush(self) -> None:
        """Make what is written readable, and put it where it belongs."""
        self.file.flush()
        self.board.flush()
        if self.temporary:
            self.out.at(LINES).write_from(os.path.join(self.folder, LINES))
            for name in os.listdir(os.path.join(self.folder, EVENTS)):
                self.out.at(EVENTS, name).write_from(os.path.join(self.folder, EVENTS, name))

    def close(self) -> None:
        """Flush, and let go of the files."""
        self.flush()
        self.file.close()
        self.board.close()
        if self.temporary:
            shutil.rmtree(self.temporary)


def _lines(file: Place) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a log; a killed run's last one may be torn."""
    if not file.exists():
        return
    for line in file.read().decode(errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n"):
                yield json.loads(line)
        except json.JSONDecodeError:
            return
