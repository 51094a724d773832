"""Conditions on a row's columns, as `--where` takes them: Python's syntax, a small part of it, worked out by Arrow.

    width >= 640 and height >= 480 and not name.startswith("test/")
    label in ("cat", "dog") and (blur is None or blur < 0.2 * width / height)

Comparisons, also in chains; `in` a list; `is None`; and, or, not; + - * / of numbers; text.startswith(), .endswith(),
.contains(), .matches() (a regular expression). A column of another name than Python allows is column("its name"). What a
missing value leaves open is not met. Nothing is evaluated as Python.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from engine.schema import InputError, first_line, nearest

GRAMMAR = 'comparisons, in (...), is None, and, or, not, + - * /, .startswith("x"), .endswith, .contains, .matches'
COMPARED = {
    ast.Eq: ("==", pc.equal),
    ast.NotEq: ("!=", pc.not_equal),
    ast.Lt: ("<", pc.less),
    ast.LtE: ("<=", pc.less_equal),
    ast.Gt: (">", pc.greater),
    ast.GtE: (">=", pc.greater_equal),
}
COMPUTED = {ast.Add: pc.add_checked, ast.Sub: pc.subtract_checked, ast.Mult: pc.multiply_checked, ast.Div: pc.divide}
TEXT = {
    "startswith": pc.starts_with,
    "endswith": pc.ends_with,
    "contains": pc.match_substring,
    "matches": pc.match_substring_regex,
}
Values = Any
"""An Arrow array or scalar: pyarrow's stubs give its compute functions no types."""


@dataclass(frozen=True)
class Labels:
    """A column of class numbers, with what the classes are called."""

    codes: Values
    names: Sequence[str]

    def code_of(self, name: str) -> int:
        """Return the number of a class; raises InputError for a name that no class has."""
        if name not in self.names:
            raise InputError(f"no class is called {name!r}{nearest(name, self.names)} (one of: {', '.join(self.names[:20])})")
        return self.names.index(name)

    def text(self) -> Values:
        """Return the names instead of the numbers; nothing where there is no label."""
        known = pa.array([*self.names, None], pa.string())
        at = pc.if_else(pc.less(pc.fill_null(self.codes, -1), 0), len(self.names), self.codes)
        return known.take(at.combine_chunks() if isinstance(at, pa.ChunkedArray) else at)


@dataclass(frozen=True)
class Where:
    """A condition, parsed: its text, what it says, and the names of the columns that it reads."""

    text: str
    body: ast.expr
    columns: tuple[str, ...]


def _fail(where: str, node: ast.AST, what: str) -> NoReturn:
    part = ast.get_source_segment(where, node) or where
    raise InputError(f"--where {where!r}: {part!r} {what}")


def _column_of(node: ast.AST) -> str | None:
    """Return the column that an expression names, or None."""
    if isinstance(node, ast.Name):
        return None if node.id.lower() in ("null", "none") else node.id
    call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column"
    if call and isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    return None


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"--where {text!r} can't be read: {first_line(error)} (it takes {GRAMMAR})") from None


def _named(body: ast.expr) -> tuple[str, ...]:
    called = {id(node.func) for node in ast.walk(body) if isinstance(node, ast.Call)}
    names = [name for node in ast.walk(body) if id(node) not in called and (name := _column_of(node)) is not None]
    return tuple(dict.fromkeys(names))


def names_in(text: str) -> tuple[str, ...]:
    """Return the names of the columns that a condition reads; raises InputError for what is none."""
    return _named(_parsed(text))


def parse_where(text: str, columns: Sequence[str]) -> Where:
    """Parse a condition on some columns; raises InputError for what is not one, or names another column."""
    body = _parsed(text)
    for name in _named(body):
        if name not in columns:
            raise InputError(f"--where {text!r}: no column {name!r}{nearest(name, columns)} (one of: {', '.join(columns)})")
    return Where(text.strip(), body, _named(body))


