"""Image files changed at random, and references of any kind: an image, or a rejection of one line, in bounded time.

`FUZZ=20000 pytest tests/test_fuzz_images.py` tries that many inputs of each kind, drawn anew each time.
"""

import io
import time

import numpy as np
import PIL.Image
import pytest
from fuzzing import damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from sources import make_source

from finetune.data.conversation import Image, RecordError
from finetune.data.images import open_image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.paths import expand
from modeling.errors import UserError


def saved(extension, mode="RGB", **options):
    levels = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
        picture = PIL.Image.fromarray(levels.astype(kinds[mode]) * (1 if mode == "F" else 256))
    else:
        picture = PIL.Image.fromarray(levels).convert("RGB").convert(mode)
    file = io.BytesIO()
    picture.save(file, extension, **options)
    return file.getvalue()


TURNED = PIL.Image.Exif()
TURNED[0x0112], TURNED[0x010E] = 6, "a description"
PICTURES = {
    "JPEG": [saved("JPEG", exif=TURNED), saved("JPEG", progressive=True), saved("JPEG", "CMYK")],
    "PNG": [saved("PNG", exif=TURNED), saved("PNG", "P", transparency=0), saved("PNG", "I;16"), saved("PNG", "RGBA")],
    "GIF": [saved("GIF", "P", save_all=True, append_images=[PIL.Image.new("P", (9, 9))])],
    "WEBP": [saved("WEBP", exif=TURNED), saved("WEBP", "RGBA", lossless=True)],
    "BMP": [saved("BMP"), saved("BMP", "1")],
    "TIFF": [saved("TIFF", mode, compression=c) for mode in ("RGB", "I;16", "F", "I", "L") for c in (None, "tiff_lzw")],
    "PPM": [saved("PPM"), saved("PPM", "I"), saved("PPM", "F")],
}
DONOR = b"".join(files[0] for files in PICTURES.values())


def check(make):
    """An image, or an error that can be written down, in seconds."""
    started, said = time.monotonic(), ""
    try:
        opened = open_image(make())
        assert opened.mode == "RGB"
        assert min(opened.size) > 0
    except RecordError as error:
        said = str(error)
    assert len(said.encode()) < 2000
    assert time.monotonic() - started < 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extension", PICTURES)
@fuzz(60)
@given(data=st.data())
def test_fuzz_pictures(extension, data):
    content = data.draw(damaged(data.draw(st.sampled_from(PICTURES[extension])), donor=DONOR))
    check(lambda: Image(content))


PIECES = ["..", ".", "a.png", "A.PNG", "sub", "link", "text", "pipe", "~", "%2e%2e", "\\", "file://", "C:", "\0"]
REFERENCES = st.one_of(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3) | st.just("x" * 300), max_size=5).map("/".join),
    st.sampled_from(["data:image/png;base64,", "https://a.b/", "file:", "{", "iVBORw0KGgo" * 9, "\ud800"]),
    st.text(max_size=9),
    st.none() | st.integers() | st.binary(max_size=9) | st.dictionaries(st.sampled_from(["bytes", "path"]), st.text()),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "images"
    (folder / "sub").mkdir(parents=True)
    for place in (folder.parent, folder, folder / "sub"):
        (place / "a.png").write_bytes(PICTURES["PNG"][0])
    (folder / "link").symlink_to("..")
    (folder / "text").write_text("..")
    (folder / "pipe").symlink_to("/dev/zero")
    return ImageRoot(make_source("auto", image_root=(folder,)))


@fuzz(300)
@given(reference=REFERENCES)
def test_fuzz_references(root, reference):
    """No reference leaves the root, waits, or ends in a traceback."""

    def found():
        image = root.image(reference)
        assert isinstance(image.source, bytes) or image.source.is_relative_to(root.source.image_roots[0])
        return image

    check(found)


PARTS = st.sampled_from(["**", "*", "[a-z]*", "[!", "sub", "..", "?.png", ".*"]) | st.text(max_size=2)


@fuzz(200)
@given(parts=st.lists(PARTS.filter(lambda part: "/" not in part), max_size=5))
def test_fuzz_patterns(root, parts):
    """A pattern fits something, or one error says that it does not."""
    try:
        found = expand(root.source.image_roots[0].joinpath(*parts))
    except UserError:
        return
    assert found
    assert len(set(found)) == len(found)
