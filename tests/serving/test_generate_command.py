"""finetune generate: a line for every record, nothing lost when it is interrupted, no prompts written over."""

import json
import os
from types import SimpleNamespace

import PIL.Image
import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.evaluation.generate import Answer
from finetune.serving import generate_command as answers
from finetune.serving.chat import load_assistant
from finetune.serving.generate_command import answer_file, count_prompts, identify_model
from modeling.errors import UserError

MODEL = {"model": "m"}


def prompt(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def written(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def scripted(monkeypatch, tiny_tokenizer):
    """An assistant that answers in capitals, the longest prompt first; scripted.stop_after(n) lets it be killed."""
    asked, limit = [], [None]

    def each(assistant, prompts, *, max_new_tokens, batch_size):
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index].turns[-1].text)):
            if len(asked) == limit[0]:
                raise KeyboardInterrupt
            text = prompts[index].turns[-1].text
            asked.append(text)
            yield index, Answer(text.upper(), True)

    monkeypatch.setattr(answers, "generate_each", each)
    return SimpleNamespace(tokenizer=tiny_tokenizer, asked=asked, limit=limit)


def ask(assistant, source, out, **changes):
    return answer_file(assistant, source, out, **{"max_new_tokens": 3, "model": MODEL, **changes})


def test_answer_file_line_per_record(base_folder, tmp_path):
    """A file of prompts gets a line for every record."""
    records = [
        prompt("hello", id=7),
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "{broken",
    ]
    source = written(tmp_path / "in.jsonl", records)
    counts = ask(load_assistant(str(base_folder)), source, tmp_path / "no" / "such" / "out.jsonl")
    assert counts == {"records": 4, "answered": 1, "errors": 3}
    found = lines(tmp_path / "no" / "such" / "out.jsonl")
    assert found[0].keys() == {"messages", "id", "answer", "stopped"}
    assert found[1]["error"].startswith("missing image")
    assert found[2]["error"].startswith("not a prompt")
    assert found[3]["record_id"] == "in.jsonl:4"
    assert sorted(path.name for path in (tmp_path / "no" / "such").iterdir()) == ["out.jsonl"]


def test_answer_file_placeholder(scripted, tmp_path):
    """Placeholder in a prompt is the place of its image."""
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    records = [
        prompt("in <image>?", images=["a.png"], system="be kind"),
        prompt("in <image>?"),
        prompt("in <video>?", videos=["v.mp4"]),
        prompt("is <image> or <image>?", image="a.png"),
    ]
    ask(scripted, written(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")
    assert scripted.asked == ["in ?"]
    answered, *refused = lines(tmp_path / "out.jsonl")
    assert answered["answer"] == "IN ?"
    assert [line["error"].partition(":")[0] for line in refused] == ["image count", "video", "image count"]


def test_answer_file_odd_records(scripted, tmp_path):
    """Odd records get their line and lose no other."""
    records = [
        prompt("a", id="\ud800"),
        prompt("b", id="\x1b[2J\u202e"),
        prompt("c\udfff"),
        '{"messages": [{"role": "user", "content": "d"}], "score": NaN}\n',
        '{"messages": [{"role": "user", "content": "e"}], "deep": ' + "[" * 400 + "]" * 400 + "}\n",
        prompt("f", answer="of an earlier run", error="of an earlier run"),
        prompt("f"),
    ]
    source = written(tmp_path / "in.jsonl", records)
    assert ask(scripted, source, tmp_path / "out.jsonl") == {"records": 7, "answered": 5, "errors": 2}
    found = lines(tmp_path / "out.jsonl")
    assert [line.get("answer") for line in found] == ["A", "B", None, "D", None, "F", "F"]
    assert (found[0]["id"], found[1]["id"]) == ("\ud800", "\x1b[2J\u202e")
    assert found[2]["error"] == "text is not Unicode: turn 1: surrogates not allowed"
    assert "error" not in found[5]
    assert "\x1b" not in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("torn", ["", '{"record": 0, "ans'])
def test_answer_file_resumes(scripted, tmp_path, torn):
    """Interrupted it goes on with what is not answered."""
    source, out = (
        written(tmp_path / "in.jsonl", [prompt(text) for text in ("a", "bbb", "cc", "dddd")]),
        tmp_path / "out",
    )
    scripted.limit[0] = 2
    with pytest.raises(KeyboardInterrupt):
        ask(scripted, source, out)
    assert not out.exists()
    journal = tmp_path / "out.journal"
    assert lines(journal)[1:] == [
        {"record": 3, "answer": "DDDD", "stopped": True},
        {"record": 1, "answer": "BBB", "stopped": True},
    ]
    with journal.open("a") as opened:
        opened.write(torn)
    scripted.limit[0] = None
    assert ask(scripted, source, out) == {"records": 4, "answered": 4, "errors": 0}
    assert scripted.asked == ["dddd", "bbb", "cc", "a"]  # none of them twice
    assert [line["answer"] for line in lines(out)] == ["A", "BBB", "CC", "DDDD"]
    assert not journal.exists()


@pytest.mark.parametrize("change", ["model", "tokens", "prompts"])
def test_answer_file_other_command(scripted, tmp_path, change):
    """Answers of another command are neither mixed nor lost."""
    source, out = written(tmp_path / "in.jsonl", [prompt("a"), prompt("b")]), tmp_path / "out"
    scripted.limit[0] = 1
    with pytest.raises(KeyboardInterrupt):
        ask(scripted, source, out)
    before = (tmp_path / "out.journal").read_bytes()
    changes = {"model": {"model": {"model": "another"}}, "tokens": {"max_new_tokens": 4}}.get(change, {})
    if change == "prompts":
        written(source, [prompt("x"), prompt("b")])
    with pytest.raises(UserError, match="holds the answers of another command, or to prompts that have changed since"):
        ask(scripted, source, out, **changes)
    assert (tmp_path / "out.journal").read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        '{"record": 1e999, "answer": "", "stopped": true}',
        '{"record": "x", "answer": "", "stopped": true}',
        "\udcff",
        "[" * 9999,
    ],
)
def test_answer_file_bad_journal(scripted, tmp_path, line):
    """A journal that is none is named."""
    source = written(tmp_path / "in.jsonl", [prompt("a"), prompt("b")])
    scripted.limit[0] = 1
    with pytest.raises(KeyboardInterrupt):
        ask(scripted, source, tmp_path / "out")
    with (tmp_path / "out.journal").open("a", errors="surrogateescape") as opened:
        opened.write(f"{line}\n")
    with pytest.raises(UserError, match=r"out\.journal: line 3 is no answer: .{1,90}; delete the journal"):
        ask(scripted, source, tmp_path / "out")


