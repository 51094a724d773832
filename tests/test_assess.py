"""How a selection covers its pool beside random draws, against ten lines of numpy."""

import json

import numpy as np
import pytest

from cli.main import run
from engine.assess import EDGES, assess, assess_selection, cuts_of, knee, random_picks
from engine.ingest import import_features
from engine.placement import open_shards
from engine.schema import InputError
from engine.select import select
from engine.shards import from_array, prepare
from engine.verbs import AssessOptions, ImportOptions, SelectOptions
from engine.verbs.shared import ShardOptions
from engine.verify import verify

OPTIONS = {"draws": 3, "points": 5, "emd_sample": 100}


@pytest.fixture(scope="module")
def selections(tmp_path_factory, feature_store):
    """Selections of the digits: by k-means, and of the 20 images nearest to the first one, which cover badly."""
    folder = tmp_path_factory.mktemp("selections")
    given = {"features": feature_store.place.uri, "normalize": True}
    select(SelectOptions(**given, out=str(folder / "kmeans"), strategy="kmeans", budget="20"))
    x = feature_store.vectors()
    far = np.argsort(-(x @ x[0]), kind="stable")[20:]
    (folder / "far.json").write_text(json.dumps(far.tolist()))
    more = {"exclude": str(folder / "far.json"), "strategy": "random", "budget": "20"}
    select(SelectOptions(**given, out=str(folder / "crowd"), **more))
    return folder


def distances(x, rows):
    return np.sqrt(((x[:, None].astype(np.float64) - x[rows][None]) ** 2).sum(axis=2)).min(axis=1)


def asked(feature_store, selection, **given):
    return AssessOptions(features=feature_store.place.uri, selection=str(selection), **{**OPTIONS, **given})


def test_figures_curve_and_histogram_are_those_of_brute_force(feature_store, selections):
    facts = assess_selection(asked(feature_store, selections / "kmeans"))
    picks = np.array(json.loads((selections / "kmeans" / "indices.json").read_text()))
    x = feature_store.vectors()
    mine = distances(x, picks)
    values = {figure["metric"]: figure for figure in facts["figures"]}
    assert values["mean_distance"]["value"] == pytest.approx(mine.mean(), rel=1e-6)
    assert values["covering_radius"]["value"] == pytest.approx(mine.max(), rel=1e-6)
    assert [point["num_picks"] for point in facts["curve"]] == cuts_of(20, 5).tolist() == [1, 2, 4, 9, 20]
    for point in facts["curve"]:
        found = distances(x, picks[: point["num_picks"]])
        assert point["mean_distance"] == pytest.approx(found.mean(), rel=1e-6)
        assert point["covering_radius"] == pytest.approx(found.max(), rel=1e-6)
    first = int(np.searchsorted(EDGES, facts["histogram"]["edges"][0]))
    expected, _ = np.histogram(mine, EDGES)
    assert facts["histogram"]["selection"] == expected[first : first + len(facts["histogram"]["selection"])].tolist()
    assert sum(facts["histogram"]["selection"]) == len(x)
    assert facts["sample"] is None


def test_random_is_what_the_draws_give(feature_store, selections):
    facts = assess_selection(asked(feature_store, selections / "kmeans"))
    x = feature_store.vectors()
    with open_shards(feature_store, ShardOptions(workers=0), True, ()) as shards:
        prepare(shards, np.empty(0, dtype=np.int64))
        drawn = [random_picks(shards, 20, 0, draw) for draw in range(3)]
    assert len({tuple(rows.tolist()) for rows in drawn}) == 3
    means = [distances(x, rows).mean() for rows in drawn]
    figure = facts["figures"][0]
    assert (figure["random_mean"], figure["random_std"]) == pytest.approx((np.mean(means), np.std(means, ddof=1)), rel=1e-6)


def test_a_selection_worse_than_random_is_warned_of_and_a_good_one_is_not(feature_store, selections):
    good = assess_selection(asked(feature_store, selections / "kmeans"))
    bad = assess_selection(asked(feature_store, selections / "crowd"))
    assert good["warnings"] == []
    assert [text.split(" is worse")[0] for text in bad["warnings"]] == ["mean_distance", "covering_radius", "emd"]
    assert all(figure["worse"] for figure in bad["figures"])


