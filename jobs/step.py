"""A step as it is run: a verb, its options, and the folder that it writes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.schema import Field, fields_of


@dataclass(frozen=True)
class Step:
    """One run of a verb: its name in the file, the folder it writes, and its options, ready for the verb's function."""

    name: str
    verb: str
    options: Any
    out: str
    path: str
    """Of the step in the file: steps[2].steps[0].select."""
    variables: dict[str, str]
    """The loops' variables in this pass."""
    given: tuple[str, ...]
    """Names of the options that are not left at their defaults."""
    reads: tuple[str, ...]
    """Labels of the steps whose folders it names."""

    @property
    def label(self) -> str:
        """The name, and which pass: picks/kmeans-50."""
        return label_of(self.name, self.variables)

    @property
    def words(self) -> list[str]:
        """The step as a command of the command line; keys in URIs are not masked."""
        positional, flags = list[str](), list[str]()
        for option in fields_of(type(self.options)):
            if option.name in self.given:
                value = getattr(self.options, option.name)
                (positional if option.opt.positional else flags).extend(_argument(option, value))
        return ["coresift", self.verb, *positional, *flags]

    @property
    def command(self) -> str:
        """The same, quoted for a shell."""
        return shlex.join(self.words)


def _argument(option: Field, value: Any) -> list[str]:
    """Return an option and its value as words of the command line."""
    flag = "--" + option.name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if option.opt.positional:
        return list(value) if isinstance(value, tuple) else [str(value)]
    if option.opt.repeat:
        return [word for item in value for word in (flag, str(item))]
    text = f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else text]


def pass_of(variables: Mapping[str, str]) -> str:
    """Return the folder of a pass: kmeans-0.5pct-0."""
    return "-".join(re.sub(r"[^\w.=+-]", "_", value.replace("%", "pct")) for value in variables.values())


def label_of(name: str, variables: Mapping[str, str]) -> str:
    """Return a step's name and which pass it is."""
    return f"{name}/{pass_of(variables)}" if variables else name
