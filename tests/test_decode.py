"""From the bytes of an image file to 8-bit RGB, or a reason why not."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from engine.decode import NO_IMAGE, BadImageError, decode
from engine.schema import MAX_PIXELS


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def noise(height=40, width=60, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(data):
    image, _ = decode(data, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_png_comes_back_as_it_is():
    image = noise()
    decoded, size = decode(encoded(image, "PNG"), MAX_PIXELS)
    assert size == decoded.size == (60, 40)
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is no picture\n" * 9, NO_IMAGE),
        (encoded(noise(), "JPEG")[:1500], "truncated"),
        (encoded(noise(), "PNG")[:1500], "truncated"),
        (encoded(noise(), "JPEG")[:20], ""),
        (b"\xff\xd8\xff", ""),
    ],
    ids=["empty", "text", "cut-jpeg", "cut-png", "jpeg-header", "jpeg-magic"],
)
def test_damaged_files_are_rejected_with_a_reason(data, reason):
    with pytest.raises(BadImageError) as caught:
        decode(data, MAX_PIXELS)
    assert reason in str(caught.value)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_random_damage_is_a_bad_image_or_an_rgb_one_and_nothing_else(kind):
    rng = np.random.default_rng(1)
    good = encoded(noise(20, 24), kind)
    for turn in range(150):
        data = bytearray(good)
        if turn % 3 == 0:
            data = data[: rng.integers(1, len(data))]
        else:
            reach = len(data) if turn % 3 == 1 else min(64, len(data))
            for at in rng.integers(0, reach, size=3):
                data[at] = rng.integers(0, 256)
        try:
            outcome = decode(bytes(data), 10_000)[0].mode
        except BadImageError as error:
            outcome = f"rejected: {error}"
        assert outcome == "RGB" or len(outcome) > len("rejected: ")


def test_cmyk_jpeg():
    pixels = pixels_of(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 4


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert pixels_of(data).tolist() == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


def test_sixteen_bit_grey_of_either_byte_order():
    values = np.array([[1000, 32768, 65535]], dtype=np.uint16)
    little, big = Image.fromarray(values), Image.fromarray(values.astype(">u2"))
    assert big.mode == "I;16B"
    expected = [[[4] * 3, [128] * 3, [255] * 3]]
    assert pixels_of(encoded(little, "TIFF")).tolist() == pixels_of(encoded(big, "TIFF")).tolist() == expected


def test_wide_integers_in_a_sixteen_bit_range_are_scaled_and_others_refused():
    assert pixels_of(encoded(Image.fromarray(np.array([[0, 32768, 65535]], np.int32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    with pytest.raises(BadImageError, match="from 0 to 65536"):
        decode(encoded(Image.fromarray(np.array([[0, 65536]], np.int32)), "TIFF"), MAX_PIXELS)
    with pytest.raises(BadImageError, match="from -1 to 5"):
        decode(encoded(Image.fromarray(np.array([[-1, 5]], np.int32)), "TIFF"), MAX_PIXELS)


def test_floating_point_tiff_is_rejected():
    with pytest.raises(BadImageError, match="floating-point"):
        decode(encoded(Image.fromarray(np.array([[0.0, 0.5]], np.float32)), "TIFF"), MAX_PIXELS)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])], ids=["one-index", "alpha-table"])
def test_palette_with_transparency_keeps_its_colours(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    data = encoded(image, "PNG", transparency=transparency)
    assert "transparency" in Image.open(io.BytesIO(data)).info
    assert pixels_of(data).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("LA", (90, 0), [90, 90, 90]),
        ("RGBA", (10, 20, 30, 0), [10, 20, 30]),
        ("L", 200, [200, 200, 200]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_grey_and_alpha(mode, colour, expected):
    assert pixels_of(encoded(Image.new(mode, (3, 2), colour), "PNG")).tolist() == [[expected] * 3] * 2


def test_animated_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels_of(data) == (255, 0, 0)).all()


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    _, size = decode(encoded(noise(40, 60), "JPEG", exif=exif), MAX_PIXELS)
    assert size == (60, 40)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png(side):
    """A valid 1-bit PNG of side x side px in a few kilobytes."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    body = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_an_image_that_is_too_large_is_rejected_before_it_is_decoded(monkeypatch):
    data = huge_png(20_000)
    assert len(data) < 200_000

    def never(*arguments):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(BadImageError, match="20000 x 20000 = 400,000,000 pixels is above --max-pixels 178,956,970"):
        decode(data, MAX_PIXELS)
    with pytest.raises(AssertionError, match="it was decoded"):  # the patch does bite
        decode(data, 400_000_000)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICO"])
def test_formats_that_run_programs_or_that_nobody_photographs_in_are_not_opened(kind, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *given, **more: pytest.fail(f"a program was started: {given}"))
    data = encoded(noise(), kind)
    with pytest.raises(BadImageError, match="not an image file") as caught:
        decode(data, MAX_PIXELS)
    assert str(caught.value) == NO_IMAGE


def test_a_stereo_photograph_gives_its_first_image():
    image = noise()
    data = encoded(image, "MPO", save_all=True, append_images=[noise(seed=1)])
    assert np.array_equal(pixels_of(data), pixels_of(encoded(image, "JPEG")))


def test_max_pixels_is_a_limit_that_may_be_reached():
    data = encoded(noise(6, 8), "PNG")
    assert decode(data, 48)[1] == (8, 6)
    with pytest.raises(BadImageError, match="48 pixels is above --max-pixels 47"):
        decode(data, 47)
