"""Examples' sizes -> all rows of a run, in order. They depend on data and seed, not on ranks or workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np

from finetune.data.packing import pack

Unit = Literal["examples", "tokens"]


@dataclass(frozen=True)
class Row:
    """One packed row: its examples, and the epoch they were drawn in. Empty rows fill the last step of an epoch."""

    epoch: int
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mix:
    """The ratio in which sources are sampled. Source s owns the examples numbered after those of sources < s.

    An epoch draws as many examples (or tokens) as the sources hold in total, divided in the ratio of their weights;
    without weights, each example is drawn once.
    """

    sizes: Sequence[int]
    """Number of examples of each source."""
    weights: Sequence[float | None]
    lengths: np.ndarray
    """Number of tokens of each example: int64 [examples]."""
    unit: Unit = "examples"

    @cached_property
    def repeats(self) -> list[float]:
        """Return how often an example of each source is drawn per epoch, on average."""
        return [share / amount if amount else 0.0 for share, amount in zip(self._shares, self._amounts, strict=True)]

    @cached_property
    def draws(self) -> list[int]:
        """Return the number of examples of each source per epoch; approximate when weighing by tokens."""
        if self.unit == "examples":
            return self._shares
        return [round(repeat * size) for repeat, size in zip(self.repeats, self.sizes, strict=True)]

    def draw(self, *, seed: int, epoch: int) -> np.ndarray:
        """Return the examples of one epoch, shuffled: int64.

        Within a source, the numbers of draws of any two examples differ by at most one; each epoch selects anew which
        examples are drawn once more. The amount of each source is within one example of its share.
        """
        rng = np.random.default_rng([seed, epoch])
        chosen = [np.zeros(0, np.int64)]
        for first, size, share, amount in zip(self._firsts, self.sizes, self._shares, self._amounts, strict=True):
            whole, rest = divmod(share, amount) if amount else (0, 0)
            order = first + rng.permutation(size)
            if self.unit == "examples":
                count = int(rest)
            else:  # those that come closest to the rest of the share
                count = int(np.abs(np.cumsum([0, *self.lengths[order]]) - rest).argmin())
            chosen += [np.arange(first, first + size)] * int(whole) + [order[:count]]
        return rng.permutation(np.concatenate(chosen))

    @property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *self.sizes])[:-1]

    @cached_property
    def _amounts(self) -> list[int]:
        """Return the size of each source, in examples or tokens."""
        if self.unit == "examples":
            return list(self.sizes)
        bounds = zip(self._firsts, self.sizes, strict=True)
        return [int(self.lengths[first : first + size].sum()) for first, size in bounds]

    @cached_property
    def _shares(self) -> list[int]:
        """Return the amount that an epoch draws from each source, by the largest remainder method.

        sizes (30, 10), weights (1, 1) -> [20, 20]; weights (None, None) -> [30, 10]
        """
        total = sum(self._amounts)
        if not total or all(weight is None for weight in self.weights):
            return self._amounts
        shares = np.array([weight or 0.0 for weight in self.weights]) * (np.array(self._amounts) > 0)
        exact = shares / shares.sum() * total
        draws = np.floor(exact).astype(np.int64)
        for index in np.argsort(draws - exact, kind="stable")[: total - int(draws.sum())]:
            draws[index] += 1
        return draws.tolist()


def build_schedule(
    mix: Mix,
    images: np.ndarray,
    *,
    row_tokens: int,
    row_images: int,
    rows_per_step: int,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
) -> list[Row]:
    """Return all rows of a run of `epochs` or `steps`; their number is a multiple of `rows_per_step`.

    images: number of distinct images of each example, int64 [examples].
    """

    def one_epoch(epoch: int) -> list[Row]:
        drawn = mix.draw(seed=seed, epoch=epoch)
        tokens, pictures = mix.lengths[drawn].tolist(), images[drawn].tolist()
        packs = pack(tokens, pictures, row_tokens=row_tokens, row_images=row_images)
        order = np.random.default_rng([seed, epoch, 1]).permutation(len(packs))
        rows = [Row(epoch, tuple(drawn[packs[row]].tolist())) for row in order]
        return rows + [Row(epoch)] * (-len(rows) % rows_per_step)

    def all_epochs() -> Iterator[Row]:
        epoch = 0
        while epochs is None or epoch < epochs:
            yield from one_epoch(epoch)
            epoch += 1

    if not sum(mix.draws):
        return []
    return list(islice(all_epochs(), None if steps is None else steps * rows_per_step))
