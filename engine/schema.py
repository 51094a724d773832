"""Words every other module shares: errors, options, budgets, column names.

Nothing here imports numpy, pyarrow, torch or ray: the command line reads its help texts from this floor.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from engine.masks import masked

T = TypeVar("T")

BLOCK_ROWS = 8192
"""Pool rows in a block, the unit of work and of rounding; recorded in every feature store."""

MAX_PIXELS = 178_956_970
"""Images with more pixels than this are rejected before they are decoded (Pillow's own limit for a decompression bomb)."""

Progress = Callable[[str, int, int, str], None]
"""Called as progress(stage, done, total, note) from the driver while something runs."""


class InputError(ValueError):
    """The caller gave something that cannot be used: the message names the value and the way out (exit code 2)."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class RunError(RuntimeError):
    """The input was fine and the work failed: the message says what failed and what is kept (exit code 1)."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


def known_error(failure: BaseException) -> InputError | RunError | None:
    """Return our own error behind what was raised: itself, or the cause that Ray wrapped on its way from an actor."""
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, (InputError, RunError)):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without keys, or its class where it has none."""
    return masked((str(error).splitlines() or [type(error).__name__])[0])


def no_progress(stage: str, done: int, total: int, note: str) -> None:
    """Ignore progress: the default where nobody watches."""


@dataclass(frozen=True)
class Opt:
    """What an option means, written once as `Annotated[type, Opt(...)]` on a dataclass field.

    `result=False` marks options that change how the work is done but not what comes out; they are not part of a
    folder's identity. `positional` fields are arguments on the command line, `repeat` ones may be given several times.
    """

    help: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    result: bool = True
    positional: bool = False
    repeat: bool = False
    metavar: str | None = None


@dataclass(frozen=True)
class Field:
    """One declared option: its name, Python type, default and `Opt`."""

    name: str
    type: Any
    default: Any
    opt: Opt

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING


def fields_of(options: type[Any]) -> list[Field]:
    """Return the declared options of a dataclass, in order: its own, then those that it shares with others."""
    if options not in _DECLARED:
        _DECLARED[options] = _declared(options)
    return list(_DECLARED[options])


_DECLARED: dict[type[Any], list[Field]] = {}
"""By dataclass: a job of hundreds of steps asks for each of them, and annotations that are text are compiled every time."""


def _declared(options: type[Any]) -> list[Field]:
    hints = typing.get_type_hints(options, include_extras=True)
    found = []
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name not in options.__annotations__):
        hint = hints[field.name]
        base, opt = hint, Opt(help="")
        if typing.get_origin(hint) is typing.Annotated:
            base, *extras = typing.get_args(hint)
            opt = next(extra for extra in extras if isinstance(extra, Opt))
        found.append(Field(field.name, base, field.default, opt))
    return found


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return ', did you mean X?' when a listed name is close to `value`, else an empty string."""
    close = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def lookup(value: str, table: Mapping[str, T], what: str) -> T:
    """Return table[value]; raise InputError that suggests the nearest name and lists the allowed ones."""
    if value in table:
        return table[value]
    names = sorted(table)
    raise InputError(f"unknown {what} {value!r}{nearest(value, names)} (one of: {', '.join(names)})")


def _optional(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and True."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        return parts[0], True
    return kind, False


def check_option(field: Field, value: Any) -> Any:
    """Return `value` as the field's type, within its range and choices; raise InputError otherwise."""
    converted = _convert(field, value)
    _check_range(field, converted)
    return converted


def _convert(field: Field, value: Any) -> Any:
    """Return `value` as the field's type (from a string, as the command line gives it), or raise InputError."""
    kind, optional = _optional(field.type)
    if value is None and optional:
        return None
    origin = typing.get_origin(kind)
    if origin is tuple:
        inner = Field(field.name, typing.get_args(kind)[0], field.default, field.opt)
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (tuple, list)) else (value,)
        return tuple(_convert(inner, part) for part in parts)
    if kind is bool:
        if isinstance(value, bool):
            return value
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise InputError(f"option {field.name} is {value!r}: it takes true or false")
    if kind in (int, float):
        try:
            converted = kind(value)
            if isinstance(value, float) and converted != value:
                raise ValueError
            return converted
        except (TypeError, ValueError):
            word = "a whole number" if kind is int else "a number"
            raise InputError(f"option {field.name} is {value!r}: it takes {word}") from None
    return str(value) if kind is str else value


def _check_range(field: Field, value: Any) -> None:
    opt = field.opt
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        if opt.choices and item not in opt.choices:
            raise InputError(
                f"option {field.name} is {item!r}{nearest(str(item), opt.choices)} (one of: {', '.join(opt.choices)})"
            )
        low, high = opt.min, opt.max
        too_low = low is not None and not item >= low
        too_high = high is not None and not item <= high
        if too_low or too_high:
            bounds = f"at least {low:g}" if high is None else f"at most {high:g}" if low is None else f"{low:g} to {high:g}"
            raise InputError(f"option {field.name} is {item}: it must be {bounds}")


