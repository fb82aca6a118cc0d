"""Made-up data for the benchmarks of preparing and streaming: all texts and all images are distinct."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

IMAGES_A_FILE = 5000
"""Images in one folder, one Parquet file or one tar archive."""

ROWS_A_GROUP = 500
"""Rows in a row group of a Parquet file."""


def write_data(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """Write `count` records of a kind below an empty folder; return the keys of their source."""
    folder.mkdir(parents=True)
    return WRITERS[kind](folder, count)


def write_text(folder: Path, count: int) -> dict[str, Any]:
    """UltraChat-like JSON lines: a short question, an answer of 10 to 100 words; 490 bytes on average."""
    with (folder / "text.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(count):
            answer = " ".join(f"word{(number * 7 + place) % 997}" for place in range(10 + number % 91))
            lines.write(json.dumps({"id": number, "data": [f"What about number {number}?", answer]}) + "\n")
    return {"format": "ultrachat", "path": [str(folder / "text.jsonl")]}


def write_folder(folder: Path, count: int) -> dict[str, Any]:
    """LLaVA-like JSON lines; each record shows a file of its own in one of several folders."""
    with (folder / "images.jsonl").open("w", encoding="utf-8") as lines:
        for number, image in enumerate(make_images(count)):
            path = folder / f"{number // IMAGES_A_FILE:04}" / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)
            record = {"image": str(path.relative_to(folder)), "conversations": _conversation(number)}
            lines.write(json.dumps(record) + "\n")
    return {"format": "llava", "path": [str(folder / "images.jsonl")], "image_root": [str(folder)]}


def write_parquet(folder: Path, count: int) -> dict[str, Any]:
    """The same, with the image's bytes in a column of Parquet files, as the hub stores them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbered = enumerate(make_images(count))
    for first in range(0, count, IMAGES_A_FILE):
        rows = [
            {"image": {"bytes": image, "path": f"{number}.jpg"}, "conversations": _conversation(number)}
            for number, image in islice(numbered, IMAGES_A_FILE)
        ]
        path = folder / f"train-{first // IMAGES_A_FILE:05}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROWS_A_GROUP)
    return {"format": "llava", "path": [str(folder / "*.parquet")]}


def write_tars(
    folder: Path, count: int, *, size: int = 224, noise: int = 0, images_a_file: int = IMAGES_A_FILE
) -> dict[str, Any]:
    """Webdataset archives: an image and its caption in a sample."""
    numbered = enumerate(make_images(count, size=size, noise=noise))
    for first in range(0, count, images_a_file):
        with tarfile.open(folder / f"{first // images_a_file:05}.tar", "w") as archive:
            for number, image in islice(numbered, images_a_file):
                _add(archive, f"{number:09}.jpg", image)
                _add(archive, f"{number:09}.txt", f"Shade {number % 256} of picture {number}.".encode())
    return {"format": "pairs", "path": [str(folder / "*.tar")]}


def write_photographs(folder: Path, count: int) -> dict[str, Any]:
    """The same with images as large as photographs on the web, 512 pixels a side, 50 kB; in many archives."""
    return write_tars(folder, count, size=512, noise=24, images_a_file=100)


WRITERS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "text": write_text,
    "folder": write_folder,
    "parquet": write_parquet,
    "tars": write_tars,
    "photographs": write_photographs,
}


def make_images(count: int, *, size: int = 224, noise: int = 0) -> Iterator[bytes]:
    """Yield distinct JPEG files: 64 pictures of soft shapes, again and again, each with its number; 11 kB by default.

    size: pixels of a side; noise: largest change of a pixel's levels.
    """
    import numpy as np
    import PIL.Image

    pictures = []
    for seed in range(min(count, 64)):
        rng, written = np.random.default_rng(seed), io.BytesIO()
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), np.uint8))
        soft = np.asarray(coarse.resize((size, size), PIL.Image.Resampling.BICUBIC))
        levels = soft + rng.integers(-noise, noise + 1, soft.shape)
        PIL.Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(written, "JPEG", quality=90)
        pictures.append(written.getvalue())
    for number in range(count):
        start, rest = pictures[number % 64][:2], pictures[number % 64][2:]
        comment = number.to_bytes(8)
        yield start + b"\xff\xfe" + (2 + len(comment)).to_bytes(2) + comment + rest


def _conversation(number: int) -> list[dict[str, str]]:
    question, answer = f"<image>\nWhich shade is number {number}?", f"Shade {number % 256}."
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
