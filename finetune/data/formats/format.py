"""What a dataset family is: how its records are read, converted and recognised."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.data.conversation import Dialogue
from finetune.data.field_names import first_name
from finetune.data.io.streams import Record
from finetune.data.leftovers import SYSTEM, leftovers
from finetune.recipe.schema import Source


@dataclass(frozen=True)
class Conversion:
    """What makes a record the dialogue of what is read of it, and then looks at the keys that are not read."""

    make: Callable[[dict[str, Any], Any], Dialogue]
    reads: tuple[str, ...]
    documents: bool

    def __call__(self, record: dict[str, Any], root: Any) -> Dialogue:
        """Raises RecordError, also for content under keys that are not read."""
        dialogue = self.make(record, root)
        read = {first_name(record, names.split("|")) or "" for names in self.reads}
        left = leftovers(record, read if self.documents else {*read, *SYSTEM}, shows=bool(dialogue.images))
        return replace(dialogue, ignored=(*left, *dialogue.ignored)) if left else dialogue


@dataclass(frozen=True)
class Format:
    """A dataset family."""

    convert: Callable[[dict[str, Any], Any], Dialogue]
    """(record, its source's ImageRoot) -> its dialogue. Raises RecordError."""
    read: Callable[[Source], Iterator[Record]]
    """Records in a stable order."""
    fits: Callable[[dict[str, Any]], bool] = lambda record: False
    """Whether a record looks like one of this family, for `format: auto`."""
    reads: tuple[str, ...] = ()
    """The fields it reads, each as its names, the first that is there taken: ("image|jpg", "text|caption")."""
    documents: bool = False
    """Whether its records become documents, which no `<end_of_utterance>` ends."""
    captions: bool = False
    """Whether a document is an image and its caption, of which a prompt makes a dialogue."""
    note: str = ""
    """What a person must know who trains on it."""
    ordered: bool = True
    """Whether the turns of a dialogue build on each other; if not, they may be shuffled."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the fields it reads."""
        return tuple(name for names in self.reads for name in names.split("|"))

    def checked(self) -> "Format":
        """The same format, which loses no content of a record without a word."""
        return replace(self, convert=Conversion(self.convert, self.reads, self.documents)) if self.reads else self
