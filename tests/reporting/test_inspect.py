"""`inspect`: examples chosen, shown token by token, with their images."""

import re

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import recipe_of
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, assistant, user
from finetune.data.tokenize import tokenize
from finetune.reporting.inspect import LONGEST, choose_shown, picture, show_example, view


def test_choose_shown_draws_apart_from_the_longest():
    assert choose_shown([5, 9, 1, 9, 7], seed=0, drawn=9, longest=2) == [
        (0, False),
        (2, False),
        (4, False),
        (1, True),
        (3, True),
    ]
    assert choose_shown([], seed=0) == []
    assert choose_shown(range(1000), seed=1) == choose_shown(range(1000), seed=1) != choose_shown(range(1000), seed=2)


@given(st.lists(st.integers(0, 500)), st.integers(0, 30), st.integers(0, 30))
def test_choose_shown_takes_none_twice(lengths, drawn, longest):
    chosen = choose_shown(lengths, seed=3, drawn=drawn, longest=longest)
    assert len({index for index, _ in chosen}) == len(chosen) == min(len(lengths), drawn + longest)
    top = [lengths[index] for index, is_long in chosen if is_long]
    assert top == sorted(lengths, reverse=True)[:longest]


def test_inspect_prints_examples_and_writes_no_run(dialogue_folder, base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [{"format": "messages", "path": str(dialogue_folder / "dialogues.jsonl")}]
    recipe = recipe_of(model={"base": str(base_folder)}, data={"sources": sources})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    outcome = CliRunner().invoke(app, ["inspect", "recipe.yaml", "--count", "2", "--ids"])
    assert outcome.exit_code == 0, outcome.output
    assert len(re.findall(r"\d+ tokens, \d+ trained on, \d images?", outcome.output)) == 2 + LONGEST
    assert "<end_of_utterance>" in outcome.output
    assert not (tmp_path / "run").exists()


def test_view_colours_supervised_tokens_and_images(tiny_tokenizer, dialogue_folder):
    red, blue = (Image(dialogue_folder / f"{name}.png") for name in ("red", "blue"))
    dialogue = Dialogue((user(red, "a"), assistant("no"), user(blue, "a"), assistant("yes")))
    example = tokenize(render(dialogue), tiny_tokenizer)
    shown = show_example(example, tiny_tokenizer, record_id="x", source="s", images=dialogue.images)
    tokens, first, second = view(shown).renderable.renderables
    green = [tokens.plain[span.start : span.end] for span in tokens.spans if "green" in str(span.style)]
    assert "".join(green).split("<end_of_utterance>") == [" no", " yes", ""]
    bars = [str(span.style) for span in tokens.spans if tokens.plain[span.start : span.end] == "▏"]
    assert set(bars) == {"cyan", "magenta"}
    assert bars == sorted(bars)  # the first image until the second one comes
    assert "image 0" in first.plain
    assert "image 1" in second.plain


def test_picture_has_the_colours_of_the_image(dialogue_folder):
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
def test_picture_of_extreme_proportions(size, columns, lines):
    shown = picture(Image(PIL.Image.new("RGB", size)), width=24).plain.splitlines()
    assert (len(shown), {len(line) for line in shown}) == (lines, {columns})


def test_picture_that_is_missing(tmp_path):
    shown = picture(Image(tmp_path / "\x1bgone.png"), width=24)
    assert shown.plain.startswith("(missing image: ")
    assert "␛gone.png" in shown.plain
