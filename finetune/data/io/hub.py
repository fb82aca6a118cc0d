"""A dataset on the hub, or a local folder that the datasets library can load -> records, images as encoded bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.data.io.streams import BrokenFileError, Record, until_broken
from finetune.data.io.tables import BATCH_ROWS, Checked, check_schema, checked, number_rows
from finetune.recipe.schema import Source
from modeling.errors import UserError

SAVED = ("state.json", "dataset_dict.json")
"""What the datasets library leaves in a folder it has saved to disk."""


def read_hub(source: Source) -> Iterator[Record]:
    """Rows of one split. Raises UserError: not found, not reachable, or nothing that can be loaded."""
    name = str(source.hub)
    return until_broken(name, number_rows(name, _batches(source)))


def _batches(source: Source) -> Iterator[Checked]:
    """In Arrow's form nothing is decoded: images stay {"bytes", "path"}, nested ones too."""
    import datasets
    import pyarrow

    name = str(source.hub)
    if any((Path(name) / file).is_file() for file in SAVED):
        raise UserError(f"{name}: a folder that save_to_disk wrote; give it as a path, not as a hub id")
    with _told(source):
        options = {"split": source.split, "revision": source.revision, "streaming": source.stream}
        tables = datasets.load_dataset(name, source.subset, **options).with_format("arrow").iter(BATCH_ROWS)
    try:
        with _told(source, but=(pyarrow.ArrowException, OSError)):
            for table in tables:
                check_schema(table.schema)
                yield from map(checked, table.to_batches())
    except (pyarrow.ArrowException, OSError) as error:
        raise BrokenFileError("corrupt file", str(error).partition("\n")[0]) from error


def name_of_version(source: Source) -> str:
    """What the library calls the data that it would load: another name for every change on the hub."""
    import datasets

    with _told(source):
        builder = datasets.load_dataset_builder(str(source.hub), source.subset, revision=source.revision)
        return f"{builder.config_id}/{builder.hash}"


@contextmanager
def _told(source: Source, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever the library raises, of any kind, becomes a UserError; `but` is left, except for lost connections."""
    try:
        yield
    except Exception as error:
        lost = isinstance(error, ConnectionError | TimeoutError)
        if isinstance(error, but) and not lost:
            raise
        hint = ""
        if lost:
            hint = "\n  is the hub reachable? HF_HUB_OFFLINE=1 takes what was downloaded before"
        elif isinstance(error, FileNotFoundError):
            hint = "\n  expected a dataset's name on the hub, or a folder; a private or gated one needs: hf auth login"
        message = " ".join(str(error).split())[:500] or type(error).__name__
        raise UserError(f"{source.name}: {message}{hint}") from error
