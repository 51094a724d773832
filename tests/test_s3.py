"""Embedding from and to an S3 endpoint (moto's server, on loopback), also while it is away, locked, or losing objects."""

import io
import json
import tarfile
import threading

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine import embed as embed_module
from engine.embed import embed, embed_all
from engine.export import export
from engine.info import describe
from engine.places import Place
from engine.schema import InputError, RunError
from engine.sources import open_pool, read
from engine.sources.pool import NO_SUCH_FILE
from engine.store import FeatureStore
from engine.verbs import EmbedOptions, ExportOptions
from engine.verify import verify

pytest.importorskip("moto", reason="needs the dev extra")


class Bucket:
    """An S3 endpoint with one bucket, which can be taken down and brought back."""

    def __init__(self):
        from moto.server import ThreadedMotoServer

        self.new = ThreadedMotoServer
        self.server = self.new(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.fs = pafs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=f"127.0.0.1:{self.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        self.fs.create_dir("bucket")

    def uri(self, path, keys="key:secret"):
        return f"s3://{keys}@bucket/{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def stop(self):
        self.server.stop()

    def start(self):
        self.server = self.new(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()


@pytest.fixture(scope="module")
def bucket():
    bucket = Bucket()
    yield bucket
    bucket.stop()


@pytest.fixture(scope="module")
def pool(bucket, tmp_path_factory):
    """150 grey PNGs in class folders, below the bucket and the same in a local folder: parts of 64, 64 and 22."""
    folder = tmp_path_factory.mktemp("local")
    for value in range(150):
        data = io.BytesIO()
        Image.fromarray(np.full((2, 3), value, np.uint8)).save(data, format="PNG")
        name = f"{'a' if value < 100 else 'b'}/{value:03d} é.png"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data.getvalue())
        with bucket.fs.open_output_stream(f"bucket/pool/{name}") as stream:
            stream.write(data.getvalue())
    return folder


def options(pool, out, **given):
    return EmbedOptions(pool=str(pool), out=str(out), **{"encoder": "pixels", "pixels_size": 2, "workers": 0, **given})


def parts(manifest):
    return [(part["name"], part["sha256"]) for part in manifest["parts"]]


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    """The manifest of an unbroken run on the local pool."""
    return embed(options(pool, tmp_path_factory.mktemp("whole") / "out"))


def test_a_pool_and_its_features_may_be_in_a_bucket(bucket, pool, whole):
    out = bucket.uri("both")
    network = {"backbone": "test_resnet", "weights": "random", "image_size": 32}
    manifests = embed_all(options(bucket.uri("pool"), out, encoder="pixels,embedding", **network))
    assert [manifest["num_vectors"] for manifest in manifests] == [150, 150]
    assert parts(manifests[0]) == parts(whole)
    store = FeatureStore(bucket.uri("both/pixels"))
    assert store.labels.tolist() == [0] * 100 + [1] * 50
    assert store.ids(np.array([149])) == ["b/149 é.png"]
    assert np.array_equal(store.vectors()[:, 0], np.arange(150, dtype=np.float32) / np.float32(255))
    assert verify(bucket.uri("both/pixels"))["bad"] == []
    assert list(describe(out)["stores"]) == ["embedding", "pixels"]
    assert embed_all(options(bucket.uri("pool"), out, encoder="pixels,embedding", **network)) == manifests


def test_what_is_handed_over_has_no_keys(bucket, pool, tmp_path):
    """Tasks and manifests name what is in the bucket as a tool with keys of its own does; copies go to a bucket as well."""
    embed(options(bucket.uri("pool"), tmp_path / "features"))
    (tmp_path / "rows.json").write_text("[140, 3]")
    given = {"selection": (str(tmp_path / "rows.json"),), "pool": bucket.uri("pool"), "features": str(tmp_path / "features")}
    facts = export(ExportOptions(format="label-studio", out=str(tmp_path / "tasks.json"), **given))
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [task["data"]["image"] for task in tasks] == ["s3://bucket/pool/b/140 é.png", "s3://bucket/pool/a/003 é.png"]
    assert any("2 addresses have keys, which are not handed over" in note for note in facts["notes"])
    export(ExportOptions(format="cvat", out=str(tmp_path / "m.jsonl"), **given))
    export(ExportOptions(format="cvat", out=str(tmp_path / "n.jsonl"), uri_prefix=("s3://bucket/=",), **given))
    names = [json.loads((tmp_path / name).read_text().splitlines()[-1])["name"] for name in ("m.jsonl", "n.jsonl")]
    assert names == ["a/003 é", "pool/a/003 é"]
    with pytest.raises(InputError, match="pass --copy"):
        export(ExportOptions(format="imagefolder", out=str(tmp_path / "links"), **given))
    for overwrite in (False, True):
        export(ExportOptions(format="coco", copy=True, out=bucket.uri("copies"), overwrite=overwrite, **given))
    assert Place(bucket.uri("copies/images")).names() == ["003_é.png", "140_é.png"]
    assert Place(bucket.uri("copies/images")).at("140_é.png").read() == (pool / "b" / "140 é.png").read_bytes()
    again = open_pool(bucket.uri("copies/annotations.json"))
    assert [sample.error for sample in read(again, 0, 2)] == [None, None]
    written = [file.read_text() for file in tmp_path.glob("*.json*")] + [Place(bucket.uri("copies/ids.csv")).read().decode()]
    assert not any("secret" in text or "127.0.0.1" in text for text in written)
    no_pool = {**given, "pool": None}
    with pytest.raises(InputError, match="had keys, which are not kept: give it with --pool"):
        export(ExportOptions(format="cvat", out=str(tmp_path / "o.jsonl"), **no_pool))


def contents(folder):
    """What stands in a folder of a bucket, each file as text."""
    place = Place(folder)
    infos = place.fs.get_file_info(pafs.FileSelector(place.path, recursive=True))
    files = [info.path for info in infos if info.type == pafs.FileType.File]
    return {path: place.fs.open_input_stream(path).read().decode("latin-1") for path in files}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_keys_are_written_nowhere_and_decide_nothing(bucket, pool, whole, request, monkeypatch, workers):
    """A pool with a bad image, by actors that read and write the bucket: they get the keys, and no file does."""
    if workers:
        request.getfixturevalue("ray_session")
        import ray.data

        shown, mapped = [], ray.data.Dataset.map_batches

        def watched(self, *given, **how):
            shown.append(repr(how))
            return mapped(self, *given, **how)

        monkeypatch.setattr(ray.data.Dataset, "map_batches", watched)
    for row in (0, 149):
        with bucket.fs.open_output_stream(f"bucket/keys-{workers}/{row}.png") as stream:
            stream.write((pool / "a" / "000 é.png").read_bytes() if row else b"words")
    given, out = {"workers": workers, "max_rejected": "1"}, bucket.uri(f"keys-out-{workers}")
    manifest = embed(options(bucket.uri(f"keys-{workers}"), out, **given))
    assert (manifest["num_vectors"], manifest["num_rejected"]) == (1, 1)
    assert manifest["pool"]["uri"].startswith(f"s3://***@bucket/keys-{workers}?endpoint_override=")
    written = contents(out)
    assert {path.rsplit("/", 1)[-1] for path in written} >= {"manifest.json", "run.json", "pool.json", "rejected.parquet"}
    assert not [path for path, text in written.items() if "secret" in text]
    others = bucket.uri(f"keys-{workers}", "other:words"), bucket.uri(f"keys-out-{workers}", "other:words")
    assert embed(options(*others, **given)) == manifest
    if workers:
        assert len(shown) == 1
        assert "secret" not in shown[0]


def test_keys_in_the_rows_of_a_list_are_in_no_id_and_decide_nothing(bucket, pool, whole, tmp_path):
    """Each row has keys of its own: they open the images, and stand only in the list and its copy for the workers."""
    names = [f"{'a' if row < 100 else 'b'}/{row:03d} é.png" for row in range(150)] + ["gone.png"]
    manifests = []
    for keys in ("key:secret", "other:secret"):
        rows = [bucket.uri(f"pool/{name.replace(' ', '%20').replace('é', '%C3%A9')}", keys) for name in names]
        pq.write_table(pa.table({"uri": rows}), tmp_path / "list.parquet")
        out = tmp_path / keys
        manifests.append(embed(options(tmp_path / "list.parquet", out, max_rejected="1")))
        (rejected,) = pq.read_table(out / "rejected.parquet").to_pylist()
        assert rejected["id"] == rejected["uri"] == rows[-1].replace(keys, "***")
        files = [path for path in out.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
        assert files == [out / "pool.arrow"]
        assert FeatureStore(str(out)).ids(np.array([7])) == [rows[7].replace(keys, "***")]
    assert manifests[0]["inputs"] == manifests[1]["inputs"]
    assert parts(manifests[0]) == parts(manifests[1])


def test_the_endpoint_may_come_from_the_environment(bucket, pool, whole, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bucket.port}")
    assert parts(embed(options("s3://bucket/pool", "s3://bucket/environment"))) == parts(whole)


def test_a_run_on_a_bucket_goes_on(bucket, pool, whole):
    uri = bucket.uri("resumed")

    def cut(stage, done, total, note):
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(options(pool, uri), cut)
    assert describe(uri)["parts_missing"] == 2
    seen = []
    assert parts(embed(options(pool, uri), lambda stage, done, total, note: seen.append(done))) == parts(whole)
    assert seen == [64, 128, 150]


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"workers": 0}, {"workers": 2}, {"workers": 1, "decode_workers": 1}], ids=str)
def test_ten_seconds_without_the_endpoint_end_no_run(bucket, pool, whole, ray_session, given):
    """Down after the first part, up again ten seconds later."""
    down = []

    def progress(stage, done, total, note):
        if done >= 64 and not down:
            bucket.stop()
            down.append(threading.Timer(10, bucket.start))
            down[0].start()

    name = "-".join(map(str, given.values()))
    manifest = embed(options(bucket.uri("pool"), bucket.uri(f"down-{name}"), **given), progress)
    assert not down[0].is_alive()
    assert manifest["num_rejected"] == 0
    assert parts(manifest) == parts(whole)


