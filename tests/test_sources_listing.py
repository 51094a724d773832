"""Listings: cut to fixed batches, read lazily, hashed by what they say; and ids that must differ."""

import gc
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.schema import InputError
from engine.sources import ids
from engine.sources.listing import LISTING_ROWS, ListingWriter, extents, pieces

SCHEMA = pa.schema([("id", pa.string()), ("n", pa.int64())])


def table(start, stop):
    return pa.table([[f"id-{i}" for i in range(start, stop)], list(range(start, stop))], schema=SCHEMA)


def listing_of(*cuts):
    writer = ListingWriter(SCHEMA)
    for start, stop in itertools.pairwise(cuts):
        writer.add(table(start, stop))
    return writer.finish()


def test_batches_are_cut_anew_whatever_was_added():
    n = 2 * LISTING_ROWS + 5
    cuts = [
        (0, n),
        (0, 1, 2, LISTING_ROWS - 1, LISTING_ROWS, n),
        (0, LISTING_ROWS, 2 * LISTING_ROWS, n),
        (0, 10_000, 10_000, n),
    ]
    listings = [listing_of(*own) for own in cuts]
    assert len({listing.digest for listing in listings}) == 1
    for listing in listings:
        assert listing.num_rows == n
        with pa.ipc.open_file(listing.place.path) as file:
            assert [file.get_batch(i).num_rows for i in range(file.num_record_batches)] == [LISTING_ROWS, LISTING_ROWS, 5]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 1), (8191, 8193), (100, 20_000), (8192, 16_384), (16_000, 99_999), (20_000, 20_000)]
)
def test_any_range_can_be_read(start, stop):
    listing = listing_of(0, 20_000)
    assert listing.read(start, stop).to_pydict() == table(start, min(stop, 20_000)).to_pydict()


def test_an_empty_listing_is_one():
    listing = ListingWriter(SCHEMA).finish()
    assert (listing.num_rows, len(listing.read(0, 10)), list(listing.tables())) == (0, 0, [])


def test_only_the_batches_asked_for_are_read():
    listing = listing_of(0, 3 * LISTING_ROWS)
    read = []

    class Watched:
        schema = SCHEMA

        def get_batch(self, index):
            read.append(index)
            return table(0, LISTING_ROWS).to_batches()[0]

    listing.__dict__["_file"] = Watched()
    listing.read(LISTING_ROWS, LISTING_ROWS + 3)
    listing.read(LISTING_ROWS + 3, LISTING_ROWS + 4)
    assert read == [1]


def test_the_temporary_file_goes_with_its_listing():
    listing = listing_of(0, 10)
    path = listing.place.path
    assert os.path.exists(path)
    del listing
    gc.collect()
    assert not os.path.exists(path)


def test_a_writer_that_is_given_up_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    writer = ListingWriter(SCHEMA)
    writer.add(table(0, LISTING_ROWS))
    assert len(os.listdir(tmp_path)) == 1
    del writer
    gc.collect()
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
import pyarrow as pa
from engine.sources.listing import ListingWriter
listing = ListingWriter(pa.schema([("n", pa.int64())])).finish()
print(os.path.basename(listing.place.path), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="files are locked by flock")
def test_what_a_killed_run_left_is_swept_and_nothing_else(tmp_path, monkeypatch):
    def run(how):
        words = [sys.executable, "-c", KILLED, how]
        given = {"env": {**os.environ, "TMPDIR": str(tmp_path)}, "cwd": Path(__file__).parents[1]}
        return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, **given)

    killed = run("kill")
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [killed.stdout.strip()]
    others = tmp_path / "coresift-listing-link.arrow", tmp_path / "listing.arrow"
    others[0].symlink_to(tmp_path / "listing.arrow")
    others[1].write_bytes(b"not ours")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alive = listing_of(0, 10)
    assert {*os.listdir(tmp_path)} == {Path(alive.place.path).name, *(other.name for other in others)}
    assert run("go on").returncode == 0
    assert {*os.listdir(tmp_path)} == {Path(alive.place.path).name, *(other.name for other in others)}
    assert alive.read(9, 10)["n"].to_pylist() == [9]


