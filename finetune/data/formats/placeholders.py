"""Build a Dialogue from the turns and images that a format has read, by one rule for all formats.

A placeholder ("<image>", in the spelling of any toolkit) in a user's text or a document is the place of the next image
that the record lists; a numbered one ("<image_2>") says which image. Every listed image must have a place and every
placeholder an image, or the record is rejected. Without any placeholder the listed images open the first user turn.
The placeholder "<img>cat.jpg</img>" gives its image's file.

A placeholder of a medium that cannot be shown, such as "<video>", rejects the record. In an answer, a system message,
or a message that holds its own images as parts, a placeholder is text; it is reported, so that it is counted.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any

from finetune.data.conversation import Dialogue, Image, Part, RecordError, Turn, assistant, user
from finetune.data.formats.fields import SYSTEM, checked, optional
from finetune.data.io.image_roots import ImageRoot


def build(
    record: Mapping[str, Any],
    root: ImageRoot,
    turns: Iterable[Turn],
    images: Sequence[Image] = (),
    *,
    ignored: Iterable[str] = (),
) -> Dialogue:
    """Return the dialogue of a record: its turns after one system message, the images it lists at their places.

    The system message is the record's own and those that the turns begin with, in order. `ignored` names the content of
    the turns that is not used. Raises RecordError.
    """
    given = tuple(turns)
    if not (given and given[0].role == "document"):
        leading = tuple(takewhile(lambda turn: turn.role == "system", given))
        own = [checked(record[name], name, str) for name in SYSTEM if record.get(name) is not None]
        system: tuple[Part, ...] = (*own, *(part for turn in leading for part in turn.parts))
        parts = tuple(part for part in dict.fromkeys(system) if isinstance(part, Image) or part.strip())
        given = (*((Turn("system", parts),) if parts else ()), *given[len(leading) :])
    placed, literal = place_images(given, images, root)
    return Dialogue(placed, ignored=tuple(dict.fromkeys((*ignored, *(f"{kind} as text" for kind in literal)))))


def history(record: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of "history", a list of [question, answer]. Raises RecordError: another shape."""
    turns: list[Turn] = []
    for index, pair in enumerate(optional(record, "history", list) or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError("unknown content", f'"history[{index}]": expected [question, answer], got {pair!r:.80}')
        turns += [user(pair[0]), assistant(pair[1])]
    return turns


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
"""First letter of a placeholder that is no image -> the medium that it stands for."""

_HIDING = "\ufdd0"
"""A Unicode noncharacter, which occurs in no text. Inside a placeholder, it keeps `_PLACEHOLDER` from matching."""


class Slot(str):
    """An image part of a message without a file: the place of the next listed image, in any turn."""

    __slots__ = ()


@dataclass(frozen=True)
class _Placeholder:
    """A placeholder as it is written, and the number in it."""

    text: str
    number: int | None
    is_part: bool


_Piece = str | Image | _Placeholder


def place_images(turns: Sequence[Turn], images: Sequence[Image], root: ImageRoot) -> tuple[tuple[Turn, ...], list[str]]:
    """Return (the turns with the listed images at their places, placeholders that stay text). Raises RecordError.

    user "In <image> or <image>?", images a and b -> user "In ", a, " or ", b, "?"
    """
    if not images and not any(isinstance(part, Slot) or kinds_in(part) for turn in turns for part in _texts(turn)):
        return tuple(turns), []
    answered = [text for turn in turns if not _asks(turn) for text in _texts(turn) if not isinstance(text, Slot)]
    literal = [kind for text in answered for kind in kinds_in(text)]
    pieces = [list(_pieces(turn, root)) for turn in turns]
    if len(_placeholders(pieces)) != len(images):
        pieces = [_without_doubles(one) for one in pieces]
    if not images:
        for number, turn in enumerate(turns):
            if turn.images and any(not one.is_part for one in _placeholders([pieces[number]])):
                literal.append("<image>")
                pieces[number] = list(_pieces(turn, root, split=False))
    placeholders = _placeholders(pieces)
    if placeholders:
        chosen = iter(_choose(placeholders, images, "text" if turns[0].role == "document" else "questions"))
        pieces = [[next(chosen) if isinstance(piece, _Placeholder) else piece for piece in one] for one in pieces]
    elif images:
        if any(isinstance(piece, Image) for one in pieces for piece in one):
            raise RecordError("image count", f"{len(images)} images listed beside others that have a place, 0 placed")
        first = next((number for number, turn in enumerate(turns) if _asks(turn)), None)
        if first is not None:  # without a user's turn, the record is rejected later
            pieces[first] = [*images, *pieces[first]]
    parts = [tuple(piece for piece in one if not isinstance(piece, _Placeholder)) for one in pieces]
    return tuple(replace(turn, parts=own) for turn, own in zip(turns, parts, strict=True)), literal


def kinds_in(text: str) -> list[str]:
    """Return the kinds of placeholder in a text: "<image>", "<video>", "<audio>", "<grounding>"."""
    if "<" not in text and "[" not in text:
        return []
    return [f"<{_kind(match)}>" for match in _PLACEHOLDER.finditer(text)]


def _kind(match: re.Match[str]) -> str:
    named = (match["unseen"] or match["tag"] or "image").lower()
    return "image" if named in ("image", "img") else _UNSEEN[named[0]]


def _asks(turn: Turn) -> bool:
    return turn.role in ("user", "document")


def _texts(turn: Turn) -> list[str]:
    return [part for part in turn.parts if isinstance(part, str)]


def _placeholders(pieces: Sequence[Sequence[_Piece]]) -> list[_Placeholder]:
    return [piece for one in pieces for piece in one if isinstance(piece, _Placeholder)]


def _pieces(turn: Turn, root: ImageRoot, *, split: bool = True) -> Iterator[_Piece]:
    """Yield the parts of a turn, slots as placeholders; with `split`, the texts of a user divided at placeholders."""
    for part in turn.parts:
        if isinstance(part, Slot):
            match = _PLACEHOLDER.fullmatch(part)
            yield _Placeholder(part, _number(match) if match else None, is_part=True)
        elif split and isinstance(part, str) and _asks(turn) and kinds_in(part):
            yield from _split(part, root)
        else:
            yield part


def _split(text: str, root: ImageRoot) -> Iterator[_Piece]:
    """Yield the texts between placeholders that are not blank, the placeholders, and the images that these name."""
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        if text[end : match.start()].strip():
            yield text[end : match.start()]
        end = match.end()
        if (kind := _kind(match)) != "image":
            raise RecordError(kind, f"{match[0]:.80}: only images can be shown")
        named = (match["inside"] or "").strip()
        yield root.image(named) if named.strip("./") else _Placeholder(match[0], _number(match), is_part=False)
    if text[end:].strip():
        yield text[end:]


def _number(match: re.Match[str]) -> int | None:
    number = match["number"] or match["bracketed"]
    return int(number) if number else None


def _without_doubles(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Drop placeholders from a message with equally many image parts: both mean the same images."""
    kept: list[_Piece] = []
    for _, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
        run = list(group)
        others = [piece for piece in run if not isinstance(piece, _Placeholder) or piece.is_part]
        kept += others if 2 * len(others) == len(run) else run
    return kept


def _choose(placeholders: Sequence[_Placeholder], images: Sequence[Image], where: str) -> list[Image]:
    """Return the image of each placeholder: by the numbers, from 0 or 1 on, if all have one, else in order."""
    numbers = [one.number for one in placeholders if one.number is not None]
    start = 0 if 0 in numbers else 1
    wanted = [number - start for number in numbers] if numbers else list(range(len(placeholders)))
    if len(wanted) != len(placeholders) or set(wanted) != set(range(len(images))):
        as_text = not images and not any(one.is_part for one in placeholders)
        hint = "; `placeholders: text` keeps them as text" if as_text else ""
        detail = f"{len(images)} images for {len(placeholders)} {placeholders[0].text} in the {where}{hint}"
        raise RecordError("image count", detail)
    return [images[number] for number in wanted]


def hide(value: Any) -> Any:
    """Return a record in whose texts no placeholder is recognised; `reveal` restores the texts of its dialogue."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: re.sub(r"(?<=[<\[])", _HIDING, match[0]), value)
    if isinstance(value, dict):
        return {key: hide(item) for key, item in value.items()}
    return [hide(item) for item in value] if isinstance(value, list) else value


def reveal(dialogue: Dialogue) -> Dialogue:
    """Return a dialogue made of a hidden record, with its texts as the record has them."""

    def shown(turn: Turn) -> Turn:
        parts = tuple(part.replace(_HIDING, "") if isinstance(part, str) else part for part in turn.parts)
        return replace(turn, parts=parts, references=tuple(text.replace(_HIDING, "") for text in turn.references))

    return replace(dialogue, turns=tuple(map(shown, dialogue.turns)))
