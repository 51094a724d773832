"""The names for notebooks: arrays in, pool rows out; the picks are those of the command line."""

import doctest
import json
import subprocess
import sys

import numpy as np
import pytest

import engine
from engine import api, evaluate_rows, open_features, select_rows
from engine.evaluate import evaluate
from engine.schema import InputError
from engine.select import select
from engine.verbs import EvaluateOptions, SelectOptions


def test_the_example_is_true():
    found = doctest.testmod(api)
    assert (found.failed, found.attempted) == (0, 12)


def test_import_engine_loads_no_numpy():
    script = "import engine, sys; assert 'numpy' not in sys.modules; engine.select_rows; assert 'numpy' in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        engine.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("strategy", "options"), [("kmeans", {"restarts": 1}), ("coreset", {}), ("activeft", {"steps": 3}), ("random", {})]
)
def test_an_array_a_store_and_the_command_give_the_same_picks(feature_store, digits, tmp_path, strategy, options):
    out, uri = tmp_path / "picks", feature_store.place.uri
    pairs = tuple(f"{name}={value}" for name, value in options.items())
    select(SelectOptions(features=uri, out=str(out), strategy=strategy, budget="1%", seed=3, option=pairs))
    expected = json.loads((out / "indices.json").read_text())
    for features in (digits[0], uri, open_features(uri)):
        rows = select_rows(features, strategy, "1%", random_state=3, **options)
        assert rows.dtype == np.int64
        assert rows.tolist() == expected


def test_evaluate_rows_is_evaluate(feature_store, digits, tmp_path):
    select(SelectOptions(features=feature_store.place.uri, out=str(tmp_path / "picks"), strategy="coreset", budget="30"))
    uri = feature_store.place.uri
    given = {"subject": uri, "selection": str(tmp_path / "picks"), "test": uri, "linear_epochs": 5, "neighbors": (1,)}
    expected = {found["metric"]: found["value"] for found in evaluate(EvaluateOptions(**given))}
    rows = json.loads((tmp_path / "picks" / "indices.json").read_text())
    for pool in (open_features(digits[0], labels=digits[1]), uri):
        assert evaluate_rows(pool, rows, pool, neighbors=[1], linear_epochs=5) == pytest.approx(expected)


def test_labels_of_any_kind_become_classes_and_a_test_set_may_lack_some():
    x = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    pool = open_features(x, labels=["cat", "dog", "owl"] * 2)
    test = open_features(x[:2], labels=["owl", "dog"])
    assert evaluate_rows(pool, [0, 1, 2], test, metrics=["knn"], neighbors=[1]) == {"knn_1": 50.0}
    with pytest.raises(InputError, match="have class 'bee'"):
        evaluate_rows(pool, [0], open_features(x[:1], labels=["bee"]), metrics=["knn"])
    assert sorted(select_rows(pool, "uniform", 3) % 3) == [0, 1, 2]


def test_random_state_is_as_in_scikit_learn(digits):
    x = digits[0][:200]
    assert select_rows(x, "random", 5, random_state=1).tolist() == select_rows(x, "random", 5, random_state=1).tolist()
    for make in (np.random.RandomState, np.random.default_rng):
        one, other = (select_rows(x, "random", 5, random_state=make(4)) for _ in range(2))
        assert one.tolist() == other.tolist()
    drawn = {tuple(select_rows(x, "random", 5, random_state=None).tolist()) for _ in range(3)}
    assert len(drawn) == 3


def test_labelled_and_excluded_rows_are_not_picked_and_probabilities_are_read(digits):
    x = digits[0][:60]
    rows = select_rows(x, "coreset", 20, labeled=range(20), exclude=np.arange(20, 40))
    assert sorted(rows.tolist()) == list(range(40, 60))
    probs = np.full((60, 2), 0.5)
    probs[7:] = [0.9, 0.1]
    assert select_rows(x, "entropy", 7, probs=probs).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: select_rows(x, "kmean", 3), "unknown strategy 'kmean', did you mean 'kmeans'?"),
        (lambda x: select_rows(x, "kmeans", 3, restart=1), "unknown option 'restart' for strategy 'kmeans', did you mean"),
        (lambda x: select_rows(x, "kmeans", 61), "budget '61' is more than the 60 images"),
        (lambda x: select_rows(x, "kmeans", "1,2"), "is 2 budgets"),
        (lambda x: select_rows(x[0], "kmeans", 1), r"shape \(64,\)"),
        (lambda x: select_rows(x * np.nan, "kmeans", 1), "the array: the vector of row 0 holds a NaN"),
        (lambda x: select_rows(x, "random", 1, labeled=[60]), "labeled names row 60"),
        (lambda x: select_rows(x, "random", 1, labeled=[0.5]), "it takes pool rows"),
        (lambda x: select_rows(x, "random", 1, random_state="a"), "random_state is 'a'"),
        (lambda x: select_rows(x, "entropy", 1), "give probs"),
        (lambda x: select_rows(x, "entropy", 1, probs=np.ones((3, 2))), r"probs have shape \(3, 2\)"),
        (lambda x: select_rows(x, "entropy", 1, probs=np.ones((60, 2))), "a sum of 2"),
        (lambda x: select_rows(x, "kmeans", 1, probs=np.ones((60, 2))), "leave probs out"),
        (lambda x: select_rows(x, "influence", 1), "use `coresift select`"),
        (lambda x: select_rows(x, "uniform", 1), "give them to open_features"),
        (lambda x: open_features(x, labels=[1]), r"labels have shape \(1,\)"),
        (lambda x: open_features("nowhere"), "nowhere"),
        (lambda x: open_features("nowhere", labels=[1]), "has its own"),
        (lambda x: evaluate_rows(x, [], metrics=["coverage"]), "rows is empty"),
        (lambda x: evaluate_rows(x, [1]), "metrics knn, linear need"),
        (lambda x: evaluate_rows(x, [1], open_features(x)), "images without a label"),
        (lambda x: evaluate_rows(x, [1], open_features(x, labels=[0] * 60)), "1 of the 1 labelled images have no label"),
        (lambda x: evaluate_rows(x, [1], open_features(x[:, :3], labels=[0] * 60)), "3 floats a row, the pool 64"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_why(digits, call, message):
    with pytest.raises(InputError, match=message):
        call(digits[0][:60])
