"""The recipe's section `data` -> training and eval examples, and a report of how many records were kept or rejected."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.console import log, track
from finetune.data.contamination import Contamination, find_contamination
from finetune.data.eval_split import split_by_image
from finetune.data.io.remote import entry_of
from finetune.data.io.source_files import files_of, fingerprint
from finetune.data.prepare import FINGERPRINTS, prepare, prepare_share, require_examples
from finetune.data.prepared import Prepared
from finetune.data.read_dialogues import resolve_source
from finetune.data.sampling import Mix
from finetune.data.stats import SourceStats
from finetune.distributed.node_group import ALONE, NodeGroup
from finetune.recipe.schema import Data, Source
from finetune.recipe.urls import is_remote
from modeling.cpu_cores import available_cores
from modeling.errors import UserError

Contents = Mapping[str, Sequence[Mapping[str, str | None]]]
"""{"sources": [{"source": name, "sha256": hash of its content}], "eval_sources": [...], "documents": [...]}."""

STREAMED_BYTES = 2**25
"""Number of bytes hashed at both ends of a streamed file, to detect a change."""


@dataclass(frozen=True)
class Dataset:
    """The prepared examples for training and for evaluation; streamed sources are in neither."""

    train: Prepared
    eval: Prepared
    mix: Mix
    """The sampling ratio of the prepared training sources."""
    source_stats: list[SourceStats]
    """Statistics of the training sources, then of the eval sources."""
    report: dict[str, Any]
    """Content of data.json."""


def make_dataset(
    data: Data,
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    row_images: int,
    seed: int,
    nodes: NodeGroup = ALONE,
) -> Dataset:
    """Prepare the sources, or open the sets that are prepared already.

    sources: the training sources, their formats resolved; row_images: the most images in one example.
    """
    options = prepare_options(data, row_images=row_images, seed=seed)
    prepared = [source for source in sources if not source.stream]
    train_set, source_stats = prepare(prepared, tokenizer, nodes=nodes, **options)
    apart = [resolve_source(source) for source in data.eval_sources]
    eval_set, eval_stats = prepare(apart, tokenizer, nodes=nodes, **options)
    if not data.streams:
        require_examples(train_set, source_stats)
    if data.eval_split:
        train_set, eval_set = split_by_image(train_set, data.eval_split, seed=seed)
    if data.eval_sources:
        require_examples(eval_set, eval_stats)
    overlap = find_contamination(train_set, eval_set)
    train_set = _without_overlap(train_set, overlap, data.overlap)
    weights = [source.weight for source in data.sources if not source.stream]
    mix = Mix(train_set.sizes, weights, train_set.lengths, data.weigh)
    for stats, draws, repeats in zip(source_stats, mix.draws, mix.repeats, strict=True):
        stats.draws_per_epoch, stats.repeats_per_epoch = draws, round(repeats, 4)
    report = {
        "training_examples": len(train_set),
        "held_out_examples": len(eval_set),
        "training_images": hashlib.sha256(train_set.digests.tobytes()).hexdigest(),
        "held_out_images": hashlib.sha256(eval_set.digests.tobytes()).hexdigest(),
        "overlap": {**overlap.to_json(), "dropped": data.overlap != "report"},
        "sources": [stats.to_json() for stats in source_stats],
        "eval_sources": [stats.to_json() for stats in eval_stats],
    }
    return Dataset(train_set, eval_set, mix, [*source_stats, *eval_stats], report)


def prepare_shares(
    data: Data, sources: Sequence[Source], tokenizer: Any, *, row_images: int, seed: int, share: tuple[int, int]
) -> list[tuple[int, int]]:
    """Prepare one share (i, n) of these sources and of the eval sources; return (shards done, all) of each."""
    prepared = [source for source in sources if not source.stream]
    apart = [resolve_source(source) for source in data.eval_sources]
    options = prepare_options(data, row_images=row_images, seed=seed)
    return prepare_share([*prepared, *apart], tokenizer, share=share, **options)


def prepare_options(data: Data, *, row_images: int, seed: int) -> dict[str, Any]:
    """Return what `prepare` needs beside sources and tokenizer."""
    return {
        "max_length": data.max_length,
        "max_images": row_images,
        "seed": seed,
        "folder": Path(data.prepared),
        "workers": available_cores() if data.workers is None else max(data.workers, 1),
        "track": track,
    }


def contents(data: Data, documents: Sequence[Source] = (), nodes: NodeGroup = ALONE) -> Contents:
    """Return hashes of the content of all sources, the reading divided among nodes; `documents`: of the evaluation.

    The hash is None where a source is missing, and "" where the hub gives none. Images in folders are not hashed, see
    `fingerprint`.
    """
    kinds: dict[str, Sequence[Source]] = {
        "sources": data.sources,
        "eval_sources": data.eval_sources,
        "documents": documents,
    }
    cache = Path(data.prepared) / FINGERPRINTS
    return {kind: [_content(source, cache, nodes) for source in sources] for kind, sources in kinds.items()}


def _content(source: Source, cache: Path, nodes: NodeGroup) -> dict[str, str | None]:
    try:
        if source.stream and not source.hub:
            ends = nodes.on_main("look at a stream", lambda: _ends_of(files_of(source)))
            return {"source": source.name, "sha256": ends}
        return {"source": source.name, "sha256": fingerprint(source, cache, nodes)}
    except (UserError, OSError):
        return {"source": source.name, "sha256": "" if source.hub and not Path(source.hub).is_dir() else None}


def _ends_of(files: Sequence[Path]) -> str:
    """Return a hash of names, sizes, and both ends (`STREAMED_BYTES`) of each file: a stream may be terabytes.

    A remote file counts with its name and its version.
    """
    digest = hashlib.sha256()
    for path in files:
        if is_remote(path):
            digest.update(f"{path.name} {entry_of(path).version} ".encode("utf-8", "surrogateescape"))
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(STREAMED_BYTES))
            file.seek(max(file.tell(), size - STREAMED_BYTES))
            digest.update(file.read(STREAMED_BYTES))
    return digest.hexdigest()


def log_losses(dataset: Dataset, report: Path) -> None:
    """Log the rejected records, and the overlap of training and eval data."""
    for stats in dataset.source_stats:
        if stats.loss:
            log(f"{stats.source}: {stats.loss}; every reason is in {report}")
    overlap = dataset.report["overlap"]
    if overlap["images"] or overlap["questions"]:
        log(
            f"training and held-out data share {overlap['images']} images (in "
            f"{overlap['training_examples_with_images']} "
            f"training examples) and {overlap['questions']} questions about equal images (in "
            f"{overlap['training_examples_with_questions']}): {'dropped' if overlap['dropped'] else 'kept'}"
        )


def _without_overlap(training: Prepared, overlap: Contamination, rule: str) -> Prepared:
    dropped = {
        "report": np.zeros(0, np.int64),
        "drop_questions": overlap.examples_with_questions,
        "drop_images": np.union1d(overlap.examples_with_images, overlap.examples_with_questions),
    }[rule]
    left = training.select(np.setdiff1d(np.arange(len(training)), dropped))
    if len(training) and not len(left):
        raise UserError("data.overlap: every training example would be dropped; is it the held-out data itself?")
    return left
