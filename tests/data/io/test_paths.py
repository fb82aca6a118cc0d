"""Paths and patterns -> files and folders."""

import os
from pathlib import Path

import pytest
from sources import make_source

from finetune.data.formats.read_records import read_records
from finetune.data.formats.recognise import recognise_source
from finetune.data.io.paths import expand, files_below, locate
from finetune.data.io.source_files import files_of, fingerprint
from modeling.errors import UserError

NAMES = (
    *("s/a/d.jsonl", "s/b/d.jsonl", "s/b/deep/d.jsonl", "s/b/e.csv", "s/.hidden/d.jsonl", "s/top.jsonl"),
    *("t[1]/d.jsonl", "t1/d.jsonl", "[ab]/x.jsonl", "a/x.jsonl", "b/x.jsonl"),
)


@pytest.fixture
def tree(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "' + name + '"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s/*/d.jsonl", ["s/a/d.jsonl", "s/b/d.jsonl"]),
        ("s/?/d.jsonl", ["s/a/d.jsonl", "s/b/d.jsonl"]),
        ("s/**/*.jsonl", ["s/top.jsonl", "s/a/d.jsonl", "s/b/d.jsonl", "s/b/deep/d.jsonl"]),
        ("s/**/d.jsonl", ["s/a/d.jsonl", "s/b/d.jsonl", "s/b/deep/d.jsonl"]),
        ("**/deep/d.jsonl", ["s/b/deep/d.jsonl"]),
        ("s/**/**/deep/*", ["s/b/deep/d.jsonl"]),
        ("s/b/[!f-z].c*", ["s/b/e.csv"]),
        ("s/[!a]/d.jsonl", ["s/b/d.jsonl"]),
        ("s/.*/d.jsonl", ["s/.hidden/d.jsonl"]),
        ("t[1]/d.jsonl", ["t[1]/d.jsonl"]),
        ("t[1]/*.jsonl", ["t[1]/d.jsonl"]),
        ("[ab]/x.jsonl", ["[ab]/x.jsonl"]),
        ("[a-b]/x.jsonl", ["a/x.jsonl", "b/x.jsonl"]),
        ("s/b", ["s/b"]),
    ],
)
def test_expand_pattern_anywhere(pattern, expected, tree, monkeypatch):
    assert expand(tree / pattern) == [tree / name for name in expected]
    monkeypatch.chdir(tree)
    assert list(map(str, expand(Path(pattern)))) == expected


def test_expand_folders_once(tree):
    """A pattern of folders means the files below them, each once."""
    below = [tree / name for name in ("s/b/d.jsonl", "s/b/deep/d.jsonl", "s/b/e.csv")]
    assert files_of(make_source("auto", (tree / "s/b",))) == files_of(make_source("auto", (tree / "s/b/**",))) == below
    assert files_of(make_source("auto", (tree / "s/[b-z]",))) == below
    assert [record["text"] for _, record in read_records(make_source("text", (tree / "s/*/d.jsonl",)))] == [
        "s/a/d.jsonl",
        "s/b/d.jsonl",
    ]


def test_fingerprint_of_pattern(tree):
    source = make_source("text", (tree / "s/*/d.jsonl",))
    before = fingerprint(source)
    (tree / "s/c").mkdir()
    (tree / "s/c/d.jsonl").write_text("{}")
    assert fingerprint(source) != before


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s/*/none.jsonl", "s/*/none.jsonl: nothing is there that fits this pattern"),
        ("none/*/d.jsonl", "none/*/d.jsonl: nothing is there that fits this pattern"),
        ("s/top.json", "s/top.json: nothing is there; did you mean top.jsonl?"),
        ("s/zzz/d.jsonl", "s/zzz is no folder"),
        ("s/top.jsonl/d", "s/top.jsonl is no folder"),
    ],
)
def test_expand_no_match(pattern, message, tree):
    with pytest.raises(UserError) as caught:
        expand(tree / pattern)
    assert str(caught.value).endswith(message)


def test_expand_broken_link(tree):
    (tree / "s/c").mkdir()
    (tree / "s/c/d.jsonl").symlink_to("gone.jsonl")
    for pattern in ("s/c/d.jsonl", "s/*/d.jsonl"):
        with pytest.raises(UserError, match=r"s/c/d\.jsonl: a link to gone\.jsonl, where nothing is"):
            expand(tree / pattern)


def test_files_below_follows_links_once(tree, tmp_path_factory):
    """A link to a folder outside is followed once."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.jsonl").write_text("")
    for name, target in (
        ("here", elsewhere),
        ("again", elsewhere),
        ("up", tree),
        ("root", "/"),
        ("side", tree / "s/a"),
    ):
        (tree / "s/b" / name).symlink_to(target)
    (tree / "s/b/loop").symlink_to("loop")
    (elsewhere / "back").symlink_to(tree / "s")
    found = [str(path.relative_to(tree / "s/b")) for path in files_below(tree / "s/b")]
    assert len([name for name in found if name.endswith("far.jsonl")]) == 1
    assert sorted(name for name in found if "far" not in name and "back" not in name) == [
        "d.jsonl",
        "deep/d.jsonl",
        "e.csv",
        "side/d.jsonl",
    ]


def test_locate_inside_archives(tree):
    archive = tree / "t.zip"
    archive.write_bytes(b"")
    assert locate(archive / "train" / "x") == [(archive, "train/x")]
    assert locate(tree / "?.zip" / "train") == [(archive, "train")]
    assert locate(tree / "s") == [(tree / "s", ".")]


def test_unreadable_folder(tree):
    if os.geteuid() == 0:
        pytest.skip("root may read all")
    (tree / "s/a").chmod(0)
    with pytest.raises(UserError, match="a folder that cannot be read: Permission denied"):
        expand(tree / "s/*/*.jsonl")


@pytest.mark.parametrize("key", ["paths", "image_root"])
def test_fingerprint_of_pipe(key, tree):
    """A pipe is refused, not waited for."""
    os.mkfifo(tree / "pipe")
    source = make_source("text", **{"paths": (tree / "s/top.jsonl",), key: (tree / "pipe",)})
    with pytest.raises(UserError, match="pipe: a file that cannot be read: expected a file, found a pipe"):
        fingerprint(source)


def test_auto_names_files_by_folder(tree):
    """Files of one name and several formats are distinguished by their folders."""
    (tree / "s/a/d.jsonl").write_text('{"question": "Q", "answer": "A"}\n')
    (tree / "s/b/d.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(UserError, match=r"a/d\.jsonl: \w+; b/d\.jsonl: messages"):
        recognise_source(make_source("auto", (tree / "s/*/d.jsonl",)))
