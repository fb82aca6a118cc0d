"""path | bytes | PIL -> RGB -> pixels, bit-identical to transformers' `load_image` + `IdeficsImageProcessorPil`.

An image that `load_image` would turn blank is scaled instead, or rejected with its name: see `_to_rgb`.
"""

import base64
import hashlib
import math
import os
import re
import warnings
import zlib
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin

from finetune.data.conversation import Image, RecordError, Remote, Slice
from finetune.data.io.paths import near_path
from finetune.data.io.remote import open_local
from finetune.recipe.schema import Augment
from finetune.recipe.urls import shown
from modeling.atomic_files import open_regular
from modeling.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Plain raster formats. Other formats of Pillow start programs (EPS) or parse far more than pixels."""

PIL.Image.init()  # Pillow loads its decoders lazily, and a restricted list of formats fails before that

MAX_PIXELS = 89_478_485
"""Pillow's own threshold for a decompression bomb: a quarter of a gigabyte in RGB."""

MAX_SIDE = 65_535
"""JPEG's own limit; the tables that shrink a longer side would take gigabytes."""

MAX_BYTES = 100_000_000
"""Largest number of bytes of an encoded image, after unpacking it from an archive."""

MAX_SCANS = 100
"""Largest number of scans of a progressive JPEG, which usually has ten: each one decodes the whole image again."""

# Pillow warns about images that it can decode, and about sizes that are rejected here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(image: Image) -> PIL.Image.Image:
    """Decode an image to RGB, with its EXIF rotation applied. Raises RecordError: missing, corrupt or too large."""
    if isinstance(image.source, PIL.Image.Image):
        return _decode(image.source, describe(image))
    content, name = encoded(image), describe(image)
    if content.startswith(b"\xff\xd8") and (scans := content.count(b"\xff\xda")) > MAX_SCANS:
        raise RecordError("image too large", f"{name}: a JPEG of {scans:,} scans")
    try:
        with PIL.Image.open(BytesIO(content), formats=FORMATS) as opened:
            return _decode(opened, name)
    except PIL.Image.DecompressionBombError as error:
        raise RecordError("image too large", f"{name}: {error}") from error
    except PIL.UnidentifiedImageError as error:  # its message holds a memory address
        tiff = "a TIFF that is damaged, or of a kind that Pillow does not read"
        detail = tiff if content.startswith(_TIFF) else f"none of {', '.join(FORMATS)}"
        raise RecordError("corrupt image", f"{name}: {detail}") from error
    except RecordError:
        raise
    except Exception as error:  # hostile headers make Pillow raise struct.error, SyntaxError and more
        raise RecordError("corrupt image", f"{name}: {error}") from error


_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _decode(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    size = f"{name}: {image.width} x {image.height} pixels"
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise RecordError("image too large", size)
    if not min(image.size):
        raise RecordError("corrupt image", size)
    try:
        return _to_rgb(image, name)
    except RecordError:
        raise
    except Exception as error:  # hostile EXIF makes Pillow raise struct.error, TypeError and more
        raise RecordError("corrupt image", f"{name}: {error}") from error


def describe(image: Image) -> str:
    """Return where an image is, for a message."""
    source = image.source
    if isinstance(source, Slice):
        return f"{source.path} at byte {source.offset}"
    if isinstance(source, Remote):
        return f"{shown(source.url):.200}"
    return str(source) if isinstance(source, Path | RecordError) else "image in memory"


def encoded(image: Image) -> bytes:
    """Return the bytes of an image file. Raises RecordError: missing, corrupt, too large, or not downloaded.

    An image in memory is converted by `open_image` and encoded as PNG.
    """
    source = image.source
    if isinstance(source, RecordError):
        raise RecordError(source.reason, source.detail)  # a new one: the traceback of a kept error grows
    if isinstance(source, Remote):
        raise RecordError("image is a URL", f"{describe(image)}: not downloaded")
    if isinstance(source, PIL.Image.Image):
        content = BytesIO()
        open_image(image).save(content, "PNG")
        return content.getvalue()
    if isinstance(source, Path):
        return _read(source)
    if isinstance(source, bytes):
        return source
    # Of an archive's member, at most MAX_BYTES are read, whatever size the archive states.
    name = describe(image)
    limit = 2 * _in_base64(MAX_BYTES) if source.coding == "base64" else MAX_BYTES  # twice: there may be white space
    packed = _read(source.path, source.offset, source.length, limit=limit)
    if source.coding == "base64":
        return decode_base64(_JSON_ESCAPES.sub(b"", packed.replace(rb"\/", b"/")), name)
    return _inflate(packed, name) if source.coding == "deflate" else packed


def digest(image: Image) -> bytes:
    """Return the SHA-256 (32 bytes) of an image's encoded bytes, or of its pixels if it is in memory."""
    source = image.source
    if isinstance(source, PIL.Image.Image):
        picture = _decode(source, describe(image))
        return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).digest()
    return hashlib.sha256(encoded(image)).digest()


