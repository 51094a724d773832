"""Encoders: what every one owes its caller, and that the embedding is timm's own."""

import contextlib
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from engine.decode import BadImageError
from engine.encoders import ENCODERS, build_encoders, encoder_help
from engine.schema import MAX_PIXELS, InputError
from engine.verbs import EmbedOptions

SWIN = ("embed_dim=16", "depths=(1,1,1,1)", "num_heads=(1,2,2,2)")
CASES = [
    ("pixels", {"pixels_size": 5}, 75),
    ("patterns", {"backbone": "test_vit", "num_patterns": 1}, 64),
    ("patterns", {"backbone": "test_resnet", "num_patterns": 1}, 96),
    ("embedding", {"backbone": "test_resnet"}, 96),
    ("embedding", {"backbone": "test_vit"}, 64),
    ("embedding", {"backbone": "test_vit", "pooling": "cls", "image_size": 48, "channels_last": False}, 64),
    ("embedding", {"backbone": "test_efficientnet", "model_option": ("pad_type=same",), "pooling": "mean"}, 256),
]
every_case = pytest.mark.parametrize(("name", "given", "dim"), CASES, ids=[f"{n}-{g.get('backbone', '')}" for n, g, _ in CASES])


def build(name="embedding", **given):
    if name != "pixels":
        given.setdefault("weights", "random")
    return build_encoders(EmbedOptions(pool="", out="", encoder=name, **given), "cpu")[name]


def images(n=5):
    rng = np.random.default_rng(3)
    sizes = [(64, 64), (200, 70), (33, 150), (8, 8), (1, 20), (90, 91)][:n]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def encode(encoder, pictures):
    sizes = np.array([picture.size for picture in pictures])
    found = encoder.encode(np.stack([encoder.input.prepare(picture) for picture in pictures]), np.arange(len(pictures)), sizes)
    return np.concatenate(found) if isinstance(found, list) else found


# --- every encoder


def test_every_encoder_is_tested_here():
    elsewhere = {"patterns", "probs", "detections", "influence", "gradient_similarity", "stability"}
    assert {name for name, _, _ in CASES} | elsewhere == set(ENCODERS) == set(encoder_help())


@every_case
def test_vectors_are_finite_float32_of_the_promised_shape(name, given, dim):
    encoder = build(name, **given)
    vectors = encode(encoder, images())
    assert encoder.dim == dim
    assert vectors.shape == (5, dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) == 5
    assert encoder.column == ("patterns" if name == "patterns" else "embedding")
    assert encoder.vectors_per_image == 1
    json.dumps(encoder.describe())


@every_case
def test_prepared_pixels_have_one_shape_and_eight_bits(name, given, dim):
    encoder = build(name, **given)
    prepared = [encoder.input.prepare(picture) for picture in images(6)]
    assert len({pixels.shape for pixels in prepared}) == 1
    assert {pixels.dtype for pixels in prepared} == {np.dtype(np.uint8)}


@every_case
def test_the_same_images_give_the_same_bits(name, given, dim):
    encoder = build(name, **given)
    first = encode(encoder, images())
    assert encode(encoder, images()).tobytes() == first.tobytes()
    assert encode(build(name, **given), images()).tobytes() == first.tobytes()


@every_case
def test_a_vector_does_not_depend_on_the_rest_of_its_batch(name, given, dim):
    encoder = build(name, **given)
    together = encode(encoder, images())
    alone = np.concatenate([encode(encoder, [picture]) for picture in images()])
    backwards = encode(encoder, images()[::-1])[::-1]
    scale = np.abs(together).max()
    assert np.abs(together - alone).max() <= 1e-5 * scale
    assert np.abs(together - backwards).max() <= 1e-5 * scale


def test_an_unknown_encoder_suggests_the_nearest():
    with pytest.raises(
        InputError,
        match=r"unknown encoder 'pixel', did you mean 'pixels'\? \(one of: .*, pixels, probs, stability\)",
    ):
        build("pixel")


# --- pixels


def test_pixels_are_box_averages_in_zero_to_one():
    quadrants = np.zeros((4, 4, 3), np.uint8)
    quadrants[:2, 2:] = (255, 0, 51)
    quadrants[2:, :2] = 102
    quadrants[2:, 2:] = np.array([[0, 2], [4, 10]], np.uint8)[:, :, None]
    vector = encode(build("pixels", pixels_size=2), [Image.fromarray(quadrants)])
    expected = np.array([[0, 0, 0, 255, 0, 51, 102, 102, 102, 4, 4, 4]], np.float32) / np.float32(255)
    assert np.array_equal(vector, expected)


# --- preprocessing


