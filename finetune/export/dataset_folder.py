"""Prepared examples -> a plain folder of the datasets library, or a dataset on the hub, that others can load.

    FOLDER/    dataset_dict.json · train/ · eval/ (where examples are held out) · README.md, the dataset card

A row is one example, as it is trained on. `messages` and `images` have the form that TRL and transformers read:

    messages    [{"role": "user", "content": [{"type": "image", "text": null},
                                              {"type": "text", "text": "Who is this?"}], "weight": null},
                 {"role": "assistant", "content": [{"type": "text", "text": "A cat."}], "weight": null}]
    images      the images of the messages, in order, encoded as they came
    source      the source of its record, as the card names it
    record_id   "train.jsonl:17"
    input_ids   the tokens as IDEFICS reads them
    labels      the same, and -100 where nothing is supervised

An answer with "weight": 0 is context, and not trained on. A document (a web page, a caption) is one message of the role
"document". The other answers that annotators gave, which only evaluation reads, are not in the folder.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.console import log, show_size, track
from finetune.data.conversation import Dialogue, Image, RecordError, Slice
from finetune.data.images import describe, encoded
from finetune.data.prepared import Prepared
from modeling.atomic_files import flush
from modeling.errors import UserError

CARD = "README.md"

_ROWS, _ROWS_WITH_IMAGES = 1000, 16
"""Rows in memory at a time, without images and with some of a few megabytes each."""

_EMPTY_REPOSITORY = {".gitattributes", CARD}
"""Files of a repository on the hub that holds no data yet."""


def require_new(folder: Path) -> None:
    """Raise UserError where a folder, or anything else, exists already."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--to: {folder} exists already, and nothing is overwritten; delete it, or name another folder")


def share(
    splits: Mapping[str, Prepared],
    card: str,
    *,
    to: Path | None,
    push: str | None,
    private: bool,
    dry_run: bool,
    scratch: Path,
    source_name: Callable[[str], str],
) -> dict[str, Any]:
    """Write examples to the folder `to`, push them to the hub as `push`, or both; return what was written, or would be.

    A split without examples is left out. scratch: a folder for what is pushed, where `to` is none. Raises UserError.
    """
    splits = {name: prepared for name, prepared in splits.items() if len(prepared)}
    if not splits:
        raise UserError("nothing to share: no example is prepared, as the sources are streamed")
    sizes = {name: size_of(prepared) for name, prepared in splits.items()}
    parts = [f"{one['examples']:,} examples with {one['images']:,} images ({name})" for name, one in sizes.items()]
    places = [str(to)] if to else []
    places += [f"{push} on the hub, {'private' if private else 'public'}"] if push else []
    image_bytes = show_size(sum(one["image_bytes"] for one in sizes.values()))
    goes = "would go" if dry_run else "goes"
    log(f"{', '.join(parts)}, {image_bytes} of images, with the dataset card: {goes} to {' and to '.join(places)}")
    shared = {"splits": sizes, "folder": str(to) if to else None, "hub": push, "private": private, "dry_run": dry_run}
    if dry_run:
        return shared
    folder = to or scratch / f"{push}".replace("/", "--")
    _require_room(folder, 2 * sum(one["image_bytes"] for one in sizes.values()))
    if not to:
        shutil.rmtree(folder, ignore_errors=True)  # from a push that was interrupted
    write_folder(splits, folder, card, source_name=source_name)
    if to:
        log(f'datasets.load_from_disk("{to}") opens it')
    if push:
        shared["url"] = push_folder(folder, push, private=private)
        log(f"pushed to {shared['url']}")
    if not to:
        shutil.rmtree(folder)
    return shared


def _require_room(folder: Path, needed: int) -> None:
    disk = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(
            f"{disk}: {show_size(free)} are free, and the images need {show_size(needed)} until the folder is written; "
            "name a folder on another disk with --to"
        )


def size_of(prepared: Prepared) -> dict[str, int]:
    """Return {"examples", "images", "image_bytes"}, an image counted as often as it is shown: so often it is stored."""
    shown = Counter(image for images in prepared.image_ids for image in images)
    sizes = {image: _encoded_bytes(prepared.images[image]) for image in shown}
    return {
        "examples": len(prepared),
        "images": shown.total(),
        "image_bytes": sum(count * sizes[image] for image, count in shown.items()),
    }


def _encoded_bytes(image: Image) -> int:
    """Return about how many bytes an image of a prepared set takes."""
    assert isinstance(image.source, Path | Slice)
    return image.source.length if isinstance(image.source, Slice) else image.source.stat().st_size


