"""A dataset on the hub, or a local folder that the datasets library can load -> records, images as encoded bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.data.io.byte_streams import BrokenFileError, Record
from finetune.data.io.parquet_arrow import BATCH_ROWS, Checked, check_schema, checked, number_rows
from finetune.recipe.schema import Source
from modeling.errors import UserError

SAVED = ("state.json", "dataset_dict.json")
"""Files that the datasets library writes into a folder that it saves."""


def read_hub(source: Source, shard: tuple[int, int] | None = None) -> Iterator[Record]:
    """Return the rows of one split, or of one (index, number) of its shards. Reading them raises BrokenFileError.

    Raises UserError: not found, not reachable, or nothing that can be loaded.
    """
    several = shard is not None and shard[1] > 1
    return number_rows(f"{source.hub}@{shard[0]}" if shard and several else str(source.hub), _batches(source, shard))


def count_shards(source: Source) -> int:
    """Return the number of shards (usually files) of a streamed split. Raises UserError as `read_hub`."""
    return _load(source).num_shards


def count_rows(source: Source) -> int:
    """Return the number of rows of a split that is not streamed. Raises UserError as `read_hub`."""
    return len(_load(source))


def _load(source: Source) -> Any:
    import datasets

    name = str(source.hub)
    if any((Path(name) / file).is_file() for file in SAVED):
        raise UserError(f"{name}: a folder that save_to_disk wrote; give it as a path, not as a hub id")
    with _as_user_error(source):
        options = {"split": source.split, "revision": source.revision, "streaming": source.stream}
        return datasets.load_dataset(name, source.subset, **options)


def _batches(source: Source, shard: tuple[int, int] | None) -> Iterator[Checked]:
    """Yield Arrow batches, in which nothing is decoded: images stay {"bytes", "path"}, nested ones too."""
    import pyarrow

    dataset = _load(source)
    with _as_user_error(source):
        if shard is not None:
            dataset = dataset.shard(num_shards=shard[1], index=shard[0])
        tables = dataset.with_format("arrow").iter(BATCH_ROWS)
    try:
        with _as_user_error(source, but=(pyarrow.ArrowException, OSError)):
            for table in tables:
                check_schema(table.schema)
                yield from map(checked, table.to_batches())
    except (pyarrow.ArrowException, OSError) as error:
        raise BrokenFileError("corrupt file", str(error).partition("\n")[0]) from error


def name_of_version(source: Source) -> str:
    """Return the library's fingerprint of the data that it would load; it changes with every change on the hub."""
    import datasets

    with _as_user_error(source):
        builder = datasets.load_dataset_builder(str(source.hub), source.subset, revision=source.revision)
        return f"{builder.config_id}/{builder.hash}"


@contextmanager
def _as_user_error(source: Source, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn any error of the library into a UserError, except errors of types `but` that are no connection errors."""
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
