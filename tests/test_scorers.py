"""Scores by a trained model, end to end: what they are, what they read and never read, and what can't be."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trained import CLASSES, make_checkpoint, setup_of
from trainings import publish_set

from engine import scoring
from engine.checkpoints import Checkpoint
from engine.draws import random_uniform
from engine.embed import embed, embed_all
from engine.images import ImageSet, Record
from engine.reference import DRAW, keys_of
from engine.schema import InputError, build_options
from engine.select import select
from engine.store import FeatureStore
from engine.tasks.heads import GROUPS
from engine.verbs import EmbedOptions, SelectOptions

COUNT = 20
FEW = ("steps=4", "restarts=2")
DETECTOR = {"task": "detect", "image_size": 64, "augment": "none", "score_threshold": 0.0, "max_boxes": 5}


def png(rng, label, size):
    pixels = rng.integers(0, 120, (*size, 3)).astype(np.uint8)
    pixels[..., label] += 100
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, format="PNG")
    return held.getvalue()


def pool_of(folder, seed, count=COUNT, shift=0, unlabelled=()):
    """Write a list of images with labels, which `shift` makes others; return it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = ["path,label"]
    for row in range(count):
        (folder / f"{row:02d}.png").write_bytes(png(rng, row % 3, (30 + row % 7, 40 - row % 5)))
        lines.append(f"{row:02d}.png,{'' if row in unlabelled else CLASSES[(row + shift) % 3]}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "list.csv")


def records(count, seed, boxes):
    rng = np.random.default_rng(seed)
    drawn = []
    for row in range(count):
        own = np.array([[3, 4, 12 + row, 9], [1, 2, 5, 20]], np.float32)[: 2 if boxes else 0]
        labels = np.array([row % 3, 1])[: len(own)]
        size = (32 + row, 36)
        drawn.append(
            Record(row, f"image-{row}", png(rng, row % 3, size), row % 3, own, labels, np.array([False, row == 2])[: len(own)])
        )
    return drawn


def with_images(checkpoint, boxes=False, heldout=3):
    """Give a checkpoint folder the images it was trained on, and those that were held out."""
    publish_set(f"{checkpoint}/images", records(6, 1, boxes), CLASSES)
    if heldout:
        publish_set(f"{checkpoint}/heldout", records(heldout, 2, boxes), CLASSES)
    return checkpoint


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return pool_of(tmp_path_factory.mktemp("pool") / "p", 0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return with_images(make_checkpoint(tmp_path_factory.mktemp("classifier") / "c", setup_of(mean=(0.4,), std=(0.3,))))


def detector_of(folder, head):
    return with_images(make_checkpoint(folder / head, setup_of(f"{head}:test_efficientnet", **DETECTOR)), boxes=True)


@pytest.fixture(scope="module")
def fcos(tmp_path_factory):
    return detector_of(tmp_path_factory.mktemp("detector"), "fcos")


def told(pool, checkpoint, out, encoder="influence", options=FEW, **given):
    words = {
        "pool": pool,
        "checkpoint": checkpoint,
        "out": str(out),
        "encoder": encoder,
        "encoder_option": options,
        "workers": 0,
    }
    return build_options(EmbedOptions, words | given, "embed")


def score(pool, checkpoint, out, *args, **given):
    """Embed, and return the scores (n,)."""
    embed(told(pool, checkpoint, out, *args, **given))
    return FeatureStore(str(out)).vectors()[:, 0]


def prepared(pool, task, row):
    with Image.open(f"{os.path.dirname(pool)}/{row:02d}.png") as image:
        return task.input.prepare(image.convert("RGB")), image.size


def by_hand(pool, checkpoint, out, target_of):
    """- h . gradient / n, by a backward pass an image, from the h that lies in the store."""
    task, model = Checkpoint(checkpoint).load()
    h = load_file(f"{out}/h.safetensors")
    num_images = int(h.pop("num_images"))
    assert num_images == COUNT
    found = []
    for row in range(COUNT):
        pixels, size = prepared(pool, task, row)
        loss = target_of(task, model, torch.from_numpy(pixels).float() / 255, size)
        gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in h])
        found.append(-sum(float((g * h[name]).sum()) for g, name in zip(gradients, h, strict=True)) / num_images)
    return np.array(found), h


def likeliest(task, model, image, size):
    logits = model((image[None] - 0.4) / 0.3)
    return torch.nn.functional.cross_entropy(logits, logits.argmax(1))


