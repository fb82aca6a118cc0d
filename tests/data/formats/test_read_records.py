"""Records under the names that their format expects."""

from data_files import read, refusal, written
from sources import make_source

from finetune.data.formats.read_records import read_records


def test_columns_renamed(tmp_path):
    path = written(tmp_path / "f.jsonl", '{"q": 1, "x": 2}\n[]\n{"x": 3, "question": 4}\n')
    assert read(path, columns={"question": "q", "again": "q"}) == [
        ("f.jsonl:1", {"question": 1, "again": 1, "x": 2}),
        ("f.jsonl:2", "not an object"),
        ("f.jsonl:3", {"x": 3, "question": 4}),
    ]
    assert read(path, columns={"x": "q", "q": "x"})[0] == ("f.jsonl:1", {"x": 1, "q": 2})
    message = refusal(read_records, make_source("auto", (path,), columns={"answer": "a"}))
    assert message.endswith("columns: no record has a; the first has q, x")
