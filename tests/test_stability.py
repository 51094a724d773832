"""Localisation stability by hand, end to end, and the strategies that take the lowest score first."""

import json

import numpy as np
import pytest
from scores import write_scores
from test_scorers import COUNT, detector_of, pool_of, told

from engine.draws import random_keys
from engine.embed import embed
from engine.schema import InputError, build_options
from engine.select import select
from engine.select.scored import WITHOUT_BOXES
from engine.stability import best_overlaps, stability
from engine.store import FeatureStore
from engine.verbs import SelectOptions


def boxes(*rows):
    """x, y, width, height, score, class."""
    return np.array(rows, dtype=np.float32).reshape(-1, 6)


SQUARE = (0, 0, 10, 10, 0.5, 0)


def test_the_best_overlap_of_each_box():
    half = (5, 0, 10, 10, 0.9, 1)  # shares 50 of 150, whatever its class
    quarter = (0, 0, 5, 5, 0.9, 0)  # 25 of 100
    assert best_overlaps(boxes(SQUARE), boxes(half, quarter)).tolist() == pytest.approx([1 / 3])
    assert best_overlaps(boxes(SQUARE, half), boxes(quarter)).tolist() == pytest.approx([0.25, 0.0])
    assert best_overlaps(boxes(SQUARE), boxes()).tolist() == [0.0]
    assert best_overlaps(boxes(SQUARE), boxes((20, 20, 3, 3, 1, 0))).tolist() == [0.0]
    assert best_overlaps(boxes((1, 1, 0, 0, 1, 0)), boxes((1, 1, 0, 0, 1, 0))).tolist() == [0.0]


def test_stability_by_hand():
    """Box A, score 0.5, meets itself, then a half (1/3): 2/3. Box B, score 0.25, is found in the first copy alone: 1/2."""
    b = (100, 100, 4, 4, 0.25, 0)
    first, second = boxes(b, SQUARE), boxes((5, 0, 10, 10, 0.9, 1))
    assert stability(boxes(SQUARE, b), [first, second]) == pytest.approx((0.5 * 2 / 3 + 0.25 * 1 / 2) / 0.75)
    assert stability(boxes(SQUARE), [boxes(SQUARE)] * 6) == 1.0
    assert stability(boxes(SQUARE), [boxes()] * 6) == 0.0
    assert np.isnan(stability(boxes(), [boxes(SQUARE)]))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return pool_of(tmp_path_factory.mktemp("pool") / "p", 0)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return detector_of(tmp_path_factory.mktemp("detector"), "ssdlite")


def test_end_to_end(pool, detector, tmp_path):
    """No noise, no movement; the noise of an image depends on the seed and its row, not on the batch."""
    found = {}
    for name, options, given in (
        ("still", ("noise=0",), {}),
        ("noisy", ("noise=8,48",), {}),
        ("batch", ("noise=8,48",), {"batch_size": 7}),
        ("seed", ("noise=8,48",), {"seed": 1}),
    ):
        embed(told(pool, detector, tmp_path / name, "stability", options, **given))
        store = FeatureStore(str(tmp_path / name))
        assert (store.column, store.dim, store.num_vectors) == ("stability", 1, COUNT)
        found[name] = store.vectors()[:, 0]
    np.testing.assert_allclose(found["still"], 1, atol=1e-5)
    assert ((found["noisy"] > 0) & (found["noisy"] < 1)).all()
    np.testing.assert_allclose(found["noisy"], found["batch"], atol=1e-4)
    assert not np.allclose(found["noisy"], found["seed"], atol=1e-4)


def test_noise_is_added_to_the_pixels(pool, detector, tmp_path, monkeypatch):
    """A detector whose box is as wide as the image is bright tells which pixels it saw; one image has none."""

    def seen(self, model, pixels, sizes):
        out = [
            boxes((0, 0, np.std(self.canvas.cut(own, *size)), 1, 1, 0))
            for own, size in zip(pixels, sizes.tolist(), strict=True)
        ]
        return [one[:0] if size[0] == 40 else one for one, size in zip(out, sizes.tolist(), strict=True)]

    monkeypatch.setattr("engine.tasks.detect.Detect.predict", seen)
    embed(told(pool, detector, tmp_path / "out", "stability", ("noise=0,30",)))
    found = FeatureStore(str(tmp_path / "out")).vectors()[:, 0]
    none = np.arange(COUNT) % 5 == 0
    assert np.isnan(found[none]).all()
    assert ((found[~none] > 0.8) & (found[~none] < 0.99)).all()  # std 60 or so, then the root of 60^2 + 30^2, clipped


