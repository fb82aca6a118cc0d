"""Lengths -> packs under two budgets, tokens and images. Pure integers; packs are a function of the lengths' order."""

from collections import defaultdict
from collections.abc import Sequence


def pack(tokens: Sequence[int], images: Sequence[int], *, row_tokens: int, row_images: int) -> list[list[int]]:
    """Best-fit-decreasing: largest first, each into the row that will have the fewest tokens to spare.

    tokens (5, 3, 4), images (1, 0, 1), row_tokens 8, row_images 1 -> [[0, 1], [2]]

    Size is the larger share of the two budgets. Room for tokens is an integer up to `row_tokens`, so the rooms in use
    among the rows that can take so many images are the bits of one integer, and the best fit is a shift and a lowest
    set bit. Raises ValueError for a sequence that no row can hold.
    """
    rows: list[list[int]] = []
    rooms = [0] * (row_images + 1)  # for each room for images: the set of rooms for tokens, as bits
    rows_with: defaultdict[tuple[int, int], list[int]] = defaultdict(list)

    def size(index: int) -> float:
        return max(tokens[index] / row_tokens, images[index] / row_images if row_images else 0)

    for index in sorted(range(len(tokens)), key=size, reverse=True):
        length, pictures = tokens[index], images[index]
        if length > row_tokens or pictures > row_images:
            raise ValueError(f"sequence {index}: {length} tokens, {pictures} images; {row_tokens}, {row_images} fit")
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


def pack_in_order(
    tokens: Sequence[int], image_ids: Sequence[Sequence[int]], *, row_tokens: int, row_images: int
) -> list[list[int]]:
    """Fill one row after the other without changing the order: neighbours about one image share it in their row.

    tokens (5, 3, 4), image_ids ((7,), (7,), (8,)), row_tokens 8, row_images 1 -> [[0, 1], [2]]
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
    """(room for tokens, room for images) of the fullest row with room for both; (-1, -1) if there is none."""
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
