"""Prepared data -> what the model will see: what became of the records, the sizes of examples, examples token by token.

Supervised tokens are green, and each token shows which image it sees: in the terminal here, or as a page
(html/inspection.py).
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from finetune.console import display, panel, table, visible
from finetune.data.chunking import Limits, fit_records, splitter
from finetune.data.conversation import Image, RecordError
from finetune.data.dataset import Dataset
from finetune.data.images import open_image
from finetune.data.prepared import Prepared
from finetune.data.read_dialogues import look, read_dialogues
from finetune.data.stats import SourceStats, loss_lines
from finetune.data.tokenize import SPECIALS, Encoder, Example
from finetune.recipe.schema import Data, Source, Training
from finetune.reporting.html.histogram import Histogram, histogram
from modeling.tokens import IGNORED

IMAGE_STYLES = ("cyan", "magenta", "yellow", "blue", "bright_red", "bright_green")
"""Colours of the images of one example, in turn."""

LONGEST = 3
"""Of the longest examples, this many are shown beside those drawn at random."""

TALLEST = 2
"""A picture in the terminal is at most this many times as high as it may be wide."""

STREAMED = 200
"""Dialogues of a streamed source that are read, and shown from."""


@dataclass(frozen=True)
class Token:
    """One token as it reads, what is trained on it, and the image it sees."""

    text: str
    id: int
    supervised: bool = False
    image: int = -1
    """Index into the example's images; -1 sees none."""
    special: bool = False


@dataclass(frozen=True)
class ShownExample:
    """One example as the model will see it."""

    record_id: str
    source: str
    tokens: tuple[Token, ...]
    images: tuple[Image, ...] = ()
    longest: bool = False
    """Shown because it is long; the others are drawn at random."""

    def __post_init__(self) -> None:
        seen = {token.image for token in self.tokens}
        assert seen <= set(range(-1, len(self.images))), f"{self.record_id}: tokens see {seen} of {len(self.images)}"

    @property
    def counts(self) -> str:
        """ "96 tokens, 25 trained on, 1 image"."""
        supervised = sum(token.supervised for token in self.tokens)
        images = f"{len(self.images)} image{'s' if len(self.images) != 1 else ''}"
        return f"{len(self.tokens):,} tokens, {supervised:,} trained on, {images}"


@dataclass(frozen=True)
class Inspection:
    """What there is to see of a recipe's data."""

    stats: list[dict[str, Any]]
    """What became of the records of each source, as in data.json."""
    histograms: list[Histogram]
    examples: list[ShownExample]


def inspect(
    sources: Sequence[Source], dataset: Dataset, tokenizer: Any, data: Data, training: Training, *, count: int
) -> Inspection:
    """Return what there is to see: `count` examples drawn at random, and the longest ones.

    Streamed sources are not prepared: the first of their examples are read and shown.
    """
    prepared, names = dataset.train, [source.name for source in sources if not source.stream]
    stats = [one.to_json() for one in dataset.source_stats]
    examples = [
        show_example(
            prepared.examples[index],
            tokenizer,
            record_id=prepared.record_ids[index],
            source=names[prepared.source_of(index)],
            images=prepared.dialogues[index].images,
            longest=longest,
        )
        for index, longest in choose_shown(prepared.lengths.tolist(), seed=training.seed, drawn=count, longest=LONGEST)
    ]
    streamed = []
    for source in sources:
        if source.stream:
            counted = SourceStats(source.name)
            how = splitter(source, Encoder(tokenizer), Limits(data.max_length, training.row_images), seed=training.seed)
            records = list(islice(read_dialogues(source, counted, seed=training.seed, look=look), STREAMED))
            counted.dialogues += len(records)
            streamed += [
                show_example(
                    example, tokenizer, record_id=origin.record_id, source=source.name, images=piece.dialogue.images
                )
                for piece, example, origin in fit_records(records, how, counted)
            ]
            stats.append(counted.to_json())
    return Inspection(stats, _histograms(prepared, names), examples + streamed[:count])