class _Reader:
    """Works a condition out on some rows."""

    def __init__(self, where: Where, columns: dict[str, Values | Labels]) -> None:
        self.text, self.columns = where.text, columns

    def plain(self, node: ast.expr) -> Values:
        """Return the values of an expression, labels as numbers."""
        value = self.value(node)
        return value.codes if isinstance(value, Labels) else value

    def value(self, node: ast.expr) -> Values | Labels:
        """Return the values of an expression."""
        column = _column_of(node)
        if column is not None:
            return self.columns[column]
        if isinstance(node, ast.Name):
            return pa.scalar(None)
        if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int, float))):
            return pa.scalar(node.value)
        if isinstance(node, ast.BoolOp):
            values = [self.truth(part) for part in node.values]
            both = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            result = values[0]
            for value in values[1:]:
                result = both(result, value)
            return result
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self.truth(node.operand))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self._arrow(node, pc.negate, self.number(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
            return self._computed(node)
        if isinstance(node, ast.Compare):
            return self._chain(node)
        if isinstance(node, ast.Call):
            return self._text(node)
        _fail(self.text, node, f"is not part of a condition: it takes {GRAMMAR}")

    def truth(self, node: ast.expr) -> Values:
        """Return the values of an expression that is true or false."""
        value = self.plain(node)
        if not pa.types.is_boolean(value.type):
            _fail(self.text, node, f"is {value.type}, neither true nor false: compare it with something")
        return value

    def number(self, node: ast.expr) -> Values:
        """Return the values of an expression that is a number."""
        value = self.value(node)
        if isinstance(value, Labels) or not _is_number(value.type):
            kind = "a label" if isinstance(value, Labels) else str(value.type)
            _fail(self.text, node, f"is {kind}, and no number")
        return value

    def _arrow(self, node: ast.AST, function: Any, *values: Values) -> Values:
        try:
            return function(*values)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            _fail(self.text, node, f"can't be worked out: {first_line(error)}")

    def _computed(self, node: ast.BinOp) -> Values:
        left, right = self.number(node.left), self.number(node.right)
        if isinstance(node.op, ast.Div):
            left = left.cast(pa.float64())
        return self._arrow(node, COMPUTED[type(node.op)], left, right)

    def _chain(self, node: ast.Compare) -> Values:
        parts = [node.left, *node.comparators]
        found = [self._compared(node, a, op, b) for a, op, b in zip(parts, node.ops, parts[1:], strict=False)]
        result = found[0]
        for value in found[1:]:
            result = pc.and_kleene(result, value)
        return result

    def _compared(self, node: ast.Compare, a: ast.expr, op: ast.cmpop, b: ast.expr) -> Values:
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(b, (ast.List, ast.Tuple, ast.Set)):
                _fail(self.text, b, "must be a list after `in`: (1, 2) or ('a', 'b')")
            found = pa.scalar(False)
            for item in b.elts:
                found = pc.or_kleene(found, self._pair(node, a, ast.Eq(), item))
            return pc.invert(found) if isinstance(op, ast.NotIn) else found
        return self._pair(node, a, op, b)

    def _pair(self, node: ast.Compare, a: ast.expr, op: ast.cmpop, b: ast.expr) -> Values:
        left, right = self.value(a), self.value(b)
        missing = [isinstance(v, pa.Scalar) and pa.types.is_null(v.type) for v in (left, right)]
        if any(missing):
            if not isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
                _fail(self.text, node, "compares with None: write `is None` or `is not None`")
            other = left if missing[1] else right
            absent = pc.is_null(other.codes if isinstance(other, Labels) else other)
            return absent if isinstance(op, (ast.Is, ast.Eq)) else pc.invert(absent)
        if type(op) not in COMPARED:
            _fail(self.text, node, "uses `is`, which is for None: write == or !=")
        left, right = self._alike(node, left, right)
        return self._arrow(node, COMPARED[type(op)][1], left, right)

    def _alike(self, node: ast.AST, left: Values | Labels, right: Values | Labels) -> tuple[Values, Values]:
        """Return two sides as Arrow compares them: class names as numbers, text as the dates it is compared with."""
        if isinstance(right, Labels) and not isinstance(left, Labels):
            right, left = self._alike(node, right, left)
            return left, right
        if isinstance(left, Labels):
            if isinstance(right, Labels):
                return left.codes, right.codes
            if pa.types.is_string(right.type):
                return (
                    (left.codes, pa.scalar(left.code_of(right.as_py())))
                    if isinstance(right, pa.Scalar)
                    else (left.text(), right)
                )
            left = left.codes
        plain: Values = right.codes if isinstance(right, Labels) else right
        left, plain = self._dated(node, left, plain), self._dated(node, plain, left)
        kinds = [_kind(side.type) for side in (left, plain)]
        if kinds[0] != kinds[1] or "" in kinds:
            _fail(self.text, node, f"compares {left.type} with {plain.type}")
        return left, plain

    def _dated(self, node: ast.AST, side: Values, other: Values) -> Values:
        """Return one side of a comparison: a text that is compared with dates or times as one of them."""
        if not isinstance(side, pa.Scalar) or not pa.types.is_string(side.type) or not pa.types.is_temporal(other.type):
            return side
        try:
            return side.cast(other.type)
        except pa.ArrowInvalid:
            _fail(self.text, node, f"compares {other.type} with {side.as_py()!r}, which is none")

    def _text(self, node: ast.Call) -> Values:
        function = node.func
        if not isinstance(function, ast.Attribute) or function.attr not in TEXT or node.keywords:
            name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            _fail(self.text, node, f"calls {name}{nearest(name, TEXT)}: there are .{'(), .'.join(TEXT)}() and column()")
        if len(node.args) != 1 or not isinstance(node.args[0], ast.Constant) or not isinstance(node.args[0].value, str):
            _fail(self.text, node, f"takes one text: .{function.attr}('...')")
        value = self.value(function.value)
        value = value.text() if isinstance(value, Labels) else value
        if _kind(value.type) != "text":
            _fail(self.text, node, f"asks {value.type} for text")
        return self._arrow(node, TEXT[function.attr], value, node.args[0].value)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _kind(kind: pa.DataType) -> str:
    """Return what a type is compared as: only the same compare; nothing for what does not compare at all."""
    if _is_number(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    return "bool" if pa.types.is_boolean(kind) else "time" if pa.types.is_temporal(kind) else ""


def rows_where(where: Where, table: pa.Table, class_names: Sequence[str] | None) -> pa.Array:
    """Return which rows of a table meet a condition, (r,) booleans without nulls.

    `label` is compared by class name as well as by number; a negative one is none. Raises InputError where types don't compare.
    """
    columns: dict[str, Values | Labels] = {}
    for name in where.columns:
        values = table[name].combine_chunks()
        values = values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
        if name == "label":
            values = pc.if_else(pc.less(values, 0), pa.scalar(None, values.type), values)
        columns[name] = Labels(values, class_names) if name == "label" and class_names else values
    found = _Reader(where, columns).truth(where.body)
    if isinstance(found, pa.Scalar):
        found = pa.repeat(found, len(table))
    return pc.fill_null(found, False)
