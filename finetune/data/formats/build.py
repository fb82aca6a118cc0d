"""What a format has read of a record -> its Dialogue: one system message, and every image at its place."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from finetune.data.conversation import Dialogue, Image, Part, RecordError, Turn, assistant, user
from finetune.data.formats.fields import checked, optional
from finetune.data.formats.placeholders import place_images
from finetune.data.io.image_roots import ImageRoot
from finetune.data.leftovers import SYSTEM


def build(
    record: Mapping[str, Any],
    root: ImageRoot,
    turns: Iterable[Turn],
    images: Sequence[Image] = (),
    *,
    ignored: Iterable[str] = (),
) -> Dialogue:
    """The dialogue of a record: its turns, and the images it lists, which stand in none of them yet.

    `ignored` is what the turns hold that is not used. Raises RecordError.
    """
    said = tuple(turns)
    is_document = bool(said) and said[0].role == "document"
    placed, literal = place_images(said if is_document else _with_system(record, said), images, root)
    return Dialogue(placed, ignored=tuple(dict.fromkeys((*ignored, *(f"{kind} as text" for kind in literal)))))


def history(record: Mapping[str, Any]) -> list[Turn]:
    """The turns before a record's own: "history", a list of [question, answer]. Raises RecordError: another shape."""
    turns: list[Turn] = []
    for index, pair in enumerate(optional(record, "history", list) or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError("unknown content", f'"history[{index}]": expected [question, answer], got {pair!r:.80}')
        turns += [user(pair[0]), assistant(pair[1])]
    return turns


def _with_system(record: Mapping[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns after one system message: of the record's own and those they begin with, in order."""
    own = [checked(record[name], name, str) for name in SYSTEM if record.get(name) is not None]
    leading = tuple(takewhile(lambda turn: turn.role == "system", turns))
    said: tuple[Part, ...] = (*own, *(part for turn in leading for part in turn.parts))
    parts = tuple(part for part in dict.fromkeys(said) if isinstance(part, Image) or part.strip())
    return (*((Turn("system", parts),) if parts else ()), *turns[len(leading) :])
