"""A shard as img2dataset writes it, in each of its layouts: four URLs, of which one is gone and one is no image."""

import io
import json

import PIL.Image
import pyarrow as pa
import pyarrow.parquet
from data_files import shard, written


def square(color):
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


RED, BLUE = square("red"), square("blue")

SIZES = {"width": 8, "height": 8, "original_width": 80, "original_height": 60, "exif": "{}"}
NO_SIZES = dict.fromkeys(("width", "height", "original_width", "original_height", "exif", "sha256"))

METADATA = [
    {
        "similarity": 0.31,
        "LICENSE": "?",
        "caption": "A red square.",
        "url": "https://example.org/red.jpg?w=80",
        "key": "000000000",
        "status": "success",
        "error_message": None,
        **SIZES,
        "sha256": "11" * 32,
    },
    {
        "similarity": 0.32,
        "LICENSE": "?",
        "caption": "Gone.",
        "url": "https://example.org/gone.jpg",
        "key": "000000001",
        "status": "failed_to_download",
        "error_message": "HTTP Error 404: Not Found",
        **NO_SIZES,
    },
    {
        "similarity": 0.33,
        "LICENSE": "?",
        "caption": "A page.",
        "url": "https://example.org/page.html",
        "key": "000000002",
        "status": "failed_to_resize",
        "error_message": "image decoding error",
        **NO_SIZES,
    },
    {
        "similarity": 0.34,
        "LICENSE": "?",
        "caption": "A blue square.",
        "url": "https://example.org/blue.jpg",
        "key": "000000003",
        "status": "success",
        "error_message": None,
        **SIZES,
        "sha256": "22" * 32,
    },
]
IMAGES = {"000000000": RED, "000000003": BLUE}

STATISTICS = {
    "count": 4,
    "successes": 2,
    "failed_to_download": 1,
    "failed_to_resize": 1,
    "duration": 0.5,
    "start_time": 1700000000.0,
    "end_time": 1700000000.5,
    "status_dict": {"success": 2, "HTTP Error 404: Not Found": 1, "image decoding error": 1},
}


def write_shard(folder, layout, *, name="00000", captions=True, encoding="jpg"):
    """Write the shard into the folder, as `--output_format webdataset`, `parquet` or `files` leaves it."""
    folder.mkdir(exist_ok=True)
    rows = [{key: value for key, value in row.items() if captions or key != "caption"} for row in METADATA]
    members = {}
    for row in rows:
        if row["key"] in IMAGES:
            members[f"{row['key']}.{encoding}"] = IMAGES[row["key"]]
            if captions:
                members[f"{row['key']}.txt"] = row["caption"].encode()
            members[f"{row['key']}.json"] = json.dumps(row, indent=4).encode()
    if layout == "webdataset":
        written(folder / f"{name}.tar", shard(list(members.items())))
    elif layout == "files":
        for member, content in members.items():
            written(folder / name / member, content)
    else:
        rows = [{**row, encoding: IMAGES.get(row["key"])} for row in rows]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    written(folder / f"{name}_stats.json", json.dumps(STATISTICS, indent=4))
    return folder
