"""Where records come from, and how a dataset family is read and converted."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from finetune.data.conversation import Dialogue, as_unicode
from finetune.data.field_names import first_name
from finetune.data.io.streams import Record
from finetune.data.leftovers import SYSTEM, leftovers


@dataclass(frozen=True)
class Source:
    """One dataset of a recipe, as its files or its name on the hub say."""

    format: str
    """A key of FORMATS."""
    paths: tuple[Path, ...] = ()
    """Files or folders, in order."""
    hub: str | None = None
    """Instead of paths: a dataset on the hub, or a local folder the datasets library can load."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    stream: bool = False
    """Train from it without preparing it."""
    image_root: tuple[Path, ...] = ()
    """Folders, zip or tar archives, or MIMIC-IT image files in which references are looked up, in order."""
    image_name: str | None = None
    """How an image's file is called, where records give only its number: "COCO_train2014_{image_id:012d}.jpg"."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """{name the format expects: name in the records}."""
    download: bool = False
    """Whether images given as https URLs are fetched."""
    download_http: bool = False
    """Whether plain http is good enough, too."""
    limit: int | None = None
    """Only the first so many records are read."""
    on_broken: Literal["stop", "keep"] = "stop"
    """What a file that breaks off does: end the verb, or give the records before."""
    turns: int | None = None
    """Questions about one image are joined, and longer dialogues divided, into dialogues of at most so many turns."""
    ordered: bool | None = None
    """Whether the order of turns matters; None: as the format has it."""
    placeholders: Literal["images", "text"] = "images"
    """What "<image>" in a text stands for: an image of the record, or itself."""
    ignore: tuple[str, ...] = ()
    """Keys of records that are read as if they were not there."""
    prompt: tuple[str, ...] = ()
    """What a user asks for a caption: one of these for each record, which makes dialogues of captions."""
    prompt_seed: int = 0
    """Draws among several prompts."""
    license: str | None = None

    @property
    def label(self) -> str:
        """Short, for a progress bar."""
        return self.paths[0].name if self.paths else self.hub or self.format

    @property
    def name(self) -> str:
        where = ", ".join(map(str, self.paths)) or self.hub or self.format
        return as_unicode(f"{where}{f'/{self.subset}' if self.subset else ''}[{self.split}]")


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
    needs_files: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the fields it reads."""
        return tuple(name for names in self.reads for name in names.split("|"))

    def checked(self) -> "Format":
        """The same format, which loses no content of a record without a word."""
        return replace(self, convert=Conversion(self.convert, self.reads, self.documents)) if self.reads else self
