"""Dialogue -> Rendered. The only file that knows "User:", "\\nAssistant:" and the special tokens around them.

The canonical instruct text (idefics-9b-instruct's model card, and its authors' later training code):

    <s>User:<fake_token_around_image><image><fake_token_around_image>What is it?<end_of_utterance>
    Assistant: A dog.<end_of_utterance>
    User: Which breed?<end_of_utterance>
    Assistant: A puli.<end_of_utterance></s>

Images side by side share the fake token between them. A system message stands before the first "User:", on a line of
its own. A document is `<s>`, its texts and images, `</s>`. Supervised: the assistant's text from the space after
"Assistant:" on and its `<end_of_utterance>`, unless the turn is not supervised; the whole text of a document and its
`</s>`. Image tokens and fake tokens are never supervised.
"""

from dataclasses import dataclass, field

from finetune.data.conversation import Dialogue, Image, Turn
from modeling.tokens import BOS, END_OF_UTTERANCE, EOS, FAKE, IMAGE


@dataclass(frozen=True)
class Special:
    """One special token."""

    name: str
    supervised: bool = False


@dataclass(frozen=True)
class Text:
    """Plain text between two special tokens, tokenised in one piece; supervised from character `supervised_from` on."""

    text: str
    supervised_from: int | None = None


@dataclass(frozen=True)
class Rendered:
    """A dialogue as the model reads it: its pieces, and the images in the order of their `<image>` pieces."""

    pieces: tuple[Special | Text, ...]
    images: tuple[Image, ...]

    @property
    def text(self) -> str:
        """Return the whole string with its special tokens, as transformers' processor would make it."""
        return "".join(piece.name if isinstance(piece, Special) else piece.text for piece in self.pieces)


def render(dialogue: Dialogue) -> Rendered:
    """Return the pieces of a dialogue.

    >>> from finetune.data.conversation import assistant, user
    >>> render(Dialogue((user("Who?"), assistant("A cat.")))).pieces  # doctest: +NORMALIZE_WHITESPACE
    (Special(name='<s>', supervised=False),
     Text(text='User: Who?', supervised_from=None),
     Special(name='<end_of_utterance>', supervised=False),
     Text(text='\\nAssistant: A cat.', supervised_from=11),
     Special(name='<end_of_utterance>', supervised=True),
     Special(name='</s>', supervised=False))

    A prompt (the last turn is the user's) ends at the colon of "\\nAssistant:"; a document that goes on has no `</s>`.
    """
    writer = _Writer()
    writer.special(BOS)
    for turn in dialogue.turns:
        _write_turn(writer, turn)
    if dialogue.is_prompt:
        writer.text("\nAssistant:")
    elif not dialogue.goes_on:
        writer.special(EOS, supervised=dialogue.is_document)
    return Rendered(tuple(writer.pieces), tuple(writer.images))


@dataclass
class _Writer:
    """Collects pieces, and joins neighbouring texts into one piece so that it is tokenised at once."""

    pieces: list[Special | Text] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def special(self, name: str, *, supervised: bool = False) -> None:
        self.pieces.append(Special(name, supervised))

    def text(self, text: str, *, supervised: bool = False) -> None:
        if not text:
            return
        before, start = "", 0 if supervised else None
        if isinstance(self.pieces[-1], Text):
            last = self.pieces.pop()
            assert isinstance(last, Text)
            assert supervised or last.supervised_from is None, "what follows an answer stands behind a special token"
            before, start = last.text, last.supervised_from
            if supervised and start is None:
                start = len(before)
        self.pieces.append(Text(before + text, start))

    def image(self, image: Image) -> None:
        if self.pieces[-1] != Special(FAKE):
            self.special(FAKE)
        self.special(IMAGE)
        self.special(FAKE)
        self.images.append(image)

    def parts(self, turn: Turn, *, lead: str, between: str, supervised: bool = False) -> None:
        """Add a turn's parts: texts stripped, empty ones left out, `lead` before a first text, `between` two texts."""
        previous: str | Image | None = None
        for part in turn.parts:
            if isinstance(part, Image):
                self.image(part)
            elif stripped := part.strip():
                space = lead if previous is None else between if isinstance(previous, str) else ""
                self.text(space + stripped, supervised=supervised)
            else:
                continue
            previous = part


def _write_turn(writer: _Writer, turn: Turn) -> None:
    if turn.role == "system":
        writer.parts(turn, lead="", between="\n")
    elif turn.role == "user":
        writer.text("User:" if writer.pieces == [Special(BOS)] else "\nUser:")
        writer.parts(turn, lead=" ", between="\n")
        writer.special(END_OF_UTTERANCE)
    elif turn.role == "assistant":
        writer.text("\nAssistant:")
        writer.parts(turn, lead=" ", between="\n", supervised=turn.supervised)
        writer.special(END_OF_UTTERANCE, supervised=turn.supervised)
    else:
        writer.parts(turn, lead="", between="\n\n", supervised=True)
