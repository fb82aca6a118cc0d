"""Recipe -> what the model will see: where the records went, how long examples are, and dialogues with their tokens.

Supervised tokens are coloured, and each token shows which image it sees: in the terminal, or as a page.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from finetune.console import display, log, panel, table, visible
from finetune.data.conversation import Dialogue, Image, RecordError
from finetune.data.dataset import Dataset
from finetune.data.fit import Limits, fitter
from finetune.data.images import describe, open_image
from finetune.data.mixing import fit_records
from finetune.data.records import look, read_dialogues
from finetune.data.stats import Account, most_frequent
from finetune.data.tokenize import SPECIALS, Encoder, Example
from finetune.recipe.schema import Recipe, Source
from finetune.reporting.html.chart import Histogram, histogram
from finetune.reporting.html.inspection import ShownDialogue, Token, choose_shown, inspection_page
from finetune.reporting.html.page import thumbnail
from modeling.files import atomic_write
from modeling.tokens import IGNORED

IMAGE_STYLES = ("cyan", "magenta", "yellow", "blue", "bright_red", "bright_green")
"""Colours of the images of one dialogue, in turn."""

LONGEST = 3
"""So many of the longest examples are shown beside those drawn at random."""

TALLEST = 2
"""A picture in the terminal is at most so many times as high as it may be wide."""

STREAMED = 200
"""Of a streamed source, so many dialogues are read, and shown from."""


@dataclass(frozen=True)
class Shown:
    """An example to look at."""

    source: str
    place: str
    dialogue: Dialogue
    example: Example
    longest: bool


class Inspection:
    """What there is to see of a recipe's data; `count` examples drawn at random, and the longest."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source], dataset: Dataset, tokenizer: Any, *, count: int):
        self.recipe, self.sources, self.dataset, self.tokenizer, self.count = recipe, sources, dataset, tokenizer, count

    @property
    def accounts(self) -> list[dict[str, Any]]:
        return [account.to_json() for account in (*self.dataset.accounts, *self._streamed[0])]

    @property
    def _names(self) -> list[str]:
        """Of the prepared training sources."""
        return [source.name for source in self.sources if not source.stream]

    @cached_property
    def shown(self) -> list[Shown]:
        """Of the training examples of prepared sources, then the first of streamed ones."""
        training, names = self.dataset.training, self._names
        seed = self.recipe.training.seed
        prepared = [
            Shown(
                names[training.source_of(index)],
                training.places[index],
                training.dialogues[index],
                training.examples[index],
                longest,
            )
            for index, longest in choose_shown(training.lengths.tolist(), seed=seed, drawn=self.count, longest=LONGEST)
        ]
        return prepared + self._streamed[1][: self.count]

    @cached_property
    def histograms(self) -> list[Histogram]:
        """Lengths and images of all training examples, and of each source where there are several."""
        training, names, made = self.dataset.training, self._names, []
        bounds = np.cumsum([0, *training.sizes])
        parts: list[tuple[str | None, slice]] = [(None, slice(None))]
        if len(names) > 1:
            parts += [(name, slice(*bounds[number : number + 2])) for number, name in enumerate(names)]
        for name, part in parts:
            for values, what, unit in (
                (training.lengths, "length", "tokens"),
                (training.image_counts, "images", "images"),
            ):
                if len(values[part]):
                    made.append(histogram(values[part].tolist(), name=what, unit=unit, source=name))
        return made

    @cached_property
    def _streamed(self) -> tuple[list[Account], list[Shown]]:
        """(accounts, examples) of the first dialogues of streamed sources."""
        accounts, shown = [], []
        for source in self.sources:
            if source.stream:
                account = Account(source.name)
                shown += list(self._first(source, account))
                accounts.append(account)
        return accounts, shown

    def _first(self, source: Source, account: Account) -> list[Shown]:
        data, settings = self.recipe.data, self.recipe.training
        limits = Limits(data.max_length, settings.row_images)
        how = fitter(source, Encoder(self.tokenizer), limits, seed=settings.seed)
        records = list(islice(read_dialogues(source, account, seed=settings.seed, look=look), STREAMED))
        account.dialogues += len(records)
        return [
            Shown(source.name, origin.place, piece.dialogue, example, longest=False)
            for piece, example, origin in fit_records(records, how, account)
        ]


def inspect(
    recipe: Recipe,
    sources: Sequence[Source],
    dataset: Dataset,
    tokenizer: Any,
    *,
    count: int,
    ids: bool,
    html: Path | None,
    show: bool = True,
) -> dict[str, Any]:
    """Show it on the terminal, or write the page; returns the accounts and what is shared with held-out data."""
    inspection = Inspection(recipe, sources, dataset, tokenizer, count=count)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(html, page(inspection))
        log(f"the page: {html}")
    elif show:
        _print(inspection, ids=ids)
    return {"sources": inspection.accounts, "overlap": inspection.dataset.report["overlap"]}