def decode_base64(content: str | bytes, name: str = "base64") -> bytes:
    """Decode base64, ignoring white space. Raises RecordError: another character, a missing one, or too many."""
    packed = b"".join(content.encode("ascii", "replace").split() if isinstance(content, str) else content.split())
    if len(packed) > _in_base64(MAX_BYTES):
        raise RecordError("image too large", f"{name}: {len(packed):,} characters of base64")
    try:
        return base64.b64decode(packed, validate=True)
    except ValueError as error:
        raise RecordError("corrupt image", f"{name}: {error}") from error


def _in_base64(length: int) -> int:
    return (length + 2) // 3 * 4


_JSON_ESCAPES = re.compile(rb"\\[nrt]")
"""Line breaks in a JSON string: the only base64 characters that JSON escapes, besides (optionally) the slash."""


def _inflate(content: bytes, name: str) -> bytes:
    unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = unpacking.decompress(content, MAX_BYTES + 1)
    except zlib.error as error:
        raise RecordError("corrupt image", f"{name}: {error}") from error
    if len(unpacked) > MAX_BYTES:
        raise RecordError("image too large", f"{name}: unpacks to over {MAX_BYTES:,} bytes")
    if not unpacking.eof:
        raise RecordError("corrupt image", f"{name}: the packed data breaks off")
    return unpacked


def _read(path: Path, offset: int = 0, length: int | None = None, *, limit: int | None = None) -> bytes:
    """Return a whole file, or exactly `length` bytes of it; at most `limit` (default `MAX_BYTES`) bytes."""
    try:
        with (open_regular if length is None else open_local)(path) as file:  # no image is a remote file of its own
            expected = os.fstat(file.fileno()).st_size if length is None else length
            if expected > (limit or MAX_BYTES):
                raise RecordError("image too large", f"{path}: {expected:,} bytes")
            if offset < 0 or expected < 0:
                raise RecordError("corrupt image", f"{path}: {expected:,} bytes from {offset:,} on")
            file.seek(offset)
            content = file.read(expected)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise RecordError("corrupt image", f"{path}: {error.strerror}") from error
        near = near_path(path)
        hint = f"; did you mean {near}?" if near else ""
        raise RecordError("missing image", f"{path}: {error.strerror}{hint}") from error
    if len(content) < expected:
        raise RecordError("corrupt image", f"{path}: {expected:,} bytes from {offset:,} on are more than there are")
    return content


def _to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Convert as transformers' `load_image` does, except for levels of over 8 bits, and images blank but for alpha."""
    turned = PIL.ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        turned = _to_8_bits(turned, *_range_of(image), name)
    rgb = turned.convert("RGB")
    if rgb.info.get("transparency") is None:
        if not turned.has_transparency_data or rgb.getcolors(1) is None:
            return rgb
        rgb = turned  # for example black letters on transparent black
    # One colour means "transparent": transformers' image processor replaces it by white.
    white = PIL.Image.new("RGBA", rgb.size, "white")
    return PIL.Image.alpha_composite(white, rgb.convert("RGBA")).convert("RGB")


def _range_of(image: PIL.Image.Image) -> tuple[int | None, bool]:
    """Return (the level of white, if the file format defines it; whether light and dark are inverted)."""
    inverted = False
    if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):
        inverted = image.tag_v2.get(262) == 0
        if image.mode == "I;16" and image.tag_v2.get(258) == (12,):
            return 4095, inverted
    known = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    return 65_535 if known else None, inverted


