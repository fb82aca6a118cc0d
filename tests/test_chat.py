"""A conversation and a file of prompts: loops around generate, on a merged model or a base with its adapter."""

import json

import PIL.Image
import pytest
from typer.testing import CliRunner

from finetune.chat import HELP, Conversation, answer_file, converse, open_assistant
from finetune.cli import app
from finetune.data.dialogue import Image, RecordError
from finetune.generate import Answer
from finetune.merge import merge
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

    monkeypatch.setattr("finetune.chat.generate", scripted)
    return prompts


def talk(*lines):
    """What a conversation writes when these lines are typed."""
    typed, written = iter(lines), []

    def read():
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    converse(Conversation(assistant=None), read, written.append)
    return written


def test_images_go_with_the_next_question_and_turns_are_remembered(spoken, tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    written = talk(f"/image {tmp_path / 'a.png'}", "what is it?", "", "and now?")
    assert written == [HELP, f"({tmp_path / 'a.png'} goes with the next question)", "answer 1", "answer 2"]
    assert [turn.parts for turn in spoken[1].turns] == [
        (Image(tmp_path / "a.png"), "what is it?"),
        ("answer 1",),
        ("and now?",),
    ]


def test_reset_save_quit_and_mistakes(spoken, tmp_path):
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


def test_a_base_with_its_adapter_answers_as_the_merged_model(base_folder, adapter, tmp_path):
    merge(adapter, str(base_folder), tmp_path / "merged")
    PIL.Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    arguments = ["what color?", "--image", str(tmp_path / "red.png"), "--max-new-tokens", "6"]
    with_adapter = CliRunner().invoke(app, ["chat", str(base_folder), "--adapter", str(adapter), *arguments])
    merged = CliRunner().invoke(app, ["chat", str(tmp_path / "merged"), *arguments])
    plain = CliRunner().invoke(app, ["chat", str(base_folder), *arguments])
    assert merged.exit_code == with_adapter.exit_code == 0, merged.output
    assert merged.stdout == with_adapter.stdout != plain.stdout


def test_a_file_of_prompts_gets_a_line_for_every_record(base_folder, dialogue_folder, tmp_path):
    records = [
        {"messages": [{"role": "user", "content": "hello"}], "id": 7},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("\n".join([*map(json.dumps, records), "{broken"]))
    counts = answer_file(open_assistant(str(base_folder)), prompts, tmp_path / "out.jsonl", max_new_tokens=3)
    assert counts == {"records": 4, "answered": 1, "errors": 3}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"messages", "id", "answer", "stopped"}
    assert lines[1]["error"].startswith("missing image")
    assert lines[2]["error"].startswith("not a prompt")
    assert lines[3]["place"] == "in.jsonl:4"


def test_an_image_that_is_none_is_told(base_folder, tmp_path):
    outcome = CliRunner().invoke(app, ["chat", str(base_folder), "what?", "--image", str(tmp_path / "no.png")])
    assert outcome.exit_code == 1
    assert "missing image" in outcome.output
    with pytest.raises(RecordError, match="missing image"):
        Conversation(assistant=None).show("no.png")
