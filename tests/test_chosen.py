"""What --selection may be: every form gives the same rows, and what fits no pool is named."""

import json

import numpy as np
import pytest
from pools import make_folder

from engine.chosen import names_of, read_chosen
from engine.ingest import import_features
from engine.schema import InputError
from engine.select import select
from engine.sources import open_pool
from engine.verbs import ImportOptions, SelectOptions

NAMES = [f"{name}/{i}.png" for name in ("ant", "owl") for i in range(10)]


@pytest.fixture
def pool(tmp_path):
    return open_pool(str(make_folder(tmp_path / "pool", NAMES)))


def make_features(folder, ids=NAMES):
    given = {"features": np.random.default_rng(3).normal(size=(len(NAMES), 4)).astype(np.float32)}
    np.savez(folder / "vectors.npz", **given, **({"ids": np.array(ids)} if ids else {}))
    out = str(folder / "features")
    import_features(ImportOptions(file=str(folder / "vectors.npz"), out=out))
    return out


def pick(features, out, budget="4", **more):
    return select(SelectOptions(features=features, strategy="random", budget=budget, out=str(out), workers=0, **more))


def refused(selection, pool, *words):
    with pytest.raises(InputError) as caught:
        read_chosen(str(selection), pool)
    for word in words:
        assert str(word) in str(caught.value)


def test_a_selection_is_what_was_labelled_and_the_picks(tmp_path, pool):
    features = make_features(tmp_path)
    (tmp_path / "labeled.json").write_text("[7, 3]")
    pick(features, tmp_path / "picks", labeled=str(tmp_path / "labeled.json"))
    picks = json.loads((tmp_path / "picks" / "indices.json").read_text())
    chosen = read_chosen(str(tmp_path / "picks"), pool)
    assert chosen.rows.tolist() == sorted([3, 7, *picks])
    assert chosen.ids == {row: NAMES[row] for row in picks}
    assert not chosen.by_row
    assert names_of(chosen, pool) == [NAMES[row] for row in chosen.rows]


def test_all_forms_name_the_same_rows(tmp_path, pool):
    pick(make_features(tmp_path), tmp_path / "picks")
    rows = json.loads((tmp_path / "picks" / "indices.json").read_text())
    np.save(tmp_path / "rows.npy", np.array(rows))
    forms = [tmp_path / "picks", tmp_path / "picks" / "ids.txt", tmp_path / "picks" / "indices.json", tmp_path / "rows.npy"]
    found = [read_chosen(str(form), pool) for form in forms]
    assert {tuple(chosen.rows.tolist()) for chosen in found} == {tuple(sorted(rows))}
    assert len({chosen.digest for chosen in found}) == 1
    assert found[1].ids == found[0].ids
    assert read_chosen("all", pool).rows.tolist() == list(range(20))


def test_features_without_ids_call_images_by_their_rows(tmp_path, pool):
    pick(make_features(tmp_path, ids=None), tmp_path / "picks")
    chosen = read_chosen(str(tmp_path / "picks"), pool)
    assert (chosen.by_row, chosen.ids) == (True, {})
    assert names_of(chosen, pool) == [str(row) for row in chosen.rows]


def test_a_folder_of_several_budgets_lists_them(tmp_path, pool):
    pick(make_features(tmp_path), tmp_path / "picks", budget="3,5")
    refused(tmp_path / "picks", pool, "one for each budget", tmp_path / "picks" / "3", tmp_path / "picks" / "5")


def test_a_pool_of_another_size_is_refused(tmp_path):
    pick(make_features(tmp_path), tmp_path / "picks")
    other = open_pool(str(make_folder(tmp_path / "other", NAMES[:-1])))
    refused(tmp_path / "picks", other, "20 rows", "has 19")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([1, 20], ["row 20", "0 to 19"]),
        ([-1, 4], ["row -1", "0 to 19"]),
        ([4, 5, 4], ["row 4", "more than once"]),
        ([[1], [2]], ["flat list of pool rows"]),
        ([0.5], ["flat list of pool rows"]),
        (3, ["flat list of pool rows"]),
        ([], ["empty", "nothing to train on"]),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, pool, rows, words):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    refused(tmp_path / "rows.json", pool, "rows.json", *words)
    np.save(tmp_path / "rows.npy", np.array(rows))
    refused(tmp_path / "rows.npy", pool, "rows.npy", *words)


def test_ids_that_do_not_fit_are_named(tmp_path, pool):
    file = tmp_path / "ids.txt"
    file.write_text("owl/1.png\nowl/x.png\n\nant/y.png\n")
    refused(file, pool, "2 ids, of 3", "'owl/x.png', 'ant/y.png'")
    file.write_text("owl/1.png\nowl/1.png\n")
    refused(file, pool, "'owl/1.png' more than once")
    file.write_text("\n")
    refused(file, pool, "empty")
    file.write_bytes(b"owl/1.png\r\nant/0.png\r\n")
    assert read_chosen(str(file), pool).rows.tolist() == [0, 11]


def test_what_is_no_selection_is_named(tmp_path, pool):
    refused(tmp_path / "nothing", pool, "does not exist")
    refused(tmp_path / "pool", pool, "not a finished selection folder")
    (tmp_path / "rows.json").write_text("[1,")
    refused(tmp_path / "rows.json", pool, "cannot be read")
    (tmp_path / "rows.npy").write_text("nope")
    refused(tmp_path / "rows.npy", pool, "cannot be read")
