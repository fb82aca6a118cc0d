"""A conversation and a file of prompts: loops around generate, on a merged model or a base with its adapter."""

import json

import PIL.Image
import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.conversation import Image, RecordError
from finetune.evaluation.generate import Answer
from finetune.export.merge import merge
from finetune.serving.chat import HELP, Conversation, converse
from modeling import loading
from modeling.adapters import attach, save_adapter


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = attach(loading.load(str(base_folder)).model, {"gates": "full"}, lora={}, base="")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data -= 2  # closed, then opened the other way
    save_adapter(model, folder)
    return folder


@pytest.fixture
def spoken(monkeypatch):
    """Every prompt that was asked; answers are numbered."""
    prompts = []

    def scripted(assistant, asked, **options):
        prompts.extend(asked)
        return [Answer(f"answer {len(prompts)}", True)]

    monkeypatch.setattr("finetune.serving.chat.generate", scripted)
    return prompts


def talk(*lines):
    """What a conversation writes when these lines are typed."""
    typed, written = iter(lines), []

    def read():
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    converse(Conversation(assistant=None), read, written.append, written.append)
    return written


def test_chat_placeholder(spoken, tmp_path):
    """Placeholder in a typed question is the place of its image."""
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    written = talk(
        "what is <image>?", f"/image {tmp_path / 'a.png'}", "what is <image> or <image>?", "what is <image>?"
    )
    assert [turn.parts for turn in spoken[0].turns] == [("what is <image>?",)]
    assert spoken[1].turns[-1].parts == ("what is ", Image(tmp_path / "a.png"), "?")
    assert written[3:] == ["image count: 1 images for 2 <image> in the questions", "answer 2"]


def test_chat_images_and_memory(spoken, tmp_path):
    """Images go with the next question and turns are remembered."""
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    written = talk(f"/image {tmp_path / 'a.png'}", "what is it?", "", "and now?")
    assert written == [HELP, f"({tmp_path / 'a.png'} goes with the next question)", "answer 1", "answer 2"]
    assert [turn.parts for turn in spoken[1].turns] == [
        (Image(tmp_path / "a.png"), "what is it?"),
        ("answer 1",),
        ("and now?",),
    ]


def test_chat_reset_save_quit(spoken, tmp_path):
    """Reset save quit and mistakes."""
    saved = tmp_path / "talk.json"
    written = talk("hi", f"/save {saved}", "/reset", "again", "/image nowhere.png", "/dance", "/quit", "never read")
    assert written[1:] == [
        *("answer 1", f"(written to {saved})", "(a new conversation)", "answer 2"),
        *("missing image: nowhere.png: No such file or directory", HELP),
    ]
    assert len(spoken[1].turns) == 1
    assert json.loads(saved.read_text()) == {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "answer 1"}]},
        ]
    }


def test_chat_base_and_adapter(base_folder, adapter, tmp_path):
    """A base with its adapter answers as the merged model."""
    merge(adapter, str(base_folder), tmp_path / "merged")
    PIL.Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    arguments = ["what color?", "--image", str(tmp_path / "red.png"), "--max-new-tokens", "6"]
    with_adapter = CliRunner().invoke(app, ["chat", str(base_folder), "--adapter", str(adapter), *arguments])
    merged = CliRunner().invoke(app, ["chat", str(tmp_path / "merged"), *arguments])
    plain = CliRunner().invoke(app, ["chat", str(base_folder), *arguments])
    assert merged.exit_code == with_adapter.exit_code == 0, merged.output
    assert merged.stdout == with_adapter.stdout != plain.stdout


def test_chat_bad_image(base_folder, tmp_path):
    """An image that is none is told."""
    outcome = CliRunner().invoke(app, ["chat", str(base_folder), "what?", "--image", str(tmp_path / "no.png")])
    assert outcome.exit_code == 1
    assert "missing image" in outcome.output
    with pytest.raises(RecordError, match="missing image"):
        Conversation(assistant=None).show("no.png")


def test_chat_goes_on_after_mistakes(spoken, tmp_path):
    """What cannot be asked or saved is said and the conversation goes on."""
    (tmp_path / "file").touch()
    written = talk("a\udcff", f"/save {tmp_path}", f"/save {tmp_path / 'file' / 'x'}", "/image \0", "/image", "b")
    assert written[1] == "text is not Unicode: turn 1: surrogates not allowed"
    assert written[2] == f"/save: '{tmp_path}' is a folder; expected a file"
    assert written[3].startswith(f"/save: '{tmp_path / 'file' / 'x'}' cannot be written: {tmp_path / 'file'} is a file")
    assert written[6:] == ["answer 1"]


def test_chat_save_to_new_folder(spoken, tmp_path):
    """A conversation is saved into a new folder whatever it holds."""
    talk("a\x1b[2J\u202e", f"/save {tmp_path / 'new' / 'talk.jsonl'}")
    saved = (tmp_path / "new" / "talk.jsonl").read_text(encoding="utf-8")
    assert json.loads(saved)["messages"][0]["content"][0]["text"] == "a\x1b[2J\u202e"
    assert "\u202e" not in saved


def test_chat_stdout_and_stderr(base_folder, monkeypatch):
    """Answers are on stdout in visible characters and all else on stderr."""
    monkeypatch.setattr(
        "finetune.serving.chat.generate", lambda *asked, **options: [Answer("a\x1b]0;b\x07\u202e\n\U0001f600", True)]
    )
    outcome = CliRunner().invoke(app, ["chat", str(base_folder)], input="hello\n")
    assert (outcome.exit_code, outcome.stdout) == (0, "a␛]0;b␇[U+202E]\n\U0001f600\n")
    assert "/quit" in outcome.stderr


def test_chat_ctrl_c(base_folder, monkeypatch):
    """Ctrl c says what it leaves."""

    def interrupted(*asked, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.serving.chat.generate", interrupted)
    outcome = CliRunner().invoke(app, ["chat", str(base_folder)], input="hello\n")
    assert (outcome.exit_code, outcome.stderr.splitlines()[-1]) == (130, "interrupted; the conversation is not saved")
    outcome = CliRunner().invoke(app, ["chat", str(base_folder), "hello"])
    assert (outcome.exit_code, outcome.stderr.splitlines()[-1]) == (130, "interrupted; nothing is written")
