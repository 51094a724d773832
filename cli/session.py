"""One command's surroundings: its watcher, its clock, and how it prints."""

from __future__ import annotations

import time
from typing import Any

from cli import output
from cli.results import Told
from engine import session

WAITING = 3
"""Exit code of rounds that wait for labels: neither done nor failed."""
INTERRUPTED = 130
"""What typer returns for Ctrl-C."""


class Session:
    """What a command is given beside its options: --json, --quiet, --verbose, the time it began, and a watcher."""

    def __init__(self, flags: dict[str, bool]) -> None:
        self.json, self.quiet, self.verbose = flags["json"], flags["quiet"], flags["verbose"]
        self.watch = output.Watcher(self.quiet)
        self.began = time.time()
        session.verbose, session.say = self.verbose, lambda text: self.watch.tell(text)

    def is_old(self, manifest: dict[str, Any]) -> bool:
        """Return whether a manifest was published before this command began: nothing was done again."""
        from datetime import datetime

        return datetime.fromisoformat(manifest["published"]).timestamp() < self.began

    def result(self, facts: dict[str, Any], sentence: str) -> None:
        """Print the command's result: `facts` with --json, else the sentence."""
        self.watch.close()
        if self.json:
            output.print_json(facts)
        else:
            output.say(sentence)

    def told(self, told: Told) -> None:
        """Print what a verb has to tell: its facts with --json, else its tables and its sentence."""
        self.watch.close()
        if self.json:
            output.print_json(told.facts)
            return
        if told.tables is not None:
            told.tables()
        if told.sentence:
            output.say(told.sentence)
