"""Examples -> Batch. The only file that builds batch tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import numpy as np
import torch

from finetune.data.dialogue import Image
from finetune.data.images import Augmentation, Preprocessing, open_image
from finetune.data.schedule import Row
from finetune.data.tokens import IGNORED, Example


class Batch(TypedDict):
    """One packed row of T tokens, S sequences and N distinct images.

    input_ids, labels, position_ids   int64 [1, T]    position_ids restart at 0 in every sequence
    sequence_starts                   int32 [S + 1]   cumulative lengths
    image_index                       int64 [1, T]    index into this batch's images, -1 = none
    pixel_values                      float32 [N, 3, H, W]   real images only, none padded (but see `blank_image`)
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    sequence_starts: torch.Tensor
    image_index: torch.Tensor
    pixel_values: torch.Tensor


def collate(
    examples: Sequence[Example],
    image_ids: Sequence[Sequence[int]],
    *,
    pixels: Callable[[int], np.ndarray],
    image_size: tuple[int, int],
    filler: int,
    blank_image: bool = False,
) -> Batch:
    """Lay examples end to end. `image_ids[i]` names the images of example i; an image used twice is there once.

    Two examples of 3 and 2 tokens, the second one seeing image 7:

    position_ids 0 1 2 0 1    sequence_starts 0 3 5    image_index -1 -1 -1 0 0    pixel_values of 7

    With no examples, a row of the one unsupervised token `filler`. With `blank_image`, a row without images carries a
    black one that no token sees: a vision tower that is trained then has a gradient (of zero) in every row.
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
    empty = np.zeros((int(blank_image), 3, *image_size), dtype=np.float32)
    return {
        "input_ids": _row([example.input_ids for example in examples]),
        "labels": _row([example.labels for example in examples]),
        "position_ids": _row([np.arange(length) for length in lengths]),
        "sequence_starts": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "image_index": _row(seen),
        "pixel_values": torch.from_numpy(np.stack([pixels(image) for image in distinct]) if distinct else empty),
    }


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]


class Rows(Protocol):
    """The rows of a run by number, as a DataLoader and a trainer use them."""

    def __call__(self, features: Sequence[dict[str, int]]) -> Batch:
        """`features` is one `{"row": number}`: a micro-batch is one pack."""

    def __len__(self) -> int: ...

    def at(self, number: int) -> Batch: ...

    def epoch(self, number: int) -> int:
        """In which pass through the data a row was drawn."""

    def tokens(self, number: int) -> int:
        """How many tokens of examples a row holds."""


@dataclass(frozen=True)
class RowCollator:
    """The rows of a schedule over prepared examples. Plain data, so workers can have it."""

    rows: Sequence[Row]
    examples: Sequence[Example]
    image_ids: Sequence[Sequence[int]]
    images: Sequence[Image]
    preprocessing: Preprocessing
    filler: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    blank_image: bool = False

    def __call__(self, features: Sequence[dict[str, int]]) -> Batch:
        (feature,) = features
        return self.at(feature["row"])

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, number: int) -> Batch:
        return self.batch(self.rows[number])

    def epoch(self, number: int) -> int:
        return self.rows[number].epoch

    def tokens(self, number: int) -> int:
        return sum(len(self.examples[index]) for index in self.rows[number].examples)

    def batch(self, row: Row) -> Batch:
        return collate(
            [self.examples[index] for index in row.examples],
            [self.image_ids[index] for index in row.examples],
            pixels=lambda image: self._pixels(image, row.epoch),
            image_size=self.preprocessing.size,
            filler=self.filler,
            blank_image=self.blank_image,
        )

    def _pixels(self, image: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, image]) if self.augmentation != Augmentation() else None
        opened = open_image(self.images[image])
        return self.preprocessing.pixels(opened, augmentation=self.augmentation, rng=rng)
