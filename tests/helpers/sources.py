"""A source in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.recipe.schema import Source


def make_source(
    format: str, paths: Path | Sequence[Path] = (), *, image_root: Sequence[Path] = (), **settings: Any
) -> Source:
    """A source as no recipe has to be able to say it: perhaps without a path, or of files whose names are not UTF-8."""
    paths = [paths] if isinstance(paths, Path) else paths
    return Source.model_construct(
        format=format, path=tuple(map(str, paths)), image_root=tuple(map(str, image_root)), **settings
    )
