"""Decoding and preprocessing: equal to transformers bit for bit, and safe on what is no image."""

import base64
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_utils import load_image
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from finetune.data import images
from finetune.data.dialogue import Image, RecordError, Remote, Slice
from finetune.data.images import Augmentation, Preprocessing, decode_base64, describe, digest, encoded, open_image


def noise(width, height, mode="RGB", seed=0):
    """Random pixels in any of Pillow's modes; the upper half opaque where there is an alpha channel."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    levels[: height // 2, :, 3] = 255
    image = PIL.Image.fromarray(levels)
    if mode == "I;16":
        return PIL.Image.fromarray(levels[..., 0].astype(np.uint16) * 257 + 3)
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    return image.convert("RGB").convert(mode)


def theirs(path, size):
    return IdeficsImageProcessorPil(image_size=size)([load_image(str(path))], return_tensors="np")[0]


def ours(source, size):
    return Preprocessing.of(IdeficsImageProcessorPil(image_size=size)).pixels(open_image(Image(source)))


def reason(source):
    with pytest.raises(RecordError) as caught:
        open_image(Image(source))
    return caught.value.reason


MODES = [
    ("png", "1", {}),
    ("png", "L", {}),
    ("png", "L", {"transparency": 120}),
    ("png", "LA", {}),
    ("png", "P", {}),
    ("png", "P", {"transparency": 0}),
    ("png", "P", {"transparency": bytes(range(256))}),
    ("png", "RGB", {}),
    ("png", "RGB", {"transparency": noise(37, 23).getpixel((5, 5))}),
    ("png", "RGBA", {}),
    ("png", "I;16", {}),
    ("jpg", "L", {}),
    ("jpg", "RGB", {"quality": 30}),
    ("jpg", "RGB", {"progressive": True, "subsampling": 0}),
    ("jpg", "YCbCr", {}),
    ("jpg", "CMYK", {}),
    ("webp", "RGB", {}),
    ("webp", "RGBA", {"lossless": True}),
    ("gif", "P", {}),
    ("gif", "L", {"transparency": 120}),
    ("bmp", "1", {}),
    ("bmp", "RGBA", {}),
    ("tiff", "1", {}),
    ("tiff", "CMYK", {}),
    ("tiff", "LAB", {}),
    ("tiff", "I;16", {}),
    ("tiff", "F", {}),
    ("tiff", "RGB", {"compression": "tiff_lzw"}),
    ("ppm", "RGB", {}),
]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(("extension", "mode", "options"), MODES, ids=[f"{e}-{m}-{[*o]}" for e, m, o in MODES])
def test_pixels_of_every_mode_equal_those_of_transformers(extension, mode, options, tmp_path):
    path = tmp_path / f"image.{extension}"
    noise(37, 23, mode).save(path, **options)
    pixels = ours(path, 64)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 64, 64)
    assert pixels.std() > 0.01
    assert np.array_equal(pixels, theirs(path, 64))
    assert np.array_equal(pixels, ours(path.read_bytes(), 64))


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (1000, 3), (224, 224), (64, 64), (225, 63)], ids=str)
def test_pixels_of_every_size_equal_those_of_transformers(shape, size, tmp_path):
    path = tmp_path / "image.png"
    noise(*shape).save(path)
    assert np.array_equal(ours(path, size), theirs(path, size))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_does(orientation, tmp_path):
    path = tmp_path / "image.png"
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    noise(30, 20).save(path, exif=exif)
    assert open_image(Image(path)).size == ((30, 20) if orientation < 5 else (20, 30))
    assert np.array_equal(ours(path, 64), theirs(path, 64))
    assert np.array_equal(ours(path, 64), ours(noise(30, 20), 64)) == (orientation == 1)


def test_exif_orientation_six_turns_clockwise(tmp_path):
    path = tmp_path / "image.png"
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = PIL.Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    image.save(path, exif=exif)
    opened = open_image(Image(path))
    assert [opened.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


def test_white_black_and_gray_by_hand():
    white = Preprocessing((1, 1), mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.4))
    pixels = white.pixels(PIL.Image.new("RGB", (5, 4), (255, 0, 51)))
    assert pixels.tolist() == [[[1.0]], [[0.0]], [[0.0]]]


def test_height_and_width_are_not_confused():
    halves = PIL.Image.new("RGB", (4, 4), "black")
    halves.paste("white", (0, 0, 4, 2))  # the upper half
    pixels = Preprocessing((2, 6), mean=(0.0,) * 3, std=(1.0,) * 3).pixels(halves)
    assert pixels.shape == (3, 2, 6)
    assert (pixels[:, 0] > 0.9).all()
    assert (pixels[:, 1] < 0.1).all()


def test_the_first_frame_of_a_gif(tmp_path):
    path = tmp_path / "image.gif"
    red, blue = (PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    red.save(path, save_all=True, append_images=[blue])
    with PIL.Image.open(path) as image:
        assert image.n_frames == 2
    assert open_image(Image(path)).getpixel((0, 0)) == (255, 0, 0)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 13_500, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_too_large(side):
    assert reason(png_header(side, side)) == "image too large"


def test_a_large_header_alone_is_not_too_large():
    assert reason(png_header(9_459, 9_459)) == "corrupt image"  # 89,472,681 pixels, and none of them there


def saved(extension, mode="RGB", **options):
    file = io.BytesIO()
    noise(40, 40, mode).save(file, extension, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"not an image",
        b"\xff\xd8\xff\xe0",
        saved("PNG")[:300],
        saved("JPEG")[:300],
        saved("WEBP")[:300],
        saved("GIF")[:30],
        saved("EPS"),
        saved("ICO"),
        saved("PDF"),
        saved("TGA"),
        b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><rect width="4" height="4"/></svg>',
    ],
    ids=["empty", "signature", "text", "marker", "png", "jpeg", "webp", "gif", "eps", "ico", "pdf", "tga", "svg"],
)
def test_what_is_no_whole_raster_image_is_corrupt(content, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert reason(path) == "corrupt image"
    assert reason(content) == "corrupt image"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cut", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_broken_file_is_decoded_or_refused_and_raises_nothing_else(extension, cut):
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    content = saved(extension, exif=exif) if extension != "BMP" else saved(extension)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        broken = bytearray(content)
        for position in rng.integers(0, max(60, int(len(broken) * cut)), size=4):
            broken[position] = rng.integers(256)
        try:
            outcomes.add(open_image(Image(bytes(broken))).mode)
        except RecordError as error:
            outcomes.add(error.reason)
    assert outcomes <= {"RGB", "corrupt image", "image too large"}


def test_exif_that_pillow_cannot_write_back_is_a_corrupt_image():
    """A description that is no text raises AttributeError while the image is turned, a width in bytes struct.error."""

    def described(tag, kind, value):
        tags = struct.pack("<HHHII", 2, tag, kind, 1, value) + struct.pack("<HHII", 0x0112, 3, 1, 6)
        return saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags + b"\0\0\0\0")

    assert open_image(Image(described(0x0131, 2, 0))).mode == "RGB"
    assert reason(described(0x010E, 11, 6)) == "corrupt image"
    assert reason(described(0x0100, 1, 6)) == "corrupt image"


def test_one_transparent_colour_becomes_white(tmp_path):
    path = tmp_path / "image.png"
    image = PIL.Image.new("RGB", (2, 1), "blue")
    image.putpixel((1, 0), (9, 9, 9))
    image.save(path, transparency=(9, 9, 9))
    opened = open_image(Image(path))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 255), (255, 255, 255)]


def test_a_missing_image():
    assert reason(Path("no/such/image.png")) == "missing image"


def test_a_folder_is_no_image(tmp_path):
    assert reason(tmp_path) == "corrupt image"


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "corrupt image"


def test_a_file_in_the_place_of_a_folder_is_a_missing_image(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert reason(tmp_path / "a" / "b.png") == "missing image"


def test_an_image_of_a_url_is_not_downloaded():
    for function in (open_image, encoded, digest):
        with pytest.raises(RecordError) as caught:
            function(Image(Remote("https://a.b/c.png")))
        assert str(caught.value) == "image is a URL: https://a.b/c.png: not downloaded"


def deflated(content):
    packing = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packing.compress(content) + packing.flush()


CODINGS = {"raw": bytes, "deflate": deflated, "base64": base64.b64encode}


@pytest.mark.parametrize("coding", [*CODINGS])
def test_a_slice_is_what_it_holds(coding, tmp_path):
    path, content = tmp_path / "archive", saved("PNG")
    packed = CODINGS[coding](content)
    path.write_bytes(b"before" + packed + b"after")
    inside = Slice(path, 6, len(packed), coding)
    assert encoded(Image(inside)) == content
    assert np.array_equal(ours(inside, 64), ours(content, 64))
    assert describe(Image(inside)) == f"{path} at byte 6"
    wrong = [
        Slice(path, 6, len(packed) + 6, "raw"),
        Slice(path, 10**9, 5, coding),
        Slice(path, 6, len(packed) // 2, coding),
    ]
    if coding != "raw":
        wrong.append(Slice(path, 5, len(packed), coding))
    assert [reason(each) for each in wrong] == ["corrupt image"] * len(wrong)
    assert reason(Slice(tmp_path / "none", 6, 5, coding)) == "missing image"


def test_half_of_what_was_packed_is_corrupt_before_it_is_decoded(tmp_path):
    path, packed = tmp_path / "archive", deflated(b"abc" * 1000)
    path.write_bytes(packed)
    assert encoded(Image(Slice(path, 0, len(packed), "deflate"))) == b"abc" * 1000
    with pytest.raises(RecordError, match=r"corrupt image: .* at byte 0: the packed data breaks off"):
        encoded(Image(Slice(path, 0, len(packed) - 1, "deflate")))


def test_base64_is_exact():
    assert decode_base64("YW Jj\r\n\tZA==") == decode_base64(b"YWJjZA==") == b"abcd"
    for wrong in ("YWJjZA", "YWJjZA=", "YWJjZA===", "=YWJjZA=", "YWJj!", "YWJjé", "YW=Jj", "-_-_"):
        with pytest.raises(RecordError) as caught:
            decode_base64(wrong)
        assert caught.value.reason == "corrupt image"


@given(st.binary(max_size=60), st.integers(0, 90))
def test_base64_of_any_bytes(content, at):
    text = base64.b64encode(content).decode()
    assert decode_base64(text) == decode_base64(f"{text[:at]}\n {text[at:]}") == content


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 3000)


def test_encoded_images_over_the_limit_are_too_large(small_limit, tmp_path):
    path = tmp_path / "large"
    for size, expected in ((3000, "corrupt image"), (3001, "image too large")):
        content = bytes(size)
        path.write_bytes(content)
        assert reason(path) == reason(Slice(path, 0, size)) == expected
        for coding in ("deflate", "base64"):
            packed = CODINGS[coding](content)
            path.write_bytes(packed)
            assert reason(Slice(path, 0, len(packed), coding)) == expected


def test_a_deflate_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb"
    block = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    zeros = bytes(10**6)
    path.write_bytes(b"".join(block.compress(zeros) for _ in range(300)) + block.flush())
    tracemalloc.start()
    assert reason(Slice(path, 0, path.stat().st_size, "deflate")) == "image too large"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * images.MAX_BYTES


def test_a_png_named_jpg_is_the_png(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(saved("PNG"))
    assert open_image(Image(path)).size == (40, 40)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB", "HSV", "YCbCr"])
def test_a_picture_in_memory_is_encoded_as_it_is_opened(mode):
    held = Image(noise(20, 30, mode))
    again = open_image(Image(encoded(held)))
    assert np.array_equal(np.asarray(again), np.asarray(open_image(held)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_was_opened_and_not_read_is_checked_like_any_other():
    cut = PIL.Image.open(io.BytesIO(saved("PNG")[:600]))
    large = PIL.Image.open(io.BytesIO(png_header(9_460, 9_460)))
    for function in (open_image, encoded, digest):
        for held, expected in ((cut, "corrupt image"), (large, "image too large")):
            with pytest.raises(RecordError) as caught:
                function(Image(held))
            assert caught.value.reason == expected


def test_digest_is_that_of_the_bytes_under_any_name(tmp_path):
    first, second, other = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    first.write_bytes(b"abc")
    second.write_bytes(b"abc")
    other.write_bytes(b"abd")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's own example
    assert digest(Image(first)) == digest(Image(second)) == digest(Image(b"abc")) == bytes.fromhex(abc)
    other.write_bytes(b"zabcz")
    assert digest(Image(Slice(other, 1, 3))).hex() == abc
    other.write_bytes(b'{"x": "YWJj"}')
    assert digest(Image(Slice(other, 7, 4, "base64"))).hex() == abc
    other.write_bytes(b"abd")
    assert digest(Image(other)).hex() != abc


def test_digest_of_a_picture_in_memory_is_that_of_its_pixels():
    def solid(mode, size, color):
        return digest(Image(PIL.Image.new(mode, size, color)))

    assert len({solid("L", (2, 3), 7), solid("L", (3, 2), 7), solid("L", (2, 3), 8)}) == 3
    assert solid("L", (2, 3), 7) == solid("L", (2, 3), 7) == solid("RGB", (2, 3), (7, 7, 7))
    one, other = PIL.Image.new("P", (2, 3)), PIL.Image.new("P", (2, 3))
    one.putpalette([1, 2, 3])
    other.putpalette([1, 2, 4])
    assert digest(Image(one)) == solid("RGB", (2, 3), (1, 2, 3)) != digest(Image(other))


SMALL = Preprocessing((5, 7), mean=(0.0,) * 3, std=(1.0,) * 3)


def moved(pixels, *, flip, down, right):
    """What an augmentation must give, one value at a time; the border repeats its edge."""
    _, height, width = pixels.shape
    out = np.empty_like(pixels)
    for channel, y, x in np.ndindex(pixels.shape):
        from_y, from_x = min(max(y - down, 0), height - 1), min(max(x - right, 0), width - 1)
        out[channel, y, x] = pixels[channel, from_y, width - 1 - from_x if flip else from_x]
    return out


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 2), (True, 1), (False, 9)])
def test_augmentation_flips_by_a_coin_and_moves_within_its_bound(flip, shift):
    image, seen = noise(7, 5), set()
    plain = SMALL.pixels(image)
    expected = {
        moved(plain, flip=flipped, down=down, right=right).tobytes(): (flipped, down, right)
        for flipped in (False, True)[: flip + 1]
        for down in range(-shift, shift + 1)
        for right in range(-shift, shift + 1)
    }
    for seed in range(40):
        changed = SMALL.pixels(image, augmentation=Augmentation(flip, shift), rng=np.random.default_rng(seed))
        again = SMALL.pixels(image, augmentation=Augmentation(flip, shift), rng=np.random.default_rng(seed))
        assert np.array_equal(changed, again)
        seen.add(expected[changed.tobytes()])
    assert {flipped for flipped, _, _ in seen} == {False, flip}
    assert shift == 0 or len({down for _, down, _ in seen}) > 2
    assert shift == 0 or len({right for _, _, right in seen}) > 2


def test_without_augmentation_the_pixels_are_the_plain_ones():
    image, rng = noise(9, 9), np.random.default_rng(0)
    assert np.array_equal(SMALL.pixels(image, augmentation=Augmentation(), rng=rng), SMALL.pixels(image))
    assert np.array_equal(SMALL.pixels(image, augmentation=Augmentation(flip=True, shift=3)), SMALL.pixels(image))
