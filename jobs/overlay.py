"""What lies over a job file: its own `small`, then each --set KEY=VALUE.

Both say the same things: `pool`, `out`, `seed`, `name`; `data.NAME`, `resources.NAME`, `table.KEY`; `steps.STEP.OPTION`, a
step by its name wherever it stands; `for.VARIABLE`, the values of a loop. A null takes a key away; a null of `data`
stays, and leaves out the options that name it.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue, ValidationError

from engine.schema import InputError, nearest
from jobs.jobfile import JobFile, Overlay, checked, problems, read_raw
from jobs.yamltext import parse_yaml

Raw = dict[str, JsonValue]
RESERVED = ("as", "for", "steps")


def load(job: str, small: bool = False, sets: tuple[str, ...] = ()) -> JobFile:
    """Return the job file `job` with what lies over it; raises InputError that lists what is wrong with either."""
    raw, name = read_raw(job)
    raw = _by_column(raw, name)
    file = checked(raw, name)
    if small and file.small is None:
        raise InputError(f"{name} has no `small` variant: leave --small out")
    if small:
        raw = _laid_over(raw, _raw_mapping(raw["small"]), f"{name}: small")
    for text in sets:
        raw = _laid_over(raw, _parse_set(text), f"--set {text.partition('=')[0]}")
    return checked(raw, name) if small or sets else file


def _raw_mapping(value: JsonValue) -> Raw:
    return value if isinstance(value, dict) else {}


def _parse_set(text: str) -> Raw:
    """Return `a.b=VALUE` as {a: {b: VALUE}}, the value parsed as YAML."""
    key, equals, value = text.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise InputError(f"--set {text!r} is not of the form KEY=VALUE, as in steps.features.backbone=resnet18")
    found = parse_yaml(value, f"--set {key}")
    for name in reversed(names):
        found = {name: found}
    overlay = _raw_mapping(found)
    try:
        Overlay.model_validate({name: value for name, value in overlay.items() if value is not None})
    except ValidationError as error:
        raise InputError("--set " + "; --set ".join(problems(error, Overlay))) from error
    return overlay


def entries(steps: JsonValue) -> Iterator[Raw]:
    """Yield every entry of a list of steps, loops before what is in them."""
    for entry in steps if isinstance(steps, list) else ():
        if isinstance(entry, dict):
            yield entry
            yield from entries(entry.get("steps"))


def _verb_of(entry: Raw) -> str | None:
    return next((key for key in entry if key not in RESERVED), None)


def _laid_over(raw: Raw, overlay: Raw, origin: str) -> Raw:
    """Return the file with `overlay` merged over it; `raw` was checked before. Raises InputError for names it has not."""
    steps = _copy(raw["steps"])
    by_name = {str(entry.get("as") or verb): (entry, verb) for entry in entries(steps) if (verb := _verb_of(entry))}
    loops = [loop for entry in entries(steps) if isinstance(loop := entry.get("for"), dict)]
    for name, options in _raw_mapping(overlay.get("steps")).items():
        if name not in by_name:
            raise InputError(f"{origin}: no step {name!r}{nearest(name, by_name)} (steps: {', '.join(by_name)})")
        entry, verb = by_name[name]
        entry[verb] = _merged(_raw_mapping(entry[verb]), _like(_raw_mapping(entry[verb]), _raw_mapping(options)))
    for variable, values in _raw_mapping(overlay.get("for")).items():
        known = {key: loop for loop in loops for key in loop}
        if variable not in known:
            shown = ", ".join(known) or "none"
            raise InputError(f"{origin}: no loop over {variable!r}{nearest(variable, known)} (variables: {shown})")
        for loop in loops:
            if variable in loop:
                loop[variable] = values
    rest = {key: value for key, value in overlay.items() if key not in ("steps", "for")}
    below = {key: value for key, value in raw.items() if key != "small"}
    data = _raw_mapping(raw.get("data"))
    for name in _raw_mapping(overlay.get("data")):
        if name not in data:
            raise InputError(f"{origin}: no data {name!r}{nearest(name, data)} (data: {', '.join(data) or 'none'})")
    data = {**data, **_raw_mapping(overlay.get("data"))}
    return {**_merged(below, rest), **({"data": data} if data else {}), "steps": steps}


def _copy(value: JsonValue) -> JsonValue:
    """Return a copy whose lists and mappings are its own, where an alias shared them, too."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _like(old: Raw, new: Raw) -> Raw:
    """Return `new` with its keys spelt as those of `old`: options have dashes or underscores."""
    spelt = {key.replace("-", "_"): key for key in old}
    return {spelt.get(key.replace("-", "_"), key): value for key, value in new.items()}


def _merged(old: Raw, new: Raw) -> Raw:
    """Return `new` over `old`: mappings key by key, a list of NAME=VALUE as one; a null takes a key away."""
    found = dict(old)
    for key, value in new.items():
        before = found.get(key)
        if isinstance(value, dict) and isinstance(before, list) and all("=" in str(item) for item in before):
            before = dict(str(item).partition("=")[::2] for item in before)
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _merged(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return found


def _by_column(raw: Raw, name: str) -> Raw:
    """Return the file with published rows that are lists as mappings: by the values that the loop has in the file itself."""
    found = dict(raw)
    if "table" in raw:
        found["table"] = _with_columns(raw, raw["table"], f"{name}: table")
    if isinstance(tables := raw.get("tables"), list):
        found["tables"] = [_with_columns(raw, table, f"{name}: tables[{index}]") for index, table in enumerate(tables)]
    return found


def _with_columns(raw: Raw, table: JsonValue, at: str) -> JsonValue:
    """Return one table so; what is no table is left to the check of the file."""
    if not isinstance(table, dict) or not isinstance(published := table.get("published"), dict):
        return table
    columns = table.get("columns")
    loops = [loop for entry in entries(raw.get("steps")) if isinstance(loop := entry.get("for"), dict)]
    values = next((loop[columns] for loop in loops if isinstance(columns, str) and columns in loop), None)
    found: Raw = {}
    for row, figures in published.items():
        if not isinstance(figures, list):
            found[row] = figures
            continue
        if not isinstance(values, (list, dict)):
            raise InputError(
                f"{at}.published.{row} is a list, and {columns!r} no loop's variable: give {{COLUMN: FIGURE, ...}}"
            )
        if len(figures) != len(values):
            known = f"{columns} {len(values)} values ({', '.join(map(str, values))})"
            told = f"has {len(figures)} figures, {known}: give one for each, null where there is none"
            raise InputError(f"{at}.published.{row} {told}")
        found[row] = dict(zip((str(value) for value in values), figures, strict=True))
    return {**table, "published": found}
