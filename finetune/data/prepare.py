"""Sources -> prepared sets: every record is counted, every image decoded once, every dialogue tokenised.

    fingerprint       the hash of all content, which names the set; nodes divide the reading
    shards_of         the parts of the source that can be read on their own
    make_parts        records -> dialogues -> examples, a part for each shard; nodes divide the shards
    join_parts        all parts as one set, images distinct by content
    join_questions    with `turns` alone: questions about one image, wherever in the source, joined, then tokenised

Whatever is interrupted goes on with the parts that are missing. Memory grows only by a few numbers per dialogue.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from finetune.console import Track, silently
from finetune.data.arrow import ArrowFile, DamagedError
from finetune.data.chunking import Limits, Splitter, splitter
from finetune.data.io.source_files import fingerprint, hash_share, is_hashed, stat_fingerprint
from finetune.data.join_questions import JOINED, join_questions
from finetune.data.prepare_shards import DIALOGUES, PARTS, content_of, join_parts, make_parts, part_of, remove_parts
from finetune.data.prepared import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    IMAGE_SCHEMA,
    IMAGES,
    STATS,
    Prepared,
    PreparedSet,
    is_undamaged,
    stats_in,
)
from finetune.data.shards import shards_of
from finetune.data.stale_images import FILE_SCHEMA, FILES, Changes, find_changes
from finetune.data.stats import SourceStats, why_nothing_is_left
from finetune.data.tokenize import Encoder
from finetune.distributed.node_group import ALONE, NodeGroup
from finetune.recipe.schema import Source
from modeling.atomic_files import flush, write_json
from modeling.errors import UserError


def prepare(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    max_length: int,
    max_images: int,
    seed: int,
    folder: Path,
    workers: int = 1,
    track: Track = silently,
    nodes: NodeGroup = ALONE,
) -> tuple[Prepared, list[SourceStats]]:
    """Prepare each source in a folder below `folder`, or open the existing set.

    A record that cannot be used is counted under its reason. `workers`: processes on each node.
    """
    encoder, limits = Encoder(tokenizer), Limits(max_length, max_images)
    options: dict[str, Any] = {"folder": folder, "workers": workers, "track": track, "nodes": nodes}
    sets = []
    for source in sources:
        sets.append(prepare_source(source, splitter(source, encoder, limits, seed=seed), **options))
    return Prepared(sets), [one.stats for one in sets]


def prepare_share(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    share: tuple[int, int],
    max_length: int,
    max_images: int,
    seed: int,
    folder: Path,
    workers: int = 1,
    track: Track = silently,
) -> list[tuple[int, int]]:
    """Prepare every n-th shard of each source, from number i on, for a share (i, n); return (shards done, all) of each.

    Other processes, on other machines, prepare the other shares; they share `folder`, and need not run at once. When
    all are done, `prepare` finds the parts and joins them.
    """
    encoder, limits, cache = Encoder(tokenizer), Limits(max_length, max_images), folder / FINGERPRINTS
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for source in sources:
        how, shards = splitter(source, encoder, limits, seed=seed), shards_of(source)
        if is_hashed(source, cache) and find_set(set_folder(source, how, folder)).set:
            done.append((len(shards), len(shards)))
            continue
        work, node = work_folder(source, how, folder), NodeGroup(*share)
        hash_share(source, cache, node)
        make_parts(source, how, work, shards, downloads=folder / "downloads", workers=workers, track=track, nodes=node)
        _require_unchanged(source, how, work)
        joined = not (work / PARTS).exists()  # by another process, meanwhile
        whole = [joined or part_of(work / PARTS, number).is_dir() for number in range(len(shards))]
        done.append((sum(whole), len(shards)))
    return done


def prepare_source(
    source: Source,
    splitter: Splitter,
    *,
    folder: Path,
    workers: int,
    track: Track = silently,
    nodes: NodeGroup = ALONE,
) -> PreparedSet:
    """Return the set of one source. Its name holds a hash of its content, its settings, the tokenizer and this code.

    If image files have changed, the old set stays and a new one is made beside it. Raises UserError: some are missing,
    or files changed while they were read.
    """

    def look() -> Found:
        found = find_set(first)
        if found.set is None and found.missing:
            raise UserError(_say_missing(source, found.folder, found.missing))
        if found.damaged:
            shutil.rmtree(found.folder)
        return found

    nodes.on_main("make the folder of prepared sets", lambda: folder.mkdir(parents=True, exist_ok=True))
    first = set_folder(source, splitter, folder, nodes)
    with nodes.lock(first.with_name(f".{first.name}.lock")):
        found = nodes.on_main(f"open {source.label}", look)
        if found.set is not None:
            return found.set
        work = nodes.on_main(f"name {source.label}", lambda: work_folder(source, splitter, folder))

        def tracked(items: Iterable[Any], step: str) -> Iterable[Any]:
            return track(items, step + found.anew)

        make_set(source, splitter, work, downloads=folder / "downloads", workers=workers, track=tracked, nodes=nodes)
        same = set_folder(source, splitter, folder, nodes) == first
        nodes.on_main(f"compare {source.label}", lambda: _require_unchanged(source, splitter, work, same=same))
        nodes.on_main(f"finish {source.label}", lambda: _finish(work, found.folder))
        made = nodes.on_main(f"open {source.label}", look)
        if made.set is not None and made.folder == found.folder:
            return made.set
        raise UserError(f"{source.name}: its images changed while they were prepared; start again")


def make_set(
    source: Source,
    splitter: Splitter,
    work: Path,
    *,
    downloads: Path,
    workers: int,
    track: Track,
    nodes: NodeGroup,
) -> None:
    """Make a set in the folder `work`, but for its stats.json, or go on where another process was interrupted."""
    name, schema = content_of(splitter)
    files = {name: schema, IMAGES: IMAGE_SCHEMA, FILES: FILE_SCHEMA}

    def are_joined() -> bool:
        return all(is_undamaged(work / file, schema, stats=file == name) for file, schema in files.items())

    options: dict[str, Any] = {"workers": workers, "track": track, "nodes": nodes}
    if not nodes.on_main("look for what is prepared", are_joined):
        shards = nodes.on_main(f"list {source.label}", lambda: shards_of(source))
        share = partial(make_parts, source, splitter, work, shards, downloads=downloads, **options)
        nodes.each(f"prepare {source.label}", share)
        nodes.on_main(f"join {source.label}", lambda: join_parts(source, splitter, work, shards))
    if splitter.joins and not nodes.on_main(
        "look for examples", lambda: is_undamaged(work / EXAMPLES, EXAMPLE_SCHEMA, stats=True)
    ):
        join_questions(source, work, splitter, **options)


def _require_unchanged(source: Source, splitter: Splitter, work: Path, *, same: bool = True) -> None:
    """Remove what was made, and raise UserError, where the files are not `same`, or not those that `work` is named by.

    Else a set could hold other records than those that its name stands for.
    """
    if not same or work_folder(source, splitter, work.parent) != work:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"{source.name}: its files changed while they were prepared; give the same command again")


def _finish(work: Path, made: Path) -> None:
    """Complete a set with its statistics, and give it its name."""
    examples = ArrowFile(work / EXAMPLES)
    stats = stats_in(examples)
    stats.images = len(np.unique(examples.values("images")))
    remove_parts(work)  # of a process that was interrupted while it removed them, or of one that came late
    shutil.rmtree(work / JOINED, ignore_errors=True)
    write_json(work / STATS, stats.to_json())
    shutil.rmtree(made, ignore_errors=True)  # not a set, or it would have been found
    work.rename(made)
    flush(made.parent)
    (made / DIALOGUES).unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    """The set of a source, or the folder in which to make it."""

    set: PreparedSet | None
    folder: Path
    damaged: bool = False
    anew: str = ""
    """ " again: " and the reason why an existing set cannot be used; else empty."""
    missing: Changes | None = None
    """Set if image files of an existing set are missing: preparing again without them is hardly intended."""


def find_set(first: Path) -> Found:
    """Return the first set, in `first` or beside it, whose image files are unchanged."""
    missing: tuple[Path, Changes] | None = None
    anew = ""
    for number in count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            opened = PreparedSet.open(folder)
            changes = find_changes(folder) if opened is not None else None
        except DamagedError as error:
            return Found(None, folder, damaged=True, anew=f" again: {error.path.name} was damaged")
        if opened is None or not changes:
            break
        missing = missing or ((folder, changes) if changes.missing else None)
        if changes.changed:
            more = f", and {len(changes.changed) - 1:,} more" if len(changes.changed) > 1 else ""
            anew = f" again: {changes.changed[0]}{more}"
    if opened is None and missing:
        return Found(None, missing[0], missing=missing[1])
    return Found(opened, folder, anew=anew)


def _say_missing(source: Source, made: Path, changes: Changes) -> str:
    roots = [path.resolve() for path in source.image_roots if path.is_dir()]
    folder, several = changes.missing_folder(roots), len(changes.missing) > 1
    where = f"none of the {len(changes.missing):,} image files below {folder} is there; is its disk mounted?"
    if folder is None:
        more = (
            f" and {len(changes.missing) - 1:,} more image files are missing"
            if several
            else ": the image file is missing"
        )
        where = f"{changes.missing[0]}{more}"
    were, them = ("they were", "their disk or restore them") if several else ("it was", "its disk or restore it")
    return (
        f"{source.name}: {where}\n"
        f"  {were} there when {made} was prepared: mount {them}; or delete that folder, to prepare without them"
    )


FINGERPRINTS = "fingerprints.json"
"""File, beside the prepared sets, with the hashes of data files."""


def set_folder(source: Source, splitter: Splitter, folder: Path, nodes: NodeGroup = ALONE) -> Path:
    """Return the folder of a source's set, which may not exist yet: named by all that determines the set."""
    content = fingerprint(source, folder / FINGERPRINTS, nodes)
    return nodes.on_main(f"name {source.label}", lambda: _named(source, splitter, folder, content))


def work_folder(source: Source, splitter: Splitter, folder: Path) -> Path:
    """Return the folder in which a source's set is made. It is named by sizes and times of files, not by content.

    So each of several machines can find it without reading what the others read.
    """
    work = _named(source, splitter, folder, stat_fingerprint(source))
    return work.with_name(f".{work.name}.work")


def require_examples(prepared: Prepared, source_stats: Sequence[SourceStats]) -> None:
    """Raise UserError, with the reasons, if no example is left."""
    if not len(prepared):
        raise UserError(why_nothing_is_left(source_stats))


def _named(source: Source, splitter: Splitter, folder: Path, content: str) -> Path:
    """Return NAME-KEY, where KEY hashes content, settings, tokenizer, and this package's code."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    made_of = {
        "source": source.model_dump(mode="json", exclude={"stream", "weight", "license"}),
        "content": content,
        "tokenizer": splitter.encoder.fingerprint,
        "limits": asdict(splitter.limits),
        "seed": splitter.seed if source.turns or len(source.prompt) > 1 else None,
        "code": code.hexdigest(),
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    label = re.sub(r"[^A-Za-z0-9.]+", "-", source.label).strip("-.")[:40]
    return folder / f"{label}-{key}"
