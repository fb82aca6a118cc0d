"""Files that are compressed, empty, corrupt, not UTF-8, not regular, or that break off."""

import gzip
import json
import os
import random
import socket
import tarfile

import pytest
import zstandard
from data_files import LINES, PACK, read, refusal, shard, written
from hypothesis import given
from hypothesis import strategies as st
from sources import make_source

from finetune.data.conversation import RecordError
from finetune.data.formats.read_records import read_records
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.source_files import read_file
from finetune.data.read_dialogues import taken, to_dialogue
from finetune.data.stats import SourceStats


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_compressed_equals_plain(suffix, packing, tmp_path):
    """Compressed files give the records that plain ones give."""
    content = {".csv": "a,b\n1,2\n", ".tsv": "a\tb\n1\t2\n", ".json": '[{"a": 1}]'}.get(suffix, LINES)
    plain = read(written(tmp_path / f"f{suffix}", content))
    packed = read(written(tmp_path / f"f{suffix}{packing}", PACK[packing](content.encode())))
    assert plain
    assert [record for _, record in packed] == [record for _, record in plain]
    assert {record_id.split(":")[0].split("#")[0] for record_id, _ in packed} == {f"f{suffix}{packing}"}


def test_empty_files(tmp_path):
    for name, content in (
        ("a.json", "[]"),
        ("b.json", '{"data": []}'),
        ("c.jsonl", ""),
        ("d.csv", ""),
        ("e.csv", "a,b\n"),
    ):
        assert read(written(tmp_path / name, content)) == []