def choose_shown(lengths: Sequence[int], *, seed: int, drawn: int = 20, longest: int = 5) -> list[tuple[int, bool]]:
    """Return (index, whether it is one of the longest): some drawn by `seed`, in order, then the longest, by length.

    >>> choose_shown([5, 9, 1, 9, 7], seed=0, drawn=9, longest=2)
    [(0, False), (2, False), (4, False), (1, True), (3, True)]
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    top, others = by_length[:longest], sorted(by_length[longest:])
    chosen = random.Random(seed).sample(others, min(drawn, len(others)))  # noqa: S311
    return [(index, False) for index in sorted(chosen)] + [(index, True) for index in top]


def show_example(
    example: Example, tokenizer: Any, *, record_id: str, source: str, images: Sequence[Image], longest: bool = False
) -> ShownExample:
    """Return an example with its tokens as they read."""
    names = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    columns = zip(names, example.input_ids, example.labels, example.image_index, strict=True)
    tokens = tuple(
        Token(token_text(name), int(token), bool(label != IGNORED), int(image), name in SPECIALS)
        for name, token, label, image in columns
    )
    return ShownExample(record_id, source, tokens, tuple(images), longest)


def token_text(name: str) -> str:
    r"""Return a token of a vocabulary as it reads; a part of a longer character as its byte.

    >>> [token_text(name) for name in ("▁What", "<0x41>", "<0xC3>")]
    [' What', 'A', '\\xC3']
    """
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    if byte is None:
        return name.replace("▁", " ")
    value = int(byte[1], 16)
    return chr(value) if value < 128 else f"\\x{byte[1]}"


def _histograms(prepared: Prepared, names: Sequence[str]) -> list[Histogram]:
    """Return the sizes of all training examples; where there are several sources, of each as well."""
    bounds = np.cumsum([0, *prepared.sizes])
    parts: list[tuple[str | None, slice]] = [(None, slice(None))]
    if len(names) > 1:
        parts += [(name, slice(*bounds[number : number + 2])) for number, name in enumerate(names)]
    kinds = (
        ("Tokens per example", "tokens", prepared.lengths),
        ("Images per example", "images", prepared.image_counts),
    )
    return [
        histogram(values[part].tolist(), name=name, unit=unit, source=source)
        for source, part in parts
        for name, unit, values in kinds
        if len(values[part])
    ]


def show_inspection(inspection: Inspection, *, ids: bool) -> None:
    """Print an inspection. `ids`: with every token's id, label and image in a row."""
    display(stats_table(inspection.stats))
    for one in inspection.stats:
        for line in loss_lines(one):
            display(f"{one['source']}: {line}", "yellow")
    for drawn in inspection.histograms:
        display(bars(drawn))
    for example in inspection.examples:
        display(view(example, ids=ids))


def stats_table(stats: Sequence[Mapping[str, Any]]) -> Any:
    """Return a table of what became of the records of each source."""
    columns = ("source", "read", "kept", "rejected", "examples", "tokens", "trained on", "times per epoch")
    rows = [
        (
            one["source"],
            f"{one['read']:,} (limit)" if one["limited"] else one["read"],
            one["kept"],
            sum(one["rejected"].values()),
            one["examples"],
            one["tokens"],
            f"{one['supervised_tokens'] / max(one['tokens'], 1):.0%}",
            one["repeats_per_epoch"],
        )
        for one in stats
    ]
    return table("sources", columns, rows)


def bars(drawn: Histogram, *, width: int = 50) -> Text:
    """Return a histogram as rows of blocks: the lower edge, a bar, the count."""
    most = max(drawn.counts)
    lines = [
        f"{edge:>8,} {'█' * round(width * count / most)}{'▏' if count and count * width < most / 2 else ''} {count:,}"
        for edge, count in zip(drawn.edges[:-1], drawn.counts, strict=True)
    ]
    return Text("\n".join([f"{drawn.name}, {drawn.source or 'all sources'}", *lines, ""]))


def view(example: ShownExample, *, ids: bool = False) -> Panel:
    """Return an example as a panel: green is trained on, and the bar before a token has the colour of its image."""
    text = Text()
    for token in example.tokens:
        if token.image >= 0:
            text.append("▏", style=IMAGE_STYLES[token.image % len(IMAGE_STYLES)])
        text.append(visible(token.text), style="bold green" if token.supervised else "default")
    body = [text]
    if ids:
        lines = [
            f"{token.id:6}  {token.id if token.supervised else '.':>5}  {token.image if token.image >= 0 else '.':>5}  "
            f"{visible(token.text)!r}"
            for token in example.tokens
        ]
        body.append(Text("\n".join(["    id  label  image  token", *lines]), style="dim"))
    for number, image in enumerate(example.images):
        style = IMAGE_STYLES[number % len(IMAGE_STYLES)]
        body.append(Text.assemble((f"image {number} ", style), "\n", picture(image, width=24)))
    title = f"{example.source} {example.record_id}" + (" (one of the longest)" if example.longest else "")
    return panel(Group(*body), title=title, subtitle=example.counts)


def picture(image: Image, *, width: int) -> Text:
    """Return an image in half blocks, two pixels a character, at most `width` characters wide, as many lines high."""
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
            text.append("▀", style=f"#{bytes(top).hex()} on #{bytes(bottom).hex()}")
        text.append("\n")
    return text