def write_folder(
    splits: Mapping[str, Prepared], folder: Path, card: str, *, source_name: Callable[[str], str] = str
) -> None:
    """Write the examples of each split, and the card, to a new folder; it appears under its name when it is whole.

    source_name: the name of a source in a recipe -> its name in the column `source`. On the way, the disk holds the
    rows twice. Raises UserError: the folder exists, or an image cannot be read any more.
    """
    import datasets

    require_new(folder)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _without_bars():
            saved = {
                name: _written(prepared, name, aside / "cache" / name, source_name) for name, prepared in splits.items()
            }
            datasets.DatasetDict(saved).save_to_disk(aside / "set")
        (aside / "set" / CARD).write_text(card, encoding="utf-8")
        for path in (aside / "set").rglob("*"):
            flush(path)
        (aside / "set").rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush(folder.parent)


def _features() -> Any:
    from datasets import Features, List, Value
    from datasets import Image as EncodedImage

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part), "weight": Value("int8")}
    return Features(
        {
            "messages": List(message),
            "images": List(EncodedImage()),
            "source": Value("string"),
            "record_id": Value("string"),
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
        }
    )


def _written(prepared: Prepared, split: str, cache: Path, source_name: Callable[[str], str]) -> Any:
    """Return a `datasets.Dataset` of the examples, whose rows are in the folder `cache`. Raises UserError."""
    import datasets

    def rows() -> Iterable[dict[str, Any]]:
        return track(_rows(prepared, source_name), f"write {split}", total=len(prepared))

    try:
        return datasets.Dataset.from_generator(
            rows,
            features=_features(),
            cache_dir=str(cache),
            fingerprint=split,
            split=datasets.NamedSplit(split),
            writer_batch_size=_ROWS_WITH_IMAGES if prepared.image_counts.any() else _ROWS,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise


def _rows(prepared: Prepared, source_name: Callable[[str], str]) -> Iterator[dict[str, Any]]:
    examples, dialogues, origins = prepared.examples, prepared.dialogues, prepared.origins
    for index in range(len(prepared)):
        example, dialogue, (source, record_id) = examples[index], dialogues[index], origins[index]
        yield {
            "messages": messages_of(dialogue),
            "images": [{"bytes": _bytes(image, record_id), "path": None} for image in dialogue.images],
            "source": source_name(source),
            "record_id": record_id,
            "input_ids": example.input_ids,
            "labels": example.labels,
        }


def messages_of(dialogue: Dialogue) -> list[dict[str, Any]]:
    """Return a dialogue as messages, with {"type": "image", "text": None} at the place of each image."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "text": None}
                for part in turn.parts
            ],
            "weight": None if turn.supervised else 0,
        }
        for turn in dialogue.turns
    ]


def _bytes(image: Image, record_id: str) -> bytes:
    try:
        return encoded(image)
    except RecordError as error:
        raise UserError(f"{record_id}: {describe(image)} was there when it was prepared: {error}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the datasets library from drawing bars of its own."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def require_repository(name: str, *, private: bool) -> None:
    """Raise UserError where a dataset cannot be pushed to the hub under this name; make nothing there.

    It needs a token, and a repository that does not exist, or one of the visibility asked for that holds no data.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _as_user_error(name):
        api.whoami()
        try:
            found = api.repo_info(name, repo_type="dataset")
        except RepositoryNotFoundError:
            return
        files = sorted(set(api.list_repo_files(name, repo_type="dataset")) - _EMPTY_REPOSITORY)
    if files:
        raise UserError(
            f"--push: {name} holds files already ({files[0]}), and nothing is overwritten; name another one"
        )
    if bool(found.private) != private:
        expected, got = ("private", "public") if private else ("public", "private")
        hint = "make it private there, or add --public" if private else "make it public there, or leave --public out"
        raise UserError(f"--push: {name}: expected a {expected} repository, and it is {got}; {hint}")


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Push a folder that `write_folder` wrote to the hub, with its card, and return its address there.

    Images are inside the Parquet files. Up to 25 GB are one commit: interrupted before it, the same command goes on.
    Raises UserError: not allowed, or not reachable.
    """
    import datasets
    from huggingface_hub import HfApi

    with _as_user_error(name), _without_bars():
        api = HfApi()
        url = api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        api.upload_file(  # first: the library completes the card with what it needs to load the data
            path_or_fileobj=folder / CARD, path_in_repo=CARD, repo_id=url.repo_id, repo_type="dataset"
        )
        datasets.load_from_disk(folder).push_to_hub(url.repo_id, private=private)
    return str(url)


@contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # connections, tokens, permissions: each library below has errors of its own
        message = " ".join(str(error).split())[:500] or type(error).__name__
        raise UserError(
            f"--push: {name}: {message}\n"
            "  expected a name such as me/mine, a token that may write (hf auth login), and the hub in reach"
        ) from error
