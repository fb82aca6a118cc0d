"""Examples' sizes -> every row of a run, in order: a function of data and seed alone, of no rank and no worker."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from finetune.data.packing import pack


@dataclass(frozen=True)
class Row:
    """One pack of the run: which examples, drawn in which epoch. An empty one fills the last step of an epoch."""

    epoch: int
    examples: tuple[int, ...] = ()


def draws_per_epoch(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many examples of each source an epoch draws: as many in all as there are, in the ratio of the weights.

    Without weights each example is drawn once. Exact to one example (largest remainder).
    sizes (30, 10), weights (1, 1) -> [20, 20]; weights (None, None) -> [30, 10]
    """
    if not sum(sizes) or all(weight is None for weight in weights):
        return list(sizes)
    shares = np.array([weight or 0.0 for weight in weights]) * (np.array(sizes) > 0)
    exact = shares / shares.sum() * sum(sizes)
    draws = np.floor(exact).astype(int)
    for index in np.argsort(draws - exact, kind="stable")[: sum(sizes) - int(draws.sum())]:
        draws[index] += 1
    return [int(draw) for draw in draws]


def draw_epoch(sizes: Sequence[int], draws: Sequence[int], *, seed: int, epoch: int) -> np.ndarray:
    """The examples of one epoch, shuffled: int64 [sum(draws)]. Source s owns the ids after those of sources < s.

    Within a source every example comes equally often, to one; who comes once more is drawn anew each epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    chosen, first = [], 0
    for size, count in zip(sizes, draws, strict=True):
        whole, rest = divmod(count, size) if size else (0, 0)
        chosen += [np.arange(first, first + size)] * whole + [first + rng.permutation(size)[:rest]]
        first += size
    return rng.permutation(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def build_schedule(
    tokens: Sequence[int],
    images: Sequence[int],
    *,
    sizes: Sequence[int],
    draws: Sequence[int],
    row_tokens: int,
    row_images: int,
    packs_per_step: int,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
) -> list[Row]:
    """All rows of the run, a multiple of `packs_per_step`: so many `epochs`, or so many `steps`."""

    def one_epoch(epoch: int) -> list[Row]:
        drawn = draw_epoch(sizes, draws, seed=seed, epoch=epoch)
        packs = pack(
            [tokens[index] for index in drawn],
            [images[index] for index in drawn],
            row_tokens=row_tokens,
            row_images=row_images,
        )
        order = np.random.default_rng([seed, epoch, 1]).permutation(len(packs))
        rows = [Row(epoch, tuple(int(drawn[position]) for position in packs[row])) for row in order]
        return rows + [Row(epoch)] * (-len(rows) % packs_per_step)

    def all_epochs() -> Iterator[Row]:
        epoch = 0
        while epochs is None or epoch < epochs:
            yield from one_epoch(epoch)
            epoch += 1

    if not len(tokens) or sum(draws) == 0:
        return []
    return list(islice(all_epochs(), None if steps is None else steps * packs_per_step))
