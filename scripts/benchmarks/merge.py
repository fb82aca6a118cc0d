"""How much memory and time a merge takes at the true shapes of the 9B's layers, against copying the same files.

    python scripts/benchmarks/merge.py --layers 4

Writes a checkpoint of random bf16 weights (hidden 4096, the real vision tower and resampler, cross-attention at every
fourth layer; with --layers 32 it is the whole 9B, 18 GB) and a LoRA adapter of rank 16 on decoder and cross-attention,
merges them in a process of its own, copies the base's files, and deletes all it wrote. Memory is anonymous memory
(RssAnon): mapped files are the page cache's. Merge and copy both end when their bytes are on the disk; both read files
that were just read (a warm page cache, as far as memory holds them), and write into memory that was just freed: on a
virtual machine, the first touch of a page can cost more than all the rest. Seconds are the median of three rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from process_memory import memory

RANK, ROUNDS = 16, 3


def make(folder: Path, layers: int) -> None:
    """base/ and adapter/ of true shapes."""
    from random_weights import write_adapter, write_base

    from modeling.shapes import IDEFICS_9B

    config = {**IDEFICS_9B, "num_hidden_layers": layers}
    write_base(config, folder / "base", [f"what is number {number}?" for number in range(2000)])
    write_adapter(config, folder / "adapter", rank=RANK)


class Stages:
    """A merge's `track`: peak RssAnon and seconds of each of its stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._stage, self._stop = "start", threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __call__(self, items: Iterable[Any], description: str) -> Iterator[Any]:
        started, self._stage = time.perf_counter(), description
        yield from items
        self.seconds[description] = self.seconds.get(description, 0.0) + time.perf_counter() - started
        self._stage = "rest"

    def end(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), memory()["RssAnon"])


def merge_here(folder: Path) -> dict[str, Any]:
    """In a process of its own: what importing takes, then merging and copying in turn."""
    from finetune.export.merge import merge

    imported, rounds, peaks = memory()["RssAnon"], [], {}
    copy(folder)  # not measured: what it frees, the first merge writes into
    for _ in range(ROUNDS):
        warm(folder)
        stages, started = Stages(), time.perf_counter()
        record = merge(folder / "adapter", str(folder / "base"), folder / "merged", instruct=True, track=stages)
        seconds = time.perf_counter() - started
        stages.end()
        shutil.rmtree(folder / "merged")
        warm(folder)
        rounds.append({**stages.seconds, "everything": seconds, "copy": copy(folder)})
        peaks = {stage: max(peak, peaks.get(stage, 0)) for stage, peak in stages.peaks.items()}
    parity = record["parity"]
    return {
        "imported": imported,
        "peaks": peaks,
        "rounds": rounds,
        "seconds": {stage: statistics.median(one[stage] for one in rounds) for stage in rounds[0]},
        "largest_tensor_difference": parity["largest_tensor_difference"],
        "largest_block_difference": parity["largest_block_difference"],
    }


def copy(folder: Path) -> float:
    """Seconds that copying the base's weights takes, until they are on the disk."""
    (folder / "copy").mkdir()
    started = time.perf_counter()
    for path in sorted((folder / "base").glob("*.safetensors")):
        shutil.copyfile(path, folder / "copy" / path.name)
        with (folder / "copy" / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "copy")
    return seconds


def warm(folder: Path) -> None:
    """Read the base's weights once, so that merge and copy find them alike."""
    for path in (folder / "base").glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def show(size: int, merged: dict[str, Any]) -> None:
    seconds = merged["seconds"]
    speeds = [size / seconds[stage] / 1e9 for stage in ("merge", "copy")]
    print(f"weights                          {size / 1e9:8.2f} GB")
    print(f"RssAnon of importing alone       {merged['imported'] / 1e6:8.0f} MB")
    for stage, what in (("merge", "merging"), ("compare", "rows"), ("run blocks", "blocks"), ("hash", "hashing")):
        print(f"peak RssAnon, {what:<19}{merged['peaks'].get(stage, 0) / 1e6:8.0f} MB {seconds[stage]:8.1f} s")
    print(
        f"peak RssAnon, all                {max(merged['peaks'].values()) / 1e6:8.0f} MB {seconds['everything']:8.1f} s"
    )
    print(f"merging                          {speeds[0]:8.2f} GB/s")
    print(f"copying                          {speeds[1]:8.2f} GB/s {seconds['copy']:8.1f} s")
    ratios = ", ".join(f"{one['copy'] / one['merge']:.2f}" for one in merged["rounds"])
    print(f"merging / copying                {speeds[0] / speeds[1]:8.2f} (each round: {ratios})")
    print(f"largest difference of a tensor   {merged['largest_tensor_difference']:8.3f} of what rounding explains")
    print(f"largest difference of a block    {merged['largest_block_difference']:8.1e} of its largest output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers instead of the 9B's 32; a multiple of 4")
    parser.add_argument("--out", type=Path, help="folder to write to (and delete from); else one for temporary files")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(merge_here(arguments.here)))
        return
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out) as name:
        folder = Path(name)
        make(folder, arguments.layers)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        command = [sys.executable, __file__, "--here", name]
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
        merged = json.loads(made.stdout.splitlines()[-1])
    if arguments.json:
        print(json.dumps({"bytes": size, **merged}, indent=2))
    else:
        show(size, merged)


if __name__ == "__main__":
    main()
