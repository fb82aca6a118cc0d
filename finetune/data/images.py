"""path | bytes | PIL -> RGB -> pixels, bit-identical to transformers' `load_image` + `IdeficsImageProcessorPil`."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from finetune.data.dialogue import Image, RecordError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Plain raster formats. Pillow has others that start programs (EPS) or parse far more than pixels."""

PIL.Image.init()  # Pillow finds its decoders lazily, and fails on a restricted list before it has

MAX_PIXELS = 89_478_485
"""Pillow's own threshold for a decompression bomb: a quarter of a gigabyte in RGB."""


def open_image(image: Image) -> PIL.Image.Image:
    """Decode to RGB, EXIF rotation applied. Raises RecordError: missing, corrupt or too large."""
    if isinstance(image.source, PIL.Image.Image):
        return _to_rgb(image.source)
    opened: Path | BytesIO = image.source if isinstance(image.source, Path) else BytesIO(image.source)
    name = str(opened) if isinstance(opened, Path) else "image bytes"
    try:
        with PIL.Image.open(opened, formats=FORMATS) as decoded:
            if decoded.width * decoded.height > MAX_PIXELS:
                raise RecordError("image too large", f"{name}: {decoded.width} x {decoded.height} pixels")
            return _to_rgb(decoded)
    except FileNotFoundError as error:
        raise RecordError("missing image", name) from error
    except PIL.Image.DecompressionBombError as error:
        raise RecordError("image too large", f"{name}: {error}") from error
    except RecordError:
        raise
    except Exception as error:  # hostile EXIF makes Pillow raise struct.error, TypeError and more
        raise RecordError("corrupt image", f"{name}: {error}") from error


def digest(image: Image) -> str:
    """SHA-256 of the image's bytes: the same picture under two names is one picture."""
    source = image.source
    if isinstance(source, PIL.Image.Image):
        return hashlib.sha256(repr((source.mode, source.size)).encode() + source.tobytes()).hexdigest()
    return hashlib.sha256(source.read_bytes() if isinstance(source, Path) else source).hexdigest()


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    rgb = PIL.ImageOps.exif_transpose(image).convert("RGB")
    if rgb.info.get("transparency") is None:
        return rgb
    # One colour stands for "nothing here": transformers' image processor puts white in its place.
    white = PIL.Image.new("RGBA", rgb.size, "white")
    return PIL.Image.alpha_composite(white, rgb.convert("RGBA")).convert("RGB")


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images: mirrored left to right, moved by up to `shift` pixels of the model's input."""

    flip: bool = False
    shift: int = 0


@dataclass(frozen=True)
class Preprocessing:
    """RGB -> pixels: squashed to `size` (height, width) by bicubic interpolation, scaled, normalised per channel."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """The settings of a transformers `IdeficsImageProcessorPil`."""
        size = (processor.size["height"], processor.size["width"])
        return cls(size, tuple(processor.image_mean), tuple(processor.image_std), processor.rescale_factor)

    def pixels(
        self,
        image: PIL.Image.Image,
        *,
        augmentation: Augmentation | None = None,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """float32 [3, H, W]. With `augmentation`, `rng` decides."""
        height, width = self.size
        levels_HWC = np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))
        if augmentation and rng:
            levels_HWC = _augment(levels_HWC, augmentation, rng)
        return np.stack([self._table[channel][levels_HWC[..., channel]] for channel in range(3)])

    @cached_property
    def _table(self) -> np.ndarray:
        """float32 [3, 256]: what each of the 256 levels becomes, by the arithmetic of transformers, step by step."""
        scaled = (np.arange(256).astype(np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


def _augment(levels_HWC: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Flip by a coin, then move by a vector; the border repeats its edge."""
    if augmentation.flip and rng.random() < 0.5:
        levels_HWC = levels_HWC[:, ::-1]
    down, right = rng.integers(-augmentation.shift, augmentation.shift, size=2, endpoint=True)
    rows = np.clip(np.arange(levels_HWC.shape[0]) - down, 0, levels_HWC.shape[0] - 1)
    columns = np.clip(np.arange(levels_HWC.shape[1]) - right, 0, levels_HWC.shape[1] - 1)
    return levels_HWC[rows][:, columns]
