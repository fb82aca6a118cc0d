"""The prepared set on disk: the examples of one source in memory-mapped Arrow files; several sets can be read as one.

NAME-KEY/   examples.arrow   an example a row: tokens, what is supervised, images, the dialogue it was made of
            images.arrow     the distinct images: where their bytes are
            files.arrow      the files in which images were looked up, with size, time and digest
            images/*.bin     images that came inside records, encoded as they came; pixels are never stored
            stats.json     what became of every record; written last, so a set that has it is complete

Paths are bytes, as names of files need not be UTF-8; those of images/*.bin are relative to the set's folder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
import pyarrow as pa

from finetune.data.arrow import ArrowFile, DamagedError
from finetune.data.chunking import by_last_appearance
from finetune.data.conversation import Dialogue, Image, RecordError, Slice, Turn
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Encoder, Example, see_images
from modeling.atomic_files import read_json
from modeling.errors import UserError
from modeling.tokens import IGNORED, IMAGE

Item = TypeVar("Item")

EXAMPLES, IMAGES, STATS = "examples.arrow", "images.arrow", "stats.json"

EXAMPLE_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.bool_()),
        "images": pa.list_(pa.int32()),
        "shown": pa.int32(),
        "questions": pa.list_(pa.uint64()),
        "record_id": pa.string(),
        "dialogue": pa.string(),
    }
)
"""images: row numbers in images.arrow, in order; shown: number of distinct images; questions: their `question_key`s."""

IMAGE_SCHEMA = pa.schema(
    {
        "digest": pa.binary(32),
        "path": pa.binary(),
        "offset": pa.int64(),
        "length": pa.int64(),
        "coding": pa.string(),
    }
)
"""One row per image; offset and length are -1 where the image is the whole file."""


class View(Sequence[Item], Generic[Item]):
    """A sequence whose items are made when asked for."""

    def __init__(self, get: Callable[[int], Item], length: int):
        self._get, self._length = get, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._get(number) for number in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._get(index % self._length)

    def __iter__(self) -> Iterator[Item]:
        return map(self._get, range(self._length))


class PreparedSet:
    """One source, prepared."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.examples, self.images = ArrowFile(folder / EXAMPLES), ArrowFile(folder / IMAGES)
        try:
            self.image_token = int((self.examples.schema.metadata or {})[b"image_token"])
        except (KeyError, ValueError) as error:
            raise DamagedError(folder / EXAMPLES, "other columns than were written") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedSet, (self.folder,)

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """Return the set in this folder, or None if there is none or it is not finished.

        Raises DamagedError: a file is damaged.
        """
        if not (folder / STATS).exists():
            return None
        found = cls(folder)
        found.examples.validate(EXAMPLE_SCHEMA)
        found.images.validate(IMAGE_SCHEMA)
        shown = found.examples.values("images")
        if len(shown) and not 0 <= shown.min() <= shown.max() < len(found.images):
            raise DamagedError(folder / EXAMPLES, "an image that is not in images.arrow")
        if found.stats.examples != len(found):
            raise DamagedError(folder / EXAMPLES, f"{len(found)} examples, {STATS} has {found.stats.examples}")
        return found

    @property
    def stats(self) -> SourceStats:
        return read_stats(self.folder / STATS)

    @property
    def digests(self) -> np.ndarray:
        """Return the SHA-256 of each image's bytes: S32 [images]."""
        return self.images.values("digest").astype("S32")

    def example(self, row: int) -> Example:
        input_ids = self.examples.cell("input_ids", row).astype(np.int64)
        labels = np.where(self.examples.cell("supervised", row), input_ids, IGNORED)
        return Example(input_ids, labels, see_images(input_ids, self.image_token))

    def image(self, row: int) -> Image:
        return image_from_row(self.images.row(row), self.folder)

    def dialogue(self, row: int) -> Dialogue:
        images = [self.image(int(image)) for image in self.examples.cell("images", row)]
        try:
            return dialogue_from_json(self.examples.text("dialogue", row), images)
        except (ValueError, KeyError, TypeError, RuntimeError, RecordError) as error:
            raise DamagedError(self.folder / EXAMPLES, f"dialogue {row}: {error!r}") from error