# --- classifiers


@pytest.mark.parametrize("encoder", ["influence", "gradient_similarity"])
@pytest.mark.parametrize("parameters", ["all", "head", r"layer4.*conv1|stages_3.*conv1|head\.bias"])
def test_scores_are_those_of_backward_passes(pool, classifier, tmp_path, encoder, parameters):
    options = (f"parameters={parameters}", *(FEW if encoder == "influence" else ()))
    found = score(pool, classifier, tmp_path / "out", encoder, options)
    expected, h = by_hand(pool, classifier, tmp_path / "out", likeliest)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    names = dict(Checkpoint(classifier).load()[1].named_parameters())
    if parameters == "all":
        assert h.keys() == {name for name, value in names.items() if value.ndim != 1}
    if parameters == "head":
        assert [*h] == ["head.weight"]


def test_v_is_the_gradient_of_the_held_out_images(pool, classifier, tmp_path):
    score(pool, classifier, tmp_path / "out", "gradient_similarity", ())
    task, model = Checkpoint(classifier).load()
    loss = torch.zeros(())
    for record in ImageSet(f"{classifier}/heldout").records():
        image = torch.from_numpy(task.input.prepare(Image.open(io.BytesIO(record.data)))).float() / 255
        loss = loss + torch.nn.functional.cross_entropy(model((image[None] - 0.4) / 0.3), torch.tensor([record.label]))
    v = load_file(f"{tmp_path}/out/h.safetensors")
    del v["num_images"]
    for name, gradient in zip(v, torch.autograd.grad(loss, [model.get_parameter(name) for name in v]), strict=True):
        torch.testing.assert_close(v[name], gradient, rtol=1e-4, atol=1e-5)


def test_lissa_draws_labelled_images_by_seed(pool, classifier, tmp_path):
    """The same seed, the same h; and one step by hand: h = v + (1 - damp) v - H v / scale, of the image that it draws."""
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ("steps=3", "restarts=1", "scale=50", "parameters=head")
        seen.append(score(pool, classifier, tmp_path / name, "influence", options, seed=seed).tobytes())
    assert seen[0] == seen[1] != seen[2]
    score(pool, classifier, tmp_path / "v", "gradient_similarity", ("parameters=head",))
    score(pool, classifier, tmp_path / "h", "influence", ("steps=1", "restarts=1", "scale=50", "parameters=head"))
    v, h = (load_file(f"{tmp_path}/{name}/h.safetensors")["head.weight"] for name in ("v", "h"))
    task, model = Checkpoint(classifier).load()
    images = ImageSet(f"{classifier}/images")
    record = images.record(int(random_uniform(0, (DRAW, 0, 0), np.zeros(1, np.int64))[0] * len(images)))
    image = torch.from_numpy(task.input.prepare(Image.open(io.BytesIO(record.data)))).float() / 255
    loss = torch.nn.functional.cross_entropy(model((image[None] - 0.4) / 0.3), torch.tensor([record.label]))
    (gradient,) = torch.autograd.grad(loss, model.head.weight, create_graph=True)
    (product,) = torch.autograd.grad((gradient * v).sum(), model.head.weight)
    torch.testing.assert_close(h, v + 0.99 * v - product / 50, rtol=1e-4, atol=1e-5)


def test_the_expected_loss_takes_the_ten_likeliest(pool, tmp_path):
    names = [f"class-{number:02d}" for number in range(14)]
    checkpoint = with_images(make_checkpoint(tmp_path / "c", setup_of(class_names=names, mean=(0.4,), std=(0.3,))))
    argmax, expected = (
        score(pool, checkpoint, tmp_path / kind, "influence", (*FEW, f"pseudo={kind}")) for kind in ("argmax", "expected")
    )

    def ten(task, model, image, size):
        logits = model((image[None] - 0.4) / 0.3)[0]
        top = logits.softmax(0).detach().topk(10)
        return -(top.values / top.values.sum() * logits.log_softmax(0)[top.indices]).sum()

    by_hand_too, _ = by_hand(pool, checkpoint, tmp_path / "expected", ten)
    np.testing.assert_allclose(expected, by_hand_too, atol=1e-4 * np.abs(by_hand_too).max())
    assert not np.allclose(expected, argmax, rtol=0.1)