def _to_8_bits(image: PIL.Image.Image, top: int | None, inverted: bool, name: str) -> PIL.Image.Image:
    """Convert levels of 16 or 32 bits, or in floating point, to mode L, by scaling 0 to `top` to 0 to 255.

    Without `top`, it is the smallest value of 1 (only for floating point), 255 and 65,535 (only for integers) that no
    level exceeds.
    """
    levels = np.asarray(image)
    low, high = levels.min(), levels.max()
    tops = [top] if top else [1, 255] if image.mode == "F" else [255, 65_535]
    top = next((each for each in tops if 0 <= low <= high <= each), None)  # None if a level is NaN
    if top is None:
        expected = " or ".join(f"0 to {each:,}" for each in tops)
        raise RecordError("unknown pixel range", f"{name}: levels from {low:g} to {high:g}; expected {expected}")
    if 0 < high - low < top / 255:
        detail = f"{name}: levels from {low:g} to {high:g} of {top:,} are all one at 8 bits; stretch them first"
        raise RecordError("unknown pixel range", detail)
    if image.mode == "F":
        scaled = (np.rint(levels * np.float32(255)) if top == 1 else levels).astype(np.uint8)
    else:
        scaled = (((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8))[levels]
    return PIL.Image.fromarray(255 - scaled if inverted else scaled)


@dataclass(frozen=True)
class Preprocessing:
    """RGB -> pixels: resized to `size` (height, width), ignoring the aspect ratio, scaled, normalised per channel."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    resample: PIL.Image.Resampling = PIL.Image.Resampling.BICUBIC

    @classmethod
    def of(cls, processor: Any, base: str = "the base") -> "Preprocessing":
        """Return the settings of a transformers `IdeficsImageProcessorPil`.

        Raises UserError: a setting that this class does not support; `base` names the model in the message.
        """
        size = (processor.size["height"], processor.size["width"])
        mean: Any = processor.image_mean if processor.do_normalize else (0.0,) * 3
        std: Any = processor.image_std if processor.do_normalize else (1.0,) * 3
        scale: Any = processor.rescale_factor if processor.do_rescale else 1.0
        expected = {
            "do_resize": (processor.do_resize is True, "true: all images get one size"),
            "do_rescale": (type(processor.do_rescale) is bool, "true or false"),
            "do_normalize": (type(processor.do_normalize) is bool, "true or false"),
            "do_center_crop": (not processor.do_center_crop, "false"),
            "do_pad": (not processor.do_pad, "false"),
            "size": (all(type(side) is int and 0 < side <= 4096 for side in size), "a height and a width in pixels"),
            "resample": (processor.resample in set(PIL.Image.Resampling), "a filter of Pillow's, 0 to 5"),
            "rescale_factor": (_are_numbers((scale,), 1) and scale > 0, "a number above 0"),
            "image_mean": (_are_numbers(mean, 3), "three numbers"),
            "image_std": (_are_numbers(std, 3) and all(value > 0 for value in std), "three numbers above 0"),
        }
        for field, (fits, what) in expected.items():
            if not fits:
                got = getattr(processor, field)
                raise UserError(f"{base}: preprocessor_config.json: {field}: expected {what}, got {got!r:.80}")
        return cls(size, tuple(mean), tuple(std), scale, PIL.Image.Resampling(processor.resample))

    def pixels(
        self,
        image: PIL.Image.Image,
        *,
        augment: Augment | None = None,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Return the pixels of an image: float32 [3, H, W]. `augment` draws its changes from `rng`."""
        height, width = self.size
        levels_HWC = np.asarray(image.resize((width, height), self.resample))
        if augment and rng:
            if augment.flip and rng.random() < 0.5:
                levels_HWC = levels_HWC[:, ::-1]
            down, right = rng.integers(-augment.shift, augment.shift, size=2, endpoint=True)
            rows = np.clip(np.arange(height) - down, 0, height - 1)  # the border repeats the edge
            columns = np.clip(np.arange(width) - right, 0, width - 1)
            levels_HWC = levels_HWC[rows][:, columns]
        return np.stack([self._table[channel][levels_HWC[..., channel]] for channel in range(3)])

    @cached_property
    def _table(self) -> np.ndarray:
        """Lookup table float32 [3, 256], level -> pixel value, computed in the same steps as in transformers."""
        scaled = (np.arange(256).astype(np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


def _are_numbers(values: Any, count: int) -> bool:
    """Return whether the values are exactly `count` finite numbers."""
    listed = values if isinstance(values, list | tuple) else ()
    return len(listed) == count and all(type(value) in (int, float) and math.isfinite(value) for value in listed)
