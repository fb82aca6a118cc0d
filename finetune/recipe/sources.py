"""A recipe's sources -> the data package's, each with a format; what a person must know of them is said."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.console import log
from finetune.data.formats import FORMATS, hold_dialogues
from finetune.data.formats.recognise import recognise_source
from finetune.data.source import Source
from finetune.recipe import schema as recipe
from modeling.errors import UserError


def to_source(source: recipe.Source, *, seed: int = 0) -> Source:
    """A recipe's source as the data package knows it, its format recognised where it is `auto`.

    `seed` draws among several prompts. Raises UserError: what the source says does not go with its format.
    """
    found = as_written(source, seed=seed)
    if source.format == "auto":
        recognised = recognise_source(found)
        found = replace(found, format=recognised.format)
        log(f"{found.name}: format {recognised.format} (recognised from its first records)")
        for note in recognised.notes:
            log(f"{found.name}: {note}")
    if FORMATS[found.format].note:
        log(f"{found.name}: {FORMATS[found.format].note}")
    _check(found)
    return found


def as_written(source: recipe.Source, *, seed: int = 0) -> Source:
    """The same with its format as the recipe says, perhaps `auto`: nothing is read, checked or said."""
    return Source(
        format=source.format,
        paths=tuple(map(Path, source.path)),
        hub=source.hub,
        subset=source.subset,
        split=source.split,
        revision=source.revision,
        stream=source.stream,
        image_root=tuple(map(Path, source.image_root)),
        image_name=source.image_name,
        columns=source.columns,
        download=bool(source.download),
        download_http=source.download == "http",
        limit=source.limit,
        on_broken=source.on_broken,
        turns=source.turns,
        ordered=source.ordered,
        placeholders=source.placeholders,
        ignore=source.ignore,
        prompt=source.prompt,
        prompt_seed=seed if len(source.prompt) > 1 else 0,
        license=source.license,
    )


def say_if_documents(sources: Sequence[Source]) -> None:
    """Say that no instruct model comes of documents alone, and what would help."""
    if not hold_dialogues(sources):
        captions = any(FORMATS[source.format].captions for source in sources)
        hint = '; prompt: "Describe the image." in a source makes dialogues of its captions' if captions else ""
        log(f"the sources hold documents alone: the base learns to continue them, not to answer{hint}")


def _check(source: Source) -> None:
    family = FORMATS[source.format]
    if source.prompt and not family.captions:
        raise UserError(
            f"{source.name}: prompt makes dialogues of captions ({', '.join(recipe.CAPTIONS)}), "
            f"got format {source.format}"
        )
    in_name = source.image_name or ""
    unknown = [name for name in source.columns if name not in family.names and f"{{{name}" not in in_name]
    if unknown:
        fields = ", ".join(family.names) or "no fields by name"
        raise UserError(
            f"{source.name}: columns: format {source.format} reads no {', '.join(unknown)}; it reads {fields}, and "
            f"columns says {{its name: the name in the records}}"
        )