def test_one_pass_for_several_encoders(pool, classifier, tmp_path):
    encoders = ["embedding", "probs", "influence", "gradient_similarity"]
    embed_all(told(pool, classifier, tmp_path / "all", ",".join(encoders)))
    for name in encoders:
        alone = embed(told(pool, classifier, tmp_path / name, name, FEW if name == "influence" else ()))
        assert alone["digest"] == FeatureStore(f"{tmp_path}/all/{name}").digest
    assert embed_all(told(pool, classifier, tmp_path / "all", ",".join(encoders), (*FEW,)))  # nothing to do, no refusal
    with pytest.raises(InputError, match=r"encoder_option\.steps 4 -> 5"):
        embed_all(told(pool, classifier, tmp_path / "all", ",".join(encoders), ("steps=5", "restarts=2")))


@pytest.mark.slow
def test_any_number_of_actors_gives_the_same_bytes(classifier, fcos, tmp_path, ray_session):
    pool = pool_of(tmp_path / "p", 3, count=70)
    for name, checkpoint, encoder in (("c", classifier, "influence"), ("d", fcos, "influence"), ("s", fcos, "stability")):
        options = FEW if encoder == "influence" else ("noise=8,24",)
        made = [
            embed(told(pool, checkpoint, tmp_path / f"{name}{workers}", encoder, options, workers=workers))
            for workers in (0, 1, 2)
        ]
        assert len(made[0]["parts"]) == 2
        assert made[0]["parts"] == made[1]["parts"] == made[2]["parts"]
        if encoder == "influence":
            assert made[0]["files"]["h.safetensors"] == made[2]["files"]["h.safetensors"]


