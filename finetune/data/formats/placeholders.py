"""Placeholders in texts ("<image>", however a toolkit spells it) -> the images of their record, by one rule everywhere.

A placeholder in what a user says, or in a document, is the place of the next image that the record lists; a numbered
one ("<image_2>") says which. Every listed image must have a place, and every placeholder an image, or the record is
rejected. Without any placeholder the listed images open the first user turn. "<img>cat.jpg</img>" names its image.

A placeholder of what cannot be shown, such as "<video>", rejects the record. In an answer or a system message, and in a
message that holds its own images as parts, a placeholder is text; what stays text is returned, so that it is counted.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from finetune.data.conversation import Dialogue, Image, RecordError, Turn
from finetune.data.io.image_roots import ImageRoot

_END = r"(?:[\s_:#-]?(?P<{}>\d{{1,4}})|[_-]?(?:here|pad|placeholder|token|soft_token|context|url|patch|plh))?\s*/?\|?>"
_PLACEHOLDER = re.compile(
    r"[<\[](?:(?<=<)"  # a set of characters comes first: re then looks for these alone
    r"(?:(?:fake_token_around_image|\|vision_start\||\|image_start\||img(?=><image_?here>))><)?"
    r"(?:"
    r"(?P<tag>image|img|video|audio)>(?P<inside>[^<>]*)</(?P=tag)>"
    r"|\|?\s*(?:images?|img)" + _END.format("number") + r"|start_of_image>"
    r"|\|?\s*(?P<unseen>videos?|audios?|speech|bbox|ref-object)" + _END.format("other") + r")"
    r"(?:</img>|<fake_token_around_image>|<\|(?:vision|image)_end\|>|<end_of_image>)?"
    r"|(?<=\[)(?-i:(?:IMG|IMAGE)(?:[\s_-]?(?P<bracketed>\d{1,4}))?\]))",
    re.IGNORECASE,
)
_UNSEEN = {"v": "video", "a": "audio", "s": "audio", "b": "grounding", "r": "grounding"}
"""First letter of a placeholder -> the kind of what stands there, if it is no image."""

_HIDING = "\ufdd0"
"""A noncharacter: it stands in no text, and within a placeholder it hides it."""


class Slot(str):
    """An image part of a message that names no file: wherever it stands, a listed image's place."""

    __slots__ = ()


@dataclass(frozen=True)
class _Place:
    """A placeholder as it is written, and the number in it."""

    text: str
    number: int | None
    is_part: bool


_Piece = str | Image | _Place


def place_images(turns: Sequence[Turn], images: Sequence[Image], root: ImageRoot) -> tuple[tuple[Turn, ...], list[str]]:
    """(the turns with the listed images at their places, what stays text of the kind "<image>"). Raises RecordError.

    user "In <image> or <image>?", images a and b -> user "In ", a, " or ", b, "?"
    """
    if not images and not any(isinstance(part, Slot) or kinds_in(part) for turn in turns for part in _texts(turn)):
        return tuple(turns), []
    answered = [text for turn in turns if not _asks(turn) for text in _texts(turn) if not isinstance(text, Slot)]
    literal = [kind for text in answered for kind in kinds_in(text)]
    pieces = [list(_pieces(turn, root)) for turn in turns]
    if len(_places(pieces)) != len(images):
        pieces = [_without_doubles(one) for one in pieces]
    if not images:
        for number, turn in enumerate(turns):
            if turn.images and any(not one.is_part for one in _places([pieces[number]])):
                literal.append("<image>")
                pieces[number] = list(_pieces(turn, root, split=False))
    places = _places(pieces)
    if places:
        chosen = iter(_choose(places, images, "text" if turns[0].role == "document" else "questions"))
        pieces = [[next(chosen) if isinstance(piece, _Place) else piece for piece in one] for one in pieces]
    elif images:
        if any(isinstance(piece, Image) for one in pieces for piece in one):
            raise RecordError("image count", f"{len(images)} images listed beside others that have a place, 0 placed")
        first = next((number for number, turn in enumerate(turns) if _asks(turn)), None)
        if first is not None:  # without a user it is no dialogue anyway
            pieces[first] = [*images, *pieces[first]]
    parts = [tuple(piece for piece in one if not isinstance(piece, _Place)) for one in pieces]
    return tuple(replace(turn, parts=own) for turn, own in zip(turns, parts, strict=True)), literal


