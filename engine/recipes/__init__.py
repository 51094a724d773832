"""What is trained and how: published training recipes, a .toml file each, and what a command says over them.

A file says where it comes from, the task, the model and its inputs, and, under [options], the task's training options.
Those that a file leaves out have the defaults of `engine.verbs.training`.
"""

from __future__ import annotations

import importlib.resources
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from engine.places import Place
from engine.schema import Field, InputError, Opt, build_options, fields_of, nearest, parse_pairs
from engine.tasks.setup import TRAINING, Setup
from engine.verbs import ClassifyOptions, FinetuneOptions, PreprocessingOptions, TrainingOptions

FILE = ".toml"
OPTIONS = "options"
"""The table of a file that holds training options."""

NONE = "none"
"""Value of --option that takes back an optional one of the recipe's."""

IN_EPOCHS = ("milestones", "warmup", "eval_epochs")
"""Options that count epochs, or steps where `steps` is given."""

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Head(PreprocessingOptions):
    """What a recipe's file says, training options aside."""

    summary: Annotated[str, Opt("What it trains, in a line.")]
    task: Annotated[str, Opt("Which.", choices=tuple(TRAINING))]
    model: Annotated[str, Opt("As --model.")]
    weights: Annotated[str, Opt("As --weights.")] = "hub"
    model_option: Annotated[tuple[str, ...], Opt("As --model-option; of this model only.")] = ()
    source: Annotated[str, Opt("Paper, year, arXiv.")] = ""
    notes: Annotated[tuple[str, ...], Opt("What the source leaves open, and what was chosen.")] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name (or file), what its file says, and the training options that this makes."""

    name: str
    head: Head
    options: dict[str, Any]
    """Those that the file gives, by name."""
    training: TrainingOptions


def recipe_names() -> list[str]:
    """Return the names of the published recipes, in order."""
    files = importlib.resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(FILE) for file in files if file.name.endswith(FILE))


def lookup_recipe(name: str) -> Recipe:
    """Return a published recipe by its name, or the recipe in a .toml file.

    Raises InputError for a name that is not one, and for a file that is missing or says what a recipe can't.
    """
    if name in recipe_names():
        data = importlib.resources.files(__name__).joinpath(name + FILE).read_bytes()
    elif name.endswith(FILE):
        place = Place(name)
        if not place.exists():
            raise InputError(f"recipe {name!r} does not exist: give a file, or one of {', '.join(recipe_names())}")
        data = place.read()
    else:
        names = recipe_names()
        raise InputError(f"unknown recipe {name!r}{nearest(name, names)} (one of: {', '.join(names)}; or a {FILE} file)")
    return parse_recipe(name, data)


def parse_recipe(name: str, data: bytes) -> Recipe:
    """Return the recipe that a file's bytes make; raises InputError that names file, key and what is allowed."""
    try:
        table = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {name!r} is not a TOML file: {error}") from error
    options = table.pop(OPTIONS, {})
    if not isinstance(options, dict):
        raise InputError(f"recipe {name!r}: {OPTIONS} is {_shown(options)}: it takes a table, [{OPTIONS}]")
    head = _checked(Head, table, name, f"recipe {name!r}", f" (training options go under [{OPTIONS}])")
    training = _checked(TRAINING[head.task], options, name, f"[{OPTIONS}] of recipe {name!r}, task {head.task}")
    return Recipe(name, head, {key.replace("-", "_"): value for key, value in options.items()}, training)


def _checked(declared: type[Any], given: Mapping[str, Any], name: str, owner: str, hint: str = "") -> Any:
    """Return `declared(**given)`, values of their own TOML type; raises InputError that names the file."""
    fields = {field.name: field for field in fields_of(declared)}
    unknown = [key for key in given if key.replace("-", "_") not in fields]
    for key, value in given.items():
        if key not in unknown:
            _check_type(fields[key.replace("-", "_")], value, owner)
    try:
        return build_options(declared, given, owner)
    except InputError as error:
        told = f"{error}{hint if unknown else ''}"
        raise InputError(told if repr(name) in told else f"recipe {name!r}: {told}") from None


def _check_type(field: Field, value: Any, owner: str) -> None:
    """Raise InputError where a value is not of its option's type: a file has types, a command line has text."""
    kind, inner = _kinds(field)
    takes = WORDS[kind] if kind is not tuple else f"a list of {WORDS[inner].removeprefix('a ')}s"
    items = value if isinstance(value, list) else []
    for one, wanted in [(value, kind), *((item, inner) for item in items)]:
        fits = type(one) is (list if wanted is tuple else wanted) or (wanted is float and type(one) is int)
        if not fits:
            raise InputError(f"{owner}: {field.name} is {_shown(one)}: it takes {takes}")


def _kinds(field: Field) -> tuple[type[Any], type[Any]]:
    """Return an option's type, and that of its items where it is a tuple (else its own)."""
    kind = next(part for part in typing.get_args(field.type) if part is not type(None)) if _is_optional(field) else field.type
    if typing.get_origin(kind) is tuple:
        return tuple, typing.get_args(kind)[0]
    return kind, kind


