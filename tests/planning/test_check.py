"""`check` and `inspect`: what a recipe would do, before it does it."""

import json
import re

import PIL.Image
import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, assistant, user
from finetune.data.tokenize import tokenize
from finetune.reporting.inspect import LONGEST, picture, view

RECIPE = """
model: {{base: {base}, vision: lora}}
adapter: {{rank: 2}}
data: {{sources: [{{format: messages, path: dialogues.jsonl, image_root: {root}}}], prepared: {prepared}, workers: 1}}
training: {{steps: 1}}
output: {output}
"""


@pytest.fixture
def recipe_file(dialogue_folder, tmp_path):
    def write(*lines, base="HuggingFaceM4/idefics-9b"):
        text = "\n".join(lines) or (dialogue_folder / "dialogues.jsonl").read_text()
        (tmp_path / "dialogues.jsonl").write_text(text)
        path = tmp_path / "recipe.yaml"
        folders = {"prepared": tmp_path / "prepared", "output": tmp_path / "run"}
        path.write_text(RECIPE.format(base=base, root=dialogue_folder, **folders))
        return path

    return write


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_9b_is_checked_by_its_literal_config(recipe_file, tmp_path):
    outcome = invoke("check", recipe_file(), "--json")
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert {tower: values["trained"] for tower, values in result["towers"].items()} == {
        "vision": 11_796_480 // 8,  # rank 2 of 16
        "resampler": 0,
        "cross_attention": 9_273_344 // 8,
        "decoder": 39_976_960 // 8,
        "gates": 16,
        "added_tokens": 24_576,
        "embeddings_and_head": 0,
    }
    assert sum(values["parameters"] for values in result["towers"].values()) == 8_929_687_824  # the instruct model
    (source,) = result["sources"]
    assert (source["read"], source["usable"], source["rejected"]) == (12, 12, {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("named", ["messages", "auto"])
def test_the_format_of_every_source_is_told_a_recognised_one_too(recipe_file, named):
    outcome = invoke("check", recipe_file(), f"data.sources.0.format={named}")
    assert outcome.exit_code == 0, outcome.output
    said = "".join(outcome.output.split())
    assert "dialogues.jsonl[train](messages):12ofthefirst12usable" in said
    assert ("formatmessages(recognisedfromitsfirstrecords)" in said) == (named == "auto")
    outcome = invoke("check", recipe_file(), f"data.sources.0.format={named}", "--json")
    assert json.loads(outcome.stdout)["sources"][0]["format"] == "messages"


def test_a_streamed_and_a_held_out_source_are_checked_like_any_other(recipe_file):
    good = '{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}'
    path = recipe_file(good, good)
    held = f"data.eval_sources=[{{path: {path.parent / 'dialogues.jsonl'}}}]"
    outcome = invoke("check", path, "data.sources.0.stream=true", held, "--json")
    assert outcome.exit_code == 0, outcome.output
    sources = json.loads(outcome.stdout)["sources"]
    assert [(source["read"], source["usable"], source["format"]) for source in sources] == [(2, 2, "messages")] * 2


def test_records_of_no_known_format_are_an_error_that_names_their_keys(recipe_file):
    outcome = invoke("check", recipe_file('{"prompt": "a", "reply": "b"}'), "data.sources.0.format=auto")
    assert outcome.exit_code == 1
    said = " ".join(outcome.output.split())
    assert "format: auto: 1 records with the keys prompt, reply are of no known format; set format" in said
    assert "prompt_completion reads prompt, completion, image|images|image_path|..., " in said


def test_records_that_cannot_be_used_are_shown_and_all_of_them_is_an_error(recipe_file):
    good = '{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}'
    outcome = invoke("check", recipe_file(good, "{broken"))
    assert outcome.exit_code == 0
    assert "1 of the first 2 usable" in outcome.output
    assert "1 x not JSON (first: dialogues.jsonl:2: " in outcome.output
    outcome = invoke("check", recipe_file("{broken", "[]"))
    assert outcome.exit_code == 1
    assert "none of the first 2 records is usable" in " ".join(outcome.output.split())


def test_a_base_folder_without_weights_or_an_adapter_that_is_not_there(recipe_file, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({"model_type": "idefics", "use_resampler": True, "additional_vocab_size": 2})
    )
    outcome = invoke("check", recipe_file(base=tmp_path / "base"))
    assert outcome.exit_code == 1
    assert "expected safetensors weights, found none" in " ".join(outcome.output.split())


def test_inspect_shows_dialogues_and_writes_nothing(recipe_file, base_folder, tmp_path):
    outcome = invoke("inspect", recipe_file(base=base_folder), "--count", "2", "--ids")
    assert outcome.exit_code == 0, outcome.output
    assert len(re.findall(r"\d+ tokens, \d+ trained on, \d images", outcome.output)) == 2 + LONGEST
    assert "<end_of_utterance>" in outcome.output
    assert not (tmp_path / "run").exists()


def test_supervised_tokens_are_green_and_a_bar_tells_the_image_seen(tiny_tokenizer, dialogue_folder):
    red, blue = (Image(dialogue_folder / f"{name}.png") for name in ("red", "blue"))
    dialogue = Dialogue((user(red, "a"), assistant("no"), user(blue, "a"), assistant("yes")))
    example = tokenize(render(dialogue), tiny_tokenizer)
    tokens, first, second = view(dialogue, example, tiny_tokenizer, title="x", ids=False).renderable.renderables
    green = [tokens.plain[span.start : span.end] for span in tokens.spans if "green" in str(span.style)]
    assert "".join(green).split("<end_of_utterance>") == [" no", " yes", ""]
    bars = [str(span.style) for span in tokens.spans if tokens.plain[span.start : span.end] == "▏"]
    assert set(bars) == {"cyan", "magenta"}
    assert bars == sorted(bars)  # the first image until the second one comes
    assert "image 0" in first.plain
    assert "image 1" in second.plain


def test_a_picture_has_the_image_s_colors(dialogue_folder):
    shown = picture(Image(dialogue_folder / "red.png"), width=4)
    assert shown.plain == "▀▀▀▀\n" * 3
    assert {str(span.style) for span in shown.spans} == {"#dc2828 on #dc2828"}


@pytest.mark.parametrize(
    ("size", "columns", "lines"),
    [
        ((1, 60_000), 1, 24),
        ((60_000, 1), 24, 1),
        ((20, 30), 24, 18),
        ((30, 20), 24, 8),
        ((1, 1), 24, 12),
        ((7, 9_999), 1, 24),
    ],
)
def test_a_picture_is_small_whatever_its_proportions(size, columns, lines):
    shown = picture(Image(PIL.Image.new("RGB", size)), width=24).plain.splitlines()
    assert (len(shown), {len(line) for line in shown}) == (lines, {columns})


def test_a_picture_that_is_gone_leaves_its_reason(tmp_path):
    shown = picture(Image(tmp_path / "\x1bgone.png"), width=24)
    assert shown.plain.startswith("(missing image: ")
    assert "␛gone.png" in shown.plain
