"""How long a trainer waits for streamed rows whose images are opened as they are made; how fast a run resumes.

    python scripts/benchmarks/streaming.py --out runs/streaming
    python scripts/benchmarks/streaming.py --before v0.1 --workers 0 1 2 4

The trainer only sleeps after each row, as one on a GPU leaves the processor to others: for `--step` seconds, by default
what scale.py predicts for a row of 1,024 tokens of the 9B on an H100, and not at all, to see how fast rows are made. A
row has 1,024 tokens, and 32 images of 512 pixels a side from webdataset archives.

With 0 workers, a thread of the trainer's process makes the rows. `--before REVISION` measures the code of a git
revision, too, with its thread. Resuming is measured on text: after so many records, seconds until the first row.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from preparing_data import write_data
from sides import ROOT, code_of, finish, start

SCRIPT = "streaming_sides.py"


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    codes = {arguments.before: code_of(arguments.before, arguments.out)} if arguments.before else {}
    codes["now"] = ROOT
    found: dict[str, list[dict[str, Any]]] = {}
    if "waiting" in arguments.only:
        found["waiting"] = show_waiting(measure_waiting(codes, arguments))
    if "resuming" in arguments.only:
        found["resuming"] = show_resuming(measure_resuming(codes, arguments))
    (arguments.out / "streaming.json").write_text(json.dumps(found, indent=1) + "\n")


def show_waiting(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print measurements as they are made, and return them."""
    shown = []
    print(f"{'code':12}{'workers':>8}{'first row s':>13}{'rows/s':>8}{'images/s':>10}{'waiting':>9}{'peak MB':>9}")
    for line in lines:
        print(
            f"{line['code']:12.11}{line['workers']:8}{line['first_row_seconds']:13.2f}{line['rows_per_second']:8.1f}"
            f"{line['images_per_second']:10,.0f}{line['waiting']:9.1%}{line['peak_memory_mb']:9,}",
            flush=True,
        )
        shown.append(line)
    return shown


def show_resuming(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print measurements as they are made, and return them."""
    shown = []
    print(f"{'code':12}{'workers':>8}{'records before':>16}{'rows before':>13}{'first row s':>13}")
    for line in lines:
        print(
            f"{line['code']:12.11}{line['workers']:8}{line['records']:16,}{line['rows']:13,}"
            f"{line['first_row_seconds']:13.2f}",
            flush=True,
        )
        shown.append(line)
    return shown


def measure_waiting(codes: Mapping[str, Path], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield, for each code and number of workers: rows a second, and the share of the time without a row."""
    source = _written("photographs", arguments.images, arguments.out)
    for code, workers in _sides(codes, arguments.workers):
        command = (SCRIPT, "wait", source, arguments.out, "--workers", workers, "--rows", arguments.rows)
        fast = finish(start(*command, code=codes[code]))
        slow = finish(start(*command, "--step", arguments.step, code=codes[code]))
        yield {
            "code": code,
            "workers": workers,
            "rows_per_second": fast["rows"] / fast["seconds"],
            "images_per_second": fast["images"] / fast["seconds"],
            "step": arguments.step,
            "waiting": slow["waiting"],
            "first_row_seconds": slow["first_row_seconds"],
            "peak_memory_mb": max(fast["peak_memory_mb"], slow["peak_memory_mb"]),
        }


def measure_resuming(codes: Mapping[str, Path], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield, for each code and number of workers: the seconds until the first row of a run that goes on."""
    source = _written("text", 2 * arguments.records, arguments.out)
    for code, workers in _sides(codes, arguments.workers):
        command = (source, arguments.out, "--workers", workers)
        stopped = finish(start(SCRIPT, "stop", *command, "--records", arguments.records, code=codes[code]))
        resumed = finish(start(SCRIPT, "resume", *command, code=codes[code]))
        yield {"code": code, "workers": workers, **stopped, **resumed}


def _sides(codes: Mapping[str, Path], workers: list[int]) -> list[tuple[str, int]]:
    return [(code, number) for code in codes for number in (workers if code == "now" else [0])]


def _written(kind: str, count: int, out: Path) -> str:
    """Write data, and return its source as JSON."""
    shutil.rmtree(out / kind, ignore_errors=True)
    return json.dumps(write_data(kind, count, out / kind))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/streaming"))
    parser.add_argument("--only", nargs="+", choices=("waiting", "resuming"), default=["waiting", "resuming"])
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=60, help="rows that are measured, after the first")
    parser.add_argument("--step", type=float, default=0.1, help="seconds that the trainer sleeps after each row")
    parser.add_argument("--images", type=int, default=6400, help="images of the data")
    parser.add_argument("--records", type=int, default=1_000_000, help="records that are read before resuming")
    parser.add_argument("--before", metavar="REVISION", help="measure this git revision as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
