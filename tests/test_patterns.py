"""Patterns: against a transformer written out by hand, against k-means worked by hand, and from images to picks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from engine import patterns as module
from engine.compare import compare
from engine.embed import embed
from engine.encoders import build_encoders
from engine.evaluate import evaluate
from engine.patterns import Clustering, gram, kept, map_features, patterns, transformer_features
from engine.pipeline import PartEncoder, Stores, Todo
from engine.schema import InputError, build_options
from engine.select import select
from engine.shards import RayShards, Reading, Request, open_local
from engine.store import FeatureStore, patterns_array, vector_counts, vectors_numpy
from engine.verbs import CompareOptions, EmbedOptions, EvaluateOptions, SelectOptions

TINY = {"backbone": "vit_tiny_patch16_224", "weights": "random", "image_size": 64, "model_option": ("depth=3",)}

SIZES = np.full((64, 2), 32)  # of stored images: patterns do not read them


def encoder(**given):
    return build_encoders(EmbedOptions(pool="", out="", encoder="patterns", **{**TINY, **given}), "cpu")["patterns"]


def pixels(n: int, side: int = 64, seed: int = 0) -> np.ndarray:
    """Images with something on them: a bright square at a seeded place of a dark noisy ground."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, 3, side, side), dtype=np.uint8)
    for image in images:
        y, x = rng.integers(0, side // 2, 2)
        image[:, y : y + side // 3, x : x + side // 3] = rng.integers(120, 256, (3, 1, 1))
    return images


# --- a transformer by hand


def norm(x, state, name):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x / np.sqrt(2))).numpy())


