"""The loop on a pool of images: end to end with tiny networks, killed anywhere, and without a leak of labels."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_finetune import colour_folder
from trainings import CLASSES, TINY_VIT, picture

from engine import rounds
from engine.folders import read_manifest
from engine.images import ImageSet
from engine.info import describe
from engine.places import Place
from engine.rounds import networks
from engine.schema import InputError, build_options
from engine.selections import open_selection
from engine.store import FeatureStore
from engine.verbs import RoundsOptions
from engine.verify import verify


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """40 images to pick from, one of them broken, and 12 to test on."""
    folder = tmp_path_factory.mktemp("pools")
    train = colour_folder(folder / "train", 40, 0)
    (folder / "train" / "red" / "0.png").write_bytes(b"no image")
    return train, colour_folder(folder / "test", 12, 1)


def told(pools, out, **given):
    values = {
        "subject": pools[0],
        "test": pools[1],
        "out": str(out),
        "oracle": "column",
        "strategy": "entropy",
        "start": 8,
        "add": 6,
        "rounds": 3,
        "task": "classify",
        "model": "vit_tiny_patch16_224",
        "weights": "random",
        "model_option": TINY_VIT,
        "image_size": 32,
        "option": ("epochs=2", "batch_size=8", "lr=0.02"),
        "embed_workers": 0,
        "max_rejected": "10%",
    }
    return build_options(RoundsOptions, {key: value for key, value in (values | given).items() if value is not None}, "rounds")


def all_picks(out, count=3):
    return [open_selection(f"{out}/round-{number:02d}/selection").picks.tolist() for number in range(count)]


def flat(picks):
    return [row for some in picks for row in some]


@pytest.fixture(scope="module")
def finished(pools, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, rounds.rounds(told(pools, out))


def test_what_is_published(finished, pools):
    out, manifest = finished
    assert (manifest["criterion"], manifest["rounds"]) == ("top1", 3)
    assert [(found["labeled"], found["trained"]) for found in manifest["table"]] == [(8, 8), (14, 14), (20, 20)]
    table = pq.read_table(out / "rounds.parquet")
    assert table["metric"].to_pylist().count("top1") == 3
    assert len(set(flat(all_picks(out)))) == 20
    assert FeatureStore(str(out / "start")).num_vectors == 39
    assert sorted(os.listdir(out / "round-00" / "checkpoint")) == ["manifest.json", "metrics.jsonl", "run.json", "tensorboard"]
    assert (out / "round-02" / "checkpoint" / "model.safetensors").exists()
    assert not list(out.glob("round-*/features"))
    assert describe(str(out / "round-00" / "checkpoint"))["let_go"] == ["best.safetensors", "model.safetensors"]
    assert verify(str(out))["bad"] == []


def test_a_broken_image_is_never_picked(finished, pools):
    store = FeatureStore(str(finished[0] / "start"))
    (broken,) = set(range(40)) - set(store.rows.tolist())
    assert broken not in flat(all_picks(finished[0]))


def test_the_trainer_sees_the_picks_so_far_alone(finished):
    out, _ = finished
    images = ImageSet(str(out / "round-02" / "checkpoint" / "images"))
    assert sorted(record.row for record in images.records()) == sorted(flat(all_picks(out)))
    store = FeatureStore(str(out / "start"))
    for record in images.records():
        assert images.class_names[record.label] == record.id.split("/")[0]
        assert record.id in store.ids(np.array([record.row]))


def test_every_round_trains_from_the_same_weights(pools, tmp_path):
    """What a round's checkpoint gives is what finetune gives for those picks, whatever was trained before."""
    from engine.finetune import finetune

    out = tmp_path / "out"
    rounds.rounds(told(pools, out, keep_models="all", rounds=2))
    place = out / "round-01"
    options = networks.finetune_options(
        told(pools, out), str(tmp_path / "model"), str(place / "labels.parquet"), str(place / "labeled.json")
    )
    manifest = finetune(options)
    kept = read_manifest(Place(str(place / "checkpoint")))
    assert manifest["files"]["model.safetensors"] == kept["files"]["model.safetensors"]
    assert verify(str(out))["bad"] == []
    assert (out / "round-00" / "features" / "probs" / "manifest.json").exists()


