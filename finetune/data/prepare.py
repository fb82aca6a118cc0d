"""Sources -> the prepared set: every record accounted for, every image decoded once, every dialogue tokenised."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.dialogue import Dialogue, Image, RecordError, Turn
from finetune.data.images import digest, open_image
from finetune.data.sources import FORMATS
from finetune.data.sources.files import ImageRoot
from finetune.data.template import render
from finetune.data.tokens import Example, tokenize
from finetune.data.tracking import Track, silently
from modeling.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where records come from."""

    format: str
    path: Path | None = None
    image_root: Path | None = None
    split: str = "train"
    limit: int | None = None
    turns: int = 1
    """Questions about one image are joined into dialogues of at most so many question-answer turns."""

    @property
    def label(self) -> str:
        """Short, for a progress bar."""
        return self.path.name if self.path else self.format

    @property
    def name(self) -> str:
        where = str(self.path) if self.path else self.format
        return f"{where}[{self.split}]"


@dataclass
class Account:
    """What became of the records of one source: read = kept + rejected + not taken."""

    source: str
    read: int = 0
    kept: int = 0
    not_taken: int = 0
    rejected: dict[str, int] = field(default_factory=Counter)
    """Reason -> records."""
    first_rejected: dict[str, str] = field(default_factory=dict)
    """Reason -> place and detail of the first."""
    dialogues: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    images: int = 0
    draws_per_epoch: int | None = None

    def reject(self, place: str, error: RecordError, *, records: int = 1) -> None:
        self.rejected[error.reason] += records
        self.first_rejected.setdefault(error.reason, f"{place}: {error.detail}".removesuffix(": "))

    def rejection(self) -> str:
        """ "4 of 10 records rejected: corrupt image 2, missing image 2"."""
        reasons = ", ".join(f"{reason} {records}" for reason, records in self.rejected.items())
        return f"{sum(self.rejected.values())} of {self.read} records rejected: {reasons}"

    def to_json(self) -> dict[str, Any]:
        assert self.read == self.kept + sum(self.rejected.values()) + self.not_taken, f"records lost: {self}"
        return {**asdict(self), "rejected": dict(self.rejected)}


