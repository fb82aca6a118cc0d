"""Where the sequences and the images lie in a packed row, and which of its positions are supervised.

The processes that make rows import this file, and so not the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling.tokens import IGNORED

ImageRun = tuple[int, int, int]
"""(start, stop, image): tokens [start, stop) of the row see this image of the row."""


@dataclass(frozen=True)
class Layout:
    """Positions of the sequences and the images in a packed row.

    They are plain numbers, made on the CPU: reading them from a tensor on a GPU would block the host.
    """

    sequence_starts: tuple[int, ...]
    """The S + 1 cumulative lengths of the sequences."""
    image_runs: tuple[ImageRun, ...]


def lay_out(sequence_starts: Sequence[int], image_index: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Return the derived part of a row's batch: its layout, its supervised positions and their targets.

    image_index and labels int64 [1, T], on the CPU -> {"layout", "supervised_positions" and "targets" int64 [K]}.
    """
    positions, targets = supervised_positions(labels)
    layout = Layout(tuple(sequence_starts), tuple(image_runs(image_index)))
    return {"layout": layout, "supervised_positions": positions, "targets": targets}


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (positions whose next token is supervised, those next tokens), int64 [K] each. The only shift by one.

    labels [[-100, -100, 7, 9]] -> ([1, 2], [7, 9]). A sequence's first token is never supervised, so no position
    predicts across a pack's boundary.
    """
    targets = labels[0, 1:]
    positions = (targets != IGNORED).nonzero()[:, 0]
    return positions, targets[positions]


def image_runs(image_index: torch.Tensor) -> list[ImageRun]:
    """Return maximal runs of tokens that see the same image: [[-1, 0, 0, 1, -1]] -> [(1, 3, 0), (3, 4, 1)].

    A run may extend over neighbouring sequences that share an image, since cross-attention does not mix tokens.
    """
    seen, lengths = torch.unique_consecutive(image_index[0], return_counts=True)
    stops = lengths.cumsum(0)
    rows = torch.stack([stops - lengths, stops, seen], dim=1).tolist()
    return [(start, stop, image) for start, stop, image in rows if image >= 0]