def digest_of(column):
    writer = ListingWriter(pa.schema([("c", column.type)]))
    writer.add(pa.table([column], ["c"]))
    return writer.finish().digest


BOXES = pa.list_(pa.struct([("x", pa.float32()), ("crowd", pa.bool_())]))


@pytest.mark.parametrize(
    "columns",
    [
        [pa.array(["ab", "c"]), pa.array(["a", "bc"]), pa.array(["ab", None]), pa.array([None, "ab"]), pa.array(["ab", ""])],
        [pa.array([1, 2]), pa.array([2, 1]), pa.array([1, None]), pa.array([1, 0]), pa.array([1, 2], pa.int32())],
        [pa.array([[1], [2, 3]]), pa.array([[1, 2], [3]]), pa.array([[1, 2, 3], []]), pa.array([[1, 2, 3], None])],
        [pa.array([[{"x": 1, "crowd": c}], y], BOXES) for c in (True, False, None) for y in (None, [])],
        [pa.array([0, 1], pa.date32()), pa.array([1, 0], pa.date32()), pa.array([0, 1], pa.timestamp("ns", "UTC"))],
        [pa.array([True, False]), pa.array([False, True]), pa.array([True, None])],
        [pa.array([None, None]), pa.array([None]), pa.array([None, None], pa.string())],
    ],
    ids=["text", "integers", "lists", "boxes", "times", "flags", "nothing"],
)
def test_the_digest_tells_values_apart(columns):
    assert len({digest_of(column) for column in columns}) == len(columns)


def test_the_digest_is_blind_to_what_lies_under_nulls():
    values = np.array([1, 99, 3])
    mask = np.array([False, True, False])
    assert digest_of(pa.array(values, mask=mask)) == digest_of(pa.array([1, None, 3]))
    sliced = pa.array([7, 1, None, 3])[1:]
    assert digest_of(sliced) == digest_of(pa.array([1, None, 3]))


def test_extents_are_those_that_hold_the_rows():
    writer = ListingWriter(pa.schema([("start", pa.int64()), ("count", pa.int64())]))
    counts = [3, 0, 2, 4]
    writer.add(pa.table([[0, 3, 3, 5], counts], schema=writer.schema))
    listing = writer.finish()
    for start in range(10):
        for stop in range(start, 10):
            for step in (1, 2, 3):
                rows = np.arange(start, min(stop, 9), step)
                found = list(extents(listing, rows))
                assert [e["start"] + at for e, places in found for at in places.tolist()] == rows.tolist()
                assert all(len(places) for _, places in found)
                assert len({e["start"] for e, _ in found}) == len(found)


def test_pieces_are_small_and_hold_what_was_asked_for():
    writer = ListingWriter(pa.schema([("n", pa.int64())]))
    writer.add(pa.table([np.arange(20_000)], schema=writer.schema))
    listing = writer.finish()
    for rows in (np.arange(5, 17_000), np.arange(0, 20_000, 7), np.array([8191, 8192, 19_999]), np.empty(0, np.int64)):
        found = list(pieces(listing, rows))
        assert [n for _, table in found for n in table["n"].to_pylist()] == rows.tolist()
        assert [row for some, _ in found for row in some.tolist()] == rows.tolist()
        assert all(1 <= len(table) <= 256 for _, table in found)


# --- ids


def test_hashes_tell_ids_apart_and_depend_on_nothing_but_the_id():
    names = [f"{i}" for i in range(100_000)] + ["ab", "ba", "a", "", "a\0", "\0", "é", "train/1.jpg"]
    found = ids.hashes(pa.array(names))
    assert len(set(found.tolist())) == len(names)
    some = pa.array(names)[777:1777]
    assert np.array_equal(ids.hashes(some), found[777:1777])
    assert np.array_equal(ids.hashes(pa.array(names, pa.large_string())), found)
    assert np.array_equal(ids.hashes(pa.array([5, 66])), ids.hashes(pa.array(["5", "66"])))