def attention_of(x, state, block, heads):
    """Return softmax(q k^T / sqrt(d)) (n, heads, t, t), and the values (n, heads, t, d)."""
    n, t, d = x.shape
    h = norm(x, state, f"{block}.norm1")
    qkv = h @ state[f"{block}.attn.qkv.weight"].T + state[f"{block}.attn.qkv.bias"]
    q, k, v = (part.reshape(n, t, heads, d // heads).transpose(0, 2, 1, 3) for part in np.split(qkv, 3, axis=-1))
    if f"{block}.attn.q_norm.weight" in state:
        q, k = norm(q, state, f"{block}.attn.q_norm"), norm(k, state, f"{block}.attn.k_norm")
    return softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(d // heads)), v


def run_block(x, state, block, heads):
    shares, v = attention_of(x, state, block, heads)
    mixed = (shares @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    x = x + mixed @ state[f"{block}.attn.proj.weight"].T + state[f"{block}.attn.proj.bias"]
    hidden = gelu(norm(x, state, f"{block}.norm2") @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"])
    return x + hidden @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]


def by_hand(model, images):
    """Second-to-last block's patch tokens after the final norm, and the last block's class attention to them."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    n, _, side, _ = images.shape
    grid, depth, heads = side // 16, len(model.blocks), model.blocks[0].attn.num_heads
    cut = images.reshape(n, 3, grid, 16, grid, 16).transpose(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, -1)
    weight = state["patch_embed.proj.weight"]
    x = cut @ weight.reshape(len(weight), -1).T + state["patch_embed.proj.bias"]
    prefix = [np.broadcast_to(state[name], (n, *state[name].shape[1:])) for name in ("cls_token", "reg_token") if name in state]
    position = state["pos_embed"]
    if position.shape[1] == x.shape[1]:
        x = np.concatenate([*prefix, x + position], axis=1)
    else:
        x = np.concatenate([*prefix, x], axis=1) + position
    for index in range(depth - 1):
        x = run_block(x, state, f"blocks.{index}", heads)
    shares, _ = attention_of(x, state, f"blocks.{depth - 1}", heads)
    first = sum(part.shape[1] for part in prefix)
    attention = shares.mean(axis=1)[:, 0, first:]
    final = "norm" if "norm.weight" in state else "fc_norm"
    return norm(x, state, final)[:, first:], attention / attention.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    "options",
    [
        ("depth=3",),
        ("depth=2", "qk_norm=True"),
        ("depth=2", "reg_tokens=3", "no_embed_class=True"),
        ("depth=2", "global_pool='avg'"),
    ],
    ids=["plain", "qk-norm", "registers", "fc-norm"],
)
def test_tokens_and_attention_equal_a_transformer_by_hand(options: tuple[str, ...]) -> None:
    model = encoder(model_option=options).network.model
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no norm, bias or position is as plain as it is initialised
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = np.random.default_rng(2).standard_normal((3, 3, 64, 64))
    with torch.inference_mode():
        tokens, attention = transformer_features(model, torch.from_numpy(images).float())
    expected_tokens, expected_attention = by_hand(model, images)
    assert tokens.shape == (3, 16, 192)
    assert attention.shape == (3, 16)
    assert np.abs(tokens.numpy() - expected_tokens).max() <= 1e-5 * np.abs(expected_tokens).max()
    assert np.abs(attention.numpy() - expected_attention).max() <= 1e-5 * expected_attention.max()
    assert np.ptp(expected_attention, axis=1).min() > 1e-3  # not uniform: a wrong one would show


# --- what is kept


def test_the_smallest_set_that_carries_the_ratio() -> None:
    weights = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    for ratio, expected in [
        (0.0, [1]),
        (0.3, [1]),
        (0.4, [1]),
        (0.5, [1, 3]),
        (0.69, [1, 3]),
        (0.8, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ]:
        assert kept(weights, ratio)[0].nonzero()[:, 0].tolist() == expected, ratio


def test_kept_weights_need_not_sum_to_one_and_may_tie() -> None:
    assert kept(torch.tensor([[2.0, 2.0, 2.0, 2.0]]), 0.5).tolist() == [[False, False, True, True]]
    assert kept(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), 0.5).tolist() == [[False, False, True, True]]
    assert kept(torch.tensor([[0.0, 5.0, 0.0]]), 1.0).tolist() == [[False, True, False]]


def test_positions_of_a_map_weigh_as_much_as_their_norm() -> None:
    """Norms 5, 1, 0, 10 of a 2 x 2 map: 16 in all, the last alone carries half."""
    maps = torch.tensor([[[[3.0, 1.0], [0.0, 6.0]], [[4.0, 0.0], [0.0, 8.0]]]])
    features, weights = map_features(maps)
    assert features.tolist() == [[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [6.0, 8.0]]]
    assert weights.tolist() == [[5.0, 1.0, 0.0, 10.0]]
    assert kept(weights, 0.5)[0].tolist() == [False, False, False, True]
    assert kept(weights, 0.7)[0].tolist() == [True, False, False, True]


# --- k-means


def cluster(x: np.ndarray, k: int, keep: list[int] | None = None, metric: str = "euclidean", seed: int = 0, row: int = 0):
    mask = torch.zeros((1, len(x)), dtype=torch.bool)
    mask[0, keep if keep is not None else slice(None)] = True
    return patterns(torch.from_numpy(x.astype(np.float32))[None], mask, np.array([row]), Clustering(k, metric, seed))[0]


@pytest.mark.parametrize("seed", range(5))
def test_k_means_worked_by_hand(seed: int) -> None:
    """On a line: 0 1 2 and 10 11 12 in two groups; 500 is not kept."""
    x = np.array([[0, 0], [10, 0], [1, 0], [500, 0], [12, 0], [2, 0], [11, 0]])
    found = cluster(x, 2, keep=[0, 1, 2, 4, 5, 6], seed=seed)
    assert sorted(found.tolist()) == [[1.0, 0.0], [11.0, 0.0]]
    assert cluster(x, 1, keep=[0, 1, 2, 4, 5, 6], seed=seed).tolist() == [[6.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
def test_cosine_k_means_worked_by_hand(seed: int) -> None:
    """Two directions of very unlike lengths: each centre is the mean of unit vectors, (1, 0) and (0, 1) and their like."""
    x = np.array([[1, 0], [100, 0], [0.1, 0], [0, 5], [0, 0.2], [3, 4]])
    found = sorted(cluster(x, 3, metric="cosine", seed=seed).tolist())
    assert found == [[0.0, 1.0], [pytest.approx(0.6), pytest.approx(0.8)], [1.0, 0.0]]
    assert cluster(x[:5], 1, metric="cosine").tolist() == [[pytest.approx(0.6), pytest.approx(0.4)]]


def test_few_features_are_taken_as_they_are() -> None:
    x = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    for metric in ("euclidean", "cosine"):
        assert cluster(x, 5, keep=[1, 4, 7], metric=metric).tolist() == x[[1, 4, 7]].tolist()
        assert cluster(x, 3, keep=[1, 4, 7], metric=metric).tolist() == x[[1, 4, 7]].tolist()


def test_features_that_are_all_alike_are_one_pattern() -> None:
    assert cluster(np.full((9, 3), 0.3), 4).tolist() == [[pytest.approx(0.3)] * 3]
    assert cluster(np.zeros((9, 3)), 4, metric="cosine").tolist() == [[0.0] * 3]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_centres_are_a_fixed_point_of_k_means(metric: str) -> None:
    """Each pattern is the mean of the features nearest to it, in float64 written out."""
    rng = np.random.default_rng(3)
    for row in range(20):
        x = rng.standard_normal((90, 24)).astype(np.float32)
        found = cluster(x, 5, metric=metric, row=row).astype(np.float64)
        points = x.astype(np.float64)
        if metric == "cosine":
            points /= np.linalg.norm(points, axis=1, keepdims=True)
            score = -points @ (found / np.linalg.norm(found, axis=1, keepdims=True)).T
        else:
            score = ((points[:, None] - found) ** 2).sum(axis=2)
        owner = score.argmin(axis=1)
        assert found.shape == (5, 24)
        for c in range(5):
            np.testing.assert_allclose(found[c], points[owner == c].mean(axis=0), atol=1e-5)


def test_k_means_is_as_good_as_scikit_learns() -> None:
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(4)
    ours, theirs = [], []
    for row in range(30):
        x = (rng.standard_normal((6, 16))[rng.integers(0, 6, 80)] * 2 + rng.standard_normal((80, 16))).astype(np.float32)
        found = cluster(x, 5, row=row)
        ours.append(((x[:, None] - found) ** 2).sum(axis=2).min(axis=1).sum())
        theirs.append(KMeans(5, n_init=1, init="k-means++", max_iter=100, random_state=row).fit(x).inertia_)
    assert np.mean(ours) <= 1.05 * np.mean(theirs)


def test_seeds_follow_seed_and_row() -> None:
    x = np.random.default_rng(5).standard_normal((60, 8)).astype(np.float32)
    base = cluster(x, 4, seed=1, row=2)
    assert cluster(x, 4, seed=1, row=2).tobytes() == base.tobytes()
    assert cluster(x, 4, seed=2, row=2).tobytes() != base.tobytes()
    assert cluster(x, 4, seed=1, row=3).tobytes() != base.tobytes()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_no_batch_no_thread_and_no_order_shows(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    rng = np.random.default_rng(6)
    x = torch.from_numpy((rng.standard_normal((7, 50, 33)) * 10.0 ** rng.integers(-8, 9, (7, 1, 1))).astype(np.float32))
    keep, rows = torch.from_numpy(rng.random((7, 50)) < 0.6), np.arange(7) * 11
    clustering = Clustering(5, metric, 0)
    whole = patterns(x, keep, rows, clustering)
    alone = [patterns(x[i : i + 1], keep[i : i + 1], rows[i : i + 1], clustering)[0] for i in range(7)]
    monkeypatch.setattr(module, "GRAM_ELEMENTS", 2 * 50 * 50)
    chunks = patterns(x, keep, rows, clustering)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        threads = patterns(x, keep, rows, clustering)
    finally:
        torch.set_num_threads(before)
    for index in range(7):
        assert len({found[index].tobytes() for found in (whole, alone, chunks, threads)}) == 1


@pytest.mark.parametrize(("p", "d"), [(1, 1), (196, 384), (1024, 1536)])
def test_inner_products_are_exact_whole_numbers(p: int, d: int) -> None:
    x = 1e3 * torch.from_numpy(np.random.default_rng(7).standard_normal((1, p, d)).astype(np.float32))
    g = gram(x, "euclidean")
    assert torch.equal(g, g.round())
    assert float(g.abs().max()) * p < 2**52
    some = np.arange(p)[:: max(1, p // 7)]
    scale = g[0, 0, 0] / (x[0, 0].double() ** 2).sum()
    expected = x[0].double().numpy() @ x[0, some].double().numpy().T * float(scale)
    assert np.abs(g[0][:, some].numpy() - expected).max() <= 1e-3 * float(g.abs().max())


# --- the encoder


def test_an_image_gives_what_its_parts_give() -> None:
    made = encoder(num_patterns=3, attention_ratio=0.6, seed=5)
    batch, rows = pixels(4), np.array([3, 9, 10, 40])
    found = made.encode(batch, rows, SIZES[: len(rows)])
    with torch.inference_mode():
        scaled = (torch.from_numpy(batch).float() - made.network.mean) / made.network.std
        tokens, attention = transformer_features(made.network.model, scaled)
    keep = kept(attention, 0.6)
    expected = patterns(tokens, keep, rows, Clustering(3, "euclidean", 5))
    assert made.column == "patterns"
    assert (made.dim, made.vectors_per_image) == (192, 3)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == np.float32
        assert 1 <= len(mine) <= 3
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[0][: len(found[1])], found[1][: len(found[0])], atol=1e-3)


@pytest.mark.parametrize("given", [{}, {"backbone": "test_resnet", "model_option": ()}], ids=["transformer", "convolutions"])
def test_patterns_do_not_depend_on_the_rest_of_the_batch(given) -> None:
    made, batch, rows = encoder(num_patterns=3, **given), pixels(5), np.arange(5)
    together = made.encode(batch, rows, SIZES[: len(rows)])
    for index in range(5):
        alone = made.encode(batch[index : index + 1], rows[index : index + 1], SIZES[:1])[0]
        np.testing.assert_allclose(alone, together[index], atol=1e-5 * np.abs(together[index]).max())


def test_one_pattern_of_a_map_is_the_mean_of_what_is_kept() -> None:
    made = encoder(backbone="test_resnet", model_option=(), num_patterns=1)
    batch = pixels(3)
    with torch.inference_mode():
        maps = made.network.model.forward_features(
            (torch.from_numpy(batch).float() - made.network.mean) / made.network.std
        ).numpy()
    for found, vectors in zip(made.encode(batch, np.arange(3), SIZES[:3]), maps.reshape(3, maps.shape[1], -1), strict=True):
        norms = np.linalg.norm(vectors, axis=0)
        order = np.argsort(norms, kind="stable")
        top = order[np.cumsum(norms[order]) > 0.5 * norms.sum()]
        assert len(top) < len(norms)
        np.testing.assert_allclose(found, vectors[:, top].mean(axis=1)[None], rtol=1e-4, atol=1e-5)


def test_a_channels_last_map_has_its_channels_as_features() -> None:
    swin = ("embed_dim=16", "depths=(1,1,1,1)", "num_heads=(1,2,2,2)")
    made = encoder(backbone="swin_tiny_patch4_window7_224", model_option=swin, image_size=None)
    assert made.dim == 128


@pytest.mark.parametrize(
    "given",
    [
        {"model_option": ("depth=1",)},
        {"model_option": ("depth=2", "class_token=False", "global_pool='avg'")},
        {"backbone": "mixer_s32_224", "model_option": (), "image_size": None},
    ],
    ids=["one-block", "no-class-token", "neither"],
)
def test_backbones_without_patterns_are_refused(given) -> None:
    with pytest.raises(InputError, match="gives no patterns"):
        encoder(**given)


@pytest.mark.parametrize(
    ("name", "value"), [("num_patterns", "0"), ("attention_ratio", "1.5"), ("pattern_metric", "l1"), ("seed", "-1")]
)
def test_options_have_ranges(name: str, value: str) -> None:
    with pytest.raises(InputError, match=name):
        build_options(EmbedOptions, {"pool": "x", "out": "y", name: value}, "embed")


# --- from images to picks


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 images in two class folders; the 71st is no image."""
    folder = tmp_path_factory.mktemp("pool")
    for index, image in enumerate(pixels(90, seed=9)):
        place = folder / ("a" if index < 40 else "b") / f"{index:03d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(place)
    (folder / "b" / "070.png").write_bytes(b"words")
    return folder


def run_embed(images: Path, out: Path, **given):
    options = {**TINY, "encoder": "patterns", "num_patterns": 3, "workers": 0, "max_rejected": "5%", **given}
    return embed(EmbedOptions(pool=str(images), out=str(out), **options))


@pytest.fixture(scope="module")
def features(images: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("patterns") / "features"
    run_embed(images, out)
    return FeatureStore(str(out))


def test_a_store_of_patterns(features: FeatureStore) -> None:
    manifest = features.manifest
    assert (manifest["column"], manifest["vectors_per_image"], manifest["dim"]) == ("patterns", 3, 192)
    assert (features.num_rows, features.num_vectors, manifest["num_rejected"]) == (90, 89, 1)
    parts = [features.read_part(part["name"]) for part in manifest["parts"]]
    assert {part["patterns"].type for part in parts} == {pa.list_(pa.list_(pa.float32(), 192))}
    assert [part["num_patterns"] for part in manifest["parts"]] == [int(vector_counts(p["patterns"]).sum()) for p in parts]
    assert 89 < features.num_patterns <= 3 * 89
    assert features.num_patterns == sum(part["num_patterns"] for part in manifest["parts"])
    assert manifest["encoder"]["num_patterns"] == 3
    assert (manifest["encoder"]["attention_ratio"], manifest["encoder"]["pattern_metric"]) == (0.5, "euclidean")
    made = encoder(num_patterns=3)
    picture = Image.open(Path(manifest["pool"]["uri"]) / "b" / "089.png")
    expected = made.encode(made.input.prepare(picture.convert("RGB"))[None], np.array([89]), SIZES[:1])[0]
    stored = np.array(parts[-1]["patterns"][-1].as_py(), dtype=np.float32)
    np.testing.assert_allclose(stored, expected, atol=1e-5 * np.abs(expected).max())


def test_blocks_hold_every_pattern_under_its_image(features: FeatureStore) -> None:
    shards = open_local(features, Reading(False, ("label",)))
    (block,) = shards.blocks
    assert shards.n == features.num_patterns == len(block.rows) == len(block.eligible) == len(block.columns["label"])
    assert np.unique(block.rows).tolist() == features.rows.tolist()
    assert (block.columns["label"] == (block.rows >= 40)).all()
    streamed = open_local(features, Reading(False, ("label",), memory_bytes=1))
    assert torch.equal(streamed.blocks[0].x, block.x)
    rows = np.array([89, 0, 69])
    assert torch.equal(streamed.take(rows), shards.take(rows))


def test_from_images_to_picks(features: FeatureStore, tmp_path: Path, ray_session: None) -> None:
    found = []
    for workers in (0, 2):
        for preset in ("freesel", "geal-v1"):
            out = tmp_path / f"{workers}-{preset}"
            given = {
                "features": features.place.uri,
                "out": str(out),
                "strategy": "freesel",
                "budget": "5,20%",
                "workers": workers,
            }
            manifests = select(build_options(SelectOptions, {**given, "option": (f"preset={preset}",)}, "select"))
            assert [manifest["num_picks"] for manifest in manifests] == [5, 18]
            found.append(tuple((out / "18" / name).read_bytes() for name in ("picks.parquet", "ids.txt")))
            assert "070" not in (out / "18" / "ids.txt").read_text()
    assert found[:2] == found[2:]
    assert found[0] != found[1]


def test_more_shards_give_the_same_picks(features: FeatureStore, ray_session: None) -> None:
    from engine.runner import run_method
    from engine.select import strategy_options

    _, method, options = strategy_options("freesel", {})
    request = Request(30, 0, np.array([4, 9]))
    here = run_method(method, open_local(features, Reading(True)), request, options)
    shards = RayShards(features, 2, 2, Reading(True))
    try:
        assert shards.n == features.num_patterns
        there = run_method(method, shards, request, options)
    finally:
        shards.close()
    assert there.picks.tobytes() == here.picks.tobytes()
    assert there.gains.tobytes() == here.gains.tobytes()


@pytest.mark.parametrize("strategy", ["kmeans", "coreset", "maxherding"])
def test_strategies_of_one_vector_an_image_refuse_patterns(features: FeatureStore, tmp_path: Path, strategy: str) -> None:
    words = rf"strategy '{strategy}' takes one vector an image, .* has up to 3 \(patterns\): use freesel"
    given = {"features": features.place.uri, "out": str(tmp_path / "out"), "workers": 0}
    with pytest.raises(InputError, match=words):
        select(build_options(SelectOptions, {**given, "strategy": strategy, "budget": "5"}, "select"))
    with pytest.raises(InputError, match=words):
        compare(
            build_options(
                CompareOptions, {**given, "strategies": f"freesel,{strategy}", "budget": "5", "metrics": "coverage"}, "compare"
            )
        )
    assert not (tmp_path / "out").exists()


def test_coverage_is_over_patterns_and_the_rest_is_refused(features: FeatureStore, tmp_path: Path) -> None:
    given = {"features": features.place.uri, "workers": 0}
    out = str(tmp_path / "picks")
    select(build_options(SelectOptions, {**given, "out": out, "strategy": "freesel", "budget": "9"}, "select"))
    measured = {"subject": features.place.uri, "workers": 0, "selection": out}
    metrics = evaluate(build_options(EvaluateOptions, {**measured, "metrics": "coverage"}, "evaluate"))
    value = {entry["metric"]: entry["value"] for entry in metrics}
    shards = open_local(features, Reading(True))
    x, rows = shards.blocks[0].x.double().numpy(), shards.blocks[0].rows
    picks = [int(line) for line in (tmp_path / "picks" / "indices.json").read_text().strip("[]").split(",")]
    distance = np.sqrt(((x[:, None] - x[np.isin(rows, picks)]) ** 2).sum(axis=2)).min(axis=1)
    assert value["mean_distance"] == pytest.approx(distance.mean(), rel=1e-9)
    assert value["covering_radius"] == pytest.approx(distance.max(), rel=1e-9)
    assert 0 < value["emd"] < 2
    with pytest.raises(InputError, match="up to 3 vectors an image"):
        evaluate(build_options(EvaluateOptions, {**measured, "test": features.place.uri, "metrics": "knn"}, "evaluate"))


def test_one_pattern_an_image_is_a_store_like_any_other(images: Path, tmp_path: Path) -> None:
    manifest = run_embed(images, tmp_path / "features", num_patterns=1)
    store = FeatureStore(str(tmp_path / "features"))
    assert manifest["vectors_per_image"] == 1
    assert store.vectors().shape == (89, 192)
    given = {"features": store.place.uri, "out": str(tmp_path / "out"), "workers": 0, "budget": "4"}
    select(build_options(SelectOptions, {**given, "strategy": "coreset"}, "select"))


def test_parts_and_actors_do_not_show(images: Path, features: FeatureStore, tmp_path: Path, ray_session: None) -> None:
    """Other batches round otherwise in the network alone; the same batches on actors give the same bytes."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        here = run_embed(images, tmp_path / "here", batch_size=1)
    finally:
        torch.set_num_threads(before)
    there = run_embed(images, tmp_path / "there", batch_size=1, workers=2)
    assert there["parts"] == here["parts"]
    assert there["digest"] == here["digest"]


def test_a_run_that_was_cut_short_goes_on(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    whole = run_embed(images, out)
    (out / "manifest.json").unlink()
    (out / "parts" / "part-000000000064.arrow").unlink()
    again = run_embed(images, out)
    assert again["parts"] == whole["parts"]
    assert again["vectors_per_image"] == 3


def test_a_pattern_that_does_not_fit_names_its_image(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.encoders import PatternsEncoder
    from engine.schema import RunError

    def encode(self, batch, rows, sizes):
        return [np.full((1 + row % 3, 192), np.inf if row == 50 else 1.0, dtype=np.float32) for row in rows]

    run_embed(images / "a", tmp_path / "first")
    monkeypatch.setattr(PatternsEncoder, "encode", encode)
    with pytest.raises(RunError, match=r"image 'b/050\.png' \(row 50\)"):
        run_embed(images, tmp_path / "out")


def test_a_part_without_good_images_has_the_column(images: Path, tmp_path: Path) -> None:
    run_embed(images, tmp_path / "out")
    options = EmbedOptions(pool=str(images), out="", encoder="patterns", num_patterns=3, **TINY)
    threads = torch.get_num_threads()
    try:
        stores = Stores(str(tmp_path / "out" / "pool.arrow"), "", {"patterns": str(tmp_path / "part")})
        entry = PartEncoder(options, stores, "cpu").encode_part(Todo(70, 71, ("patterns",)))["stores"]["patterns"]
    finally:
        torch.set_num_threads(threads)
    assert (entry["num_vectors"], entry["num_patterns"], entry["num_rejected"]) == (0, 0, 1)


def test_a_column_of_lists_goes_there_and_back() -> None:
    values = np.arange(12, dtype=np.float16).reshape(6, 2)
    column = pa.chunked_array([patterns_array(values, np.array([1, 3, 2])), patterns_array(values[:0], np.array([], np.int64))])
    assert column.type == pa.list_(pa.list_(pa.float16(), 2))
    assert vector_counts(column).tolist() == [1, 3, 2]
    assert np.array_equal(vectors_numpy(column), values)
    assert np.array_equal(vectors_numpy(column.slice(1, 1)), values[1:4])
    twice = pa.chunked_array([*column.chunks, column.chunk(0)])
    assert np.array_equal(vectors_numpy(twice), np.concatenate([values, values]))
