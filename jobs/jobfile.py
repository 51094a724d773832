"""The job file: a pool, and the verbs that work on it, in order; checked by pydantic.

    name: cifar                       # default: the file's name
    pool: cifar10/train.parquet       # what every step that takes a pool gets, unless it says otherwise
    out: results/cifar                # a step writes OUT/<its name>
    seed: 0                           # for every step that has a seed, unless it says otherwise
    data: {test: cifar10/test.parquet}
    resources: {workers: 2}
    steps:
      - embed: {encoder: pixels}      # a verb, below it its options
        as: features                  # the step's name; default: the verb
      - for: {strategy: [random, kmeans], budget: [50, 1%]}
        steps:
          - select: {features: $features, strategy: $strategy, budget: $budget}

A loop's values may bring others along: `strategy: {random: {store: features}, freesel: {store: patterns}}` has $store, too.

`small`, and `--set KEY=VALUE`, lie over it (jobs/overlay.py); jobs/expand.py makes of it the steps that are run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from engine.places import Place
from engine.schema import InputError, lookup, nearest
from engine.verbs import JOB_VERBS
from jobs.yamltext import parse_yaml, to_yaml

HERE = Path(__file__).parent
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z][a-zA-Z0-9_-]*$")]
JobName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]
Options = dict[str, JsonValue]
Published = dict[str, dict[str, float | None]]


def _refuse(message: str) -> None:
    raise PydanticCustomError("job", "{message}", {"message": message})


def _as_mapping(values: Any) -> Any:
    """Return a loop's values, each with what it brings along: a list brings nothing. Refuses what is neither, or uneven."""
    if not isinstance(values, (list, dict)):
        _refuse(
            f"it takes a list: [A, B], or what each brings along: {{A: {{NAME: VALUE}}, B: {{NAME: VALUE}}}}, not {values!r}"
        )
    if not values:
        _refuse("it takes one value or more")
    if isinstance(values, list):
        texts = [value for value in values if isinstance(value, str)]
        if len(set(texts)) != len(values):
            _refuse(f"takes {values}: give one value or more, each once")
        return {value: {} for value in texts}
    found = {value: {} if brought is None else brought for value, brought in values.items()}
    names = [brought.keys() if isinstance(brought, dict) else None for brought in found.values()]
    if any(name != names[0] for name in names):
        _refuse(f"takes {', '.join(found)}: each must bring the same names along")
    return found


def _as_written(values: dict[str, Any]) -> object:
    return values if any(values.values()) else list(values)


Values = Annotated[dict[str, dict[Name, JsonValue]], BeforeValidator(_as_mapping), PlainSerializer(_as_written)]
"""A loop's values, and the further names that each of them brings along."""
Names = Annotated[tuple[Name, ...], BeforeValidator(lambda names: [names] if isinstance(names, str) else names)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Table(_Strict):
    """A table that the run ends with: one metric of a step's passes, beside what was published."""

    title: str | None = None
    steps: Names = Field(alias="step", min_length=1)
    """One, or several whose passes make the table together."""
    metric: str
    rows: Name
    """A loop variable; of compare: `strategy`; of rounds: `round`, `labeled`."""
    columns: Name | None = None
    """Another. What is neither (seeds) is averaged."""
    only: dict[Name, str] = {}
    """Variables that are neither, and the value whose figures alone count."""
    scale: float = Field(default=1.0, gt=0)
    """What our figures are multiplied by to have the published ones' unit."""
    published: Published = {}
    """By row and column; in a file also a list for a row, in the order of the loop's values."""


class Overlay(_Strict):
    """What changes a file: `small`, and each `--set`. Steps are named, loops are named by their variables."""

    name: JobName | None = None
    pool: str | None = None
    out: str | None = None
    seed: int | None = Field(default=None, ge=0)
    data: dict[Name, JsonValue] = {}
    resources: Options = {}
    table: dict[str, JsonValue] | None = None
    steps: dict[Name, Options] = {}
    loops: dict[Name, Values] = Field(default={}, alias="for")


class Entry(BaseModel):
    """A step: a verb and its options; or a loop: `for`, and the steps of each pass."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    __pydantic_extra__: dict[str, Options | None]

    name: Name | None = Field(default=None, alias="as")
    loop: dict[Name, Values] | None = Field(default=None, alias="for")
    steps: list[Entry] | None = None

    @property
    def verb(self) -> str:
        """The step's verb."""
        return next(iter(self.__pydantic_extra__))

    @property
    def options(self) -> Options:
        """The step's options, as they are written."""
        return self.__pydantic_extra__[self.verb] or {}

    @property
    def called(self) -> str:
        """The step's name."""
        return self.name or self.verb

    @model_validator(mode="after")
    def _step_or_loop(self) -> Entry:
        verbs = list(self.__pydantic_extra__)
        unknown = [name for name in verbs if name not in JOB_VERBS]
        if unknown:
            _refuse(f"unknown verb {unknown[0]!r}{nearest(unknown[0], JOB_VERBS)} (one of: {', '.join(JOB_VERBS)})")
        if self.loop is not None or self.steps is not None:
            if verbs or self.name or not self.loop or not self.steps:
                _refuse("a loop has `for`, with a list for each variable, and `steps`, and nothing else")
        elif len(verbs) != 1:
            _refuse(f"a step is one verb ({', '.join(JOB_VERBS)}) and its options" + (f", not {verbs}" if verbs else ""))
        return self


class JobFile(_Strict):
    """A job, as it is written."""

    name: JobName
    about: str | None = None
    source: str | None = None
    pool: str | None = None
    out: str
    seed: int = Field(default=0, ge=0)
    data: dict[Name, JsonValue] = {}
    resources: Options = {}
    steps: list[Entry] = Field(min_length=1)
    table: Table | None = None
    tables: list[Table] = []
    small: Overlay | None = None

    @property
    def all_tables(self) -> list[Table]:
        """`table` and `tables`."""
        return [*([self.table] if self.table else []), *self.tables]

    def as_yaml(self) -> str:
        """Return the file as YAML, without what lay over it."""
        return to_yaml(self.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"small"}))


