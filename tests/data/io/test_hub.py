"""Datasets on the hub, here as local folders, and folders that the datasets library saved."""

import pytest
from data_files import PNG, read, refusal, written
from sources import make_source

from finetune.data.formats.read_records import read_records
from finetune.data.io.source_files import fingerprint


@pytest.fixture(scope="module")
def images_dataset():
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "inner": {"image": datasets.Image()},
            "text": datasets.Value("string"),
        }
    )
    image = {"bytes": PNG, "path": None}
    rows = [{"images": [image, image], "inner": {"image": image}, "text": f"text {number}"} for number in range(20)]
    return datasets.Dataset.from_list(rows, features=features), rows


def test_datasets_saved_folder(images_dataset, tmp_path):
    import datasets

    dataset, rows = images_dataset
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    assert [record for _, record in read(tmp_path / "one")] == rows
    datasets.DatasetDict({"train": dataset, "test": dataset.select([3, 1])}).save_to_disk(tmp_path / "dict")
    assert [record for _, record in read(tmp_path / "dict", split="test")] == [rows[3], rows[1]]
    message = refusal(read_records, make_source("auto", (tmp_path / "dict",), split="val"))
    assert "expected split test or train, got 'val'" in message


def test_datasets_saved_folder_with_cache(images_dataset, tmp_path):
    """What the library's own functions leave beside the data, such as `map`, is not read as more of it."""
    import datasets

    dataset, rows = images_dataset
    dataset.save_to_disk(tmp_path / "one")
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"text": row["text"].upper()})
    assert len(list((tmp_path / "one").glob("cache-*.arrow"))) == 1
    assert [record for _, record in read(tmp_path / "one")] == rows


@pytest.mark.parametrize("stream", [False, True])
def test_hub_local_folder(stream, images_dataset, tmp_path):
    dataset, rows = images_dataset
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "data" / "train-00000.parquet")
    source = make_source("auto", hub=str(folder), stream=stream)
    assert list(read_records(source)) == [(f"{folder}#{number}", row) for number, row in enumerate(rows)]
    for wrong in ({"split": "nope"}, {"subset": "nope"}):
        assert "nope" in refusal(read_records, make_source("auto", hub=str(folder), stream=stream, **wrong))
    assert len(fingerprint(source)) == 64


def test_hub_mistakes(images_dataset, tmp_path):
    images_dataset[0].save_to_disk(tmp_path / "saved")
    assert "as a path" in refusal(read_records, make_source("auto", hub=str(tmp_path / "saved")))
    (tmp_path / "empty").mkdir()
    assert "expected a dataset's name" in refusal(read_records, make_source("auto", hub=str(tmp_path / "empty")))
    written(tmp_path / "bad" / "train.parquet", b"nothing")
    assert str(tmp_path / "bad") in refusal(read_records, make_source("auto", hub=str(tmp_path / "bad")))
