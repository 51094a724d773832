"""What a checkpoint's evaluation makes of a pool's class numbers: mapped by name, and none that the pool does not name."""

import json

import numpy as np
import pytest
from pools import images_column, write

from engine.embed import embed
from engine.evaluate_model import Truth, class_map, read_judged
from engine.schema import InputError
from engine.store import DETECTIONS, FeatureStore, detections_array, part_bytes
from engine.verbs import EmbedOptions

MODEL = ("cat", "dog", "owl")


def store_of(folder, **columns):
    """Embed a pool of three images with a column whose classes are named owl and cat."""
    (name,) = columns
    feature = {"names": ["owl", "cat"], "_type": "ClassLabel"}
    features = {name: feature if name == "label" else {"category": feature}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    file = write(folder / "pool.parquet", {"image": images_column(range(3)), **columns}, metadata=metadata)
    embed(EmbedOptions(pool=str(file), out=str(folder / "out"), encoder="pixels", workers=0))
    return FeatureStore(str(folder / "out"))


def boxed(*codes):
    """Return the objects of images that have one box each."""
    return [{"bbox": [[0.0, 0.0, 1.0, 2.0]], "category": [code]} for code in codes]


def as_detections(store):
    """Have a store hold an empty list of boxes for each image, in place of its vectors."""
    for part in store.manifest["parts"]:
        table = store.read_part(part["name"])
        none = detections_array(np.empty((0, 6), np.float32), np.zeros(len(table), np.int64))
        table = table.drop_columns([store.column]).append_column(DETECTIONS, none)
        store.place.at("parts", part["name"]).write(part_bytes(table))
    store.column = DETECTIONS
    return store


@pytest.mark.parametrize(("names", "expected"), [(["owl", "cat"], [2, 0]), (["cat", "dog"], [0, 1]), (None, None)])
def test_classes_go_by_name(names, expected):
    found = class_map(names, MODEL, "pool")
    assert (None if found is None else found.tolist()) == expected


def test_labels_are_mapped(tmp_path):
    judged = read_judged(store_of(tmp_path, label=[0, 1, None]), Truth(class_map(["owl", "cat"], MODEL, "pool"), None))
    assert [record.label for record in judged.records] == [2, 0]
    assert judged.without == 1


@pytest.mark.parametrize("names", [["owl", "cat"], ["cat", "dog"]], ids=["reordered", "same"])
def test_a_label_that_the_pool_does_not_name(tmp_path, names):
    """2 is a class of the model, but none of the pool's."""
    store = store_of(tmp_path, label=[0, 2, 1])
    with pytest.raises(InputError, match=r"image 'img_1\.png' of .* has class 2, and the pool names classes 0 to 1"):
        read_judged(store, Truth(class_map(names, MODEL, "pool"), None))


def test_boxes_are_mapped(tmp_path):
    store = as_detections(store_of(tmp_path, objects=boxed(0, 1, 1)))
    judged = read_judged(store, Truth(class_map(["owl", "cat"], MODEL, "pool"), None))
    assert [record.box_labels.tolist() for record in judged.records] == [[2], [0], [0]]


@pytest.mark.parametrize("code", [2, -1])
def test_a_box_of_a_class_that_the_pool_does_not_name(tmp_path, code):
    store = as_detections(store_of(tmp_path, objects=boxed(0, 1, code)))
    with pytest.raises(InputError, match=rf"image 'img_2\.png' of .* has class {code}, and the pool names classes 0 to 1"):
        read_judged(store, Truth(class_map(["owl", "cat"], MODEL, "pool"), None))