def build_options(options: type[T], given: Mapping[str, Any], owner: str) -> T:
    """Return `options(**given)` with every value converted and checked.

    Raises InputError for an unknown name (listing the allowed ones), a wrong type, a value out of range or a
    missing required option. `owner` names whose options they are in the message.
    """
    declared = {field.name: field for field in fields_of(options)}
    values = {}
    for name, value in given.items():
        key = name.replace("-", "_")
        if key not in declared:
            listed = ", ".join(declared) or "none"
            raise InputError(f"unknown option {name!r} for {owner}{nearest(key, declared)} (its options: {listed})")
        values[key] = check_option(declared[key], value)
    missing = [field.name for field in declared.values() if field.required and field.name not in values]
    if missing:
        raise InputError(f"{owner} needs {', '.join(missing)}")
    return options(**values)


def result_options(options: Any) -> dict[str, Any]:
    """Return the options that decide what comes out, as a JSON-ready dict: part of a folder's identity."""
    return {f.name: getattr(options, f.name) for f in fields_of(type(options)) if f.opt.result and not f.opt.positional}


def parse_pairs(pairs: Iterable[str], what: str) -> dict[str, str]:
    """Parse `name=value` strings into a dict; raise InputError for one without '=' or given twice."""
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"{what} {pair!r} is not of the form name=value")
        if name in parsed:
            raise InputError(f"{what} {name!r} is given twice: {parsed[name]!r} and {value!r}")
        parsed[name] = value
    return parsed


def parse_bytes(text: str | None) -> int | None:
    """Parse a size in memory, `4GiB`, `500MB`, `1e9`, into bytes; None stays None. Raises InputError otherwise."""
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().rstrip("BGKMIgkmib")
    unit = text.strip()[len(number) :].lower()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise InputError(f"size {text!r} is not one: give bytes, or a number with MB, GB, MiB or GiB")
    return int(value)


def parse_workers(given: str | int | None) -> tuple[int, int] | None:
    """Parse `--workers`: None stays None, N is (N, N), MIN:MAX is (MIN, MAX), 1 <= MIN <= MAX. Raises InputError otherwise."""
    if given is None:
        return None
    low, colon, high = str(given).partition(":")
    try:
        found = int(low), int(high if colon else low)
    except ValueError:
        found = (-1, -1)
    if not (0 < found[0] <= found[1] or (found == (0, 0) and not colon)):
        raise InputError(
            f"option workers is {given}: it must be at least 0 (a number of actors, 0 for this process), "
            "or MIN:MAX with 1 <= MIN <= MAX"
        )
    return found


def parse_decode_workers(given: str | int) -> int | None:
    """Parse `--decode-workers`: a count, or None for auto. Raises InputError otherwise."""
    if given == "auto":
        return None
    try:
        count = int(given)
    except ValueError:
        count = -1
    if count < 0:
        raise InputError(f"option decode_workers is {given}: it must be at least 0, or auto")
    return count


def _parse_budget(text: str, available: int) -> int:
    """Return one budget as a count of new labels out of `available` eligible rows."""
    percent = text.endswith("%")
    try:
        value = Decimal(text.removesuffix("%").strip().replace("_", ""))
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or (not percent and value != value.to_integral_value()):
        raise InputError(f"budget {text!r} is neither a count (1000) nor a percentage (2%)")
    if value <= 0:
        raise InputError(f"budget {text!r} must be positive")
    if percent and value > 100:
        raise InputError(f"budget {text!r} is more than 100%")
    count = int((value * available / 100).to_integral_value(rounding="ROUND_HALF_UP")) if percent else int(value)
    if count == 0:
        raise InputError(f"budget {text!r} of {available} images is less than one image: give a larger one")
    return count


def parse_hold_out(text: str | None, num_chosen: int) -> int:
    """Parse `--hold-out`, `10%` or a count, into how many of the chosen images are held out: 0 for None, else 1 or more.

    Raises InputError where that leaves none to train on.
    """
    if text is None:
        return 0
    try:
        value = Decimal(text.removesuffix("%").strip().replace("_", ""))
    except InvalidOperation:
        value = Decimal("NaN")
    percent = text.endswith("%")
    if not value.is_finite() or value <= 0 or (not percent and value != value.to_integral_value()):
        raise InputError(f"--hold-out {text!r} is neither a count (100) nor a percentage (10%) above 0")
    exact = value * num_chosen / 100 if percent else value
    count = max(1, int(exact.to_integral_value(rounding="ROUND_HALF_UP")))
    if count >= num_chosen:
        raise InputError(
            f"--hold-out {text!r} is {count:,} of {num_chosen:,} chosen images: one at least must be left to train on"
        )
    return count


def parse_budgets(text: str, total: int, available: int) -> list[int]:
    """Parse `1000`, `2%` or `100,500,1%` into distinct counts of new labels, in the order given.

    A percentage is of `total`, the rows of the store; a count may not exceed `available`, the rows that can still
    be picked. Raises InputError otherwise.
    """
    counts = []
    for part in text.split(","):
        count = _parse_budget(part.strip(), total)
        if count > available:
            of = f"{available} images" if available == total else f"{available} eligible images (of {total})"
            raise InputError(f"budget {part.strip()!r} is more than the {of} to pick from")
        if count not in counts:
            counts.append(count)
    return counts
