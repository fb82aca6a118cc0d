"""Pack sequences into rows under two budgets, tokens and images. The result depends only on the lengths, in order."""

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

LARGE = 1 / 4
"""Share of a row from which on a sequence is large: large ones are packed first, in decreasing size."""

LAST = 1 / 10
"""Share of all sequences that are packed last: the smallest ones, which fill the remaining gaps."""

ENDS = 16
"""Number of ends of a window that are tried."""


def pack(tokens: Sequence[int], images: Sequence[int], *, row_tokens: int, row_images: int) -> list[list[int]]:
    """Pack by best fit: each sequence, in the order of `arrange`, goes into the row with the fewest free tokens left.

    >>> pack((5, 3, 4), (1, 0, 1), row_tokens=8, row_images=1)
    [[0, 1], [2]]

    For each number of free images, the numbers of free tokens that occur are the 1 bits of one integer, so the best
    fit is found by a shift and the lowest set bit. Raises ValueError for a sequence that no row can hold.
    """
    rows: list[list[int]] = []
    # rooms[free images], bit n: a row with so many free images and n free tokens exists
    rooms = [0] * (row_images + 1)
    rows_with: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (length, pictures) in enumerate(zip(tokens, images, strict=True)):
        if length > row_tokens or pictures > row_images:
            raise ValueError(f"sequence {index}: {length} tokens, {pictures} images; {row_tokens}, {row_images} fit")
    for index in arrange(tokens, images, row_tokens=row_tokens, row_images=row_images):
        length, pictures = tokens[index], images[index]
        room, image_room = _best_fit(rooms, length, pictures, row_tokens)
        if room < 0:
            room, image_room, row = row_tokens, row_images, len(rows)
            rows.append([])
        else:
            row = rows_with[room, image_room].pop()
            if not rows_with[room, image_room]:
                rooms[image_room] &= ~(1 << room)
        rows[row].append(index)
        room, image_room = room - length, image_room - pictures
        rows_with[room, image_room].append(row)
        rooms[image_room] |= 1 << room
    return rows


def pack_window(
    tokens: Sequence[int], images: Sequence[int], *, rows: int, row_tokens: int, row_images: int
) -> list[list[int]]:
    """Pack the first sequences into about `rows` rows: as many of the sequences as leave the least room in their rows.

    What is left over belongs to the next window. The last row of a window whose end is not chosen is half empty on
    average; with a chosen end, windows of 8 rows are as full as whole epochs.

    >>> pack_window((5, 3, 4), (0, 0, 0), rows=1, row_tokens=8, row_images=1)
    [[0, 1]]
    """
    totals = zip(accumulate(tokens), accumulate(images), strict=True)
    filled = [max(length / row_tokens, pictures / row_images) for length, pictures in totals]
    stops = [stop for stop, amount in enumerate(filled, start=1) if amount >= rows - 1 / 2] or [len(filled)]
    best, fullest = [], 0.0
    for stop in stops[:: math.ceil(len(stops) / ENDS)]:
        packs = pack(tokens[:stop], images[:stop], row_tokens=row_tokens, row_images=row_images)
        if (fill := filled[stop - 1] / len(packs)) >= fullest:
            best, fullest = packs, fill
    return best


def arrange(tokens: Sequence[int], images: Sequence[int], *, row_tokens: int, row_images: int) -> list[int]:
    """Return the order in which sequences are packed: the large ones, the others, the smallest tenth.

    The size of a sequence is the larger of its shares of the two budgets. The others keep their order, except that
    sequences with many tokens and sequences with many images alternate: neighbours share a row, so a row then uses up
    both budgets together. Sorting them by size would leave a quarter of one budget empty.
    """
    sizes = [
        max(length / row_tokens, pictures / row_images if row_images else 0.0)
        for length, pictures in zip(tokens, images, strict=True)
    ]
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    large = [index for index in by_size if sizes[index] > LARGE]
    last = by_size[max(len(large), math.ceil(len(sizes) * (1 - LAST))) :]
    between = sorted({*by_size} - {*large} - {*last})
    return [*large, *_in_turn(between, tokens, images), *last]


def _in_turn(indices: Sequence[int], tokens: Sequence[int], images: Sequence[int]) -> Iterator[int]:
    """Yield indices so that sequences heavy in tokens and sequences heavy in images stay in balance."""
    all_tokens, all_images = (max(1, sum(counts[index] for index in indices)) for counts in (tokens, images))
    excess = {index: tokens[index] / all_tokens - images[index] / all_images for index in indices}
    many_tokens, many_images = (
        deque(index for index in indices if (excess[index] > 0) is more) for more in (True, False)
    )
    balance = 0.0
    while many_tokens or many_images:
        source = many_tokens if many_tokens and (balance <= 0 or not many_images) else many_images
        balance += excess[source[0]]
        yield source.popleft()


def pack_in_order(
    tokens: Sequence[int], image_ids: Sequence[Sequence[int]], *, row_tokens: int, row_images: int
) -> list[list[int]]:
    """Fill one row after the other without changing the order, so that neighbours share their image in a row.

    >>> pack_in_order((5, 3, 4), ((7,), (7,), (8,)), row_tokens=8, row_images=1)
    [[0, 1], [2]]
    """
    rows: list[list[int]] = []
    room, shown = 0, set[int]()
    for index, (length, ids) in enumerate(zip(tokens, image_ids, strict=True)):
        if not rows or length > room or len(shown | set(ids)) > row_images:
            rows.append([])
            room, shown = row_tokens, set()
        rows[-1].append(index)
        room -= length
        shown |= set(ids)
    return rows


def _best_fit(rooms: Sequence[int], length: int, pictures: int, row_tokens: int) -> tuple[int, int]:
    """Return (free tokens, free images) of the fullest row that has space for both, or (-1, -1)."""
    best, chosen = row_tokens + 1, -1
    for image_room in range(pictures, len(rooms)):
        fitting = rooms[image_room] >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            if room < best:
                best, chosen = room, image_room
                if room == length:
                    break
    return (best, chosen) if chosen >= 0 else (-1, -1)