def test_identify_model(base_folder, tmp_path):
    """Another model in the same folder is another model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = identify_model(str(tmp_path), adapter=None, quantize=None)
    assert identify_model(str(tmp_path), adapter=None, quantize=None) == before
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert identify_model(str(tmp_path), adapter=None, quantize=None) != before
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "trained.safetensors").write_bytes(b"1")
    os.utime(adapter / "trained.safetensors", ns=(1, 1))
    assert identify_model(str(base_folder), adapter=adapter, quantize=None)["weights"][-1].endswith(
        "trained.safetensors 1 1"
    )


@pytest.mark.parametrize("out", ["in.jsonl", "link.jsonl", "hard.jsonl", "./below/../in.jsonl"])
def test_prompts_not_overwritten(tmp_path, monkeypatch, out):
    """Prompts are not written over."""
    monkeypatch.chdir(tmp_path)
    source = written(tmp_path / "in.jsonl", [prompt("a")])
    (tmp_path / "below").mkdir()
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "hard.jsonl").hardlink_to(source)
    outcome = CliRunner().invoke(app, ["generate", "no-model", "in.jsonl", out])
    assert outcome.exit_code == 1
    assert (
        f"{os.path.normpath(out) if out[0] != '.' else 'below/../in.jsonl'}: would be written over its own"
        in outcome.output
    )
    assert lines(source) == [prompt("a")]


@pytest.mark.parametrize(
    ("source", "out"), [("no.jsonl", "out"), ("in.jsonl", "folder"), ("in.jsonl", "in.jsonl/below")]
)
def test_prompts_checked_before_model(tmp_path, monkeypatch, source, out):
    """Files are looked at before the model."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in.jsonl", [prompt("a")])
    (tmp_path / "folder").mkdir()
    outcome = CliRunner().invoke(app, ["generate", "no-model", source, out])
    assert (outcome.exit_code, len(outcome.output.splitlines())) == (1, 1)
    assert "no-model" not in outcome.output


def test_generate_exit_status(base_folder, tmp_path):
    """The status says whether all were answered."""
    source = written(tmp_path / "in.jsonl", [prompt("a"), prompt("b")])
    arguments = ["generate", str(base_folder), str(source), str(tmp_path / "out"), "--max-new-tokens", "1", "--json"]
    outcome = CliRunner().invoke(app, arguments)
    assert (outcome.exit_code, json.loads(outcome.stdout)) == (0, {"records": 2, "answered": 2, "errors": 0})
    written(source, [prompt("a"), "{\n"])
    outcome = CliRunner().invoke(app, arguments)
    assert (outcome.exit_code, json.loads(outcome.stdout)) == (4, {"records": 2, "answered": 1, "errors": 1})


def test_answer_file_empty(scripted, tmp_path):
    """An empty file of prompts has no answers."""
    source = written(tmp_path / "in.jsonl", [])
    assert count_prompts(source, tmp_path / "out") == 0
    assert ask(scripted, source, tmp_path / "out") == {"records": 0, "answered": 0, "errors": 0}
    assert lines(tmp_path / "out") == []