class Prepared:
    """Examples of several sources, in the order of the sources, ready to be packed. Images are distinct by content."""

    def __init__(self, sets: Sequence[PreparedSet], chosen: np.ndarray | None = None):
        self.sets = tuple(sets)
        self._bounds = np.cumsum([0, *map(len, self.sets)])
        self.chosen = np.arange(self._bounds[-1]) if chosen is None else chosen
        """Indices of the selected examples among all: int64, sorted."""
        digests = np.concatenate([np.zeros(0, "S32"), *(one.digests for one in self.sets)])
        self.digests, self._first, self._number = np.unique(digests, return_index=True, return_inverse=True)
        self._image_bounds = np.cumsum([0, *(len(one.images) for one in self.sets)])

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, chosen: np.ndarray) -> "Prepared":
        """Return the examples with these indices, which must be sorted; images keep their numbers."""
        return Prepared(self.sets, self.chosen[chosen])

    @property
    def sizes(self) -> list[int]:
        """Return the number of examples of each source."""
        return np.diff(np.searchsorted(self.chosen, self._bounds)).tolist()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example: int64 [examples]."""
        return self._column(lambda one: one.examples.lengths("input_ids"))

    @cached_property
    def image_counts(self) -> np.ndarray:
        """Return the number of distinct images of each example: int64 [examples]."""
        return self._column(lambda one: one.examples.values("shown"))

    @property
    def examples(self) -> View[Example]:
        return View(self._example, len(self))

    @property
    def dialogues(self) -> View[Dialogue]:
        return View(self._dialogue, len(self))

    @property
    def record_ids(self) -> View[str]:
        return View(self._place, len(self))

    @property
    def origins(self) -> View[tuple[str, str]]:
        """Return (source, record_id) of each example's record."""
        return View(self._origin, len(self))

    @property
    def image_ids(self) -> View[tuple[int, ...]]:
        """Return, for each example, its images in order, as indices into `images`."""
        return View(self._images_of, len(self))

    @property
    def images(self) -> View[Image]:
        return View(self._image, len(self._first))

    def shown_images(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (example, digest) of every image in an example: int64, S32."""
        examples, rows = self._flat("images")
        offsets = np.repeat(self._image_bounds[:-1], [len(one.examples.values("images")) for one in self.sets])
        taken = examples >= 0
        return examples[taken], self.digests[self._number[(rows + offsets)[taken]]]

    def asked_questions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (example, `question_key`) of every question: int64, uint64."""
        examples, keys = self._flat("questions")
        return examples[examples >= 0], keys[examples >= 0]

    def _flat(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (example, value) of every value in a list column of all sets; example is -1 if not selected."""
        counts = np.concatenate([np.zeros(0, np.int64), *(one.examples.lengths(column) for one in self.sets)])
        index = np.full(int(self._bounds[-1]), -1)
        index[self.chosen] = np.arange(len(self.chosen))
        values = np.concatenate([np.zeros(0, np.uint8), *(one.examples.values(column) for one in self.sets)])
        return np.repeat(index, counts), values

    def source_of(self, index: int) -> int:
        return self._locate(index)[0]

    def _column(self, of: Callable[[PreparedSet], np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *map(of, self.sets)])[self.chosen]

    def _locate(self, index: int) -> tuple[int, int]:
        return _locate(self._bounds, self.chosen[index])

    def _example(self, index: int) -> Example:
        which, row = self._locate(index)
        return self.sets[which].example(row)

    def _dialogue(self, index: int) -> Dialogue:
        which, row = self._locate(index)
        return self.sets[which].dialogue(row)

    def _place(self, index: int) -> str:
        which, row = self._locate(index)
        return self.sets[which].examples.text("record_id", row)

    def _origin(self, index: int) -> tuple[str, str]:
        return self._names[self.source_of(index)], self._place(index)

    @cached_property
    def _names(self) -> list[str]:
        return [one.stats.source for one in self.sets]

    def _images_of(self, index: int) -> tuple[int, ...]:
        which, row = self._locate(index)
        local = self.sets[which].examples.cell("images", row)
        return tuple(self._number[self._image_bounds[which] + local].tolist())

    def _image(self, image: int) -> Image:
        which, row = _locate(self._image_bounds, self._first[image])
        return self.sets[which].image(row)


STATS_KEY = b"stats"
"""Key of the statistics in the metadata of a file that is not a set yet."""


def example_metadata(encoder: Encoder, stats: SourceStats) -> dict[str, str]:
    """Return the metadata of examples.arrow: the id of the image token, and the statistics so far."""
    return {"image_token": str(encoder.specials[IMAGE]), "stats": json.dumps(stats.partial())}


def stats_in(file: ArrowFile) -> SourceStats:
    """Return the statistics in a file's metadata. Raises DamagedError."""
    try:
        return SourceStats.from_json(json.loads(file.schema.metadata[STATS_KEY]))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamagedError(file.path, "no stats") from error


def is_undamaged(path: Path, schema: pa.Schema, *, stats: bool = False) -> bool:
    """Return whether an Arrow file exists and is undamaged; `stats`: with statistics in its metadata."""
    try:
        file = ArrowFile(path).validate(schema)
        if stats:
            stats_in(file)
    except DamagedError:
        return False
    return True


def read_stats(path: Path) -> SourceStats:
    """Return the statistics in a set's stats.json. Raises DamagedError."""
    try:
        return SourceStats.from_json(read_json(path) or {})
    except (UserError, TypeError, KeyError, ValueError) as error:
        raise DamagedError(path, "not the stats of a source") from error


def _locate(bounds: np.ndarray, number: int) -> tuple[int, int]:
    which = int(np.searchsorted(bounds, number, side="right")) - 1
    return which, int(number - bounds[which])


def example_row(
    dialogue: Dialogue, example: Example, images: Sequence[int], digest: Callable[[int], bytes], record_id: str
) -> dict[str, Any]:
    """Return an example's row of examples.arrow; images: their rows in images.arrow; digest: of such a row's image."""
    questions, shown = [], 0
    for turn in dialogue.turns:
        shown += len(turn.images)
        if turn.role == "user":  # by last appearance: the same whether its dialogue was divided before it or not
            questions.append(question_key(map(digest, by_last_appearance(images[:shown])), turn.text))
    return {
        "input_ids": example.input_ids,
        "supervised": example.labels != IGNORED,
        "images": images,
        "shown": len(set(images)),
        "questions": questions,
        "record_id": record_id,
        "dialogue": dialogue_to_json(dialogue),
    }


def question_key(images: Iterable[bytes], question: str) -> int:
    """Return a 64-bit key: equal for equal questions (ignoring case and spacing) about images with equal digests."""
    words = " ".join(question.lower().split())
    content = b"".join(images) + words.encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def image_row(image: Image, digest: bytes, folder: Path) -> dict[str, Any]:
    """Return an image's row of images.arrow, for the set in `folder`."""
    source = image.source
    assert isinstance(source, Path | Slice)
    path, own = (source.path if isinstance(source, Slice) else source).absolute(), folder.absolute()
    name = os.fsencode(path.relative_to(own) if path.is_relative_to(own) else path)
    place = (source.offset, source.length, source.coding) if isinstance(source, Slice) else (-1, -1, "raw")
    return dict(zip(IMAGE_SCHEMA.names, (digest, name, *place), strict=True))


def image_from_row(row: dict[str, Any], folder: Path) -> Image:
    path = folder / os.fsdecode(row["path"])
    return Image(path if row["offset"] < 0 else Slice(path, row["offset"], row["length"], row["coding"]))


def dialogue_to_json(dialogue: Dialogue) -> str:
    """Return a dialogue as JSON, with null for each image: the example lists its images in order."""
    turns = [
        [
            turn.role,
            [part if isinstance(part, str) else None for part in turn.parts],
            turn.references,
            *([] if turn.supervised else [False]),
        ]
        for turn in dialogue.turns
    ]
    text = json.dumps({"turns": turns, "goes_on": dialogue.goes_on}, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate, in references, as JSON escapes it


def dialogue_from_json(text: str, images: Iterable[Image]) -> Dialogue:
    values, next_image = json.loads(text), iter(images)
    turns = tuple(
        Turn(role, tuple(next(next_image) if part is None else part for part in parts), tuple(references), *supervised)
        for role, parts, references, *supervised in values["turns"]
    )
    return Dialogue(turns, values["goes_on"])
