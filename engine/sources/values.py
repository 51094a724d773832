"""From the columns of a table to the labels and further columns of samples."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.schema import InputError
from engine.sources.roles import is_text

MAX_CLASSES = 100_000


class ClassNames:
    """Gathers the values of a label column, batch by batch: class names if they are strings."""

    def __init__(self, column: str, uri: str) -> None:
        self.column, self.uri = column, uri
        self._seen: set[str] = set()

    def add(self, labels: pa.Array | pa.ChunkedArray) -> None:
        """Take note of a batch of strings; missing and empty ones are no class."""
        self._seen.update(value for value in pc.unique(labels).to_pylist() if value)
        if len(self._seen) > MAX_CLASSES:
            raise InputError(
                f"{self.uri}: label column {self.column!r} has more than {MAX_CLASSES:,} different values: "
                "name another one with --label-column"
            )

    def names(self) -> tuple[str, ...]:
        """Return the class names, sorted."""
        return tuple(sorted(self._seen))


def labels_of(column: pa.ChunkedArray | pa.Array, class_names: tuple[str, ...] | None) -> list[int | None]:
    """Return labels as codes: strings by their place in `class_names` (as numbers without any), -1 and "" as None."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        text = column.cast(pa.string())
        if class_names:
            codes: list[int | None] = pc.index_in(text, value_set=pa.array(class_names, pa.string())).to_pylist()
            return codes
        column = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text).cast(pa.int64())
    return [None if value in (None, -1) else int(value) for value in column.to_pylist()]


def records(columns: dict[str, pa.ChunkedArray | pa.Array], num_rows: int) -> list[dict[str, Any]]:
    """Return columns as one dict a row."""
    values = {name: column.to_pylist() for name, column in columns.items()}
    return [{name: column[i] for name, column in values.items()} for i in range(num_rows)]