@dataclass(frozen=True)
class Prepared:
    """Examples ready to be packed, in the order of their sources."""

    examples: list[Example]
    dialogues: list[Dialogue]
    image_ids: list[tuple[int, ...]]
    """For each example, its images in order, as indices into `images`."""
    images: list[Image]
    """Distinct by content."""
    sizes: list[int]
    """Examples per source."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int]:
        return [len(example) for example in self.examples]

    @property
    def image_counts(self) -> list[int]:
        return [len(set(ids)) for ids in self.image_ids]

    def select(self, chosen: Sequence[int]) -> "Prepared":
        """The examples with these indices, which must be sorted; images stay numbered as they were."""
        bounds = np.cumsum([0, *self.sizes])
        return Prepared(
            [self.examples[index] for index in chosen],
            [self.dialogues[index] for index in chosen],
            [self.image_ids[index] for index in chosen],
            self.images,
            np.histogram(chosen, bins=bounds)[0].tolist() if len(chosen) else [0] * len(self.sizes),
        )


def prepare(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    max_length: int,
    max_images: int,
    seed: int,
    track: Track = silently,
) -> tuple[Prepared, list[Account]]:
    """Read, convert, check and tokenise. A record that cannot be used is counted under its reason, never skipped."""
    images = _Images()
    prepared = Prepared([], [], [], images.distinct, [])
    accounts = []
    for source in sources:
        account = Account(source.name)
        dialogues = read_dialogues(source, account, seed=seed, track=track)
        before = len(prepared)
        for place, dialogue in track(dialogues, f"tokenise {source.label}"):
            account.dialogues += 1
            try:
                ids = images.add(dialogue.images)
                example = _example(dialogue, tokenizer, len(set(ids)), max_length=max_length, max_images=max_images)
            except RecordError as error:
                account.reject(place, error, records=dialogue.records)
                continue
            account.kept += dialogue.records
            account.examples += 1
            account.tokens += len(example)
            account.supervised_tokens += example.supervised
            prepared.examples.append(example)
            prepared.dialogues.append(dialogue)
            prepared.image_ids.append(ids)
        prepared.sizes.append(len(prepared) - before)
        account.images = len({image for ids in prepared.image_ids[before:] for image in ids})
        accounts.append(account)
    return prepared, accounts


def read_dialogues(
    source: Source, account: Account, *, seed: int, track: Track = silently
) -> list[tuple[str, Dialogue]]:
    """(place, dialogue) for every record that converts; questions about one image joined as the source says."""
    root = ImageRoot(source.image_root or (source.path.parent if source.path else Path()))
    dialogues = list(_convert(source, account, root, track))
    return _join(dialogues, turns=source.turns, seed=seed) if source.turns > 1 else dialogues


def split_by_image(prepared: Prepared, fraction: float, *, seed: int) -> tuple[Prepared, Prepared]:
    """(training, held out): at most `fraction` of the examples (or one), no image on both sides. Raises UserError."""
    groups = _groups(prepared.image_ids)
    order = np.random.default_rng([seed, 2]).permutation(len(groups))
    held: list[int] = []
    wanted = max(1, round(fraction * len(prepared))) if fraction else 0
    for group in order:
        if len(held) + len(groups[group]) <= wanted:
            held += groups[group]
    if wanted and len(held) in (0, len(prepared)):
        raise UserError(
            f"data.eval_split: {fraction:g} of {len(prepared)} examples cannot be held out: they share images, and the "
            f"smallest group that does has {min(map(len, groups), default=0)}; set eval_sources, or a larger share"
        )
    kept = sorted(set(range(len(prepared))) - set(held))
    return prepared.select(kept), prepared.select(sorted(held))


def _convert(source: Source, account: Account, root: ImageRoot, track: Track) -> Iterator[tuple[str, Dialogue]]:
    family = FORMATS[source.format]
    for place, record in track(family.read(source.path, source.split), f"read {source.label}"):
        account.read += 1
        if source.limit is not None and account.read > source.limit:
            account.not_taken += 1
            continue
        try:
            if isinstance(record, RecordError):
                raise record
            dialogue = family.convert(record, root)
            if dialogue.is_prompt:
                raise RecordError("no answer to the last question", "the dialogue ends with the user")
        except RecordError as error:
            account.reject(place, error)
            continue
        yield place, dialogue


def _example(dialogue: Dialogue, tokenizer: Any, images: int, *, max_length: int, max_images: int) -> Example:
    if images > max_images:
        raise RecordError("too many images", f"{images}, row_images is {max_images}")
    example = tokenize(render(dialogue), tokenizer)
    if len(example) > max_length:
        raise RecordError("too long", f"{len(example)} tokens, max_length is {max_length}")
    if not example.supervised:
        raise RecordError("nothing supervised", "no token of this dialogue is trained on")
    return example


class _Images:
    """Distinct images by content; each is decoded once, so that a broken one is found now and not in training."""

    def __init__(self) -> None:
        self.distinct: list[Image] = []
        self._by_content: dict[str, int] = {}
        self._by_path: dict[Path, int | RecordError] = {}

    def add(self, images: Sequence[Image]) -> tuple[int, ...]:
        return tuple(self._add(image) for image in images)

    def _add(self, image: Image) -> int:
        path = image.source if isinstance(image.source, Path) else None
        known = self._by_path.get(path) if path else None
        if isinstance(known, RecordError):
            raise known
        if known is not None:
            return known
        try:
            open_image(image)
        except RecordError as error:
            if path:
                self._by_path[path] = error
            raise
        index = self._by_content.setdefault(digest(image), len(self.distinct))
        if index == len(self.distinct):
            self.distinct.append(image)
        if path:
            self._by_path[path] = index
        return index


def _join(dialogues: list[tuple[str, Dialogue]], *, turns: int, seed: int) -> list[tuple[str, Dialogue]]:
    """One-question dialogues that open with the same single image and ask become multi-turn ones, the image shown once.

    The order of an image's questions is shuffled by `seed`. Dialogues of another form stay as they are.
    """
    rng = np.random.default_rng([seed, 3])
    by_image: dict[Image, list[tuple[str, Dialogue]]] = defaultdict(list)
    joined = []
    for place, dialogue in dialogues:
        if [turn.role for turn in dialogue.turns] == ["user", "assistant"] and _asks_about_its_image(dialogue):
            by_image[dialogue.images[0]].append((place, dialogue))
        else:
            joined.append((place, dialogue))
    for questions in by_image.values():
        shuffled = [questions[index] for index in rng.permutation(len(questions))]
        for start in range(0, len(shuffled), turns):
            joined.append(_join_one(shuffled[start : start + turns]))
    return joined


def _asks_about_its_image(dialogue: Dialogue) -> bool:
    """Image first, then words: without words nothing would be left of the question once the image is not repeated."""
    question = dialogue.turns[0]
    return len(dialogue.images) == 1 and question.parts[0] == dialogue.images[0] and bool(question.text)


def _join_one(questions: list[tuple[str, Dialogue]]) -> tuple[str, Dialogue]:
    (place, first), *others = questions
    turns = list(first.turns)
    for _, dialogue in others:
        question, answer = dialogue.turns
        turns += [Turn("user", question.parts[1:]), answer]
    return place, Dialogue(tuple(turns), records=len(questions))


def _groups(image_ids: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Examples connected by shared images, directly or through others; each without images is its own group."""
    parent: dict[int, int] = {}

    def root(image: int) -> int:
        while parent.setdefault(image, image) != image:
            parent[image] = image = parent[parent[image]]
        return image

    for ids in image_ids:
        for image in ids[1:]:
            parent[root(image)] = root(ids[0])
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for example, ids in enumerate(image_ids):
        groups[("image", root(ids[0])) if ids else ("text", example)].append(example)
    return list(groups.values())


def require_examples(prepared: Prepared, accounts: Sequence[Account]) -> None:
    """Raise UserError when no dialogue is left, with the reasons."""
    if not len(prepared):
        reasons = [
            f"  {account.source}: {count} x {reason} (first: {account.first_rejected[reason]})"
            for account in accounts
            for reason, count in account.rejected.items()
        ]
        raise UserError("\n".join(["no dialogue is left:", *(reasons or ["  the sources are empty"])]))
