"""The contract between a dataset's records and the text that the model reads: turns of texts and images.

>>> dialogue = Dialogue((user(Image(Path("cat.jpg")), "Who is this?"), assistant("A cat.")))
>>> [turn.role for turn in dialogue.turns]
['user', 'assistant']
>>> Dialogue((assistant("A cat."),))
Traceback (most recent call last):
finetune.data.conversation.RecordError: roles do not alternate: expected [system,] user, ...; got assistant
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import PIL.Image

from modeling.errors import UserError

Role = Literal["system", "user", "assistant", "document"]


class RecordError(UserError):
    """A record cannot be used: it is counted under `reason`; `detail` describes the fault."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, as_unicode(detail)
        super().__init__(f"{reason}: {self.detail}" if detail else reason)

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str]]:
        return RecordError, (self.reason, self.detail)


def as_unicode(text: str) -> str:
    """Return a text with lone surrogates (from file names that are not UTF-8) escaped, so that it can be written."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Slice:
    """An encoded image inside a larger file: a member of a tar or zip archive, a base64 string in a JSON file."""

    path: Path
    offset: int
    length: int
    """Number of bytes in the file."""
    coding: Literal["raw", "deflate", "base64"] = "raw"


@dataclass(frozen=True)
class Remote:
    """An image that is not downloaded yet, in a source that allows downloads."""

    url: str


@dataclass(frozen=True, eq=False)
class Image:
    """Where an image's pixels come from. Two references to the same file, or to equal bytes, are equal.

    An image that is known to be missing has the error instead, which opening it raises: a document goes on without it.
    """

    source: Path | Slice | Remote | bytes | PIL.Image.Image | RecordError

    @property
    def _key(self) -> Path | Slice | Remote | bytes | RecordError | int:
        return id(self.source) if isinstance(self.source, PIL.Image.Image) else self.source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


Part = str | Image


@dataclass(frozen=True)
class Turn:
    """The text and images of one speaker, in order."""

    role: Role
    parts: tuple[Part, ...]
    references: tuple[str, ...] = ()
    """All answers that annotators gave, including the one trained on. Only evaluation reads them."""
    supervised: bool = True
    """Whether an answer is trained on and evaluated; if not, it is only context for later answers."""

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def text(self) -> str:
        """Return the texts, joined; images are left out."""
        return " ".join(part.strip() for part in self.parts if isinstance(part, str) and part.strip())


@dataclass(frozen=True)
class Dialogue:
    """A conversation, or one document such as a web page or a caption.

    Turns are either one `document`, or an optional `system` followed by `user` and `assistant` in alternation. A
    dialogue that ends with the user is a prompt. Raises RecordError for anything else, for an empty turn, and for text
    that is not Unicode.
    """

    turns: tuple[Turn, ...]
    goes_on: bool = False
    """Whether a document was cut here; if so, it does not end with `</s>`."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Parts of the record that are not used: unknown keys, and placeholders that stay text."""

    def __post_init__(self) -> None:
        _check_roles(tuple(turn.role for turn in self.turns))
        for number, turn in enumerate(self.turns, start=1):
            _check_parts(turn, number)

    @property
    def is_prompt(self) -> bool:
        return self.turns[-1].role == "user"

    @property
    def is_document(self) -> bool:
        return self.turns[0].role == "document"

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(image for turn in self.turns for image in turn.images)

    def prompts(self) -> Iterable[tuple["Dialogue", tuple[str, ...]]]:
        """Yield (the dialogue up to an answer, the references of the answer) for each supervised answer."""
        for index, turn in enumerate(self.turns):
            if turn.role == "assistant" and turn.supervised:
                yield Dialogue(self.turns[:index]), turn.references or (turn.text,)


def user(*parts: Part) -> Turn:
    return Turn("user", parts)


def assistant(*parts: Part, references: tuple[str, ...] = ()) -> Turn:
    return Turn("assistant", parts, references)


def _check_roles(roles: tuple[str, ...]) -> None:
    if not roles:
        raise RecordError("no turns", "expected at least one question and its answer")
    if roles == ("document",):
        return
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = tuple("assistant" if index % 2 else "user" for index in range(len(spoken)))
    if not spoken or spoken != expected:
        got = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
        raise RecordError("roles do not alternate", f"expected [system,] user, assistant, user, ...; got {got}")


def is_blank(text: str) -> bool:
    """Return whether a text is invisible: only white space, zero-width and control characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


_EMPTY = {"system": "empty system message", "user": "empty question", "assistant": "empty answer"}


def _check_parts(turn: Turn, number: int) -> None:
    if is_blank(turn.text) and (turn.role in ("assistant", "system") or not turn.images):
        raise RecordError(_EMPTY.get(turn.role, "empty document"), f"turn {number}")
    for part in turn.parts:
        if isinstance(part, str):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RecordError("text is not Unicode", f"turn {number}: {error.reason}") from error
