"""Bytes of small files, changed at random, and what readers may make of them.

As a program, it changes Parquet and Arrow files in a process of its own, which a crash of pyarrow ends alone:

    python tests/helpers/fuzz_files.py EXAMPLES FOLDER
"""

import gzip
import io
import json
import resource
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from fuzzing import damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from sources import make_source

from finetune.data.conversation import Dialogue, RecordError
from finetune.data.formats import FORMATS
from finetune.data.images import open_image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import taken
from finetune.data.stats import SourceStats
from modeling.errors import UserError


def picture() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return file.getvalue()


PNG = picture()
TALK = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
LINES = [
    {"messages": TALK, "images": ["a.png"], "score": 0.5, "n": None},
    {"conversations": [{"from": "human", "value": "Hü?"}, {"from": "gpt", "value": '\\ud83d\\ude00 " \\\\'}]},
    {"instruction": "Do", "input": "", "output": "done", "text": "t", "image": "a.png", "question": "q", "answer": "a"},
    {"image_id": 7, "question_id": 8, "question": "Who?", "answers": [{"answer": "me"}], "texts": ["a", None]},
]
VQA = {"data_subtype": "train2014", "questions": [{"image_id": 9, "question": "What?", "question_id": 1}] * 2}
MIMIC = {"meta": {}, "data": {"A": {"instruction": "i", "answer": "a", "image_ids": ["x"], "rel_ins_ids": []}}}
CSV = 'text,image\nA cat,a.png\n"two\nlines, ""quoted""",b.png\n\nü,c.png\n'


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("a.png", PNG), ("a.txt", b"A cat."), ("ü" * 120 + ".json", b'{"text": "t"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.png", PNG)
        made.writestr("b/a.png", PNG, zipfile.ZIP_DEFLATED)
    return file.getvalue()


TABLE = pa.table(
    {
        "text": ["one", "two", None, "three"] * 5,
        "image": [{"bytes": PNG, "path": "a.png"}] * 20,
        "messages": [TALK] * 20,
        "n": list(range(20)),
        "id": [str(number) for number in range(20)],
    }
)


def parquet(**options) -> bytes:
    file = io.BytesIO()
    pq.write_table(TABLE, file, row_group_size=8, **options)
    return file.getvalue()


def arrow(new, table=TABLE, **options) -> bytes:
    file = io.BytesIO()
    with new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as out:
        out.write_table(table, max_chunksize=8)
    return file.getvalue()


def texts() -> dict[str, list[bytes]]:
    """Suffix -> small files."""
    as_lines = "\n".join(map(json.dumps, LINES)).encode()
    lists = [json.dumps(LINES).encode(), json.dumps({"info": {}, "data": LINES}, indent=1).encode()]
    lists += [json.dumps(VQA).encode(), json.dumps(MIMIC).encode(), json.dumps(LINES[0]).encode()]
    tar = archive()
    return {
        ".json": lists,
        ".jsonl": [as_lines],
        ".csv": [CSV.encode()],
        ".tsv": [CSV.replace(",", "\t").encode()],
        ".jsonl.gz": [gzip.compress(as_lines)],
        ".json.zst": [zstandard.compress(lists[0])],
        ".csv.gz": [gzip.compress(CSV.encode())],
        ".tar": [tar],
        ".tgz": [gzip.compress(tar)],
        ".tar.zst": [zstandard.compress(tar)],
    }


def columns() -> dict[str, list[bytes]]:
    coded = pa.table(
        {"text": TABLE["text"].combine_chunks().dictionary_encode(), "v": pa.array(["v" * 20] * 20, pa.string_view())}
    )
    return {
        ".parquet": [
            parquet(compression="none", use_dictionary=False),
            parquet(compression="zstd"),
            parquet(compression="snappy", data_page_version="2.0", write_statistics=False),
        ],
        ".arrow": [
            arrow(pa.ipc.new_file),
            arrow(pa.ipc.new_stream),
            arrow(pa.ipc.new_stream, compression="lz4"),
            arrow(pa.ipc.new_file, coded, compression="zstd"),
            arrow(pa.ipc.new_stream, coded),
        ],
    }


def check_reading(path: Path, *, formats=(), **settings) -> None:
    """Read a file to its end: records, counted rejections, or one error, in seconds; all of it can be written down."""
    started = time.monotonic()
    stats = SourceStats("fuzz")
    source = make_source("text", (path,), on_broken="keep", **settings)
    root = ImageRoot(make_source("messages", (path,)))
    try:
        for record_id, record in taken(source, stats):
            record_id.encode()
            if isinstance(record, RecordError):
                stats.reject(record_id, record)
                continue
            assert isinstance(record, dict)
            stats.kept += 1
            for name in formats:
                check_conversion(FORMATS[name].convert, record, root)
    except UserError as error:
        check_message(error)
    json.dumps(stats.to_json(), ensure_ascii=False).encode()
    assert len(stats.broken) < 2
    assert not any("\n" in line for line in (*stats.broken, *stats.rejected))
    assert time.monotonic() - started < 10


def check_message(error: UserError) -> None:
    assert not isinstance(error, RecordError)
    assert str(error).count("\n") < 3


def check_conversion(convert, record, root) -> None:
    try:
        assert isinstance(convert(dict(record), root), Dialogue)
    except RecordError as error:
        str(error).encode()


def check_images(store: Path, *names: str) -> None:
    """Look images up in a store: images, or errors of one line."""
    started = time.monotonic()
    try:
        root = ImageRoot(make_source("messages", (store,), image_root=(store,)))
        for name in names:
            try:
                open_image(root.image(name))
            except RecordError as error:
                str(error).encode()
    except UserError as error:
        check_message(error)
    assert time.monotonic() - started < 10


def fuzz_columns(folder: Path, count: int) -> None:
    """Raises AssertionError, or is ended by a crash; the file is left in the folder."""
    corpus = [(suffix, content) for suffix, contents in columns().items() for content in contents]

    @fuzz(count)
    @given(st.sampled_from(corpus), st.sampled_from(corpus), st.data())
    def run(file, other, data):
        path = folder / f"last{file[0]}"
        path.write_bytes(data.draw(damaged(file[1], donor=other[1])))
        check_reading(path)
        if file[0] == ".parquet":
            check_images(path, "0", "19", "no")

    run()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz_columns(Path(sys.argv[2]), int(sys.argv[1]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown:,} KB more than before"