def test_options_of_stability(pool, detector, tmp_path):
    for options, words in (
        (("steps=3",), "options: noise"),
        (("noise=-1",), "it must be 0 to 255"),
        (("noise=",), "takes a number"),
    ):
        with pytest.raises(InputError, match=words):
            embed(told(pool, detector, tmp_path / "out", "stability", options))


# --- strategies


def picks_of(features, out, strategy, budget, **given):
    words = {"features": features, "out": str(out), "strategy": strategy, "budget": str(budget), "workers": 0}
    (manifest,) = select(build_options(SelectOptions, words | given, "select"))
    return json.loads((out / "indices.json").read_text()), manifest


@pytest.mark.parametrize("strategy", ["influence", "gradient_similarity", "stability"])
def test_the_lowest_come_first_and_those_without_a_score_last(tmp_path, strategy):
    values = np.round(np.random.default_rng(0).standard_normal(150), 1)  # some are equal: the smaller row first
    values[[3, 70, 149]] = np.nan
    store = write_scores(tmp_path / "s", strategy, values, "stability" if strategy == "stability" else "influence")
    (tmp_path / "labeled.json").write_text("[0, 70]")
    picks, _ = picks_of(store, tmp_path / "out", strategy, 148, labeled=str(tmp_path / "labeled.json"))
    expected = sorted(set(range(150)) - {0, 3, 70, 149}, key=lambda row: (np.float32(values[row]), row))
    rest = np.array([3, 149])
    assert picks == [*expected, *rest[np.argsort(random_keys(0, (WITHOUT_BOXES,), rest))]]
    import pyarrow.parquet as pq

    gains = pq.read_table(tmp_path / "out" / "picks.parquet")["gain"].to_pylist()
    assert gains[:3] == [-float(np.float32(values[row])) for row in picks[:3]]
    assert gains[-2:] == [None, None]
    assert picks_of(store, tmp_path / "few", strategy, 20, labeled=str(tmp_path / "labeled.json"))[0] == picks[:20]


def test_a_store_of_another_encoder_is_refused(tmp_path):
    values = np.arange(80.0)
    stores = {name: write_scores(tmp_path / name, name, values) for name in ("influence", "gradient_similarity")}
    stores["stability"] = write_scores(tmp_path / "stability", "stability", values / 80, "stability")
    infinite = write_scores(tmp_path / "infinite", "influence", np.where(values == 7, np.inf, values))
    for store, strategy, words in (
        ("gradient_similarity", "influence", "reads what --encoder influence wrote, and .* is of 'gradient_similarity'"),
        ("influence", "gradient_similarity", "is of 'influence': use strategy 'influence'"),
        ("influence", "stability", "reads scores by noise .* use influence, gradient_similarity"),
        ("stability", "entropy", "'entropy' reads probabilities or a detector's boxes, and .* by noise .*: use stability"),
        ("influence", "kmeans", r"holds a number for each image \(influence\), not vectors"),
    ):
        with pytest.raises(InputError, match=words):
            picks_of(stores[store], tmp_path / "out", strategy, 5)
    with pytest.raises(InputError, match="row 7 has an infinite score"):
        picks_of(infinite, tmp_path / "out", "influence", 5)


def test_random_takes_any_store(tmp_path):
    """It reads no vectors: the same picks of scores, with rows that have none, as of any other store of so many rows."""
    scores = write_scores(tmp_path / "s", "influence", np.where(np.arange(90) % 4, 1.0, np.nan))
    np.savez(tmp_path / "x.npz", features=np.ones((90, 3), np.float32))
    from engine.ingest import import_features
    from engine.verbs import ImportOptions

    import_features(ImportOptions(file=str(tmp_path / "x.npz"), out=str(tmp_path / "x")))
    of_scores, _ = picks_of(scores, tmp_path / "a", "random", 30)
    of_vectors, _ = picks_of(str(tmp_path / "x"), tmp_path / "b", "random", 30)
    assert of_scores == of_vectors
    assert len(set(of_scores)) == 30