STAGES = ["read", "embed_all", "select", "answer", "keep_labels", "finetune", "publish", "discard"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage_it_goes_on_to_the_same_picks(finished, pools, tmp_path, monkeypatch, stage):
    """The stage's function raises in round 1 after all that it does, and in round 2 before."""
    owner = next(one for one in (networks.Networks, networks, rounds) if hasattr(one, stage))
    real, calls, first = getattr(owner, stage), [], 0 if stage == "read" else 1
    second = first + (2 if stage == "keep_labels" else 3)  # labels that were taken are not taken again

    def killed(*args, **kwargs):
        calls.append(stage)
        if len(calls) == second:
            raise KeyboardInterrupt
        found = real(*args, **kwargs)
        if len(calls) == first + 1:
            raise KeyboardInterrupt
        return found

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(owner, stage, killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                rounds.rounds(told(pools, out))
    manifest = rounds.rounds(told(pools, out))
    assert all_picks(out) == all_picks(finished[0])
    assert [found["metrics"] for found in manifest["table"]] == [found["metrics"] for found in finished[1]["table"]]
    assert verify(str(out))["bad"] == []
    assert not list(out.glob("round-*/features"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "awaited",
    [
        "start/manifest.json",
        "round-00/checkpoint/images/manifest.json",
        "round-00/features/probs/run.json",
        "round-01/selection/run.json",
        "round-01/labels.parquet",
        "round-01/checkpoint/manifest.json",
        "round-01/manifest.json",
    ],
)
def test_killed_for_good_it_goes_on_to_the_same_picks(finished, pools, tmp_path, awaited):
    out = tmp_path / "out"
    line = ["rounds", pools[0], "--test", pools[1], "--out", str(out), "--oracle", "column", "--strategy", "entropy"]
    line += ["--start", "8", "--add", "6", "--rounds", "3", "--task", "classify", "--model", "vit_tiny_patch16_224"]
    line += ["--weights", "random", "--image-size", "32", "--embed-workers", "0", "--max-rejected", "10%"]
    line += [word for pair in TINY_VIT for word in ("--model-option", pair)]
    line += [word for pair in ("epochs=2", "batch_size=8", "lr=0.02") for word in ("--option", pair)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "cli", *line, "--quiet"], cwd=Path(__file__).parents[1], env=environment)
    deadline = time.monotonic() + 300
    while not (out / awaited).exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    rounds.rounds(told(pools, out))
    assert all_picks(out) == all_picks(finished[0])
    assert verify(str(out))["bad"] == []


def test_no_label_of_an_unpicked_image_is_used(finished, pools, tmp_path):
    """A copy of the pool in which all that is never picked lies in another class's folder, under the same row."""
    picked, wrong = set(flat(all_picks(finished[0]))), {}
    table = {"uri": [], "label": [], "truth": []}
    for row, name in enumerate(sorted(str(path.relative_to(pools[0])) for path in Path(pools[0]).rglob("*.png"))):
        label = name.split("/")[0]
        table["uri"].append(f"{pools[0]}/{name}")
        table["truth"].append(label)
        wrong[row] = CLASSES[(CLASSES.index(label) + 1) % 3]
        table["label"].append(label if row in picked else wrong[row])
    for name in ("truth", "label"):
        pq.write_table(pa.table({"uri": table["uri"], "label": table[name]}), tmp_path / f"{name}.parquet")
        rounds.rounds(told((str(tmp_path / f"{name}.parquet"), pools[1]), tmp_path / name))
    assert all_picks(tmp_path / "truth") == all_picks(tmp_path / "label") == all_picks(finished[0])


@pytest.mark.parametrize("strategy", ["random", "badge"])
def test_other_strategies(pools, tmp_path, strategy):
    """random looks at the pool once; badge reads the model's vectors as its last layer does, and its probabilities."""
    out = tmp_path / "out"
    rounds.rounds(told(pools, out, strategy=strategy, rounds=2, keep_models="all"))
    stores = sorted(str(path.parent.relative_to(out)) for path in out.rglob("rejected.parquet"))
    beside = ["round-00/features/embedding", "round-00/features/probs"] if strategy == "badge" else []
    assert stores == [*beside, "start"]
    if strategy == "badge":
        assert read_manifest(Place(str(out / "round-01" / "selection")))["options"]["normalize"] is False


def test_influence_holds_out_a_tenth(pools, tmp_path):
    out, given = tmp_path / "out", {"strategy": "influence", "encoder_option": ("restarts=1", "steps=2")}
    manifest = rounds.rounds(told(pools, out, **given, keep_models="all"))
    assert [(found["labeled"], found["trained"]) for found in manifest["table"]] == [(8, 7), (14, 13), (20, 18)]
    assert len(ImageSet(str(out / "round-02" / "checkpoint" / "heldout"))) == 2
    store = FeatureStore(str(out / "round-01" / "features" / "influence"))
    values, labeled = store.vectors()[:, 0], json.loads((out / "round-01" / "labeled.json").read_text())
    left = ~np.isin(store.rows, labeled)
    assert all_picks(out)[2] == store.rows[left][np.argsort(values[left], kind="stable")][:6].tolist()
    lean = tmp_path / "lean"
    rounds.rounds(told(pools, lean, **given))
    assert all_picks(lean) == all_picks(out)
    assert not list(lean.glob("round-01/checkpoint/heldout"))


def test_features_that_are_fixed(pools, tmp_path):
    from engine.embed import embed
    from engine.verbs import EmbedOptions

    fixed = str(tmp_path / "fixed")
    embed(EmbedOptions(pool=pools[0], out=fixed, encoder="pixels", pixels_size=2, workers=0, max_rejected="10%"))
    given = {"strategy": "coreset", "start_strategy": "kmeans", "features": fixed, "fixed_features": True, "rounds": 2}
    out = tmp_path / "out"
    rounds.rounds(told(pools, out, **given, keep_models="all"))
    assert not (out / "start").exists()
    assert not list(out.glob("round-*/features"))
    digests = {read_manifest(Place(str(out / f"round-{n:02d}" / "selection")))["inputs"]["features"] for n in (0, 1)}
    assert digests == {FeatureStore(fixed).digest}
    with pytest.raises(InputError, match="are of other images than pool"):
        rounds.rounds(told((pools[1], pools[0]), tmp_path / "other", **given))


def test_labels_in_a_folder_by_name(finished, pools, tmp_path):
    """The pool is a flat folder: nothing but the answers says what its images are."""
    flat_pool, asked = tmp_path / "flat", tmp_path / "asked"
    flat_pool.mkdir()
    asked.mkdir()
    rng = np.random.default_rng(0)
    for row in range(20):
        (flat_pool / f"{row:02d}.png").write_bytes(picture(row % 3, rng))
    options = told((str(flat_pool), pools[1]), tmp_path / "out", oracle=str(asked), rounds=2)
    for number in range(2):
        found = rounds.rounds(options)
        assert found.number == number
        names = (asked / f"round-{number:02d}" / "ids.txt").read_text().split()
        lines = [f"{name},{CLASSES[int(name[:2]) % 3]}" for name in names]
        (asked / f"round-{number:02d}" / "labels.csv").write_text("\n".join(["id,label", *lines]) + "\n")
    manifest = rounds.rounds(options)
    assert [found["trained"] for found in manifest["table"]] == [8, 14]
    uri = (asked / "round-00" / "to_label.csv").read_text().splitlines()[1].split(",")[1]
    assert Path(uri).exists()


def test_classes_that_are_numbers_and_not_all_seen(pools, tmp_path):
    """Six classes, and two labels in the first round: the test pool says how many there are."""
    files = sorted(str(path) for path in Path(pools[1]).rglob("*.png"))
    for name, some in (("train", files[:8]), ("test", files[4:])):
        lines = [f"{file},{row % 6}" for row, file in enumerate(some)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    given = {"start": 2, "add": 2, "rounds": 2, "option": ("epochs=1", "batch_size=2")}
    out = tmp_path / "out"
    rounds.rounds(told((str(tmp_path / "train.csv"), str(tmp_path / "test.csv")), out, **given))
    assert read_manifest(Place(str(out / "round-00" / "checkpoint")))["model"]["class_names"] == list("012345")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Twelve images with a box or two each, eight to pick from and four to test on, as COCO."""
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(0)
    for name, rows in (("train", range(8)), ("test", range(8, 12))):
        images, annotations = [], []
        for row in rows:
            (folder / f"{row}.png").write_bytes(picture(row % 3, rng))
            images.append({"id": row, "file_name": f"{row}.png", "width": 32, "height": 32})
            for box in range(1 + row % 2):
                size = {"bbox": [4 + 8 * box, 4, 12, 12], "area": 144, "iscrowd": 0}
                annotations.append({"id": 10 * row + box, "image_id": row, "category_id": 1 + box, **size})
        categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
        (folder / f"{name}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
    return str(folder / "train.json"), str(folder / "test.json")


def detector(cells, out, **given):
    values = {
        "task": "detect",
        "model": "ssdlite:mobilenetv2_100",
        "model_option": (),
        "image_size": 64,
        "option": ("steps=2", "batch_size=2", "augment=none"),
        "start": 2,
        "add": 2,
        "rounds": 2,
    }
    return told(cells, out, **{**values, **given})


def test_a_detector_reads_its_boxes_and_learns_from_those_of_the_picks(cells, tmp_path):
    out = tmp_path / "out"
    manifest = rounds.rounds(detector(cells, out, keep_models="all"))
    assert manifest["criterion"] == "AP"
    assert FeatureStore(str(out / "round-00" / "features" / "detections")).column == "detections"
    truth = json.loads(Path(cells[0]).read_text())["annotations"]
    for record in ImageSet(str(out / "round-01" / "checkpoint" / "images")).records():
        boxes = [entry for entry in truth if entry["image_id"] == record.row]
        assert record.boxes.tolist() == [entry["bbox"] for entry in boxes]
        assert record.box_labels.tolist() == [entry["category_id"] - 1 for entry in boxes]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strategy": "coreset"}, "a model for detect gives none: name some with --features"),
        ({"strategy": "badge"}, "a model for detect gives none|gives boxes"),
        ({"model": "ssdlight"}, "ssdlight"),
    ],
)
def test_what_a_detector_can_t_give_is_refused(cells, tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        rounds.rounds(detector(cells, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"start_strategy": "kmeans"}, "give --features DIR, or start at random"),
        ({"fixed_features": True}, "give it, too"),
        ({"features": "nowhere"}, "nowhere does not exist"),
        ({"rounds": 9}, "want 56 labels, and there are 40 images: at most --rounds 6"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
        ({"recipe": "isal"}, "isal-resnet18"),
        ({"test": "nowhere"}, "nowhere' does not exist"),
        ({"oracle": "column:truth"}, "truth"),
        ({"model": "vit_tinny"}, "vit_tinny"),
        ({"strategy": "stability"}, "it is for detect"),
        ({"strategy": "influence", "reference": "nowhere"}, "nowhere' does not exist"),
        ({"strategy": "influence", "encoder_option": ("pseudo=expected",)}, "the model knows 3 classes"),
        ({"strategy": "influence", "encoder_option": ("noise=3",)}, "'noise' is none of --encoder influence"),
    ],
)
def test_wrong_input_claims_no_folder(pools, tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        rounds.rounds(told(pools, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_weights_of_an_earlier_round_are_refused(finished, pools, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    weights = str(out / "round-02" / "checkpoint")
    with pytest.raises(InputError, match="holds what this command reads"):
        rounds.rounds(told(pools, out, weights=weights, overwrite=True))
    assert (out / "manifest.json").exists()
