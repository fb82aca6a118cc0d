"""Remote sources are prepared and streamed as local ones are; what is prepared needs nothing remote any more."""

import shutil

import pytest
from image_files import tarred
from img2dataset_files import write_shard
from remote_files import fetched, forget
from sources import make_source
from streamed import equal, reader_of, rows_of

from finetune.data.chunking import Limits, splitter
from finetune.data.images import encoded
from finetune.data.io import remote
from finetune.data.io.source_files import fingerprint
from finetune.data.prepare import prepare
from finetune.data.streaming import downloaders
from finetune.data.tokenize import Encoder
from finetune.recipe.urls import path_of

DIALOGUES = "dialogues.jsonl"


@pytest.fixture
def uploaded(dialogue_folder, storage, tmp_path):
    """The twelve dialogues and their images below memory://b/d, and the images once more in memory://b/images.tar."""
    images = {path.name: path.read_bytes() for path in dialogue_folder.glob("*.png")}
    for name, content in {**images, DIALOGUES: (dialogue_folder / DIALOGUES).read_bytes()}.items():
        storage.pipe_file(f"/b/d/{name}", content)
    storage.pipe_file("/b/images.tar", tarred(tmp_path / "images.tar", images).read_bytes())
    return storage


def made(folder, tokenizer, path, *, format="messages", **source):
    limits = {"max_length": 200, "max_images": 2, "seed": 0}
    prepared, (stats,) = prepare([make_source(format, [path], **source)], tokenizer, folder=folder, **limits)
    return prepared, stats


def content(prepared):
    """Return all that a run takes from a set: ids, labels, images as encoded bytes, and record ids."""
    examples = [(one.input_ids.tolist(), one.labels.tolist(), one.image_index.tolist()) for one in prepared.examples]
    return examples, list(map(encoded, prepared.images)), list(prepared.image_ids), list(prepared.record_ids)


@pytest.mark.parametrize("turns", [None, 3])
@pytest.mark.parametrize(
    "image_root", [(), ("memory://b/d",), ("memory://b/images.tar",)], ids=["beside", "folder", "tar"]
)
def test_remote_source_is_prepared_as_a_local_one(
    image_root, turns, uploaded, cache, dialogue_folder, tiny_tokenizer, tmp_path
):
    local, _ = made(tmp_path / "local", tiny_tokenizer, dialogue_folder / DIALOGUES, turns=turns)
    prepared, stats = made(
        tmp_path / "made", tiny_tokenizer, f"memory://b/d/{DIALOGUES}", image_root=image_root, turns=turns
    )
    uploaded.store.clear()
    shutil.rmtree(cache)
    assert content(prepared) == content(local)
    assert stats.source == "memory://b/d/dialogues.jsonl[train]"
    assert (stats.read, stats.kept) == (12, 12)


def test_remote_set_is_opened_until_the_data_change(uploaded, cache, tiny_tokenizer, tmp_path, monkeypatch):
    def again():
        forget(monkeypatch)
        prepared, _ = made(tmp_path, tiny_tokenizer, f"memory://b/d/{DIALOGUES}", image_root=("memory://b/images.tar",))
        return prepared.sets[0].folder

    first = again()
    assert first.name.startswith("dialogues.jsonl-")
    shutil.rmtree(cache)
    assert again() == first
    assert fetched(cache) == []  # neither records nor images were fetched
    uploaded.pipe_file("/b/images.tar", uploaded.cat_file("/b/images.tar"))
    assert again() != first
    assert fetched(cache) == ["memory/b/d/dialogues.jsonl", "memory/b/images.tar"]


def test_remote_set_depends_on_the_storage_not_on_the_cache(storage, cache, monkeypatch):
    """What happens to have been fetched below a root does not name the set."""
    for name in ("00000.tar", "00000_stats.json", "a.jsonl"):
        storage.pipe_file(f"/b/d/{name}", b"{}")
    source = make_source("messages", ["memory://b/d/a.jsonl"], image_root=("memory://b/d",))
    before = fingerprint(source)
    for name in ("00000.tar", "00000_stats.json"):
        remote.open_local(path_of(f"memory://b/d/{name}")).close()
    forget(monkeypatch)
    assert len(fetched(cache)) == 2
    assert fingerprint(source) == before


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "files"])
def test_remote_img2dataset_folder(layout, storage, tiny_tokenizer, tmp_path):
    """In the layout of files, images have to be JPEG: asking for each one's suffix would take too long."""
    write_shard(tmp_path / "d", layout)
    for path in (tmp_path / "d").rglob("*"):
        if path.is_file():
            storage.pipe_file(f"/b/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    (local, local_stats), (prepared, stats) = (
        made(tmp_path / name, tiny_tokenizer, path, format="pairs")
        for name, path in (("local", tmp_path / "d"), ("made", "memory://b/d"))
    )
    assert content(prepared) == content(local)
    assert len(prepared) == 2
    assert stats.first_rejected == local_stats.first_rejected
    assert stats.rejected == {"failed to download": 1, "failed to resize": 1}


def test_remote_images_that_are_missing_reject_their_records(uploaded, tiny_tokenizer, tmp_path):
    uploaded.rm("/b/d/red.png")
    _, stats = made(tmp_path, tiny_tokenizer, f"memory://b/d/{DIALOGUES}")
    assert stats.rejected == {"download failed": 5}
    assert stats.first_rejected == {"download failed": "dialogues.jsonl:1: memory://b/d/red.png: nothing is there"}


def test_remote_source_is_prepared_with_a_cache_that_holds_one_file(
    uploaded, cache, dialogue_folder, tiny_tokenizer, tmp_path, monkeypatch
):
    """Each file is fetched when it is needed, and left for the next one; nothing is lost by that."""
    lines = (dialogue_folder / DIALOGUES).read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        uploaded.pipe_file(f"/b/d/{number:02}.jsonl", line + b" " * 2000)
    uploaded.rm(f"/b/d/{DIALOGUES}")
    monkeypatch.setenv(remote.CACHE_SIZE, "4KB")
    prepared, _ = made(tmp_path / "made", tiny_tokenizer, "memory://b/d/*.jsonl")
    local, _ = made(tmp_path / "local", tiny_tokenizer, dialogue_folder / DIALOGUES)
    assert content(prepared)[:3] == content(local)[:3]
    assert list(prepared.record_ids) == [f"{number:02}.jsonl:1" for number in range(12)]
    assert fetched(cache) == ["memory/b/d/11.jsonl"]


def test_remote_source_is_streamed_as_a_local_one(uploaded, cache, dialogue_folder, tiny_tokenizer, tmp_path):
    def rows(path, **source):
        source = make_source("messages", [path], stream=True, **source)
        how = splitter(source, Encoder(tiny_tokenizer), Limits(200, 2), seed=0)
        return rows_of(
            reader_of(source, how, lanes=2), lanes=2, row_tokens=200, downloaders=downloaders(tmp_path, [source])
        )

    local, remote = rows(dialogue_folder / DIALOGUES), rows(f"memory://b/d/{DIALOGUES}")
    archive = rows(f"memory://b/d/{DIALOGUES}", image_root=("memory://b/images.tar",))
    for number in range(12):
        row = local.at(number)
        assert equal(remote.at(number), row)
        shutil.rmtree(cache / "memory")  # all of it left to make room
        assert equal(archive.at(number), row)
