"""One measurement of streaming.py, in a process of its own: `finetune` and `modeling` are those of PYTHONPATH.

    wait      makes rows ahead of a trainer that only sleeps, as one on a GPU leaves the processor alone
    stop      makes rows until so many records are read, and writes the state that a checkpoint holds
    resume    goes on from this state, as far as the first row

Prints a line of JSON. Packages are imported where they are used: worker processes import this file again.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from process_memory import Watch

ROW_TOKENS, ROW_IMAGES, ROWS_PER_STEP, AHEAD = 1024, 32, 8, 8
SIZE = 224
"""Height and width to which images are resized, in pixels; both published bases have this one."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("source", help="keys of the source, as JSON")
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--step", type=float, default=0.0, help="seconds that the trainer sleeps after each row")
    parser.add_argument("--records", type=int, default=0)
    arguments = parser.parse_args()
    with Watch() as watch:
        measured = SIDES[arguments.side](arguments)
    print(json.dumps({**measured, "peak_memory_mb": round(watch.peak / 2**20)}))


def wait(arguments: argparse.Namespace) -> dict[str, Any]:
    with _prefetched(arguments) as (_, prefetched):
        started = time.perf_counter()
        prefetched([{"row": 0}])
        first, images, waited = time.perf_counter() - started, 0, prefetched.waited
        started = time.perf_counter()
        for number in range(1, arguments.rows + 1):
            batch = prefetched([{"row": number}])
            images += len(batch["pixel_values"])
            time.sleep(arguments.step)
        seconds = time.perf_counter() - started
        return {
            "first_row_seconds": round(first, 2),
            "rows": arguments.rows,
            "images": images,
            "seconds": round(seconds, 2),
            "waiting": round((prefetched.waited - waited) / seconds, 4),
        }


def stop(arguments: argparse.Namespace) -> dict[str, Any]:
    with _prefetched(arguments) as (rows, prefetched):
        number = 0
        while True:
            prefetched([{"row": number}])
            number += 1
            if number % ROWS_PER_STEP == 0 and rows.source_stats[0].read >= arguments.records:
                break
        state = {"rows": number, "state": rows.state(number)}
        (arguments.out / "rows.json").write_text(json.dumps(state))
        return {"rows": number, "records": rows.source_stats[0].read}


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    saved = json.loads((arguments.out / "rows.json").read_text())
    with _prefetched(arguments) as (rows, prefetched):
        started = time.perf_counter()
        rows.restore(saved["state"])
        prefetched([{"row": saved["rows"]}])
        seconds = time.perf_counter() - started
    return {"rows": saved["rows"], "first_row_seconds": round(seconds, 2)}


SIDES = {"wait": wait, "stop": stop, "resume": resume}


@contextmanager
def _prefetched(arguments: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Yield the rows of a run, and what makes them ahead of its trainer."""
    from finetune.data.dataset import make_dataset
    from finetune.data.images import Preprocessing
    from finetune.data.rows import train_rows
    from finetune.recipe.schema import Data, Source, Training
    from finetune.training.prefetch import PrefetchedRows
    from modeling import tiny

    keys = json.loads(arguments.source)
    source = Source(
        stream=True, **{key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    )
    data = Data(sources=(source,), max_length=ROW_TOKENS, prepared=str(arguments.out / "prepared"))
    training = Training(
        steps=10**6, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES, tokens_per_step=ROW_TOKENS * ROWS_PER_STEP
    )
    words = [f"What about number {number}? word{number} Shade Which of picture" for number in range(1000)]
    tokenizer = tiny.train_tokenizer(words, vocab_size=2000, added=3)
    rows = train_rows(
        make_dataset(data, [source], tokenizer, row_images=ROW_IMAGES, seed=0),
        [source],
        data,
        training,
        preprocessing=Preprocessing((SIZE, SIZE), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        tokenizer=tokenizer,
    )
    # Code before there were worker processes knows no such option.
    prefetched = PrefetchedRows(rows, depth=AHEAD, **({"workers": arguments.workers} if arguments.workers else {}))
    try:
        yield rows, prefetched
    finally:
        prefetched.close()


if __name__ == "__main__":
    main()
