"""One measurement of preparing.py, in a process of its own: `finetune` and `modeling` are those of PYTHONPATH.

    prepare   this toolkit, in one process and its workers; then once more, where all is prepared already
    node      this toolkit, as one of several machines: the launcher's variables say which
    passes    plain `datasets`: from_generator makes dialogues, map tokenises them
    pass      plain `datasets`: from_generator makes examples

All call the same functions to convert, render and tokenise. Prints a line of JSON. The package is imported where it is
used: worker processes import this file again, and older code lacks some of these functions.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from process_memory import Watch, bytes_read

AT_ONCE, MAX_LENGTH, MAX_IMAGES = 512, 512, 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("source", help="keys of the source, as JSON")
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    from finetune.recipe.schema import Source

    keys = json.loads(arguments.source)
    source = Source(**{key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()})
    measured = SIDES[arguments.side](source, _tokenizer(), arguments.out, arguments.workers)
    stored = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(json.dumps({**measured, "stored_mb": round(stored / 2**20, 1)}))


def _tokenizer() -> Any:
    from modeling import tiny

    words = [f"What about number {number}? word{number} Shade Which of picture" for number in range(1000)]
    return tiny.train_tokenizer(words, vocab_size=2000, added=3)


def prepare(source: Any, tokenizer: Any, out: Path, workers: int) -> dict[str, Any]:
    from finetune.data.prepare import prepare as prepare_sources

    def run() -> dict[str, Any]:
        prepared, (stats,) = prepare_sources(
            [source], tokenizer, max_length=MAX_LENGTH, max_images=MAX_IMAGES, seed=0, folder=out, workers=workers
        )
        assert len(prepared) == stats.kept == stats.read
        return {"dialogues": stats.kept, "tokens": stats.tokens}

    measured = _measured(run)
    started = time.perf_counter()
    run()
    return {**measured, "again_seconds": round(time.perf_counter() - started, 2)}


def node(source: Any, tokenizer: Any, out: Path, workers: int) -> dict[str, Any]:
    from finetune.data.prepare import prepare as prepare_sources
    from finetune.distributed import collectives

    nodes = collectives.nodes()

    def run() -> dict[str, Any]:
        prepared, _ = prepare_sources(
            [source],
            tokenizer,
            max_length=MAX_LENGTH,
            max_images=MAX_IMAGES,
            seed=0,
            folder=out,
            workers=workers,
            nodes=nodes,
        )
        return {"dialogues": len(prepared)}

    return _measured(run)


def passes(source: Any, tokenizer: Any, out: Path, workers: int) -> dict[str, Any]:
    import datasets

    from finetune.data.prepared import EXAMPLE_SCHEMA
    from finetune.data.shards import shards_of

    splitter = _splitter(source, tokenizer)
    text = datasets.Value("string")

    def run() -> dict[str, Any]:
        dialogues = datasets.Dataset.from_generator(
            partial(_written_dialogues, source=source),
            gen_kwargs={"shards": shards_of(source)},
            features=datasets.Features({"record_id": text, "dialogue": text}),
            num_proc=workers,
            cache_dir=str(out),
        )
        examples = dialogues.map(
            partial(_tokenised, splitter=splitter),
            batched=True,
            batch_size=AT_ONCE,
            remove_columns=dialogues.column_names,
            features=datasets.Features.from_arrow_schema(EXAMPLE_SCHEMA),
            num_proc=workers,
        )
        return _counted(examples)

    return _measured(run)


def one_pass(source: Any, tokenizer: Any, out: Path, workers: int) -> dict[str, Any]:
    import datasets

    from finetune.data.prepared import EXAMPLE_SCHEMA
    from finetune.data.shards import shards_of

    splitter = _splitter(source, tokenizer)

    def run() -> dict[str, Any]:
        examples = datasets.Dataset.from_generator(
            partial(_examples, source=source, splitter=splitter),
            gen_kwargs={"shards": shards_of(source)},
            features=datasets.Features.from_arrow_schema(EXAMPLE_SCHEMA),
            num_proc=workers,
            cache_dir=str(out),
        )
        return _counted(examples)

    return _measured(run)


SIDES = {"prepare": prepare, "node": node, "passes": passes, "pass": one_pass}


def _measured(run: Any) -> dict[str, Any]:
    """Return what `run` returns, with its seconds, those of the processors, its memory and the bytes it read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    processors, read, started = _processor_seconds(), bytes_read(), time.perf_counter()
    with Watch() as watch:
        returned = run()
    return {
        **returned,
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(_processor_seconds() - processors, 2),
        "peak_memory_mb": round(watch.peak / 2**20),
        "read_mb": round((bytes_read() - read) / 2**20, 1),
    }


def _processor_seconds() -> float:
    """Seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _splitter(source: Any, tokenizer: Any) -> Any:
    from finetune.data.chunking import Limits, splitter
    from finetune.data.tokenize import Encoder

    return splitter(source, Encoder(tokenizer), Limits(MAX_LENGTH, MAX_IMAGES), seed=0)


def _dialogues(shards: Iterable[Any], source: Any) -> Iterator[tuple[str, Any]]:
    from finetune.data.conversation import Dialogue
    from finetune.data.io.image_roots import ImageRoot
    from finetune.data.read_dialogues import try_dialogue
    from finetune.data.shards import read_shard

    root = ImageRoot(source)
    for shard in shards:
        for record_id, record in read_shard(source, shard):
            dialogue = try_dialogue(record_id, record, root, 0)
            assert isinstance(dialogue, Dialogue)
            yield record_id, dialogue


def _written_dialogues(shards: Iterable[Any], source: Any) -> Iterator[dict[str, str]]:
    from finetune.data.prepared import dialogue_to_json

    for record_id, dialogue in _dialogues(shards, source):
        yield {"record_id": record_id, "dialogue": dialogue_to_json(dialogue)}


def _tokenised(batch: dict[str, list[str]], splitter: Any) -> dict[str, list[Any]]:
    from finetune.data.prepared import dialogue_from_json

    read = [dialogue_from_json(text, ()) for text in batch["dialogue"]]
    rows = _rows(list(zip(batch["record_id"], read, strict=True)), splitter)
    return {name: [row[name] for row in rows] for name in rows[0]}


def _examples(shards: Iterable[Any], source: Any, splitter: Any) -> Iterator[dict[str, Any]]:
    dialogues = _dialogues(shards, source)
    while chunk := list(islice(dialogues, AT_ONCE)):
        yield from _rows(chunk, splitter)


def _rows(chunk: list[tuple[str, Any]], splitter: Any) -> list[dict[str, Any]]:
    """Return rows of examples.arrow, of dialogues without images."""
    import numpy as np

    from finetune.data.chunking import fit_records
    from finetune.data.prepared import example_row
    from finetune.data.stats import SourceStats

    fitted = fit_records([(record_id, [dialogue]) for record_id, dialogue in chunk], splitter, SourceStats(""))
    rows = [
        example_row(piece.dialogue, example, [], lambda image: b"", origin.record_id)
        for piece, example, origin in fitted
    ]
    return [{**row, "questions": np.array(row["questions"], np.uint64)} for row in rows]


def _counted(examples: Any) -> dict[str, Any]:
    lists = examples.data.table.column("input_ids").chunks
    return {"dialogues": len(examples), "tokens": sum(len(one.flatten()) for one in lists)}


if __name__ == "__main__":
    main()