def test_preprocessing_is_the_models_own_by_default():
    described = build(backbone="test_vit").describe()
    own = resolve_model_data_config(timm.create_model("test_vit", pretrained=False))
    assert described == {key: own[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    assert described["input_size"] == (3, 160, 160)


def test_preprocessing_overrides():
    encoder = build(
        backbone="test_resnet",
        image_size=40,
        mean=(0.5,),
        std=(0.1, 0.2, 0.3),
        interpolation="lanczos",
        crop_pct=0.8,
        crop_mode="border",
    )
    assert encoder.describe() == {
        "input_size": (3, 40, 40),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.1, 0.2, 0.3),
        "interpolation": "lanczos",
        "crop_pct": 0.8,
        "crop_mode": "border",
    }
    assert encoder.input.prepare(images()[0]).shape == (3, 40, 40)
    assert encoder.network.mean.flatten().tolist() == [127.5] * 3
    assert encoder.network.std.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])


def test_mean_and_std_shift_and_scale_what_the_model_sees(monkeypatch):
    encoder = build(backbone="test_resnet", image_size=32, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    seen = []
    monkeypatch.setattr(encoder, "forward", lambda batch: seen.append(batch) or batch.mean(dim=(2, 3)))
    values = encoder.encode(np.full((1, 3, 32, 32), 255, np.uint8), np.arange(1), np.full((1, 2), 32))
    assert values[0].tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)
    assert seen[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mean": (0.1, 0.2)}, "--mean 0.1,0.2 has 2 values"),
        ({"std": (0.1, 0.2, 0.3, 0.4)}, "--std 0.1,0.2,0.3,0.4 has 4 values"),
        ({"std": (0.0,)}, "must be positive"),
        ({"std": (0.1, -0.2, 0.3)}, "must be positive"),
        ({"std": (float("nan"),)}, "must be positive"),
    ],
)
def test_means_and_stds_that_cannot_be_used(given, words):
    with pytest.raises(InputError) as caught:
        build(backbone="test_resnet", **given)
    assert words in str(caught.value)


def test_squash_keeps_the_sides_that_a_crop_cuts_off():
    stripes = np.zeros((40, 120, 3), np.uint8)
    stripes[:, :30] = (255, 0, 0)
    stripes[:, 90:] = (0, 0, 255)
    picture = Image.fromarray(stripes)
    settings = {"backbone": "test_resnet", "image_size": 40, "crop_pct": 1.0, "interpolation": "nearest"}
    squashed = build(**settings, crop_mode="squash").input.prepare(picture)
    cropped = build(**settings, crop_mode="center").input.prepare(picture)
    assert squashed[:, 20, 0].tolist() == [255, 0, 0]
    assert squashed[:, 20, -1].tolist() == [0, 0, 255]
    assert not cropped.any()


def test_a_very_long_image_is_not_blown_up_before_it_is_cropped(monkeypatch):
    """Its short side is 1 px: brought to 160 px, the long one would be 4,800,000 px."""
    encoder = build(backbone="test_resnet")
    asked = []

    def resize(image, size, *arguments, **settings):
        asked.append(size)
        return Image.new("RGB", (160, 160))

    monkeypatch.setattr(Image.Image, "resize", resize)
    with contextlib.suppress(BadImageError):
        encoder.input.prepare(Image.new("RGB", (30_000, 1)))
    assert max((width * height for width, height in asked), default=0) <= MAX_PIXELS


# --- backbone


def test_a_model_option_reaches_the_model():
    plain = build(backbone="test_efficientnet")
    same = build(backbone="test_efficientnet", model_option=("pad_type=same",))
    assert type(plain.network.model.conv_stem).__name__ == "Conv2d"
    assert type(same.network.model.conv_stem).__name__ == "Conv2dSame"
    assert torch.equal(plain.network.model.conv_stem.weight, same.network.model.conv_stem.weight)
    assert not np.allclose(encode(plain, images()), encode(same, images()))


