"""A recipe's sources -> the data package's, each with a format."""

from dataclasses import replace
from pathlib import Path

from finetune import recipe
from finetune.data.sources import recognise_source
from finetune.data.sources.source import Source
from finetune.progress import say


def to_source(source: recipe.Source) -> Source:
    """A recipe's source as the data package knows it, its format recognised where it is `auto`."""
    found = Source(
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
        license=source.license,
    )
    if source.format != "auto":
        return found
    recognised = replace(found, format=recognise_source(found))
    say(f"{found.name}: format {recognised.format} (recognised from its first records)")
    return recognised
