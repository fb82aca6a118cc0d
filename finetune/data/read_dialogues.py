"""Source -> dialogues whose images can be opened. Every command that reads records uses these functions.

    resolve_source    a recipe's source, its format named and its keys checked
    taken             its records: (record_id, record), as many as its limit allows
    to_dialogue       a record as a dialogue that can be trained on, or as a prompt to be answered
    open_images       the dialogue once more, its images opened: a document goes on without a lost one
    read_dialogues    all of these, in a loop; what is rejected is counted under its reason

Preparing calls the same functions block by block (prepare_shards.py), since it downloads and hashes images on the way.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.console import Track, log, silently
from finetune.data.chunking import without_images
from finetune.data.conversation import (
    Dialogue,
    Image,
    RecordError,
    Remote,
    as_unicode,
    assistant,
    is_blank,
    user,
)
from finetune.data.formats import FORMATS
from finetune.data.formats.placeholders import hide, reveal
from finetune.data.formats.recognise import recognise_source
from finetune.data.formats.unused_keys import without
from finetune.data.images import open_image
from finetune.data.io.byte_streams import BrokenFileError, Record
from finetune.data.io.image_roots import ImageRoot
from finetune.data.shards import read_shard, shards_of, undivided
from finetune.data.stats import SourceStats
from finetune.recipe.schema import CAPTIONS, Source, need_end_of_utterance
from modeling.errors import UserError


def resolve_source(source: Source) -> Source:
    """Return the source with `auto` replaced by the format found, and print the format's note.

    Raises UserError: its other keys do not fit its format.
    """
    if source.format == "auto":
        recognised = recognise_source(source)
        source = source.model_copy(update={"format": recognised.format})
        log(f"{source.name}: format {recognised.format} (recognised from its first records)")
        for note in recognised.notes:
            log(f"{source.name}: {note}")
    family = FORMATS[source.format]
    if family.note:
        log(f"{source.name}: {family.note}")
    if source.prompt and not family.captions:
        raise UserError(
            f"{source.name}: prompt makes dialogues of captions ({', '.join(CAPTIONS)}), got format {source.format}"
        )
    in_name = source.image_name or ""
    unknown = [name for name in source.columns if name not in family.names and f"{{{name}" not in in_name]
    if unknown:
        fields = ", ".join(family.names) or "no fields by name"
        raise UserError(
            f"{source.name}: columns: format {source.format} reads no {', '.join(unknown)}; it reads {fields}, and "
            f"columns says {{its name: the name in the records}}"
        )
    return source


def taken(source: Source, stats: SourceStats) -> Iterator[Record]:
    """Yield (record_id, record) of a source up to its limit, and read nothing beyond; count them in `stats`."""
    for shard in undivided(shards_of(source)):
        yield from count_records(read_shard(source, shard), source, stats)


def count_records(records: Iterable[Record], source: Source, stats: SourceStats) -> Iterator[Record]:
    """Yield records, and count them in `stats`; a file that breaks off is no record, and goes to `stats.broken`."""
    for record_id, record in records:
        if isinstance(record, BrokenFileError):
            stats.broken.append(as_unicode(f"{record.file} breaks off: {record}"))
            continue
        stats.read += 1
        stats.limited = stats.read == source.limit
        yield as_unicode(record_id), record


def to_dialogue(
    record_id: str, record: dict[str, Any] | RecordError, root: ImageRoot, *, prompt: bool = False, seed: int = 0
) -> Dialogue:
    """Return a record of the root's source as a dialogue to train on, or with `prompt`, as one to answer.

    `seed` selects among the prompts of a source of captions. Raises RecordError: the record cannot be converted.
    """
    if isinstance(record, RecordError):
        raise record
    source, root = root.source, root.beside(record_id)
    convert = FORMATS[source.format].convert
    try:
        record = without(record, source.ignore) if source.ignore else record
        dialogue = reveal(convert(hide(record), root)) if source.placeholders == "text" else convert(record, root)
    except RecursionError as error:
        raise RecordError("nested too deeply", "expected lists and objects in a few levels") from error
    if dialogue.is_document and is_blank(dialogue.turns[0].text):
        raise RecordError("empty document", "expected words beside its images")
    if dialogue.is_prompt and not prompt:
        raise RecordError("no answer to the last question", "the dialogue ends with the user")
    if prompt and not dialogue.is_prompt:
        raise RecordError("not a prompt", "expected a dialogue that ends with the user")
    answers = [turn for turn in dialogue.turns if turn.role == "assistant"]
    if not prompt and answers and not any(turn.supervised for turn in answers):
        raise RecordError("nothing supervised", "every answer has a weight of 0")
    if source.prompt:  # images "A cat." -> user: images, prompt; assistant: "A cat."
        drawn = hashlib.blake2b(f"{seed}/{record_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        question = source.prompt[int.from_bytes(drawn) % len(source.prompt)]
        (caption,) = dialogue.turns
        words = tuple(part for part in caption.parts if isinstance(part, str))
        return replace(dialogue, turns=(user(*caption.images, question), assistant(*words)))
    return dialogue


Look = Callable[[Image], Any]
"""A function that opens an image. Raises RecordError: it cannot be opened."""


@dataclass(frozen=True)
class Opened:
    """A record's dialogues, with their opened images."""

    dialogues: list[Dialogue]
    """One dialogue, or the parts of a document that was cut at a lost image."""
    images: list[Any]
    """The result of `look` for each image that is kept, in order."""
    lost: list[RecordError]
    """Error of each image that was left out of a document."""