def test_utf16_refused(tmp_path):
    for name, content in (("f.jsonl", '{"a": 1}'), ("f.json", "[]"), ("f.csv", "a\n1\n")):
        for encoding in ("utf-16", "utf-16-be"):
            mark = b"" if encoding == "utf-16" else b"\xfe\xff"
            path = written(tmp_path / name, mark + content.encode(encoding))
            [(record_id, error)] = read_records(make_source("auto", (path,), on_broken="keep"))
            assert (record_id, error.reason) == (name, "not UTF-8")
            assert "UTF-16" in error.detail


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_compressed_breaks_off(suffix, packing, tmp_path):
    words = [random.Random(number).randbytes(30).hex() for number in range(10_000)]
    content = {
        ".jsonl": "".join(f'{{"a": "{word}"}}\n' for word in words),
        ".json": json.dumps([{"a": word} for word in words]),
        ".csv": "a\n" + "\n".join(words),
    }[suffix]
    packed = PACK[packing](content.encode())
    *records, (record_id, last) = read(written(tmp_path / f"f{suffix}{packing}", packed[: len(packed) * 2 // 3]))
    assert (record_id, last) == (f"f{suffix}{packing}", "corrupt file")
    assert 3000 < len(records) < 7000
    assert [record["a"] for _, record in records] == words[: len(records)]


@pytest.mark.parametrize(
    "name",
    [
        f"f{suffix}"
        for suffix in (".jsonl.gz", ".json.zst", ".csv.gz", ".parquet", ".arrow", ".tar", ".tgz", ".tar.zst")
    ],
)
@pytest.mark.parametrize(
    "content", [b"neither this nor that" * 100, b"\x1f\x8b\x08\0\0\0", b"PAR1PAR1", b"ARROW1\0\0", b"\xff" * 700]
)
def test_corrupt_file(name, content, tmp_path):
    """A file whose content is of another kind is corrupt."""
    assert read(written(tmp_path / name, content)) == [(name, "corrupt file")]


@pytest.mark.parametrize("name", ["f.parquet", "f.arrow", "f.tar"])
def test_empty_binary_file(name, tmp_path):
    assert read(written(tmp_path / name, b"")) == [(name, "corrupt file")]


def test_broken_json_message(tmp_path):
    """The message of a JSON file that breaks off says how much is lost."""
    path = written(tmp_path / "sub" / "f.json", "[" + '{"a": 10}, ' * 20 + "tru, " + '{"a": 1}, ' * 17 + "{}]")
    assert path.stat().st_size == 399
    message = refusal(read_records, make_source("auto", (tmp_path,)))
    assert message == (
        f"{path}: the file breaks off: not JSON: Expecting value at byte 221; 20 records were read before, "
        "45 % of the file was not read, from byte 221 of 399 on\n"
        "  mend the file, or set `on_broken: keep` on this source to use what can be read"
    )
    *records, (record_id, error) = read_records(make_source("auto", (tmp_path,), on_broken="keep"))
    assert (len(records), record_id, error.file) == (20, "sub/f.json", str(path))
    assert str(error) == message.splitlines()[0].removeprefix(f"{path}: the file breaks off: ")


@pytest.mark.parametrize(
    ("name", "content", "lost"),
    [
        ("f.json", b'[{"a": 1}, {"a": ', "1 record was read before, the file ends early, after byte 17"),
        ("f.json", b"", "0 records were read before, the file ends early, after byte 0"),
        (
            "f.json",
            b'{"a": 1} {"a": 2}',
            "1 record was read before, 47 % of the file was not read, from byte 9 of 17 on",
        ),
        (
            "f.json.gz",
            gzip.compress(b'[{"a": 1}, tru]', mtime=0),
            "at byte 11 of the unpacked text; 1 record was read before",
        ),
        (
            "f.jsonl.gz",
            gzip.compress(b'{"a": 1}\n', mtime=0)[:-4],
            "1 record was read before, the file ends early, after byte 25",
        ),
        ("f.csv.zst", zstandard.compress(b"a\n1\n")[:-2], "0 records were read before, the file ends early, after"),
        ("f.jsonl", b"\xff\xfe{\0}\0", "nothing of the file was read"),
    ],
)
def test_broken_file_message(name, content, lost, tmp_path):
    """The message of a file that breaks off says how much is lost."""
    path = written(tmp_path / name, content)
    message = refusal(read_records, make_source("auto", (path,)))
    assert message.startswith(f"{path}: the file breaks off: ")
    assert lost in message


def test_broken_file_among_others(tmp_path):
    """A broken file among others loses nothing of the others."""
    written(tmp_path / "a.jsonl", '{"a": 1}')
    written(tmp_path / "b.json", '[{"a": 2}, ')
    written(tmp_path / "c.jsonl", '{"a": 3}')
    assert read(tmp_path) == [
        ("a.jsonl:1", {"a": 1}),
        ("b.json#0", {"a": 2}),
        ("b.json", "not JSON"),
        ("c.jsonl:1", {"a": 3}),
    ]


def test_broken_file_after_limit(tmp_path):
    """A file that breaks off after the limit is not read so far."""
    stats = SourceStats("x")
    path = written(tmp_path / "f.json", '[{"text": "a"}, {"text": "b"}, tru')
    assert len(list(taken(make_source("text", (path,), limit=2), stats))) == 2
    assert (stats.read, stats.limited, stats.broken) == (2, True, [])
    stats = SourceStats("x")
    assert len(list(taken(make_source("text", (path,), on_broken="keep"), stats))) == 2
    assert (stats.read, stats.limited) == (2, False)
    assert stats.loss == (
        f"{path} breaks off: not JSON: Expecting value at byte 31; 2 records were read before, 8.8 % of the file "
        "was not read, from byte 31 of 34 on"
    )


def test_names_not_utf8(tmp_path):
    """A file's name, a member's and a key's: as escapes, in ids and details alike."""
    folder = tmp_path / "caf\udce9"
    written(folder / "d\udce9.jsonl", '{"text": "good"}\n{"\\ud800": 1}\n["\\udfff"]\n')
    written(folder / "s\udce9.tar", shard([("k\udce9.text", b"text"), ("\udce9", b"")], format=tarfile.GNU_FORMAT))
    written(folder / "z\udce9.json", '[{"text": "last"}, tru')
    source = make_source("text", (folder,), on_broken="keep")
    stats, root, kept = SourceStats(source.name), ImageRoot(source), []
    for record_id, record in taken(source, stats):
        try:
            to_dialogue(record_id, record, root)
            kept.append(record_id)
        except RecordError as error:
            stats.reject(record_id, error)
    stats.kept = len(kept)
    assert kept == ["d\\udce9.jsonl:1", "s\\udce9.tar/k\\udce9", "z\\udce9.json#0"]
    assert stats.rejected == {"missing field": 1, "not an object": 1, "not a sample": 1}
    assert r"got keys ['\ud800']" in stats.first_rejected["missing field"]
    assert stats.first_rejected["not a sample"].startswith("s\\udce9.tar/\\udce9: ")
    assert stats.broken[0].startswith(f"{tmp_path}/caf\\udce9/z\\udce9.json breaks off: ")
    assert json.dumps(stats.to_json(), ensure_ascii=False).encode()


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a device"])
@pytest.mark.parametrize("suffix", ["json", "jsonl.gz", "csv.zst", "tar", "tgz", "parquet", "arrow"])
def test_fifo_and_devices_refused(kind, suffix, tmp_path):
    path = tmp_path / f"d.{suffix}"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    message = f"{path}: expected a file, found {kind}"
    assert refusal(read_file, path, "train") == message


@given(
    st.binary(max_size=200),
    st.sampled_from(["jsonl", "json", "csv", "tsv", "jsonl.gz", "json.zst", "parquet", "arrow", "tar", "tgz"]),
)
def test_any_bytes(tmp_path_factory, content, suffix):
    """Any bytes give records or errors with a reason."""
    path = written(tmp_path_factory.mktemp("any") / f"f.{suffix}", content)
    for record_id, record in read_records(make_source("auto", (path,), on_broken="keep")):
        assert record_id.startswith(path.name)
        assert isinstance(record, dict | RecordError)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_compressed_small_list_breaks_off(packing, tmp_path):
    words = [random.Random(number).randbytes(30).hex() for number in range(3)]
    packed = PACK[packing](json.dumps([{"a": word} for word in words]).encode())
    got = read(written(tmp_path / f"f.json{packing}", packed[:-12]))
    assert got[-1] == (f"f.json{packing}", "corrupt file")
    assert len(got) > (packing == ".gz")