def page(inspection: Inspection) -> str:
    """One self-contained HTML file."""
    images: dict[str, str] = {}
    dialogues = []
    for shown in inspection.shown:
        for image in shown.dialogue.images:
            if (name := describe(image)) not in images and (opened := _opened(image)):
                images[name] = thumbnail(opened)
        keys = tuple(describe(image) for image in shown.dialogue.images)
        tokens = _page_tokens(shown.example, inspection.tokenizer)
        dialogues.append(ShownDialogue(shown.place, shown.source, tokens, keys, shown.longest))
    return inspection_page(
        inspection.accounts,
        dialogues,
        title=Path(inspection.recipe.output).name,
        recipe=inspection.recipe.to_yaml(),
        images=images,
        histograms=inspection.histograms,
    )


def _page_tokens(example: Example, tokenizer: Any) -> tuple[Token, ...]:
    names = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    return tuple(
        Token(
            name if name in SPECIALS else _written(name),
            int(token),
            bool(label != IGNORED),
            int(image),
            name in SPECIALS,
        )
        for name, token, label, image in zip(names, example.input_ids, example.labels, example.image_index, strict=True)
    )


def _opened(image: Image) -> PIL.Image.Image | None:
    """None of one that cannot be opened any more."""
    try:
        return open_image(image)
    except RecordError:
        return None


def _print(inspection: Inspection, *, ids: bool) -> None:
    display(accounts_table(inspection.accounts))
    for account in inspection.accounts:
        for reason, records in {**account["rejected"], **account["parts_rejected"]}.items():
            first = account["first_rejected"][reason]
            display(f"{account['source']}: {records} x {reason} (first: {first})", "yellow")
        for broken in account["broken"]:
            display(broken, "yellow")
        if ignored := account.get("ignored"):
            display(f"{account['source']}: not used of records: {most_frequent(ignored)}", "yellow")
    for drawn in inspection.histograms:
        display(bars(drawn))
    for shown in inspection.shown:
        title = f"{shown.source} {shown.place}" + (" (one of the longest)" if shown.longest else "")
        display(view(shown.dialogue, shown.example, inspection.tokenizer, title=title, ids=ids))


def accounts_table(accounts: Sequence[dict[str, Any]]) -> Any:
    """What became of the records of each source."""
    columns = ("source", "read", "kept", "rejected", "examples", "tokens", "trained on", "repeats")
    rows = [
        (
            account["source"],
            f"{account['read']:,} (limit)" if account["limited"] else account["read"],
            account["kept"],
            sum(account["rejected"].values()),
            account["examples"],
            account["tokens"],
            f"{account['supervised_tokens'] / max(account['tokens'], 1):.0%}",
            account["repeats_per_epoch"],
        )
        for account in accounts
    ]
    return table("sources", columns, rows)


def bars(drawn: Histogram, *, width: int = 50) -> Text:
    """A histogram as rows of blocks: from, count."""
    title = f"{drawn.name} of {drawn.source or 'all examples'}, in {drawn.unit}"
    most = max(drawn.counts)
    lines = [
        f"{edge:>8,} {'█' * round(width * count / most)}{'▏' if count and count * width < most / 2 else ''} {count:,}"
        for edge, count in zip(drawn.edges[:-1], drawn.counts, strict=True)
    ]
    return Text("\n".join([title, *lines, ""]))


def view(dialogue: Dialogue, example: Example, tokenizer: Any, *, title: str, ids: bool) -> Panel:
    """One dialogue as a panel: green is trained on; the bar before a token has the colour of the image it sees."""
    shown = [
        Text.assemble((f"image {number} ", _style(number)), "\n", picture(image, width=24))
        for number, image in enumerate(dialogue.images)
    ]
    counts = f"{len(example)} tokens, {example.supervised} trained on, {len(dialogue.images)} images"
    body = [_tokens(example, tokenizer), *([_ids(example, tokenizer)] if ids else []), *shown]
    return panel(Group(*body), title=title, subtitle=counts)


def picture(image: Image, *, width: int) -> Text:
    """An image in half blocks, two pixels a character; at most so wide, and as many lines high."""
    try:
        opened = open_image(image)
    except RecordError as error:  # it was there when the data was prepared
        return Text(visible(f"({error})\n"))
    shrink = min(width / opened.width, TALLEST * width / opened.height)
    size = max(1, round(shrink * opened.width)), max(2, round(shrink * opened.height / 2) * 2)
    levels_HWC = np.asarray(opened.resize(size, reducing_gap=2))
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
    """The tokens as written, trained ones in green, behind a bar in the colour of the image they see."""
    text = Text()
    for token, label, image in zip(example.input_ids, example.labels, example.image_index, strict=True):
        piece = _written(tokenizer.convert_ids_to_tokens(int(token)))
        if image >= 0:
            text.append("▏", style=_style(int(image)))
        text.append(visible(piece), style="bold green" if label != IGNORED else "default")
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
        lines.append(
            f"{token:6}  {label if label != IGNORED else '.':>5}  {image if image >= 0 else '.':>5}  {visible(name)}"
        )
    return Text("\n".join(lines), style="dim")