def test_labelled_rows_cover_for_both_and_are_never_drawn(feature_store, selections, tmp_path):
    given = {"features": feature_store.place.uri, "labeled": str(selections / "crowd"), "strategy": "coreset", "budget": "5"}
    select(SelectOptions(**given, out=str(tmp_path / "more")))
    facts = assess_selection(asked(feature_store, tmp_path / "more"))
    labeled = np.array(json.loads((tmp_path / "more" / "labeled.json").read_text()))
    picks = np.array(json.loads((tmp_path / "more" / "indices.json").read_text()))
    mine = distances(feature_store.vectors(), np.union1d(labeled, picks))
    assert facts["figures"][0]["value"] == pytest.approx(mine.mean(), rel=1e-6)
    assert facts["num_labeled"] == 20
    shards = from_array(feature_store.vectors())
    prepare(shards, labeled)
    assert not np.isin(random_picks(shards, 200, 0, 0), labeled).any()


def test_the_same_for_any_number_of_shards_and_a_sample_too(ray_session, digits, tmp_path):
    """Blocks of 8,192 rows: the digits are repeated to fill several."""
    x = np.concatenate([digits[0] + 0.001 * shift for shift in range(10)])
    np.save(tmp_path / "x.npy", x)
    import_features(ImportOptions(file=str(tmp_path / "x.npy"), out=str(tmp_path / "features")))
    given = {"features": str(tmp_path / "features"), "strategy": "random", "budget": "30"}
    select(SelectOptions(**given, out=str(tmp_path / "picks")))
    found = [
        assess_selection(
            AssessOptions(
                features=str(tmp_path / "features"), selection=str(tmp_path / "picks"), sample=6000, workers=workers, **OPTIONS
            )
        )
        for workers in (0, 2)
    ]
    assert found[0] == found[1]
    assert 5500 < found[0]["sample"] < 6500
    assert found[0]["sample"] == sum(found[0]["histogram"]["selection"])


@pytest.mark.parametrize(
    ("counts", "values", "expected"),
    [
        ([1, 2, 3, 4, 5], [1.0, 0.4, 0.3, 0.2, 0.1], 2),
        ([1, 2, 3], [3.0, 2.0, 1.0], None),
        ([1, 2, 3], [1.0, 1.0, 1.0], None),
        ([1, 2, 3, 4], [4.0, 3.9, 3.8, 1.0], None),
        ([1, 2], [2.0, 1.0], None),
    ],
    ids=["bend", "straight", "flat", "bulge", "two"],
)
def test_the_knee(counts, values, expected):
    assert knee(counts, values) == expected


def test_patterns_are_measured_vector_by_vector():
    x = np.eye(4, dtype=np.float32)
    shards = from_array(x, rows=np.array([0, 0, 1, 2]))
    options = AssessOptions(features="", selection="", draws=2, points=2, emd_sample=10)
    facts = assess(shards, np.array([0]), np.empty(0, dtype=np.int64), options)
    assert facts["figures"][0]["value"] == pytest.approx((0 + 0 + 2 * np.sqrt(2)) / 4)


def test_the_command_prints_publishes_and_does_nothing_twice(feature_store, selections, tmp_path, capsys):
    line = ["assess", feature_store.place.uri, "--selection", str(selections / "crowd"), "--draws", "3", "--emd-sample", "50"]
    line += ["--points", "4", "--out", str(tmp_path / "assessment"), "--workers", "0"]
    assert run(line) == 0
    printed = capsys.readouterr().out
    assert "covering_radius" in printed
    assert "warning: mean_distance is worse than that of random picks" in printed
    before = (tmp_path / "assessment" / "manifest.json").read_bytes()
    assert run([*line, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_picks"], len(facts["curve"])) == (20, 4)
    assert (tmp_path / "assessment" / "manifest.json").read_bytes() == before
    assert run(["info", str(tmp_path / "assessment")]) == 0
    assert verify(str(tmp_path / "assessment"))["bad"] == []


def test_nothing_to_compare_with_is_an_error(feature_store, tmp_path):
    given = {"features": feature_store.place.uri, "strategy": "random", "budget": "100%"}
    select(SelectOptions(**given, out=str(tmp_path / "all")))
    with pytest.raises(InputError, match="holds all that could be picked: there is nothing to compare it with"):
        assess_selection(asked(feature_store, tmp_path / "all"))
