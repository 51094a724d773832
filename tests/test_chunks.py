"""Chunks: what is decoded, wherever, and how much of it is held at a time."""

import numpy as np
import pytest
from PIL import Image

from engine import chunks as module
from engine import session
from engine.chunks import Inline, OnTasks, OnThreads, Recipe, chunk_rows, decode_chunk
from engine.decode import BadImageError, decode
from engine.embed import LISTING, embed, embed_all
from engine.inputs import NetworkInput, SquareInput
from engine.pipeline import Batches, crew
from engine.places import Place
from engine.schema import MAX_PIXELS, InputError
from engine.sources import open_pool, save_pool
from engine.store import FeatureStore
from engine.verbs import EmbedOptions

NETWORK = NetworkInput((3, 16, 16), "bicubic", 0.875, "center", MAX_PIXELS)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A listed pool of 90 images, three of them broken, and a recipe for two inputs."""
    folder = tmp_path_factory.mktemp("chunks")
    rng = np.random.default_rng(0)
    for row in range(90):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{row:02d}.png")
    for row in (0, 31, 89):
        (folder / f"{row:02d}.png").write_bytes(b"words")
    pool = open_pool(str(folder))
    save_pool(pool, Place(str(folder)).at(LISTING))
    return Recipe(str(folder / LISTING), pool.digest, (SquareInput(4), NETWORK), MAX_PIXELS, False)


RANGES = [(0, 1), (1, 33), (33, 64), (64, 88), (88, 90)]


def summary(chunk):
    return chunk.items, [pixels.tobytes() for pixels in chunk.pixels], [pixels.shape for pixels in chunk.pixels]


# --- what a chunk holds


def test_a_chunk_has_every_item_and_the_pixels_of_the_good_ones(listed):
    chunk = decode_chunk(listed, 30, 34)
    assert [(item.row, item.reason is None) for item in chunk.items] == [(30, True), (31, False), (32, True), (33, True)]
    assert [pixels.shape for pixels in chunk.pixels] == [(3, 48), (3, 3, 16, 16)]
    assert (chunk.items[0].size, chunk.items[0].id) == ((30, 20), "30.png")
    assert chunk.read_s > 0
    assert chunk.decode_s > 0


def test_threads_give_the_same_chunks_in_order(listed):
    expected = [summary(decode_chunk(listed, *given)) for given in RANGES]
    assert [summary(chunk) for chunk in Inline().chunks(listed, RANGES)] == expected
    assert [summary(chunk) for chunk in OnThreads(3).chunks(listed, RANGES)] == expected


def test_tasks_give_the_same_chunks_in_order(listed, ray_session):
    expected = [summary(decode_chunk(listed, *given)) for given in RANGES]
    assert [summary(chunk) for chunk in OnTasks(2).chunks(listed, RANGES)] == expected


def test_threads_run_no_further_ahead_than_they_may(listed, monkeypatch):
    started, real = [], module.decode_chunk
    monkeypatch.setattr(module, "decode_chunk", lambda *given: started.append(given) or real(*given))
    ranges = [(row, row + 1) for row in range(40)]
    decoder = OnThreads(2)
    for number, _ in enumerate(decoder.chunks(listed, ranges), start=1):
        assert len(started) <= number + decoder.ahead


def test_without_a_cpu_for_tasks_the_caller_decodes(listed, ray_session, monkeypatch):
    """Every CPU is taken: what would be a deadlock is a slow run."""
    import ray

    monkeypatch.setattr(module, "PATIENCE_S", 0.5)

    @ray.remote(num_cpus=1)
    class Taker:
        def here(self):
            return True

    takers = [Taker.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    assert ray.get([taker.here.remote() for taker in takers])
    decoder = OnTasks(2)
    assert [summary(chunk) for chunk in decoder.chunks(listed, RANGES)] == [summary(decode_chunk(listed, *r)) for r in RANGES]
    assert decoder.patience_s == 0
    for taker in takers:
        ray.kill(taker)


# --- how large


@pytest.mark.parametrize(
    ("batch", "side", "expected"),
    [
        (16, 224, 64),  # four batches
        (256, 224, 256),  # one batch of 256 is 37 MiB, two are above 64
        (256, 32, 1024),
        (256, 512, 85),  # less than a batch
        (1, 4096, 1),
        (4, 6000, 1),  # one image is above
    ],
)
def test_chunks_are_whole_batches_within_64_mib(batch, side, expected):
    given = NetworkInput((3, side, side), "bicubic", 1.0, "center", MAX_PIXELS)
    assert chunk_rows(batch, [given]) == expected
    assert chunk_rows(batch, [given]) * given.num_bytes <= module.CHUNK_BYTES or expected == 1


@pytest.mark.parametrize("sizes", [[10], [3, 3, 4], [1] * 10, [0, 7, 0, 3]])
def test_batches_do_not_depend_on_chunks(sizes):
    values, batches, found = np.arange(10, dtype=np.uint8)[:, None], Batches(4), []
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        found += list(batches.add(values[stop - size : stop]))
    rest = batches.rest()
    assert [batch[:, 0].tolist() for batch in (*found, rest)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches.rest()) == 0


# --- who decodes


def who(cpus, gpus, parts=100, **given):
    has = session.Size(cpus, gpus)
    found = crew(EmbedOptions(pool="", out="", **given), parts, has, has)
    return found.low, found.high, found.gpus, found.decode_tasks


@pytest.mark.parametrize(
    ("cpus", "gpus", "given", "expected"),
    [
        (8, 0, {}, (8, 8, 0.0, 0)),
        (8, 0, {"cpus_per_worker": 3}, (2, 2, 0.0, 0)),
        (8, 0, {"decode_workers": "3"}, (2, 2, 0.0, 3)),
        (8, 0, {"workers": 2}, (2, 2, 0.0, 0)),
        (96, 8, {}, (8, 8, 1.0, 11)),
        (8, 8, {}, (8, 8, 1.0, 0)),  # the actors take every CPU
        (9, 8, {}, (8, 8, 1.0, 1)),
        (96, 8, {"decode_workers": 0}, (8, 8, 1.0, 0)),
        (96, 8, {"decode_workers": 4}, (8, 8, 1.0, 4)),
        (16, 1, {"gpus_per_worker": 0.25}, (4, 4, 0.25, 3)),
        (16, 4, {"gpus_per_worker": 2}, (2, 2, 2.0, 7)),
        (16, 1, {"gpus_per_worker": 0}, (16, 16, 0.0, 0)),
        (96, 8, {"workers": "2:8"}, (2, 8, 1.0, 11)),
        (96, 8, {"workers": "2:200"}, (2, 100, 1.0, 0)),
    ],
)
def test_actors_and_tasks_share_a_cluster(cpus, gpus, given, expected):
    assert who(cpus, gpus, **given) == expected


@pytest.mark.parametrize(
    ("up", "most", "given", "expected"),
    [
        ((0, 0), (64, 8), {}, (8, 8, 1.0, 7)),  # nothing is up yet: all that can come is asked for
        ((0, 0), (64, 0), {}, (64, 64, 0.0, 0)),
        ((4, 1), (64, 8), {"workers": 3}, (3, 3, 1.0, 20)),
        ((0, 0), None, {}, (1, 100, 0.0, 0)),  # nobody says what can come: it begins with one
        ((8, 2), None, {}, (2, 100, 1.0, 3)),
        ((8, 2), None, {"workers": "4:64"}, (4, 64, 1.0, 3)),
        ((0, 0), None, {"gpus_per_worker": 1}, (1, 100, 1.0, 0)),
    ],
)
def test_actors_of_a_cluster_that_grows(up, most, given, expected):
    found = crew(EmbedOptions(pool="", out="", **given), 100, session.Size(*up), most and session.Size(*most))
    assert (found.low, found.high, found.gpus, found.decode_tasks) == expected


def test_no_more_actors_than_parts():
    assert who(96, 0, parts=3) == (3, 3, 0.0, 0)
    assert who(96, 0, parts=3, workers="5:9") == (3, 3, 0.0, 0)


def test_more_than_one_gpu_is_a_whole_number():
    with pytest.raises(InputError, match=r"gpus_per_worker is 1\.5: above 1 it must be a whole number"):
        who(8, 8, gpus_per_worker=1.5)


# --- the same bytes


def parts_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "parts").iterdir())}


@pytest.mark.parametrize("given", [{"workers": 1, "decode_workers": 2}, {"workers": 2}, {"workers": "1:2"}], ids=str)
def test_parts_are_the_same_bytes_whoever_decodes(listed, tmp_path, ray_session, given):
    """A part of 64 rows in four chunks of sixteen, in process and on actors that decode themselves or have it done."""
    pool = listed.listing.rsplit("/", 1)[0]
    options = {"encoder": "pixels,patterns", "backbone": "vit_tiny_patch16_224", "weights": "random", "batch_size": 4}
    options |= {"model_option": ("depth=2",), "image_size": 32, "max_rejected": "3"}
    here = embed_all(EmbedOptions(pool=pool, out=str(tmp_path / "here"), workers=0, **options))
    there = embed_all(EmbedOptions(pool=pool, out=str(tmp_path / "there"), **options, **given))
    for name, one, other in zip(("pixels", "patterns"), here, there, strict=True):
        assert parts_of(tmp_path / "here" / name) == parts_of(tmp_path / "there" / name)
        same = {key: value for key, value in one.items() if key not in ("time", "published")}
        assert same == {key: value for key, value in other.items() if key not in ("time", "published")}


# --- draft


def jpeg(tmp_path, width, height):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    return (tmp_path / "a.jpg").read_bytes()


@pytest.mark.parametrize(
    ("wanted", "expected"), [(401, (801, 602)), (301, (401, 301)), (300, (401, 301)), (150, (201, 151)), (10, (101, 76))]
)
def test_draft_halves_what_is_twice_as_large_in_both_directions(tmp_path, wanted, expected):
    data = jpeg(tmp_path, 801, 602)
    image, size = decode(data, MAX_PIXELS, wanted)
    assert size == (801, 602)
    assert image.size == expected
    if expected == size:
        assert image.tobytes() == decode(data, MAX_PIXELS)[0].tobytes()


def test_draft_leaves_other_formats_and_the_check_of_the_size_alone(tmp_path):
    Image.new("RGB", (400, 400)).save(tmp_path / "a.png")
    assert decode((tmp_path / "a.png").read_bytes(), MAX_PIXELS, 10)[0].size == (400, 400)
    with pytest.raises(BadImageError, match="801 x 602"):
        decode(jpeg(tmp_path, 801, 602), 1000, 10)


def test_draft_of_real_images_is_close_and_says_so_in_the_identity(shared, tmp_path):
    """BCCD, 640 x 480, to 96 px: decoded at a quarter."""
    (tmp_path / "pool").mkdir()
    for path in sorted((shared / "bccd" / "images").iterdir())[:24]:
        (tmp_path / "pool" / path.name).write_bytes(path.read_bytes())
    network = {
        "backbone": "mobilenetv2_100",
        "weights": str(shared / "weights" / "mobilenetv2_100.safetensors"),
        "model_option": ("pad_type=same",),
        "image_size": 96,
        "mean": (0.5,),
        "std": (0.5,),
        "workers": 0,
    }
    x = {}
    for draft in (False, True):
        out = str(tmp_path / f"draft-{draft}")
        embed(EmbedOptions(pool=str(tmp_path / "pool"), out=out, draft=draft, **network))
        found = FeatureStore(out)
        assert found.read_column("width").to_pylist() == [640] * 24
        x[draft] = found.vectors() / np.linalg.norm(found.vectors(), axis=1, keepdims=True)
    cosines = (x[False] * x[True]).sum(1)
    assert 0.9 < cosines.min() < 0.99999
    with pytest.raises(InputError, match=r"options\.draft true -> false"):
        embed(EmbedOptions(pool=str(tmp_path / "pool"), out=str(tmp_path / "draft-True"), **network))


@pytest.mark.slow
def test_a_compiled_part_does_not_depend_on_the_batches_before(listed, tmp_path):
    """The last batch of a part is smaller: the network sees it filled up, in the one shape that it was compiled for."""
    pool = listed.listing.rsplit("/", 1)[0]
    options = {"backbone": "test_resnet", "weights": "random", "image_size": 32, "compile": True, "workers": 0}
    options |= {"max_rejected": "3", "batch_size": 16}
    embed(EmbedOptions(pool=pool, out=str(tmp_path / "whole"), **options))
    embed(EmbedOptions(pool=pool, out=str(tmp_path / "again"), **options))
    last = tmp_path / "again" / "parts" / "part-000000000064.arrow"
    expected = last.read_bytes()
    last.unlink()
    (tmp_path / "again" / "manifest.json").unlink()
    embed(EmbedOptions(pool=pool, out=str(tmp_path / "again"), **options))
    assert last.read_bytes() == expected
    assert parts_of(tmp_path / "again") == parts_of(tmp_path / "whole")
    plain = embed(EmbedOptions(pool=pool, out=str(tmp_path / "plain"), **{**options, "compile": False}))
    x, y = FeatureStore(str(tmp_path / "plain")).vectors(), FeatureStore(str(tmp_path / "whole")).vectors()
    assert plain["num_vectors"] == 87
    assert np.allclose(x, y, atol=1e-4 * np.abs(x).max())