def shipped() -> dict[str, Path]:
    """Return the job files that come with coresift, by name."""
    files = [HERE / "quickstart.yaml", *sorted((HERE / "recipes").glob("*.yaml"))]
    return {file.stem: file for file in files if file.exists()}


def read_raw(job: str) -> tuple[dict[str, JsonValue], str]:
    """Return a job file's keys and values, unchecked, and its name for errors; `job` is a path, or a shipped one's name.

    Raises InputError where there is none, or it is no YAML of keys.
    """
    place = Place(job)
    if not job.endswith((".yaml", ".yml")) and "/" not in job:
        if job not in shipped() and place.exists():
            raise InputError(f"{job} is not called .yaml: a job file is")
        place = Place(str(lookup(job, shipped(), "job")))
    try:
        text = place.read().decode()
    except FileNotFoundError:
        known = ", ".join(shipped()) or "none"
        raise InputError(f"job file {place.uri} does not exist (shipped ones, by name: {known})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"job file {place.uri} cannot be read: {error}") from error
    raw = parse_yaml(text, place.uri)
    if not isinstance(raw, dict):
        raise InputError(f"{place.uri} is no job file: it has no keys, such as pool, out and steps")
    stem = re.sub(r"[^a-z0-9]+", "-", place.name.rsplit(".", 1)[0].lower()).strip("-")
    return {"name": stem or "job", **raw}, place.uri


def checked(raw: dict[str, JsonValue], name: str) -> JobFile:
    """Return the file as it was checked; raises InputError that lists what is wrong, each by the path of its key."""
    try:
        return JobFile.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{name}: " + "; ".join(problems(error, JobFile))) from error


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return a line for each thing that pydantic found wrong in what was to be a `model`."""
    return [_problem(detail, model) for detail in error.errors(include_url=False)]


def key_path(keys: tuple[int | str, ...]) -> str:
    """Return e.g. steps[2].select.budget."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def _keys_of(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


PARTS: dict[str, type[BaseModel]] = {"table": Table, "tables": Table, "small": Overlay}
"""The models below a file's keys that refuse unknown ones."""
WORDS = {
    "string_type": "it takes a text",
    "int_parsing": "it takes a whole number",
    "float_parsing": "it takes a number",
    "list_type": "it takes a list: [A, B]",
    "too_short": "it takes one or more",
    "dict_type": "it takes keys and values",
    "model_type": "it takes keys and values",
    "model_attributes_type": "it takes keys and values",
}


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """Return one line: the path of the key, the value, what is allowed."""
    keys = tuple(key for key in detail["loc"] if key != "[key]")
    kind, value = detail["type"], detail["input"]
    path = key_path(keys) or "the file"
    if kind == "extra_forbidden":
        around = [key for key in keys[:-1] if isinstance(key, str)]
        inside = PARTS.get(around[-1], model) if around else model
        allowed = _keys_of(inside)
        return f"unknown key {path}{nearest(str(keys[-1]), allowed)} (one of: {', '.join(allowed)})"
    if kind == "missing":
        return f"{path} is missing"
    if kind == "job":
        return f"{path}: {detail['msg']}"
    if kind == "string_pattern_mismatch":
        return f"{path} is {value!r}: a name has letters, digits, dashes (a job's: small letters), and begins with a letter"
    shown = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}" if value else "empty"
    return f"{path} is {shown}: {WORDS.get(kind, detail['msg'])}"
