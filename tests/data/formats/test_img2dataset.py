"""img2dataset's output, in each layout: every sample once, every failed download counted."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from img2dataset_files import BLUE as BLUE_BYTES
from img2dataset_files import METADATA, write_shard
from img2dataset_files import RED as RED_BYTES
from sources import make_source

from finetune.data.conversation import Image, Remote, Slice
from finetune.data.images import open_image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.img2dataset import samples_first
from finetune.data.prepare import prepare
from finetune.data.read_dialogues import look, read_dialogues, resolve_source
from finetune.data.stats import SourceStats

RED, BLUE = (255, 0, 0), (0, 0, 255)
FAILED = [
    "failed to download: 00000.parquet#1: https://example.org/gone.jpg: HTTP Error 404: Not Found",
    "failed to resize: 00000.parquet#2: https://example.org/page.html: image decoding error",
]


def documents(*paths, **settings):
    """(format, [(record id, colour of its image, caption)], what is not kept or not used of the records)."""
    source = resolve_source(make_source("auto", paths=paths, **settings))
    stats = SourceStats("one")
    found = []
    for record_id, (dialogue,) in read_dialogues(source, stats, look=look):
        ((image, caption),) = (turn.parts for turn in dialogue.turns)
        found.append((record_id, open_image(image).getpixel((4, 4)), caption))
    assert stats.read == len(found) + sum(stats.rejected.values())
    return source.format, found, [f"{reason}: {stats.first_rejected[reason]}" for reason in stats.rejected], stats.loss


@pytest.mark.parametrize(
    ("layout", "ids"),
    [
        ("webdataset", ("00000.tar/000000000", "00000.tar/000000003")),
        ("parquet", ("00000.parquet#0", "00000.parquet#3")),
        ("files", ("00000.parquet#0", "00000.parquet#3")),
    ],
)
@pytest.mark.parametrize("encoding", ["jpg", "webp"])
def test_img2dataset_folder(tmp_path, layout, ids, encoding):
    write_shard(tmp_path, layout, encoding=encoding)
    format, found, failed, loss = documents(tmp_path)
    assert format == "pairs"
    assert found == [(ids[0], RED, "A red square."), (ids[1], BLUE, "A blue square.")]
    assert failed == FAILED
    assert loss == "2 of 4 records rejected: failed to download 1, failed to resize 1"


def test_img2dataset_several_shards(tmp_path):
    for name in ("00000", "00001"):
        write_shard(tmp_path, "webdataset", name=name)
    _, found, _, loss = documents(tmp_path)
    assert [record_id for record_id, _, _ in found] == [
        "00000.tar/000000000",
        "00000.tar/000000003",
        "00001.tar/000000000",
        "00001.tar/000000003",
    ]
    assert loss == "4 of 8 records rejected: failed to download 2, failed to resize 2"


def test_img2dataset_first_records_are_samples(tmp_path):
    """What failed comes last: a shard may have thousands of failures, and `check` reads the first records alone."""
    for name in ("00000", "00001"):
        write_shard(tmp_path, "webdataset", name=name)
    source = resolve_source(make_source("auto", paths=(tmp_path,), limit=4))
    stats = SourceStats("one")
    assert len(list(read_dialogues(source, stats, look=look))) == stats.read == 4


def test_img2dataset_tars_alone(tmp_path):
    """A pattern that names the tars reads these: what failed is not in them, and not counted."""
    write_shard(tmp_path, "webdataset")
    _, found, failed, loss = documents(tmp_path / "*.tar")
    assert (len(found), failed, loss) == (2, [], None)


def test_img2dataset_pattern(tmp_path):
    write_shard(tmp_path, "webdataset")
    assert documents(tmp_path / "*") == documents(tmp_path)


def test_img2dataset_prompted(tmp_path):
    write_shard(tmp_path, "webdataset")
    source = resolve_source(make_source("auto", paths=(tmp_path,), prompt=("What is it?",)))
    dialogues = [dialogue for _, (dialogue,) in read_dialogues(source, SourceStats("one"))]
    assert [[turn.text for turn in one.turns] for one in dialogues] == [
        ["What is it?", "A red square."],
        ["What is it?", "A blue square."],
    ]


def test_img2dataset_caption_of_another_name(tmp_path):
    """Other columns that were saved beside the caption are counted, unless they are known to be scores."""
    write_shard(tmp_path, "parquet")
    _, found, _, loss = documents(tmp_path, columns={"text": "url"})
    assert [caption for _, _, caption in found] == ["https://example.org/red.jpg?w=80", "https://example.org/blue.jpg"]
    assert loss.endswith("; not used of records: caption 2")


def test_files_without_samples(tmp_path):
    """A file's name alone is no reason to leave it out: a Parquet file must stand beside it."""
    parts = [tmp_path / name for name in ("0/7.json", "0.parquet", "0.tar", "0_stats.json", "1/7.json", "1_stats.json")]
    left = samples_first(parts)
    assert left == [tmp_path / name for name in ("0.tar", "1/7.json", "1_stats.json", "0.parquet")]


