"""img2dataset's output, in each layout: every sample once, every failed download counted."""

import pytest
from img2dataset_files import METADATA, write_shard
from sources import make_source

from finetune.data.images import open_image
from finetune.data.io.img2dataset import without_descriptions, without_metadata
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
    left = without_descriptions(parts)
    assert left == [tmp_path / name for name in ("0.parquet", "0.tar", "1/7.json", "1_stats.json")]
    assert without_metadata(left) == [tmp_path / name for name in ("0.tar", "1/7.json", "1_stats.json")]


def test_parquet_beside_a_tar_of_another_tool(tmp_path):
    """Without statistics beside them, the rows of a Parquet file are records of their own."""
    write_shard(tmp_path, "webdataset")
    (tmp_path / "00000_stats.json").unlink()
    _, found, failed, _ = documents(tmp_path / "00000.parquet")
    assert found == []
    assert failed == ["image is a URL: 00000.parquet#0: " + METADATA[0]["url"] + ": expected a path; `download: true` "
                      "fetches it", *FAILED]  # fmt: skip