def test_a_killed_run_goes_on_with_the_h_that_was_made(pool, classifier, tmp_path, monkeypatch):
    whole = score(pool, classifier, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("engine.embed.in_process", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(pool, classifier, tmp_path / "out")
    made = (tmp_path / "out" / "h.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"was begun with other inputs .*damp 0\.01 -> 0\.02"):
        score(pool, classifier, tmp_path / "out", "influence", (*FEW, "damp=0.02"))
    monkeypatch.setattr(scoring, "make_h", lambda *_: pytest.fail("h is there"))
    monkeypatch.setattr(scoring, "make_v", lambda *_: pytest.fail("h is there"))
    assert score(pool, classifier, tmp_path / "out").tobytes() == whole.tobytes()
    assert (tmp_path / "out" / "h.safetensors").stat().st_mtime_ns == made


def test_progress_is_told_of_v_and_h(pool, classifier, tmp_path):
    told_of = []
    embed(told(pool, classifier, tmp_path / "out"), lambda stage, done, total, note: told_of.append((stage, done, total)))
    assert ("reference gradient", 3, 3) in told_of
    assert ("inverse Hessian", 8, 8) in told_of
    assert told_of[-1] == ("embed", COUNT, COUNT)


# --- what is read, and what is not


def test_the_labels_of_the_pool_make_no_difference(classifier, tmp_path):
    """The same images with other labels, and with none."""
    pools = [pool_of(tmp_path / f"p{shift}", 0, shift=shift) for shift in (0, 1)] + [
        pool_of(tmp_path / "none", 0, unlabelled=range(COUNT))
    ]
    for encoder in ("influence", "gradient_similarity"):
        options = FEW if encoder == "influence" else ()
        made = [score(pool, classifier, tmp_path / f"{encoder}{i}", encoder, options) for i, pool in enumerate(pools)]
        assert made[0].tobytes() == made[1].tobytes() == made[2].tobytes()


def test_a_pool_may_be_the_reference_set(pool, classifier, tmp_path):
    """Its classes go by name; the same images with other labels give other scores."""
    seen = [
        score(pool, classifier, tmp_path / str(shift), reference=pool_of(tmp_path / f"r{shift}", 5, count=6, shift=shift))
        for shift in (0, 1)
    ]
    assert np.isfinite(seen[0]).all()
    assert not np.allclose(seen[0], seen[1])
    reference = pool_of(tmp_path / "unlabelled", 5, count=6, unlabelled=range(6))
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{row:02d}.png,{CLASSES[row % 3]}\n" for row in range(6)))
    apart = score(pool, classifier, tmp_path / "apart", reference=reference, reference_labels=str(tmp_path / "labels.csv"))
    assert apart.tobytes() == seen[0].tobytes()


def test_a_reference_image_without_label_is_named(pool, classifier, tmp_path):
    reference = pool_of(tmp_path / "r", 5, count=6, unlabelled=(4,))
    with pytest.raises(InputError, match=r"1 of 6 images .* have no label: '04\.png'.*--reference-labels"):
        score(pool, classifier, tmp_path / "out", reference=reference)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reference": "itself"}, "is the pool itself: its labels are what is to be chosen"),
        ({"encoder": "probs"}, "--encoder-option 'steps' is none of --encoder probs .it is for influence"),
        (
            {"encoder": "gradient_similarity"},
            r"--encoder-option 'steps' is none of .*\(options: parameters, pseudo, pseudo_score",
        ),
        ({"options": ("stepz=3",)}, "'stepz' is none of --encoder influence, did you mean 'steps'"),
        ({"options": ("damp=2",)}, r"option damp is 2\.0: it must be 0 to 0\.999"),
        ({"options": ("scale=1,2",)}, "option scale is 1,2: give one value for all, or one for each of head"),
        ({"options": ("pseudo=most",)}, r"option pseudo is 'most' .*argmax, expected"),
        ({"options": ("pseudo=expected",)}, "knows 3 classes: of 10 and fewer the expected gradient of the loss is 0"),
        ({"options": ("pseudo_score=0.3",)}, "pseudo_score is 0.3: it is for detectors' boxes"),
        ({"options": ("parameters=nothing",)}, "parameters 'nothing' matches none of the model's"),
        (
            {"encoder": "probs", "options": (), "reference": "other"},
            "--reference is for --encoder influence and gradient_similarity",
        ),
        ({"reference_labels": "x.csv"}, "--reference-labels are of a --reference pool"),
        ({"dtype": "float16"}, "--dtype is not for --encoder influence"),
        ({"draft": True}, "--draft is not for --encoder influence"),
        ({"precision": "bf16"}, "--precision is not for --encoder influence"),
        ({"checkpoint": None}, "--encoder influence needs --checkpoint"),
        ({"encoder": "stability", "options": ()}, "--encoder stability is for a detector"),
    ],
)
def test_what_does_not_go_together(pool, classifier, tmp_path, given, words):
    given = {"checkpoint": classifier, "encoder": "influence", "options": FEW} | given
    if given.get("reference") == "itself":
        given["reference"] = pool
    checkpoint, encoder, options = given.pop("checkpoint"), given.pop("encoder"), given.pop("options")
    with pytest.raises(InputError, match=words):
        score(pool, checkpoint, tmp_path / "out", encoder, options, **given)
    assert not (tmp_path / "out").exists()


def test_without_held_out_images_both_ways_out_are_told(pool, tmp_path):
    checkpoint = with_images(make_checkpoint(tmp_path / "c"), heldout=0)
    with pytest.raises(InputError, match=r"no held-out images.*`finetune --hold-out 10%`, or give --reference POOL"):
        score(pool, checkpoint, tmp_path / "out")
    bare = make_checkpoint(tmp_path / "bare")
    with pytest.raises(InputError, match="does not hold the images that the checkpoint was trained on"):
        score(pool, bare, tmp_path / "out", reference=pool_of(tmp_path / "r", 5, count=3))


# --- detectors


@pytest.mark.parametrize("head", ["fcos", "fasterrcnn", "ssdlite"])
def test_a_detector_is_scored_by_its_head(pool, tmp_path, head):
    checkpoint = detector_of(tmp_path, head)
    scale = {"fcos": "scale=100,8000,5000", "fasterrcnn": "scale=1000,1000,5000,1000", "ssdlite": "scale=1000"}[head]
    plain = {"channels_last": False}  # other kernels round otherwise, and boxes of random weights are close to one another
    found = score(pool, checkpoint, tmp_path / "out", "influence", ("steps=3", "pseudo_score=0"), **plain)
    task, model = Checkpoint(checkpoint).load()
    groups = task.heads(model)
    assert groups.keys() == GROUPS[head].keys()
    h = load_file(f"{tmp_path}/out/h.safetensors")
    assert {*h} - {"num_images"} == {name for own in groups.values() for name in own if name.endswith("weight")}
    assert all(len(own) == (12 if head == "ssdlite" else 2) for own in groups.values())

    def boxes(task, model, image, size):
        pixels = (image * 255).round().to(torch.uint8).numpy()[None]
        sizes = np.array([size])
        row = next(rows)
        (target,) = task.pseudo(model, pixels, sizes, False, 0.0)
        return task.losses(model, pixels, sizes, [target], keys_of(0, [row]))[0]

    rows = iter(range(COUNT))
    expected, _ = by_hand(pool, checkpoint, tmp_path / "out", boxes)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert len(set(found.tolist())) > COUNT / 2
    told_alike = score(
        pool, checkpoint, tmp_path / "told", "influence", ("steps=3", "pseudo_score=0", scale), batch_size=7, **plain
    )
    assert told_alike.tobytes() == found.tobytes()


def test_a_detector_s_loss_is_torchvision_s_with_norms_as_in_evaluation(fcos):
    task, model = Checkpoint(fcos).load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = records(3, 2, True)[2]  # one of its two boxes is a crowd
    image = Image.open(io.BytesIO(record.data))
    pixels, sizes = task.input.prepare(image)[None], np.array([image.size])
    (target,) = task.targets([record], sizes)
    wide, tall = 64 * 36 / 34 // 1, 64
    assert target["boxes"][0].tolist() == pytest.approx([3 * wide / 36, 4 * tall / 34, 17 * wide / 36, 13 * tall / 34])
    assert len(target["boxes"]) == 1
    loss = task.losses(model, pixels, sizes, [target], [0])
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.train()
    for module in model.modules():
        module.training = module is model
    image = torch.from_numpy(np.ascontiguousarray(task.canvas.cut(pixels[0], *sizes[0].tolist()))).float() / 255
    assert loss.tolist() == pytest.approx([sum(float(value.detach()) for value in model([image], [target]).values())])


def test_proposals_are_drawn_by_the_image_s_key(tmp_path):
    task, model = Checkpoint(detector_of(tmp_path, "fasterrcnn")).load()
    record = records(1, 2, True)[0]
    image = Image.open(io.BytesIO(record.data))
    pixels, sizes = np.stack([task.input.prepare(image)] * 2), np.array([image.size] * 2)
    targets = task.targets([record] * 2, sizes)
    state = torch.get_rng_state()
    one, other = task.losses(model, pixels, sizes, targets, [5, 6]).tolist()
    assert one != other
    assert task.losses(model, pixels[:1], sizes[:1], targets[:1], [5]).tolist() == [one]
    assert torch.equal(torch.get_rng_state(), state)


def test_images_without_pseudo_boxes_come_last(pool, fcos, tmp_path, monkeypatch):
    real = type(Checkpoint(fcos).load()[0]).pseudo
    monkeypatch.setattr(
        "engine.tasks.detect.Detect.pseudo",
        lambda self, model, pixels, sizes, *rest: [None] if sizes[0, 0] == 40 else real(self, model, pixels, sizes, *rest),
    )
    found = score(pool, fcos, tmp_path / "out", "influence", ("steps=1", "pseudo_score=0"))
    none = [row for row in range(COUNT) if row % 5 == 0]
    assert np.flatnonzero(np.isnan(found)).tolist() == none
    orders = []
    for seed in (0, 1):
        out = tmp_path / f"picks{seed}"
        words = {
            "features": str(tmp_path / "out"),
            "out": str(out),
            "strategy": "influence",
            "budget": str(COUNT),
            "seed": seed,
        }
        select(build_options(SelectOptions, {**words, "workers": 0}, "select"))
        orders.append(json.loads((out / "indices.json").read_text()))
    scored = np.array([row for row in range(COUNT) if row not in none])
    assert orders[0][:-4] == orders[1][:-4] == scored[np.argsort(found[scored], kind="stable")].tolist()
    assert sorted(orders[0][-4:]) == sorted(orders[1][-4:]) == none
    assert orders[0][-4:] != orders[1][-4:]


def test_a_score_that_is_not_finite_is_no_absent_score():
    from engine.chunks import Item
    from engine.parts import part_table
    from engine.schema import RunError

    items = [Item(row, str(row), "", None, {}, content_hash=bytes(16)) for row in range(3)]
    empty = np.empty((0, 1), np.float32)
    good = np.array([[1.0], [np.nan], [2.0]], np.float32)
    assert part_table(items, [empty, good], "influence", "float32", pa.schema([]))["influence"].to_pylist()[0] == [1.0]
    with pytest.raises(RunError, match="not finite as float32 for image '1'"):
        part_table(items, [empty, good], "embedding", "float32", pa.schema([]))
    with pytest.raises(RunError, match="not finite as float32 for image '2'"):
        part_table(items, [empty, np.array([[1], [np.nan], [np.inf]], np.float32)], "influence", "float32", pa.schema([]))
