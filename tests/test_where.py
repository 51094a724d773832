"""The conditions of --where, against Python's own answer row by row, and what they say of mistakes."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pytest

from engine.schema import InputError
from engine.where import names_in, parse_where, rows_where

ROWS = [
    {"id": "a/1", "width": 640, "blur": 0.1, "label": 0, "sharp": True, "day": datetime.date(2024, 1, 1), "my column": 1},
    {"id": "a/2", "width": 320, "blur": None, "label": 1, "sharp": False, "day": datetime.date(2024, 6, 1), "my column": 2},
    {"id": "b/1", "width": 100, "blur": 0.9, "label": None, "sharp": None, "day": None, "my column": None},
    {"id": "b/2", "width": None, "blur": 0.5, "label": 2, "sharp": True, "day": datetime.date(2025, 1, 1), "my column": 4},
]
TABLE = pa.Table.from_pylist(ROWS)
NAMES = ["cat", "dog", "cow"]


def rows_of(text: str, class_names: list[str] | None = NAMES) -> list[int]:
    where = parse_where(text, TABLE.column_names)
    return [row for row, kept in enumerate(rows_where(where, TABLE.select(where.columns), class_names).to_pylist()) if kept]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width >= 320", [0, 1]),
        ("100 < width <= 640", [0, 1]),
        ("not width >= 320", [2]),
        ("width != 320", [0, 2]),
        ("blur is None", [1]),
        ("blur is not null", [0, 2, 3]),
        ("blur == None or width is None", [1, 3]),
        ("blur < 0.2 or blur is None and width / 2 == 160", [0, 1]),
        ("(blur < 0.2 or blur is None) and -width + 1 < -400", [0]),
        ("width * 2 - 1 > 1000", [0]),
        ("id.startswith('a/')", [0, 1]),
        ("id.endswith('1') and not id.contains('b')", [0]),
        ("id.matches('^[ab]/2$')", [1, 3]),
        ("id in ('a/1', 'b/2')", [0, 3]),
        ("width not in [640, 100]", [1]),
        ("width in ()", []),
        ("label == 'dog'", [1]),
        ("'dog' == label", [1]),
        ("label in ('cat', 2)", [0, 3]),
        ("label != 'cat'", [1, 3]),
        ("label == 1", [1]),
        ("label.startswith('c')", [0, 3]),
        ("label is None", [2]),
        ("sharp", [0, 3]),
        ("not sharp", [1]),
        ("sharp == False", [1]),
        ("day >= '2024-06-01'", [1, 3]),
        ("'2024-06-01' > day", [0]),
        ("column('my column') > 1", [1, 3]),
        ("1 == 1", [0, 1, 2, 3]),
        ("blur > 0.4 and width > 1", [2]),
    ],
)
def test_answers(text: str, expected: list[int]) -> None:
    assert rows_of(text) == expected


def test_a_negative_label_is_none() -> None:
    table = pa.table({"label": pa.array([-1, 0, 1])})
    where = parse_where("label is None or label == 'dog'", ["label"])
    assert rows_where(where, table, NAMES).to_pylist() == [True, False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("widht > 3", "did you mean 'width'"),
        ("width >", "can't be read"),
        ("id > 3", "compares string with int64"),
        ("sharp > 3", "compares bool with int64"),
        ("label == 'cta'", "did you mean 'cat'"),
        ("width", "neither true nor false"),
        ("width and sharp", "'width' is int64"),
        ("id + 1 > 3", "is string, and no number"),
        ("label + 1 > 3", "a label, and no number"),
        ("width is 3", "uses `is`"),
        ("width < None", "is None"),
        ("width in 3", "must be a list"),
        ("width.startswith('1')", "asks int64 for text"),
        ("id.startwith('1')", "did you mean 'startswith'"),
        ("id.startswith(id)", "takes one text"),
        ("id.matches('(')", "can't be worked out"),
        ("day > 'soon'", "which is none"),
        ("width * 9223372036854775807 > 1", "overflow"),
        ("__import__('os').system('true')", "calls system"),
        ("open('x')", "calls open"),
        ("(lambda: 1)() == 1", "calls"),
        ("[x for x in id]", "no column 'x'"),
        ("id[0] == 'a'", "is not part of a condition"),
        ("id.upper == 'A'", "is not part of a condition"),
        ("f'{id}' == 'a'", "is not part of a condition"),
        ("width ** 9 > 1", "is not part of a condition"),
        ("b'x' == id", "is not part of a condition"),
        ("(" * 2000 + "1" + ")" * 2000, "can't be read"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        rows_of(text)
    assert "--where" in str(caught.value) or "class" in str(caught.value)
    assert said in str(caught.value)


def test_names() -> None:
    assert names_in("label == 'x' and column('a b') > 1 and id.startswith('q')") == ("label", "a b", "id")