def test_parquet_beside_a_tar_of_another_tool(tmp_path):
    """Without statistics beside them, the rows of a Parquet file are records of their own."""
    write_shard(tmp_path, "webdataset")
    (tmp_path / "00000_stats.json").unlink()
    _, found, failed, _ = documents(tmp_path / "00000.parquet")
    assert found == []
    assert failed == ["image is a URL: 00000.parquet#0: " + METADATA[0]["url"] + ": expected a path; `download: true` "
                      "fetches it", *FAILED]  # fmt: skip


URLS = [row["url"] for row in METADATA]
PAGE = {
    "images": [URLS[0], None, URLS[1], None, URLS[3], None],
    "metadata": json.dumps([{"src": URLS[0], "alt_text": "red"}, None, {"src": URLS[1]}, None, {"src": URLS[3]}, None]),
    "general_metadata": json.dumps({"url": "https://example.org/page"}),
    "texts": [None, "A red square.", None, "What is gone.", None, "A blue square."],
}
LOST = {**PAGE, "images": [URLS[1], None], "texts": [None, "All is gone."]}


def write_pages(folder, pages=(PAGE, LOST)):
    """OBELICS's own Parquet: URLs in place of images."""
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(pages)), folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def read_pages(path, **settings):
    """(the parts of each document, images by their colour, statistics)."""
    source, stats = resolve_source(make_source("auto", path, **settings)), SourceStats("one")
    assert source.format == "obelics"
    found = [
        [part if isinstance(part, str) else open_image(part).getpixel((4, 4)) for part in one.turns[0].parts]
        for _, dialogues in read_dialogues(source, stats, look=look)
        for one in dialogues
    ]
    return found, stats


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_obelics_with_downloaded_images(tmp_path, layout):
    """A document finds its images by their URLs; it goes on without one, cut as any document is at a lost image."""
    images = write_shard(write_shard(tmp_path / "images", layout), layout, name="00001", captions=False)
    found, stats = read_pages(write_pages(tmp_path), image_root=[images])
    assert found == [[RED, "A red square."], ["What is gone.", BLUE, "A blue square."]]
    assert (stats.read, dict(stats.rejected), dict(stats.parts_rejected)) == (
        2,
        {"missing image": 1},
        {"missing image": 1},
    )
    assert stats.first_rejected["missing image"] == (
        f"train-00000-of-00001.parquet#0: {URLS[1]}: not among the images in {images.resolve()}"
    )
    assert not stats.ignored


def test_obelics_downloads_what_is_not_there(tmp_path):
    """With `download`, what img2dataset did not get is asked for again."""
    images = write_shard(tmp_path / "images", "webdataset")
    root = ImageRoot(make_source("obelics", write_pages(tmp_path), image_root=[images], download=True))
    assert root.image(URLS[1]) == Image(Remote(URLS[1]))
    assert isinstance(root.image(URLS[0]).source, Slice)


def test_obelics_with_images_in_place(tmp_path):
    """As the tools that made OBELICS leave it: images where URLs were, and null for one that is missing."""
    images = [{"bytes": RED_BYTES, "path": None}, None, None, None, {"bytes": BLUE_BYTES, "path": None}, None]
    path = write_pages(tmp_path, [{**PAGE, "images": images, "images_urls": PAGE["images"]}])
    found, stats = read_pages(path)
    assert found == [[RED, "A red square."], ["What is gone.", BLUE, "A blue square."]]
    assert stats.first_rejected == {
        "missing image": f"train-00000-of-00001.parquet#0: {URLS[1]}: was not downloaded",
    }
    assert not stats.ignored


def test_prepare_documents_by_url(tmp_path, tiny_tokenizer):
    """Prepared, the images are referred to where they lie; another shard of images makes another set."""
    images, path = write_shard(tmp_path / "images", "webdataset"), write_pages(tmp_path)
    settings = {"max_length": 500, "max_images": 4, "seed": 0, "folder": tmp_path / "prepared", "workers": 1}
    source = make_source("obelics", path, image_root=[images])
    prepared, (stats,) = prepare([source], tiny_tokenizer, **settings)
    assert [image.source.path.name for image in prepared.images] == ["00000.tar", "00000.tar"]
    assert (stats.kept, dict(stats.rejected), dict(stats.parts_rejected)) == (
        1,
        {"missing image": 1},
        {"missing image": 1},
    )
    write_shard(images, "webdataset", name="00001")
    again, _ = prepare([source], tiny_tokenizer, **settings)
    assert again.sets[0].folder != prepared.sets[0].folder


def test_stream_documents_by_url(tmp_path, reading):
    """A stream finds, loses and counts the same."""
    images, path = write_shard(tmp_path / "images", "webdataset"), write_pages(tmp_path)
    rows = reading(make_source("obelics", path, image_root=[images], stream=True), row_tokens=512)
    for number in range(6):
        assert rows.at(number)["pixel_values"].isfinite().all()
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept) == (2, 1)
    assert (dict(stats.rejected), dict(stats.parts_rejected)) == ({"missing image": 1}, {"missing image": 1})
