"""What columns of text hold: the narrowest type that every value of a column has, found over all rows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

NARROWEST_FIRST = (pa.int64(), pa.float64(), pa.bool_())
"""What a column of text may be, the narrowest first."""


class TextTypes:
    """Finds what the columns of a text file are, over all of its rows: the narrowest type that every value has."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._fit = {name: list(NARROWEST_FIRST) for name in names}
        self._empty = set(names)

    def add(self, name: str, values: pa.Array) -> None:
        """Take note of a batch of strings. 007 is no number: its zeros mean something."""
        if values.null_count < len(values):
            self._empty.discard(name)
        if self._fit[name] and pc.any(pc.match_substring_regex(values, r"^[+-]?0\d")).as_py():
            self._fit[name] = []
        self._fit[name] = [kind for kind in self._fit[name] if _casts(values, kind)]

    def type_of(self, name: str) -> pa.DataType:
        """Return the type of a column; strings where nothing narrower fits or nothing is there."""
        fit = self._fit[name]
        return fit[0] if fit and name not in self._empty else pa.string()


def _casts(values: pa.Array, kind: pa.DataType) -> bool:
    try:
        values.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True