def kinds_in(text: str) -> list[str]:
    """The kinds of placeholder in a text: "<image>", "<video>", "<audio>", "<grounding>"."""
    if "<" not in text and "[" not in text:
        return []
    return [f"<{_kind(match)}>" for match in _PLACEHOLDER.finditer(text)]


def hide(value: Any) -> Any:
    """A record of whose texts no placeholder is recognised; `reveal` makes the texts of its dialogue as they were."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: re.sub(r"(?<=[<\[])", _HIDING, match[0]), value)
    if isinstance(value, dict):
        return {key: hide(item) for key, item in value.items()}
    return [hide(item) for item in value] if isinstance(value, list) else value


def reveal(dialogue: Dialogue) -> Dialogue:
    def shown(turn: Turn) -> Turn:
        parts = tuple(part.replace(_HIDING, "") if isinstance(part, str) else part for part in turn.parts)
        return replace(turn, parts=parts, references=tuple(text.replace(_HIDING, "") for text in turn.references))

    return replace(dialogue, turns=tuple(map(shown, dialogue.turns)))


def _asks(turn: Turn) -> bool:
    return turn.role in ("user", "document")


def _texts(turn: Turn) -> list[str]:
    return [part for part in turn.parts if isinstance(part, str)]


def _places(pieces: Sequence[Sequence[_Piece]]) -> list[_Place]:
    return [piece for one in pieces for piece in one if isinstance(piece, _Place)]


def _pieces(turn: Turn, root: ImageRoot, *, split: bool = True) -> Iterator[_Piece]:
    for part in turn.parts:
        if isinstance(part, Slot):
            match = _PLACEHOLDER.fullmatch(part)
            yield _Place(part, _number(match) if match else None, is_part=True)
        elif split and isinstance(part, str) and _asks(turn) and kinds_in(part):
            yield from _split(part, root)
        else:
            yield part


def _split(text: str, root: ImageRoot) -> Iterator[_Piece]:
    """Texts that are not blank, placeholders, and the images that placeholders name."""
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        if text[end : match.start()].strip():
            yield text[end : match.start()]
        end = match.end()
        if (kind := _kind(match)) != "image":
            raise RecordError(kind, f"{match[0]:.80}: only images can be shown")
        named = (match["inside"] or "").strip()
        yield root.image(named) if named.strip("./") else _Place(match[0], _number(match), is_part=False)
    if text[end:].strip():
        yield text[end:]


def _kind(match: re.Match[str]) -> str:
    named = (match["unseen"] or match["tag"] or "image").lower()
    return "image" if named in ("image", "img") else _UNSEEN[named[0]]


def _number(match: re.Match[str]) -> int | None:
    number = match["number"] or match["bracketed"]
    return int(number) if number else None


def _without_doubles(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Without the placeholders written right beside as many image parts: they stand for the same images."""
    kept: list[_Piece] = []
    for _, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
        run = list(group)
        others = [piece for piece in run if not isinstance(piece, _Place) or piece.is_part]
        kept += others if 2 * len(others) == len(run) else run
    return kept


def _choose(places: Sequence[_Place], images: Sequence[Image], where: str) -> list[Image]:
    """The image of each place: by the numbers from 0 or 1 on, if all have one, else in order."""
    numbers = [one.number for one in places if one.number is not None]
    start = 0 if 0 in numbers else 1
    wanted = [number - start for number in numbers] if numbers else list(range(len(places)))
    if len(wanted) != len(places) or set(wanted) != set(range(len(images))):
        hint = (
            "; `placeholders: text` keeps them as text" if not images and not any(one.is_part for one in places) else ""
        )
        raise RecordError(
            "image count", f"{len(images)} images for {len(places)} {places[0].text} in the {where}{hint}"
        )
    return [images[number] for number in wanted]
