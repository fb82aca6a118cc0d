"""`check`: what a recipe would read and train, before it does."""

import json

import pytest
from typer.testing import CliRunner

from finetune.cli import app

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


def test_check_9b_by_its_literal_config(recipe_file, tmp_path):
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
def test_check_prints_the_format_of_every_source(recipe_file, named):
    outcome = invoke("check", recipe_file(), f"data.sources.0.format={named}")
    assert outcome.exit_code == 0, outcome.output
    said = "".join(outcome.output.split())
    assert "dialogues.jsonl[train](messages):12ofthefirst12recordsusable" in said
    assert ("formatmessages(recognisedfromitsfirstrecords)" in said) == (named == "auto")
    outcome = invoke("check", recipe_file(), f"data.sources.0.format={named}", "--json")
    assert json.loads(outcome.stdout)["sources"][0]["format"] == "messages"


def test_check_streamed_and_eval_sources(recipe_file):
    good = '{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}'
    path = recipe_file(good, good)
    held = f"data.eval_sources=[{{path: {path.parent / 'dialogues.jsonl'}}}]"
    outcome = invoke("check", path, "data.sources.0.stream=true", held, "--json")
    assert outcome.exit_code == 0, outcome.output
    sources = json.loads(outcome.stdout)["sources"]
    assert [(source["read"], source["usable"], source["format"]) for source in sources] == [(2, 2, "messages")] * 2


def test_check_records_of_no_known_format(recipe_file):
    outcome = invoke("check", recipe_file('{"prompt": "a", "reply": "b"}'), "data.sources.0.format=auto")
    assert outcome.exit_code == 1
    said = " ".join(outcome.output.split())
    assert "format: auto: 1 records with the keys prompt, reply are of no known format; set format" in said
    assert "prompt_completion reads prompt, completion, image|images|image_path|..., " in said


def test_check_records_that_cannot_be_used(recipe_file):
    good = '{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}'
    outcome = invoke("check", recipe_file(good, "{broken"))
    assert outcome.exit_code == 0
    assert "1 of the first 2 records usable" in outcome.output
    assert "1 x not JSON (first: dialogues.jsonl:2: " in outcome.output
    outcome = invoke("check", recipe_file("{broken", "[]"))
    assert outcome.exit_code == 1
    assert "none of the first 2 records is usable" in " ".join(outcome.output.split())


def test_check_base_without_weights(recipe_file, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({"model_type": "idefics", "use_resampler": True, "additional_vocab_size": 2})
    )
    outcome = invoke("check", recipe_file(base=tmp_path / "base"))
    assert outcome.exit_code == 1
    assert "expected safetensors weights, found none" in " ".join(outcome.output.split())
