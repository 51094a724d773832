"""The perceptual hash: the usual definition, exactly, and close for images that look alike."""

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from engine.phash import phash


def by_definition(image):
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = scipy.fft.dct(scipy.fft.dct(grey, axis=0), axis=1)[:8, :8]
    return int("".join("1" if above else "0" for above in (low > np.median(low)).reshape(-1)), 2)


def bits_apart(a, b):
    return (a ^ b).bit_count()


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_usual_definition(seed):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    image = small.resize((20 + 50 * seed, 130), Image.Resampling.BICUBIC)
    assert phash(image) == by_definition(image)


def test_real_images_hash_by_definition_and_close_to_their_copies(shared):
    images = [Image.open(path).convert("RGB") for path in sorted((shared / "bccd" / "images").iterdir())[:12]]
    hashes = [phash(image) for image in images]
    assert hashes == [by_definition(image) for image in images]
    assert max(bits_apart(phash(image.resize((200, 150))), h) for image, h in zip(images, hashes, strict=True)) <= 4
    assert min(bits_apart(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 4


def test_one_colour_has_no_noise_to_hash():
    assert phash(Image.new("RGB", (9, 30), (3, 9, 200))) == 1 << 63
    assert phash(Image.new("RGB", (64, 64))) == 0