@given(st.lists(st.text(max_size=3), max_size=40), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_repeats_are_found_wherever_they_are(names, size):
    def read():
        return [pa.array(names[at : at + size], pa.string()) for at in range(0, len(names), size)]

    assert ids.names_rows(read, len(names)) == (len(set(names)) == len(names))


def test_a_repeat_is_named_with_both_rows():
    names = [f"{i}" for i in range(30_000)]
    names[29_999] = "17"
    with pytest.raises(InputError, match=r"'17' is the id of rows 17 and 29999"):
        ids.check_unique(lambda: [pa.array(names[:10_000]), pa.array(names[10_000:])], 30_000, "pool")


@pytest.fixture
def short_runs(monkeypatch, tmp_path):
    """Hashes go to disk from the 65th on, in runs of 64; gives the folder of temporary files."""
    monkeypatch.setattr(ids, "RUN_ROWS", 64)
    monkeypatch.setattr(ids, "CHUNK_ROWS", 16)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]), max_size=300), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_hashes_on_disk_come_back_sorted(values, size):
    wanted, found = np.array(values, np.uint64), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "RUN_ROWS", 64)
        with ids._Hashes(len(wanted)) as hashes:
            for start in range(0, len(wanted), size):
                hashes.add(wanted[start : start + size])
            pieces = list(hashes.pieces())
    found = np.concatenate(pieces)
    assert np.array_equal(np.unique(found), np.unique(wanted))
    assert np.array_equal(np.sort(found), found)
    (distinct, there), (_, were) = np.unique(found, return_counts=True), np.unique(wanted, return_counts=True)
    assert np.array_equal(there > 1, were > 1)
    ends = [(piece[0], piece[-1]) for piece in pieces if len(piece)]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ends))
    assert len(distinct) == 0 or len(pieces) >= len(wanted) / 64


@pytest.mark.parametrize(("at", "again"), [(0, 999), (17, 18), (63, 64), (500, 998)])
def test_a_repeat_is_found_on_disk_too(short_runs, at, again):
    names = [f"{i}" for i in range(1000)]
    assert ids.names_rows(lambda: [pa.array(names)], 1000)
    names[again] = names[at]
    assert not ids.names_rows(lambda: [pa.array(names)], 1000)
    with pytest.raises(InputError, match=f"'{at}' is the id of rows {at} and {again}"):
        ids.check_unique(lambda: [pa.array(names)], 1000, "pool")
    assert os.listdir(short_runs) == []


def test_one_id_for_all_rows_takes_no_more_room_than_others(short_runs, monkeypatch):
    sizes = []
    pieces = ids._Hashes.pieces

    def watched(self):
        for piece in pieces(self):
            sizes.append(len(piece))
            yield piece

    monkeypatch.setattr(ids._Hashes, "pieces", watched)
    assert not ids.names_rows(lambda: itertools.repeat(pa.array(["a"] * 16), 500), 8000)
    assert max(sizes) <= 2 * 8000 / 64


def test_hashes_on_disk_go_with_an_error(short_runs, monkeypatch):
    opened, new = [], ids.tempfile.TemporaryFile

    def watched(**given):
        opened.append(new(**given))
        return opened[-1]

    def read():
        yield pa.array([f"{i}" for i in range(100)])
        raise OSError("gone")

    monkeypatch.setattr(ids.tempfile, "TemporaryFile", watched)
    with pytest.raises(OSError, match="gone"):
        ids.check_unique(read, 1000, "pool")
    assert [file.closed for file in opened] == [True]
    assert os.listdir(short_runs) == []


def test_a_missing_id_is_named():
    with pytest.raises(InputError, match="row 3 has no id"):
        ids.check_unique(lambda: [pa.array(["a", "b"]), pa.array(["c", None])], 4, "pool")


def test_two_ids_of_one_hash_are_no_repeat(monkeypatch):
    monkeypatch.setattr(ids, "hashes", lambda column: np.zeros(len(column), np.uint64))
    ids.check_unique(lambda: [pa.array(["a", "b"]), pa.array(["c"])], 3, "pool")
    with pytest.raises(InputError, match="rows 0 and 2"):
        ids.check_unique(lambda: [pa.array(["a", "b"]), pa.array(["a"])], 3, "pool")
