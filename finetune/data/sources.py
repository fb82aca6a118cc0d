"""A recipe's source -> the same source, ready to be read: its format recognised and checked."""

from collections.abc import Sequence
from pathlib import Path

from finetune.console import log
from finetune.data.formats import FORMATS
from finetune.data.formats.recognise import recognise_source
from finetune.recipe.schema import CAPTIONS, Source, need_end_of_utterance
from modeling.errors import UserError


def resolve_source(source: Source) -> Source:
    """Return the source with its format named where it is `auto`, and print what a person must know of it.

    Raises UserError where its other keys do not go with its format.
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


def messages_at(*paths: Path) -> Source:
    """A source of `messages` that no recipe names: a file of prompts, whose name need not be UTF-8, or a chat."""
    return Source.model_construct(format="messages", path=tuple(map(str, paths)))


def say_if_documents(sources: Sequence[Source]) -> None:
    """Say that no instruct model comes of documents alone, and what would help."""
    if not need_end_of_utterance(sources):
        captions = any(FORMATS[source.format].captions for source in sources)
        hint = '; prompt: "Describe the image." in a source makes dialogues of its captions' if captions else ""
        log(f"the sources hold documents alone: the base learns to continue them, not to answer{hint}")
