"""`--labeled` and `--exclude` by a column of the features, and strategies whose options hold commas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.compare import compare, specs
from engine.ingest import import_features
from engine.schema import InputError
from engine.select import read_labeled, select
from engine.select.given import _rows_of_column
from engine.store import FeatureStore
from engine.verbs import CompareOptions, ImportOptions, SelectOptions


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 vectors, every third with a label."""
    folder = tmp_path_factory.mktemp("column")
    x = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    table = pa.table({"v": pa.array(list(x)), "label": pa.array([i % 2 if i % 3 == 0 else None for i in range(60)])})
    pa.feather.write_feather(table, folder / "x.arrow")
    import_features(ImportOptions(file=str(folder / "x.arrow"), out=str(folder / "features")))
    return str(folder / "features")


def test_rows_with_a_value_are_labelled(features: str, tmp_path: Path) -> None:
    options = {"strategy": "coreset", "budget": "40", "labeled": "column:label", "workers": 0}
    select(SelectOptions(features=features, out=str(tmp_path / "out"), **options))
    assert json.loads((tmp_path / "out/labeled.json").read_text()) == list(range(0, 60, 3))
    assert sorted(json.loads((tmp_path / "out/indices.json").read_text())) == [i for i in range(60) if i % 3]


def test_a_boolean_column_labels_where_it_is_true(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(features)
    assert len(store.rows) == 60  # read before the column is replaced
    assert "label" in store.columns
    marks = pa.chunked_array([pa.array([True, None, False] * 20)])
    monkeypatch.setattr(FeatureStore, "read_column", lambda self, name: marks)
    assert _rows_of_column("--labeled", "label", store).tolist() == list(range(0, 60, 3))


def test_an_unknown_column_lists_those_there_are(features: str) -> None:
    with pytest.raises(InputError, match="no column 'lable' \\(one of: row, id, label\\)"):
        read_labeled("column:lable", FeatureStore(features))


def test_a_part_that_begins_with_a_digit_belongs_to_the_option_before_it() -> None:
    assert specs(("kmeans", " hierarchical:levels=30", "5", "random")) == ["kmeans", "hierarchical:levels=30,5", "random"]


def test_compare_leaves_out_what_is_excluded(features: str, tmp_path: Path) -> None:
    given = {"strategies": ("random", "hierarchical:levels=10", "2"), "budget": "40", "exclude": "column:label", "seeds": 1}
    compare(CompareOptions(features=features, out=str(tmp_path / "out"), metrics=("coverage",), workers=0, **given))
    for picks in (tmp_path / "out").rglob("indices.json"):
        assert all(row % 3 for row in json.loads(picks.read_text()))
    assert len(list((tmp_path / "out").rglob("indices.json"))) == 2
