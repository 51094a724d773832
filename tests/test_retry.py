"""What passes is waited for, what does not is one clear error, and nothing that is finished is lost."""

import errno
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine import retry
from engine.decode import NO_IMAGE
from engine.embed import embed
from engine.pipeline import check_readable
from engine.places import Place
from engine.retry import patiently, reached
from engine.schema import InputError, RunError
from engine.sources import pool as pool_module
from engine.sources.pool import NO_SUCH_FILE
from engine.verbs import EmbedOptions

DOWN = "When reading: AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server"
DENIED = "When reading: AWS Error ACCESS_DENIED during HeadObject operation: No response body."


@pytest.fixture
def naps(monkeypatch):
    """The seconds that were waited, without waiting."""
    slept = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    return slept


class Flaky:
    """Work that fails with the errors given, one a call, and then gives 7."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


# --- waiting


def test_what_passes_is_waited_for(naps):
    work = Flaky(OSError(DOWN), OSError("odd"), TimeoutError("slow"))
    assert patiently(work, "s3://b/x", True) == 7
    assert naps == [0.5, 1.0, 2.0]


def test_ten_seconds_are_waited_for():
    assert sum(retry.WAITS_S) > 10


def test_a_local_disk_is_never_waited_for(naps):
    with pytest.raises(OSError, match="full"):
        patiently(Flaky(OSError(errno.ENOSPC, "full")), "/x", False)
    assert naps == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError("gone"), PermissionError("no"), OSError(DENIED), OSError("NO_SUCH_BUCKET")]
)
def test_what_is_final_is_raised_at_once(naps, error):
    work = Flaky(error)
    with pytest.raises(type(error)):
        patiently(work, "s3://b/x", True)
    assert (work.calls, naps) == (1, [])


def test_a_store_that_never_answers_is_a_run_error(naps):
    with pytest.raises(RunError, match=r"s3://b/x gave no answer in 6 tries: When reading.*run the same command again"):
        patiently(Flaky(*[OSError(DOWN)] * 9), "s3://b/x", True)
    assert naps == list(retry.WAITS_S)


def test_a_host_of_the_web_that_is_away_speaks_for_itself(naps):
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        patiently(Flaky(*[OSError(DOWN)] * 9), "https://example.org/a.jpg", True)
    assert naps == list(retry.WAITS_S[: retry.WEB_TRIES])


def test_an_object_that_stays_odd_is_its_own_error(naps):
    with pytest.raises(OSError, match="odd"):
        patiently(Flaky(*[OSError("odd")] * 9), "s3://b/x", True)


def test_errors_about_places_are_one_sentence():
    with pytest.raises(InputError, match=r"s3://b is refused: .*ACCESS_DENIED.* Check the credentials"), reached("s3://b"):
        raise OSError(DENIED)
    with (
        pytest.raises(RunError, match=r"^/out failed: .*No space left on device\. All is kept$"),
        reached("/out", ". All is kept"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


# --- embedding


@pytest.fixture
def pool(tmp_path):
    """150 grey PNGs: parts of 64, 64 and 22."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for value in range(150):
        Image.fromarray(np.full((2, 3), value, np.uint8)).save(folder / f"{value:03d}.png")
    return folder


def run(pool, out, **given):
    return embed(EmbedOptions(pool=str(pool), out=str(out), encoder="pixels", **{"workers": 0, **given}))


