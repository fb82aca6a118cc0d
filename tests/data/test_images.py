"""Decoding and preprocessing: equal to transformers bit for bit, and safe on what is no image."""

import base64
import io
import json
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
from transformers import AutoImageProcessor
from transformers.image_utils import load_image
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from finetune.data import images
from finetune.data.conversation import Image, RecordError, Remote, Slice
from finetune.data.images import Preprocessing, decode_base64, describe, digest, encoded, open_image
from finetune.recipe.schema import Augment
from modeling.errors import UserError


def noise(width, height, mode="RGB", seed=0):
    """Random pixels in any of Pillow's modes; the upper half opaque where there is an alpha channel."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    levels[: height // 2, :, 3] = 255
    image = PIL.Image.fromarray(levels)
    if mode == "I;16":
        return PIL.Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
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


def gray(image):
    """The levels of an image that is gray, row by row."""
    opened = np.asarray(open_image(Image(image)))
    assert (opened == opened[..., :1]).all()
    return opened[..., 0].tolist()


SIXTEEN_BITS = np.array([[0, 128, 129, 257], [4095, 32768, 65280, 65535]], np.uint16)
EIGHT_BITS = [[0, 0, 1, 1], [16, 128, 254, 255]]
"""level / 257, rounded"""


def tiff(levels, *, bits, photometric=1, sample_format=1, order="<"):
    """A TIFF file of one channel, written by hand: Pillow does not write all that it reads."""
    data = levels if isinstance(levels, bytes) else levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    height, width = (1, 4) if isinstance(levels, bytes) else levels.shape
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(
            f"{order}{'HH' if kind == 3 else 'I'}", *((value, 0) if kind == 3 else (value,))
        )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + directory + bytes(4)


@pytest.mark.parametrize("extension", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_by_their_full_range(extension):
    file = io.BytesIO()
    PIL.Image.fromarray(SIXTEEN_BITS).save(file, extension)
    assert gray(file.getvalue()) == EIGHT_BITS
    assert gray(PIL.Image.fromarray(SIXTEEN_BITS)) == EIGHT_BITS


def test_sixteen_bits_of_either_byte_order_dark_or_light_first():
    assert gray(tiff(SIXTEEN_BITS, bits=16)) == EIGHT_BITS
    assert gray(tiff(SIXTEEN_BITS, bits=16, order=">")) == EIGHT_BITS
    assert gray(tiff(SIXTEEN_BITS, bits=16, photometric=0)) == [[255, 255, 254, 254], [239, 127, 1, 0]]
    assert gray(tiff(bytes([0x00, 0x0F, 0xFF, 0x80, 0x80, 0x10]), bits=12)) == [[0, 255, 128, 1]]  # 0, 4095, 2056, 16
    assert gray(b"P5\n4 1\n1023\n" + np.array([0, 1023, 512, 4], ">u2").tobytes()) == [[0, 255, 128, 1]]
    colour = np.array([[[0, 32768, 65535]]], np.uint16)  # Pillow keeps the upper byte
    header = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + colour.astype(">u2").tobytes()))
    assert open_image(Image(header + pixels + png_chunk(b"IEND", b""))).getpixel((0, 0)) == (0, 128, 255)


WIDER = [
    (np.array([[0, 65535, 32768, 257]], np.int32), [[0, 255, 128, 1]]),
    (np.array([[0, 255, 128, 1]], np.int32), [[0, 255, 128, 1]]),
    (np.array([[0, 1, 0.5, 0.1]], np.float32), [[0, 255, 128, 26]]),
    (np.array([[0, 255, 127.6, 1]], np.float32), [[0, 255, 127, 1]]),
    (np.array([[7, 7, 7, 7]], np.int32), [[7, 7, 7, 7]]),
    (np.array([[0, 0, 0, 0]], np.float32), [[0, 0, 0, 0]]),
]


@pytest.mark.parametrize(("levels", "expected"), WIDER, ids=[f"{a.dtype}-{a.max():g}" for a, _ in WIDER])
def test_integers_and_floats_of_32_bits_are_scaled_by_the_range_they_fit(levels, expected):
    assert gray(PIL.Image.fromarray(levels)) == expected
    kind = 3 if levels.dtype == np.float32 else 1
    assert gray(tiff(levels, bits=32, sample_format=kind)) == expected
    assert gray(tiff(levels, bits=32, sample_format=3 if kind == 3 else 2, order=">")) == expected


@pytest.mark.parametrize(
    ("levels", "detail"),
    [
        (np.array([[0, 65536]], np.int32), "levels from 0 to 65536; expected 0 to 255 or 0 to 65,535"),
        (np.array([[-1, 200]], np.int32), "levels from -1 to 200; expected 0 to 255 or 0 to 65,535"),
        (np.array([[-0.5, 0.5]], np.float32), "levels from -0.5 to 0.5; expected 0 to 1 or 0 to 255"),
        (np.array([[0, 3000]], np.float32), "levels from 0 to 3000; expected 0 to 1 or 0 to 255"),
        (np.array([[0, np.nan]], np.float32), "levels from nan to nan; expected 0 to 1 or 0 to 255"),
        (np.array([[0, np.inf]], np.float32), "levels from 0 to inf; expected 0 to 1 or 0 to 255"),
        (np.array([[0, 200]], np.uint16), "levels from 0 to 200 of 65,535 are all one at 8 bits; stretch them first"),
        (np.array([[65400, 65535]], np.uint16), "levels from 65400 to 65535 of 65,535 are all one at 8 bits"),
        (np.array([[0, 0.003]], np.float32), "levels from 0 to 0.003 of 1 are all one at 8 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_range_that_would_leave_a_blank_image_is_refused_by_name(levels, detail):
    with pytest.raises(RecordError) as caught:
        open_image(Image(PIL.Image.fromarray(levels)))
    assert caught.value.reason == "unknown pixel range"
    assert detail in caught.value.detail


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 255, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 128), (100, 100, 100)),
        ("P", 1, (1, 1, 1)),
        ("PA", (1, 128), (1, 1, 1)),
        ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
        ("RGBX", (10, 20, 30, 128), (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)
def test_every_other_mode_by_hand(mode, colour, expected):
    picture = PIL.Image.new(mode, (2, 1), colour)
    picture.putpixel((1, 0), 0 if isinstance(colour, int) else (0,) * len(colour))
    if mode in ("P", "PA"):
        picture.putpalette([level for level in range(256) for _ in range(3)])
    assert open_image(Image(picture)).getpixel((0, 0)) == expected


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_a_picture_that_only_its_transparency_shows_is_put_on_white(mode):
    letters = PIL.Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    letters.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "LA":
        letters = letters.convert("LA")
    elif mode in ("P", "PA"):
        letters = PIL.Image.new("P", (3, 1), 0)
        letters.putpixel((1, 0), 1)
        letters.putpalette([0, 0, 0, 0, 0, 0])
        letters.info["transparency"] = b"\0\xff"
        letters = letters.convert("PA") if mode == "PA" else letters
    opened = open_image(Image(letters))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (0, 0, 0), (255, 255, 255)]


def test_the_first_page_of_a_tiff():
    file = io.BytesIO()
    red, blue = (PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    red.save(file, "TIFF", save_all=True, append_images=[blue])
    assert open_image(Image(file.getvalue())).getpixel((0, 0)) == (255, 0, 0)


def test_a_tiff_that_pillow_does_not_read_is_named_as_that():
    double = tiff(np.array([[0, 1]], np.float64), bits=64, sample_format=3)
    with pytest.raises(RecordError, match=r"corrupt image: .* damaged, or of a kind that Pillow does not read"):
        open_image(Image(double))


def test_white_black_and_gray_by_hand():
    white = Preprocessing((1, 1), mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.4))
    pixels = white.pixels(PIL.Image.new("RGB", (5, 4), (255, 0, 51)))
    assert pixels.tolist() == [[[1.0]], [[0.0]], [[0.0]]]


def processor_of(folder, **settings):
    """As a base's folder with such a preprocessor_config.json loads."""
    config = {"image_processor_type": "IdeficsImageProcessor", "image_size": 64, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 0},
        {"resample": 2},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_convert_rgb": False},
        {"rescale_factor": 0.01},
        {"size": {"height": 32, "width": 48}, "image_size": None},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1, 2]},
    ],
    ids=str,
)
def test_settings_of_the_image_processor_are_followed(settings, tmp_path):
    processor = processor_of(tmp_path, **settings)
    picture = noise(37, 23)
    pixels = Preprocessing.of(processor).pixels(picture)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, processor([picture], return_tensors="np")[0].astype(np.float32))
    assert not np.array_equal(pixels, ours(picture, 64)) or settings == {"do_convert_rgb": False}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_resize": False}, "do_resize: expected true: all images get one size, got False"),
        ({"do_rescale": "no"}, "do_rescale: expected true or false, got 'no'"),
        ({"do_normalize": None}, "do_normalize: expected true or false, got None"),
        ({"do_center_crop": True}, "do_center_crop: expected false, got True"),
        ({"do_pad": True}, "do_pad: expected false, got True"),
        ({"resample": 9}, "resample: expected a filter of Pillow's, 0 to 5, got 9"),
        ({"resample": "bicubic"}, "resample: expected a filter of Pillow's, 0 to 5, got 'bicubic'"),
        ({"rescale_factor": None}, "rescale_factor: expected a number above 0, got None"),
        ({"rescale_factor": 0}, "rescale_factor: expected a number above 0, got 0"),
        ({"image_mean": 0.5}, "image_mean: expected three numbers, got 0.5"),
        ({"image_std": [0, 1, 1]}, "image_std: expected three numbers above 0, got (0, 1, 1)"),
        ({"image_size": "64"}, "size: expected a height and a width in pixels, got "),
        ({"image_size": 10**9}, "size: expected a height and a width in pixels, got "),
        ({"image_size": None, "size": {"shortest_edge": 64}}, "size: expected a height and a width in pixels, got "),
    ],
    ids=str,
)
def test_settings_of_the_image_processor_that_cannot_be_followed_are_named(settings, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        Preprocessing.of(processor_of(tmp_path, **settings), "my/base")
    assert str(caught.value).startswith(f"my/base: preprocessor_config.json: {expected}")


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


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 13_500, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_too_large(side):
    assert reason(png_header(side, side)) == "image too large"


def test_a_large_header_alone_is_not_too_large():
    assert reason(png_header(9_459, 9_459)) == "corrupt image"  # 89,472,681 pixels, and none of them there


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_absurd_proportions():
    assert reason(png_header(65_536, 1)) == reason(png_header(1, 10**8)) == "image too large"
    assert reason(PIL.Image.new("RGB", (70_000, 2))) == "image too large"
    line = open_image(Image(PIL.Image.new("RGB", (65_535, 1), "red")))
    pixels = Preprocessing((4, 4), (0.0,) * 3, (1.0,) * 3).pixels(line)
    assert pixels[0].tolist() == [[1.0] * 4] * 4


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_corrupt(size):
    assert reason(PIL.Image.new("RGB", size)) == reason(png_header(*size)) == "corrupt image"


def test_a_jpeg_of_endless_scans_is_not_decoded():
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0\0"
    assert reason(saved("JPEG", progressive=True)[:-2] + 101 * scan) == "image too large"
    assert open_image(Image(saved("JPEG", progressive=True))).size == (40, 40)


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
        Slice(path, 6, -1, coding),
        Slice(path, -6, 5, coding),
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
    """What an augment must give, one value at a time; the border repeats its edge."""
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
        changed = SMALL.pixels(image, augment=Augment(flip=flip, shift=shift), rng=np.random.default_rng(seed))
        again = SMALL.pixels(image, augment=Augment(flip=flip, shift=shift), rng=np.random.default_rng(seed))
        assert np.array_equal(changed, again)
        seen.add(expected[changed.tobytes()])
    assert {flipped for flipped, _, _ in seen} == {False, flip}
    assert shift == 0 or len({down for _, down, _ in seen}) > 2
    assert shift == 0 or len({right for _, _, right in seen}) > 2


def test_without_augmentation_the_pixels_are_the_plain_ones():
    image, rng = noise(9, 9), np.random.default_rng(0)
    assert np.array_equal(SMALL.pixels(image, augment=Augment(), rng=rng), SMALL.pixels(image))
    assert np.array_equal(SMALL.pixels(image, augment=Augment(flip=True, shift=3)), SMALL.pixels(image))