def _is_optional(field: Field) -> bool:
    return isinstance(field.type, types.UnionType) and type(None) in typing.get_args(field.type)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def resolve(options: FinetuneOptions) -> Setup:
    """Return what a command trains: the recipe's values, then its flags, then --option; its classes are not known yet.

    Raises InputError for what is unknown or out of range, where neither recipe nor task and model are given, where the
    task is not the recipe's, for weights to train from scratch with, and where --option steps makes steps of what the
    recipe counts in epochs.
    """
    recipe = None if options.recipe is None else lookup_recipe(options.recipe)
    if recipe is None and (options.task is None or options.model is None):
        lacking = " and ".join(flag for flag in ("--task", "--model") if getattr(options, flag[2:]) is None)
        raise InputError(
            f"{lacking} not given, and no --recipe: pass --task and --model, or a recipe, one of {', '.join(recipe_names())} "
            f"(`coresift recipes` says what they are), or a {FILE} file"
        )
    if recipe is not None and options.task not in (None, recipe.head.task):
        raise InputError(f"--task {options.task}: recipe {recipe.name!r} is for {recipe.head.task}; leave --task out")
    task = options.task or (recipe.head.task if recipe else "")
    flags = {name: getattr(options, name) for name in _MODEL}
    given = {name: value for name, value in flags.items() if value is not None}
    said = {name: getattr(recipe.head, name) for name in _MODEL} if recipe else {}
    pairs = list(options.model_option)
    if recipe and options.model in (None, recipe.head.model):
        pairs = _overlaid(recipe.head.model_option, pairs)
    training = _training(task, recipe, parse_pairs(options.option, "--option"))
    values = {"weights": "hub", **said, **given}
    if isinstance(training, ClassifyOptions) and training.mode == "scratch":
        if options.weights not in (None, "random"):
            raise InputError(
                f"--weights {options.weights}: option mode is scratch, which starts from random weights; leave --weights out, "
                "or pass --option mode=finetune"
            )
        values["weights"] = "random"
    return Setup(task=task, class_names=(), training=training, model_option=tuple(pairs), **values)


_MODEL = ("model", "weights", *(field.name for field in fields_of(PreprocessingOptions)))
"""What flags and a recipe's head both say, with None for a flag that is not given."""


def _overlaid(below: tuple[str, ...], above: list[str]) -> list[str]:
    """Return NAME=VALUE pairs with those of `above` in the place of `below`'s of the same name."""
    names = parse_pairs(above, "--model-option")
    return [pair for pair in below if pair.partition("=")[0] not in names] + above


def _training(task: str, recipe: Recipe | None, pairs: dict[str, str]) -> TrainingOptions:
    """Return a task's training options: the recipe's, and over them the pairs of --option."""
    declared = TRAINING[task]
    fields = {field.name: field for field in fields_of(declared)}
    given: dict[str, Any] = {}
    for name, text in pairs.items():
        key = name.replace("-", "_")
        takes_none = key in fields and _is_optional(fields[key])
        given[key] = None if takes_none and text.lower() == NONE else text
    over = build_options(declared, given, f"task {task!r}")
    if recipe is None:
        return over
    changed = {key: getattr(over, key) for key in given}
    training = replace(recipe.training, **changed)
    if (training.steps is None) != (recipe.training.steps is None):
        _check_unit(recipe, training, changed)
    return training


def _check_unit(recipe: Recipe, training: TrainingOptions, changed: Mapping[str, Any]) -> None:
    """Raise InputError where `steps` was given, or taken back, over options of the recipe that count in the other unit."""
    was, now = ("epochs", "steps") if recipe.training.steps is None else ("steps", "epochs")
    left = [key for key in IN_EPOCHS if key not in changed and getattr(training, key)]
    if left:
        counted = ", ".join(f"{key}={option_text(getattr(training, key))}" for key in left)
        raise InputError(
            f"--option steps={option_text(training.steps)} makes {now} of what recipe {recipe.name!r} counts in {was}: "
            f"{counted}. Give {' and '.join(f'--option {key}=' for key in left)} in {now}, too"
        )


def option_text(value: Any) -> str:
    """Return an option's value as --option takes it."""
    if isinstance(value, (tuple, list)):
        return ",".join(option_text(item) for item in value)
    if value is None or isinstance(value, bool):
        return NONE if value is None else str(value).lower()
    return value if isinstance(value, str) else f"{value:.10g}"


def describe_recipes() -> list[dict[str, Any]]:
    """Return every published recipe, JSON-ready: what it says of itself and its model, and the options that it sets."""
    found = []
    for recipe in map(lookup_recipe, recipe_names()):
        said = {field.name: getattr(recipe.head, field.name) for field in fields_of(Head)}
        known = {key: value for key, value in said.items() if value is not None}
        found.append({"name": recipe.name, **known, "options": recipe.options})
    return found


def describe_options() -> dict[str, list[dict[str, Any]]]:
    """Return the training options, JSON-ready: `all` for those of every task, and each task's own."""
    shared = {field.name for field in fields_of(TrainingOptions)}
    described = {"all": [_described(field) for field in fields_of(TrainingOptions)]}
    for task, declared in TRAINING.items():
        described[task] = [_described(field) for field in fields_of(declared) if field.name not in shared]
    return described


def _described(field: Field) -> dict[str, Any]:
    opt = field.opt
    return {
        "name": field.name,
        "default": field.default,
        "help": opt.help,
        "choices": list(opt.choices),
        "min": opt.min,
        "max": opt.max,
    }