def test_a_full_disk_keeps_what_is_finished_and_the_command_goes_on(tmp_path, pool, monkeypatch):
    write = Place.write

    def full(self, data):
        if self.path.endswith("part-000000000064.arrow"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(Place, "write", full)
    out = tmp_path / "out"
    with pytest.raises(RunError) as caught:
        run(pool, out)
    assert f"{out}/parts/part-000000000064.arrow cannot be written: [Errno 28] No space left on device" in str(caught.value)
    assert "The parts written before are kept: once there is room" in str(caught.value)
    kept = [path.stat().st_ino for path in (out / "parts").iterdir()]
    assert len(kept) == 1
    monkeypatch.undo()
    manifest = run(pool, out)
    assert (out / "parts" / "part-000000000000.arrow").stat().st_ino == kept[0]
    assert manifest["digest"] == run(pool, tmp_path / "whole")["digest"]


def test_a_really_full_disk(tmp_path, pool):
    """A file system of a few pages, where the machine lets us have one."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with pytest.raises(RunError, match="No space left on device"):
            run(pool, small / "out", pixels_size=16)
        assert not (small / "out" / "manifest.json").exists()
        assert not list(small.rglob("*.tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert run(pool, small / "out", pixels_size=16)["num_vectors"] == 150
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)  # its listing is still mapped in this process


def test_a_part_of_which_nothing_can_be_read_ends_the_run(tmp_path, pool, monkeypatch):
    """Rows 64 to 127 are refused: not their fault. The two other parts stand; all is well the next time."""
    read = Place.read

    def refused(self):
        if self.path.endswith(".png") and 64 <= int(self.path[-7:-4]) < 128:
            raise OSError(DENIED)
        return read(self)

    monkeypatch.setattr(Place, "read", refused)
    with pytest.raises(RunError, match=r"none of rows 64 to 127 of pool .*ACCESS_DENIED.*Finished parts are kept"):
        run(pool, tmp_path / "out", max_rejected="100%")
    assert [path.name for path in (tmp_path / "out" / "parts").iterdir()] == ["part-000000000000.arrow"]
    monkeypatch.undo()
    assert run(pool, tmp_path / "out", max_rejected="100%")["num_rejected"] == 0


@pytest.mark.parametrize("count", [1, 22])
def test_a_short_last_part_that_is_refused_is_rejected_where_the_pool_is_there(tmp_path, pool, monkeypatch, count):
    """The last of 129 images, and the last 22 of 150: the ones before them are given, so these are bad by themselves."""
    num_images, read, tried = 128 + count, Place.read, []
    for value in range(num_images, 150):
        (pool / f"{value:03d}.png").unlink()

    def refused(self):
        if self.path.endswith(".png"):
            tried.append(int(self.path[-7:-4]))
            if tried[-1] >= 128:
                raise OSError(DENIED)
        return read(self)

    monkeypatch.setattr(Place, "read", refused)
    assert run(pool, tmp_path / "out", max_rejected="20%")["num_rejected"] == count
    assert tried == [*range(num_images), num_images - 64]
    reasons = pq.read_table(tmp_path / "out" / "rejected.parquet")["reason"].to_pylist()
    assert reasons == [f"cannot be read: {DENIED}"] * count
    with pytest.raises(RunError, match=rf"{count} of {num_images} images are bad, above --max-rejected 0"):
        run(pool, tmp_path / "none", max_rejected="0")


def test_a_short_last_part_that_is_refused_with_all_before_it_ends_the_run(tmp_path, pool, monkeypatch):
    """The pool is locked once its first two parts are there: the 22 images of the last one are not to blame."""
    read, locked = Place.read, []

    def refused(self):
        if self.path.endswith(".png") and locked:
            raise OSError(DENIED)
        return read(self)

    def progress(stage, done, total, note):
        if done == 128:
            locked.append(done)

    monkeypatch.setattr(Place, "read", refused)
    options = EmbedOptions(pool=str(pool), out=str(tmp_path / "out"), encoder="pixels", workers=0, max_rejected="100%")
    with pytest.raises(RunError, match=r"none of rows 128 to 149 of pool .*ACCESS_DENIED"):
        embed(options, progress)
    locked.clear()
    assert embed(options)["num_rejected"] == 0


def test_one_image_that_cannot_be_read_is_rejected(tmp_path, pool, monkeypatch):
    read = Place.read

    def refused(self):
        if self.path.endswith("070.png"):
            raise OSError(DENIED)
        return read(self)

    monkeypatch.setattr(Place, "read", refused)
    assert run(pool, tmp_path / "out")["num_rejected"] == 1
    (rejected,) = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert rejected == {"row": 70, "id": "070.png", "uri": f"{pool}/070.png", "reason": f"cannot be read: {DENIED}"}


def test_images_that_are_gone_are_rejected_however_many(tmp_path, pool, monkeypatch):
    from engine import embed as embed_module

    opened = embed_module.open_pool

    def listed(uri, columns):
        found = opened(uri, columns)
        for value in range(64, 128):
            (pool / f"{value:03d}.png").unlink()
        return found

    monkeypatch.setattr(embed_module, "open_pool", listed)
    with pytest.raises(RunError, match=r"64 of 150 images are bad.*\(64 x cannot be read\)"):
        run(pool, tmp_path / "out")
    reasons = pq.read_table(tmp_path / "out" / "rejected.parquet")["reason"].to_pylist()
    assert reasons == [NO_SUCH_FILE] * 64
    assert pool_module.UNREADABLE == "cannot be read: "


def test_the_row_of_a_container_is_where_a_rejected_image_is(tmp_path, pool):
    import pyarrow as pa

    images = [b"words" if row == 5 else (pool / f"{row:03d}.png").read_bytes() for row in range(100)]
    pq.write_table(pa.table({"image": images}), tmp_path / "pool.parquet")
    run(tmp_path / "pool.parquet", tmp_path / "out")
    (rejected,) = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert (rejected["uri"], rejected["reason"]) == (f"{tmp_path}/pool.parquet#5", NO_IMAGE)


def test_a_container_that_was_replaced_by_words_ends_the_run(tmp_path, pool, monkeypatch):
    import pyarrow as pa

    from engine import embed as embed_module

    pq.write_table(pa.table({"image": [(pool / "000.png").read_bytes()] * 10}), tmp_path / "pool.parquet")
    opened = embed_module.open_pool

    def listed(uri, columns):
        found = opened(uri, columns)
        (tmp_path / "pool.parquet").write_text("words")
        return found

    monkeypatch.setattr(embed_module, "open_pool", listed)
    with pytest.raises(RunError, match=r"row 0 of pool .* cannot be read: .*Finished parts are kept"):
        run(tmp_path / "pool.parquet", tmp_path / "out")


def test_nothing_read_and_some_gone_is_the_images_fault():
    from engine.chunks import Item

    def item(reason):
        return Item(0, "a", "a", None, {}, reason=reason)

    check_readable([item(NO_SUCH_FILE), item("cannot be read: odd")], "pool")
    check_readable([item("empty file")] * 2, "pool")
    with pytest.raises(RunError, match="the first one: odd"):
        check_readable([item("cannot be read: odd")] * 2, "pool")


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_done(tmp_path, pool, monkeypatch):
    def denied(self, data):
        raise PermissionError(errno.EACCES, "Permission denied", self.path)

    monkeypatch.setattr(Place, "write", denied)
    with pytest.raises(InputError, match=r"out is refused: .*Permission denied"):
        run(pool, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
