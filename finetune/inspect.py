"""Recipe -> what the model will see: dialogues with supervised tokens coloured, and the image each token sees."""

import re
from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from finetune.data import prepare as data
from finetune.data.dialogue import Dialogue, Image, RecordError
from finetune.data.images import open_image
from finetune.data.sources import hold_dialogues
from finetune.data.template import render
from finetune.data.tokens import IGNORED, Example, tokenize
from finetune.materials import learn_tokenizer, to_source
from finetune.progress import console, say
from finetune.recipe import Recipe
from modeling.loading import load_processor
from modeling.shapes import SHAPES

IMAGE_STYLES = ("cyan", "magenta", "yellow", "blue", "bright_red", "bright_green")
"""Colours of the images of one dialogue, in turn."""


def inspect(recipe: Recipe, *, count: int, ids: bool) -> None:
    """Print the first dialogues of every source as the model will see them; writes nothing."""
    model = recipe.model
    sources = [to_source(source) for source in (*recipe.data.sources, *recipe.data.eval_sources)]
    instruct = hold_dialogues(source.format for source in recipe.data.sources)
    if model.init:
        tokenizer = learn_tokenizer(SHAPES[model.init], sources[: len(recipe.data.sources)], seed=0, instruct=instruct)
    else:
        tokenizer = load_processor(str(model.base), revision=model.revision, instruct=instruct).tokenizer
    for source in sources:
        account = data.Account(source.name)
        for place, dialogue in data.read_dialogues(source, account, seed=recipe.training.seed)[:count]:
            try:
                console.print(view(dialogue, tokenizer, title=f"{source.name} {place}", ids=ids))
            except RecordError as error:
                say(f"{source.name} {place}: {error}")
        for reason, records in account.rejected.items():
            say(f"{source.name}: {records} x {reason} (first: {account.first_rejected[reason]})")


def view(dialogue: Dialogue, tokenizer: Any, *, title: str, ids: bool) -> Panel:
    """One dialogue as a panel: green is trained on; the bar under a token has the colour of the image it sees."""
    example = tokenize(render(dialogue), tokenizer)
    shown = [
        Text.assemble((f"image {number} ", _style(number)), "\n", picture(image, width=24))
        for number, image in enumerate(dialogue.images)
    ]
    counts = f"{len(example)} tokens, {example.supervised} trained on, {len(dialogue.images)} images"
    body = [_tokens(example, tokenizer), *([_ids(example, tokenizer)] if ids else []), *shown]
    return Panel(Group(*body), title=title, subtitle=counts, title_align="left", subtitle_align="left")


def picture(image: Image, *, width: int) -> Text:
    """An image in half blocks, two pixels a character."""
    opened = open_image(image)
    height = max(2, round(width * opened.height / opened.width / 2) * 2)
    levels_HWC = np.asarray(opened.resize((width, height)))
    text = Text()
    for upper, lower in zip(levels_HWC[::2], levels_HWC[1::2], strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            text.append("▀", style=f"{_hex(top)} on {_hex(bottom)}")
        text.append("\n")
    return text


def _hex(rgb: np.ndarray) -> str:
    return "#" + bytes(rgb).hex()


def _style(image: int) -> str:
    return IMAGE_STYLES[image % len(IMAGE_STYLES)] if image >= 0 else ""


def _tokens(example: Example, tokenizer: Any) -> Text:
    """The tokens as written, trained ones in green, underlined in the colour of the image they see."""
    text = Text()
    for token, label, image in zip(example.input_ids, example.labels, example.image_index, strict=True):
        piece = _written(tokenizer.convert_ids_to_tokens(int(token)))
        if image >= 0:
            text.append("▏", style=_style(int(image)))
        text.append(piece, style="bold green" if label != IGNORED else "default")
    return text


def _written(token: str) -> str:
    """A token as it reads: "▁What" -> " What", the byte "<0x41>" -> "A"; a part of a longer character -> "\\xC3"."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    if byte is None:
        return token.replace("▁", " ")
    value = int(byte[1], 16)
    return chr(value) if value < 128 else f"\\x{byte[1]}"


def _ids(example: Example, tokenizer: Any) -> Text:
    """Every token with its id, its label and the image it sees: exactly what is trained on."""
    lines = ["    id  label  image  token"]
    for token, label, image in zip(example.input_ids, example.labels, example.image_index, strict=True):
        name = tokenizer.convert_ids_to_tokens(int(token))
        lines.append(f"{token:6}  {label if label != IGNORED else '.':>5}  {image if image >= 0 else '.':>5}  {name}")
    return Text("\n".join(lines), style="dim")
