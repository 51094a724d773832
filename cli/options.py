"""Command-line parameters out of the option dataclasses of engine.verbs: nothing is declared twice."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from engine.schema import Field, build_options, fields_of

OUTPUT_FLAGS = {
    "quiet": (("--quiet", "-q"), "Print nothing but the result."),
    "json": (("--json",), "Print the result as one line of JSON on stdout, all else on stderr."),
    "verbose": (("--verbose", "-v"), "Also show what Ray has to say, and tracebacks."),
}


def _help(field: Field) -> str:
    """Return the option's help with its choices, range and default."""
    notes = []
    opt = field.opt
    if opt.choices:
        notes.append(" | ".join(opt.choices))
    if opt.min is not None or opt.max is not None:
        low = "" if opt.min is None else f"{opt.min:g}"
        high = "" if opt.max is None else f"{opt.max:g}"
        notes.append(f"{low}..{high}")
    default = field.default
    if not field.required and default not in (None, (), False, True):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
        notes.append(f"default {shown}")
    return opt.help + (f" [{'; '.join(notes)}]" if notes else "")


def _parameter(field: Field) -> inspect.Parameter:
    """Return one option as a parameter: text for everything but flags, so that the checks and messages are ours."""
    flag = "--" + field.name.replace("_", "-")
    default: Any = inspect.Parameter.empty if field.required else None
    kind: Any = str if field.required else str | None
    if field.opt.positional:
        many = "..." if field.opt.repeat else ""
        info: Any = typer.Argument(help=_help(field), metavar=field.name.upper() + many, show_default=False)
        if field.opt.repeat:
            kind = list[str]
    elif field.type is bool:
        names = f"{flag}/--no-{flag[2:]}" if field.default else flag
        info, kind, default = typer.Option(names, help=_help(field)), bool, field.default
    else:
        info = typer.Option(flag, help=_help(field), metavar=field.opt.metavar or _metavar(field), show_default=False)
        if field.opt.repeat:
            kind = list[str] | None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _metavar(field: Field) -> str:
    text = str(field.type)
    if "tuple" in text:
        return "A,B,..."
    return "INT" if "int" in text else "NUMBER" if "float" in text else "TEXT"


def verb(options: type[Any], run: Callable[[Any, dict[str, bool]], None], name: str) -> Callable[..., None]:
    """Return a function that typer can make a command of: parses into `options`, then calls run(options, flags)."""
    fields = fields_of(options)

    def command(**given: Any) -> None:
        flags = {key: bool(given.pop(key)) for key in OUTPUT_FLAGS}
        values = {key: value for key, value in given.items() if value is not None}
        run(build_options(options, values, f"coresift {name}"), flags)

    parameters = [_parameter(field) for field in fields]
    for key, (names, text) in OUTPUT_FLAGS.items():
        info = typer.Option(*names, help=text)
        parameters.append(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, info])
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = options.__doc__
    return command


def no_options(run: Callable[[Any, dict[str, bool]], None]) -> type[Any]:
    """Return an options dataclass without fields, for a verb that only prints; its help is the docstring of `run`."""
    return dataclasses.make_dataclass("NoOptions", [], frozen=True, namespace={"__doc__": run.__doc__})