def open_images(dialogue: Dialogue, look: Look) -> Opened:
    """Open every image of a dialogue. A document leaves out images that cannot be opened, if at least one is left.

    Raises RecordError: an image that the dialogue needs cannot be opened.
    """
    found: list[Any] = []
    for image in dialogue.images:
        try:
            found.append(look(image))
        except RecordError as error:
            found.append(error)
    gone = [isinstance(one, RecordError) for one in found]
    lost = [one for one in found if isinstance(one, RecordError)]
    if lost and (not dialogue.is_document or all(gone)):
        raise lost[0]
    dialogues = without_images(dialogue, gone) if lost else [dialogue]
    return Opened(dialogues, [one for one in found if not isinstance(one, RecordError)], lost)


def look(image: Image) -> None:
    """Open an image that is on this machine; ignore one that is not downloaded yet."""
    if not isinstance(image.source, Remote):
        open_image(image)


def try_dialogue(
    record_id: str, record: dict[str, Any] | RecordError, root: ImageRoot, seed: int
) -> Dialogue | RecordError:
    """Do as `to_dialogue`, but return the error: rejected records are counted later, in order."""
    try:
        return to_dialogue(record_id, record, root, seed=seed)
    except RecordError as error:
        return error


def open_and_count(
    record_id: str, dialogue: Dialogue | RecordError, look: Look | None, stats: SourceStats
) -> Opened | None:
    """Return a record's dialogues, their images opened, or None if it is rejected; count rejections and lost images.

    Without `look` no image is opened: streams open images only when they make a row.
    """
    if isinstance(dialogue, RecordError):
        stats.reject(record_id, dialogue)
        return None
    stats.ignore(dialogue.ignored)
    if look is None:
        return Opened([dialogue], [], [])
    try:
        opened = open_images(dialogue, look)
    except RecordError as error:
        stats.reject(record_id, error)
        return None
    for lost in opened.lost:
        stats.reject_part(record_id, lost)
    return opened


def read_dialogues(
    source: Source, stats: SourceStats, *, seed: int = 0, look: Look | None = None, track: Track = silently
) -> Iterator[tuple[str, list[Dialogue]]]:
    """Yield (record_id, dialogues) of every record that is not rejected; count the others.

    Raises UserError: the source cannot be read at all.
    """
    root = ImageRoot(source)
    for record_id, record in track(taken(source, stats), f"read {source.label}"):
        dialogue = try_dialogue(record_id, record, root, seed)
        if opened := open_and_count(record_id, dialogue, look, stats):
            yield record_id, opened.dialogues


def messages_at(*paths: Path) -> Source:
    """Return a source of format `messages` for files outside a recipe, such as prompts or a chat."""
    return Source.model_construct(format="messages", path=tuple(map(str, paths)))


def say_if_documents(sources: Sequence[Source]) -> None:
    """Warn that training only on documents gives no instruct model, and suggest what helps."""
    if not need_end_of_utterance(sources):
        captions = any(FORMATS[source.format].captions for source in sources)
        hint = '; prompt: "Describe the image." in a source makes dialogues of its captions' if captions else ""
        log(f"the sources hold documents alone: the base learns to continue them, not to answer{hint}")
