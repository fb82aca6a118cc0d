"""Examples -> Batch. The only file that builds batch tensors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, TypedDict

import numpy as np
import torch

from finetune.data.conversation import Image
from finetune.data.images import Preprocessing, open_image
from finetune.data.sampling import Row
from finetune.data.tokenize import Example
from finetune.recipe.schema import Augment
from modeling.layout import Layout, lay_out
from modeling.tokens import IGNORED


class Batch(TypedDict, total=False):
    """One packed row of T tokens, S sequences and N distinct images.

    input_ids, labels, position_ids   int64 [1, T]    position_ids restart at 0 in every sequence
    image_index                       int64 [1, T]    index into this batch's images, -1 = none
    supervised_positions, targets     int64 [K]       positions whose next token is supervised, and that token
    layout                            plain numbers   where the sequences and the images lie

    and the images, without padding (but see `stack_pixels`), as one of

    pixel_values                      float32 [N, 3, H, W]
    image_features                    [N, latents, D], in the model's dtype
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    image_index: torch.Tensor
    supervised_positions: torch.Tensor
    targets: torch.Tensor
    layout: Layout
    pixel_values: torch.Tensor
    image_features: torch.Tensor


def collate(
    examples: Sequence[Example],
    image_ids: Sequence[Sequence[int]],
    *,
    show: Callable[[Sequence[int]], Batch],
    filler: int,
) -> Batch:
    """Concatenate examples. `image_ids[i]` lists the images of example i; an image used twice is stored once.

    Two examples of 3 and 2 tokens, the second one seeing image 7:

    position_ids 0 1 2 0 1    image_index -1 -1 -1 0 0    layout: starts 0 3 5, run (3, 5, 0)    and `show([7])`

    Without examples, the row is one unsupervised token, `filler`.
    """
    if not examples:
        one = np.zeros(1, dtype=np.int64)
        examples, image_ids = [Example(one + filler, one + IGNORED, one - 1)], [()]
    distinct = list(dict.fromkeys(image for images in image_ids for image in images))
    place = {image: index for index, image in enumerate(distinct)}
    seen = [
        # The extra last entry is what index -1 ("none yet") finds.
        np.array([*(place[image] for image in images), -1])[example.image_index]
        for example, images in zip(examples, image_ids, strict=True)
    ]
    lengths = [len(example) for example in examples]
    labels, image_index = _row([example.labels for example in examples]), _row(seen)
    return {
        "input_ids": _row([example.input_ids for example in examples]),
        "labels": labels,
        "position_ids": _row([np.arange(length) for length in lengths]),
        "image_index": image_index,
        **lay_out([0, *accumulate(lengths)], image_index, labels),  # type: ignore[typeddict-item]
        **show(distinct),
    }


def stack_pixels(
    images: Sequence[int], pixels: Callable[[int], np.ndarray], *, size: tuple[int, int], blank: bool = False
) -> torch.Tensor:
    """Return the pixels of images of `size` (height, width): float32 [N, 3, H, W].

    With `blank`, a row without images gets one black image, which no token sees, so that a trained vision tower has a
    gradient (of zero) in every row.
    """
    if not images:
        return torch.zeros(int(blank), 3, *size)
    return torch.from_numpy(np.stack([pixels(image) for image in images]))


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]


@dataclass(frozen=True)
class MadeRow:
    """A row on its way from where it was made, perhaps another process, to the trainer."""

    number: int
    batch: Batch
    state: dict[str, Any] | None = None
    """Where streams stand after it, as JSON values; None for rows that have no state."""


class Rows(Protocol):
    """The rows of a run by number. They are made in any process, and taken by the one that trains on them."""

    def __len__(self) -> int: ...

    def workers(self, most: int, *, processes: int) -> int:
        """Return how many worker processes, at most `most`, should make the rows of one of `processes` that train.

        0: a thread makes them as fast.
        """

    def make(self, number: int) -> MadeRow: ...

    def take(self, made: MadeRow) -> Batch:
        """Return the batch of a row, which the trainer is about to train on."""
        return made.batch

    def at(self, number: int) -> Batch:
        return self.take(self.make(number))

    def epoch(self, number: int) -> int:
        """Return the epoch in which a row was drawn."""

    def tokens(self, number: int) -> int:
        """Return the number of example tokens in a row."""

    def dialogues(self, number: int) -> "list[tuple[Origin, Batch]]":
        """Return each example of a row as a batch of its own, with its origin."""

    def empty(self) -> Batch:
        """Return a row without examples."""

    def state(self, rows: int) -> list[Any]:
        """Return the state to checkpoint after this process's rows among the first `rows`, as JSON values."""
        return []

    def restore(self, state: Sequence[Any]) -> None:
        """Restore the state of a checkpoint or of other processes."""
        assert not state, "of rows that have none"


Origin = tuple[str, str]
"""(source, record_id) of the record from which an example was made."""


class Features(Protocol):
    """The resampler's features of images, by image number."""

    def __call__(self, images: Sequence[int]) -> torch.Tensor:
        """Return the features of these images: [N, latents, D] in the model's dtype."""

    def exchanged(self, other: Mapping[int, int]) -> "Features":
        """Return features in which image `i` has those of image `other[i]`."""


@dataclass(frozen=True)
class RowCollator(Rows):
    """The rows of a schedule over prepared examples. It is plain data, so that it can be sent to workers."""

    rows: Sequence[Row]
    examples: Sequence[Example]
    image_ids: Sequence[Sequence[int]]
    images: Sequence[Image]
    preprocessing: Preprocessing
    filler: int
    augment: Augment = field(default_factory=Augment)
    seed: int = 0
    blank_image: bool = False
    features: Features | None = None
    """Cached features, which replace the pixels."""
    origins: Sequence[Origin] = ()
    """Origin of each example."""
    skipped: Collection[Origin] = frozenset()
    """Records whose examples are left out of the rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def workers(self, most: int, *, processes: int) -> int:
        """Return `most` where rows have images to open: a thread gathers cached features faster than a process."""
        return most if self.features is None and len(self.images) else 0

    def make(self, number: int) -> MadeRow:
        return MadeRow(number, self.batch(self.rows[number]))

    def epoch(self, number: int) -> int:
        return self.rows[number].epoch

    def tokens(self, number: int) -> int:
        return sum(len(self.examples[index]) for index in self._taken(self.rows[number]))

    def dialogues(self, number: int) -> list[tuple[Origin, Batch]]:
        row = self.rows[number]
        return [(self.origins[index], self.batch(Row(row.epoch, (index,)))) for index in self._taken(row)]

    def empty(self) -> Batch:
        return self.batch(Row(0))

    def batch(self, row: Row) -> Batch:
        taken = self._taken(row)
        return collate(
            [self.examples[index] for index in taken],
            [self.image_ids[index] for index in taken],
            show=lambda images: self._show(images, row.epoch),
            filler=self.filler,
        )

    def _taken(self, row: Row) -> Sequence[int]:
        if not self.skipped:
            return row.examples
        return [index for index in row.examples if self.origins[index] not in self.skipped]

    def _show(self, images: Sequence[int], epoch: int) -> Batch:
        if self.features is not None:
            return {"image_features": self.features(images)}

        def pixels(image: int) -> np.ndarray:
            rng = np.random.default_rng([self.seed, epoch, image]) if self.augment != Augment() else None
            return self.preprocessing.pixels(open_image(self.images[image]), augment=self.augment, rng=rng)

        size, blank = self.preprocessing.size, self.blank_image
        return {"pixel_values": stack_pixels(images, pixels, size=size, blank=blank)}