def test_model_options_are_numbers_where_they_read_as_numbers():
    encoder = build(backbone="vit_tiny_patch16_224", image_size=32, model_option=("depth=2", "qkv_bias=False"))
    assert len(encoder.network.model.blocks) == 2
    assert encoder.network.model.blocks[0].attn.qkv.bias is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"backbone": "vit_smal_patch16_224.dino"}, ["'vit_smal_patch16_224.dino'", "did you mean 'vit_small_patch16_224'?"]),
        ({"backbone": "resnet18.nope"}, ["resnet18", "nope"]),
        ({"backbone": "test_resnet", "model_option": ("no_such_thing=1",)}, ["test_resnet", "no_such_thing"]),
        ({"backbone": "test_resnet", "model_option": ("pad",)}, ["--model-option 'pad'", "name=value"]),
        ({"backbone": "test_resnet", "model_option": ("a=1", "a=2")}, ["'a'", "twice"]),
        ({"backbone": "test_resnet", "pooling": "cls"}, ["test_resnet", "no class token"]),
        ({"backbone": "mixer_s32_224", "image_size": 64}, ["mixer_s32_224", "64"]),
        ({"backbone": "test_resnet", "weights": "/nowhere/w.pth"}, ["/nowhere/w.pth", "does not exist"]),
    ],
    ids=["name", "tag", "argument", "no-equals", "twice", "no-class-token", "fixed-size", "no-file"],
)
def test_backbones_that_cannot_be_built(given, words):
    with pytest.raises(InputError) as caught:
        build(**given)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_size_resamples_the_positions_of_a_transformer():
    encoder = build(backbone="test_vit", image_size=96)
    assert encoder.network.model.pos_embed.shape[1] == 1 + (96 // 16) ** 2
    assert encoder.input.prepare(images()[0]).shape == (3, 96, 96)


# --- vectors


def by_hand(name, pictures, **arguments):
    """The same random model, and its input by timm's own evaluation transform."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return model, torch.stack([transform(picture) for picture in pictures])


@pytest.mark.parametrize("pooling", ["model", "cls", "mean"])
def test_pooling_of_a_vision_transformer(pooling):
    model, batch = by_hand("test_vit", images())
    with torch.inference_mode():
        tokens = model.forward_features(batch)
        expected = {
            "model": model.forward_head(tokens, pre_logits=True),
            "cls": tokens[:, 0],
            "mean": tokens[:, model.num_prefix_tokens :].mean(dim=1),
        }
    assert tokens.shape == (5, model.num_prefix_tokens + 100, 64)
    assert not torch.allclose(expected["cls"], expected["mean"], atol=1e-2)
    found = encode(build(backbone="test_vit", pooling=pooling), images())
    assert np.allclose(found, expected[pooling].numpy(), atol=1e-4)


def test_mean_pooling_of_a_convolutional_network_is_over_positions():
    model, batch = by_hand("test_resnet", images())
    with torch.inference_mode():
        expected = model.forward_features(batch).mean(dim=(2, 3)).numpy()
    found = encode(build(backbone="test_resnet", pooling="mean"), images())
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_mean_pooling_of_a_channels_last_transformer_is_over_positions():
    arguments = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
    model, batch = by_hand("swin_tiny_patch4_window7_224", images(2), **arguments)
    with torch.inference_mode():
        maps = model.forward_features(batch)
    assert maps.shape == (2, 7, 7, 128)
    encoder = build(backbone="swin_tiny_patch4_window7_224", model_option=SWIN, pooling="mean")
    assert encoder.dim == 128
    assert np.allclose(encode(encoder, images(2)), maps.mean(dim=(1, 2)).numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_an_embedding_is_the_model_after_timms_own_transform(name):
    model, batch = by_hand(name, images())
    with torch.inference_mode():
        expected = model(batch).numpy()
    found = encode(build(backbone=name), images())
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_real_embedding_is_timms_own(shared):
    pictures = [Image.open(path).convert("RGB") for path in sorted((shared / "bccd" / "images").iterdir())[:6]]
    weights = str(shared / "weights" / "mobilenetv2_100.safetensors")
    model = timm.create_model("mobilenetv2_100", pad_type="same", checkpoint_path=weights).eval()
    config = resolve_model_data_config(model) | {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 128, 128)}
    transform = create_transform(**config, is_training=False)
    with torch.inference_mode():
        batch = torch.stack([transform(picture) for picture in pictures])
        expected = model.forward_head(model.forward_features(batch), pre_logits=True).numpy()
    encoder = build(
        backbone="mobilenetv2_100",
        weights=weights,
        model_option=("pad_type=same",),
        mean=(0.5,),
        std=(0.5,),
        image_size=128,
    )
    found = encode(encoder, pictures)
    assert found.shape == (6, 1280)
    cosines = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.9999
    others = (found[:-1] * found[1:]).sum(axis=1) / np.linalg.norm(found[:-1], axis=1) / np.linalg.norm(found[1:], axis=1)
    assert others.max() < 0.999  # two images are not that close, so the test above can fail


# --- precision and compilation


@pytest.mark.parametrize("name", ["embedding", "patterns"])
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_bf16_is_close_and_coarser(name, backbone):
    given = {"backbone": backbone, "image_size": 64, "num_patterns": 1, "attention_ratio": 1.0}  # a threshold may tip
    exact, coarse = encode(build(name, **given), images()), encode(build(name, **given, precision="bf16"), images())
    assert coarse.dtype == np.float32
    assert not np.array_equal(exact, coarse)
    cosines = (exact * coarse).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(coarse, axis=1)
    assert cosines.min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedding", "patterns"])
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_a_compiled_network_gives_what_the_network_gives(name, backbone):
    given = {"backbone": backbone, "image_size": 64, "num_patterns": 1}
    plain, compiled = encode(build(name, **given), images()), encode(build(name, **given, compile=True), images())
    assert np.allclose(plain, compiled, atol=1e-4 * np.abs(plain).max())