@pytest.mark.slow
def test_an_endpoint_that_stays_away_is_one_error_and_rejects_nothing(bucket, pool, whole):
    uri = bucket.uri("gone")

    def progress(stage, done, total, note):
        if done == 64:
            bucket.stop()

    try:
        with pytest.raises(RunError, match=r"gave no answer in 6 tries: .*run the same command again once the store is back"):
            embed(options(bucket.uri("pool"), uri, max_rejected="100%"), progress)
    finally:
        bucket.start()
    manifest = embed(options(bucket.uri("pool"), uri, max_rejected="100%"))
    assert (manifest["num_rejected"], parts(manifest)) == (0, parts(whole))


@pytest.fixture
def locked(monkeypatch):
    """Call it to let the endpoint refuse every key from then on."""
    from moto import settings

    return lambda: monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)


def test_wrong_credentials_are_one_error_and_leave_nothing(bucket, pool, tmp_path, locked, monkeypatch):
    locked()
    with pytest.raises(InputError, match=r"bucket/pool.* is refused: .*ACCESS_DENIED.* Check the credentials"):
        embed(options(bucket.uri("pool"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"bucket/refused.* is refused: .*ACCESS_DENIED.* Check the credentials"):
        embed(options(pool, bucket.uri("refused")))
    monkeypatch.undo()
    assert not Place(bucket.uri("refused")).exists()


def test_credentials_that_end_in_mid_run_keep_what_is_finished(bucket, pool, whole, locked, monkeypatch):
    uri = bucket.uri("ended")

    def progress(stage, done, total, note):
        if done == 64:
            locked()

    with pytest.raises(RunError, match=r"cannot be written: .*The parts written before are kept"):
        embed(options(pool, uri), progress)
    monkeypatch.undo()
    assert describe(uri)["parts_missing"] == 2
    assert parts(embed(options(pool, uri))) == parts(whole)


def test_an_object_deleted_between_listing_and_reading_is_rejected(bucket, pool, tmp_path, monkeypatch):
    opened, key = embed_module.open_pool, "bucket/pool/a/070 é.png"
    data = (pool / "a" / "070 é.png").read_bytes()

    def listed(uri, columns):
        found = opened(uri, columns)
        bucket.fs.delete_file(key)
        return found

    monkeypatch.setattr(embed_module, "open_pool", listed)
    try:
        manifest = embed(options(bucket.uri("pool"), tmp_path / "out"))
    finally:
        with bucket.fs.open_output_stream(key) as stream:
            stream.write(data)
    assert manifest["num_rejected"] == 1
    (rejected,) = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert (rejected["row"], rejected["id"], rejected["reason"]) == (70, "a/070 é.png", NO_SUCH_FILE)
    assert "bucket/pool/a/070" in rejected["uri"]


def parquet_of(images, file):
    pq.write_table(pa.table({"image": images}), file, row_group_size=30)


def tar_of(images, file):
    with tarfile.open(file, "w") as archive:
        for row, data in enumerate(images):
            info = tarfile.TarInfo(f"{row:03d}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "write"), [("pool.parquet", parquet_of), ("pool.tar", tar_of)])
def test_ten_seconds_without_the_endpoint_of_a_container(bucket, pool, tmp_path, name, write):
    """A Parquet file in five row groups, a tar shard: what is read after the first part has to be waited for."""
    write([(pool / ("a" if row < 100 else "b") / f"{row:03d} é.png").read_bytes() for row in range(150)], tmp_path / name)
    with bucket.fs.open_output_stream(f"bucket/{name}") as stream:
        stream.write((tmp_path / name).read_bytes())
    down = []

    def progress(stage, done, total, note):
        if done == 64 and not down:
            bucket.stop()
            down.append(threading.Timer(10, bucket.start))
            down[0].start()

    manifest = embed(options(bucket.uri(name), tmp_path / "out"), progress)
    assert not down[0].is_alive()
    assert manifest["num_rejected"] == 0
    assert parts(manifest) == parts(embed(options(tmp_path / name, tmp_path / "local")))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_made_before_encoding_lies_in_the_bucket(bucket, tmp_path, request, monkeypatch, workers):
    """Checkpoint, its labelled images and the store are there; a run that is killed once h is made goes on with it."""
    from test_scorers import FEW, pool_of, told, with_images
    from trained import make_checkpoint, setup_of

    if workers:
        request.getfixturevalue("ray_session")
    images = pool_of(tmp_path / "p", 0)
    checkpoint = with_images(make_checkpoint(tmp_path / "c", setup_of(mean=(0.4,), std=(0.3,))))
    pafs.copy_files(checkpoint, f"bucket/model-{workers}", destination_filesystem=bucket.fs)
    whole = embed(told(images, checkpoint, tmp_path / "here"))
    out = bucket.uri(f"scores-{workers}")
    options = told(images, bucket.uri(f"model-{workers}"), out, "influence", FEW, workers=workers)
    with monkeypatch.context() as patch:
        for name in ("in_process", "on_ray"):
            patch.setattr(embed_module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(options)
    made = bucket.fs.get_file_info(f"bucket/scores-{workers}/h.safetensors").mtime_ns
    manifest = embed(options)
    assert manifest["parts"] == whole["parts"]
    assert manifest["files"]["h.safetensors"] == whole["files"]["h.safetensors"]
    assert bucket.fs.get_file_info(f"bucket/scores-{workers}/h.safetensors").mtime_ns == made
    assert verify(out)["bad"] == []
    assert b"secret" not in Place(out).at("manifest.json").read()
