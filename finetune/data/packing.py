"""Lengths -> packs under two budgets, tokens and images. Pure integers; packs are a function of the lengths' order."""

from collections.abc import Sequence


def pack(tokens: Sequence[int], images: Sequence[int], *, row_tokens: int, row_images: int) -> list[list[int]]:
    """Best-fit-decreasing: longest first, each into the fullest row that still has room for it.

    tokens (5, 3, 4), images (1, 0, 1), row_tokens 8, row_images 1 -> [[0, 1], [2]]

    A row's room is an integer up to `row_tokens`, so the rows with a given room are a list and the rooms in use are
    the bits of one integer: finding the fullest fitting row is a shift and a lowest set bit. Raises ValueError for a
    sequence that no row can hold.
    """
    rows: list[list[int]] = []
    room_for_images: list[int] = []
    rows_by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    rooms = 0
    for index in sorted(range(len(tokens)), key=lambda index: -tokens[index]):
        length, pictures = tokens[index], images[index]
        if length > row_tokens or pictures > row_images:
            raise ValueError(f"sequence {index}: {length} tokens, {pictures} images; {row_tokens}, {row_images} fit")
        room, row = _fullest_fit(rooms, rows_by_room, room_for_images, length, pictures)
        if row < 0:
            room, row = row_tokens, len(rows)
            rows.append([])
            room_for_images.append(row_images)
        else:
            rows_by_room[room].remove(row)
            if not rows_by_room[room]:
                rooms &= ~(1 << room)
        rows[row].append(index)
        room_for_images[row] -= pictures
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


_LOOKS = 4
"""Rows of one room looked at for room for images: a bound, so that a million sequences take seconds."""


def _fullest_fit(
    rooms: int, rows_by_room: list[list[int]], room_for_images: list[int], length: int, pictures: int
) -> tuple[int, int]:
    """(room, row) of the fullest row with room for both, or (0, -1)."""
    candidates = rooms >> length
    room = length - 1
    while candidates:
        step = (candidates & -candidates).bit_length()
        room += step
        candidates >>= step
        for row in rows_by_room[room][-1 : -_LOOKS - 1 : -1]:
            if room_for_images[row] >= pictures:
                return room, row
    return 0, -1
