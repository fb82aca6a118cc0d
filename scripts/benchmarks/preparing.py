"""How time and memory of preparing grow with the data: text and image dialogues, generated on the way.

    python scripts/benchmarks/preparing.py --out runs/preparing

For each size a process of its own writes the source files, prepares them, and prepares them again; its memory, and that
of its workers, is watched meanwhile. Prints a table and leaves it as JSON and as a picture in the folder. What is
measured is anonymous memory (RssAnon): mapped files are the page cache's.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

from process_memory import memory

TEXT, IMAGES = (10_000, 100_000, 1_000_000), (1_000, 10_000, 100_000)
SHARD = 10_000
"""Images in one tar."""


def write_text(folder: Path, count: int) -> Path:
    """UltraChat-like: a short question, an answer of 10 to 100 words."""
    path = folder / "text.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            answer = " ".join(f"word{(number * 7 + place) % 997}" for place in range(10 + number % 91))
            lines.write(json.dumps({"id": number, "data": [f"What about number {number}?", answer]}) + "\n")
    return path


def write_images(folder: Path, count: int) -> Path:
    """LLaVA-like: one distinct small image each, in plain tar archives that are never unpacked."""
    import numpy as np
    import PIL.Image

    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"images-{first // SHARD:04}.tar", "w") as archive:
            for number in range(first, min(first + SHARD, count)):
                levels = np.full((32, 32, 3), [number % 256, number // 256 % 256, number // 65536], np.uint8)
                written = io.BytesIO()
                PIL.Image.fromarray(levels).save(written, "PNG")
                member = tarfile.TarInfo(f"{number}.png")
                member.size = written.tell()
                written.seek(0)
                archive.addfile(member, written)
    path = folder / "images.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            turns = [("human", f"<image>\nWhich shade is number {number}?"), ("gpt", f"Shade {number % 256}.")]
            conversation = [{"from": role, "value": value} for role, value in turns]
            lines.write(json.dumps({"image": f"{number}.png", "conversations": conversation}) + "\n")
    return path


def measure(kind: str, count: int, folder: Path, workers: int) -> dict[str, Any]:
    """In a process of its own: seconds and peak memory of preparing, and of preparing again."""
    from finetune.data.prepare import prepare
    from finetune.recipe.schema import Source
    from modeling import tiny

    if kind == "text":
        source = Source(format="ultrachat", path=(str(write_text(folder, count)),))
    else:
        path = write_images(folder, count)
        source = Source(format="llava", path=(str(path),), image_root=tuple(map(str, sorted(folder.glob("*.tar")))))
    words = [f"What about number {number}? word{number} Shade Which" for number in range(1000)]
    tokenizer = tiny.train_tokenizer(words, vocab_size=2000, added=3)

    def run() -> tuple[float, int, int]:
        started = time.perf_counter()
        with Watch() as watch:
            prepared, (stats,) = prepare(
                [source], tokenizer, max_length=512, max_images=4, seed=0, folder=folder / "prepared", workers=workers
            )
        assert len(prepared) == stats.kept == count
        return time.perf_counter() - started, watch.peak, stats.tokens

    seconds, peak, tokens = run()
    again, _, _ = run()
    stored = sum(path.stat().st_size for path in (folder / "prepared").rglob("*") if path.is_file())
    return {
        "kind": kind,
        "dialogues": count,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "again_seconds": round(again, 2),
        "peak_memory_mb": round(peak / 2**20),
        "stored_mb": round(stored / 2**20, 1),
    }


class Watch:
    """The largest anonymous memory of this process and its children, seen five times a second."""

    def __enter__(self) -> "Watch":
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        import psutil

        while not self._stop.wait(0.2):
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            self.peak = max(self.peak, sum(memory(process.pid)["RssAnon"] for process in processes))


def draw(results: list[dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, key, label in zip(axes, ("seconds", "peak_memory_mb"), ("seconds", "peak memory (MB)"), strict=True):
        for kind in dict.fromkeys(result["kind"] for result in results):
            points = [(result["dialogues"], result[key]) for result in results if result["kind"] == kind]
            axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        axis.set(xlabel="dialogues", ylabel=label, xscale="log", ylim=(0, None))
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/preparing"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--text", type=int, nargs="+", default=TEXT)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        kind, count = arguments.one
        folder = arguments.out / f"{kind}-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        print(json.dumps(measure(kind, int(count), folder, arguments.workers)))
        shutil.rmtree(folder)
        return
    results = []
    print(f"{'kind':8}{'dialogues':>12}{'seconds':>10}{'per second':>12}{'again':>8}{'peak MB':>10}{'stored MB':>11}")
    for kind, counts in (("text", arguments.text), ("images", arguments.images)):
        for count in counts:
            command = [sys.executable, __file__, "--out", arguments.out, "--workers", arguments.workers]
            command += ["--one", kind, count]
            made = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)  # noqa: S603
            result = json.loads(made.stdout)
            results.append(result)
            print(
                f"{kind:8}{count:12,}{result['seconds']:10.1f}{count / result['seconds']:12,.0f}"
                f"{result['again_seconds']:8.2f}{result['peak_memory_mb']:10,}{result['stored_mb']:11,.1f}",
                flush=True,
            )
    (arguments.out / "scale.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, arguments.out / "scale.png")
    print(f"{arguments.out / 'scale.png'}")


if __name__ == "__main__":
    main()
