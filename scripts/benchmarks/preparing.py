"""Time, memory and disk of preparing: text, images in folders, in Parquet and in webdataset archives; before and after.

    python scripts/benchmarks/preparing.py --out runs/preparing
    python scripts/benchmarks/preparing.py --before v0.1 --only text=1000000 tars=50000
    python scripts/benchmarks/preparing.py --datasets --nodes --only text=200000

For each kind and size the data is written once (it is then in the page cache), and prepared by each number of workers.
Each measurement is a process of its own. `--before REVISION` prepares the same data with the code of a git revision,
too; `--datasets` with plain `datasets`; `--nodes` with two processes as two machines, which share a folder.

again       seconds to prepare a second time, when all is there
peak        anonymous memory of the process and its workers
of one      how many times as fast as with one worker, or on one machine
of before   how many times as fast as the code before
read        megabytes from read calls, cached or not; some 25 of each process are the modules that it imports
"""

import argparse
import json
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preparing_data import WRITERS, write_data
from sides import ROOT, code_of, finish, start

SIZES = ("text=10000", "text=100000", "text=1000000", "folder=100000", "parquet=50000", "tars=50000")
SCRIPT = "preparing_sides.py"


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    codes = {arguments.before: code_of(arguments.before, arguments.out)} if arguments.before else {}
    codes["now"] = ROOT
    print(HEADER)
    results: list[dict[str, Any]] = []
    for kind, count in arguments.only:
        data = arguments.out / f"{kind}-{count}"
        shutil.rmtree(data, ignore_errors=True)
        source = write_data(kind, count, data)
        data_mb = round(sum(path.stat().st_size for path in data.rglob("*.*")) / 2**20, 1)
        for result in measure(source, data / "prepared", codes, arguments):
            _add(results, {"kind": kind, "data_mb": data_mb, **result}, arguments.before)
        shutil.rmtree(data)
        (arguments.out / "preparing.json").write_text(json.dumps(results, indent=1) + "\n")
    draw([result for result in results if result["code"] == "now"], arguments.out / "preparing.png")
    print(arguments.out / "preparing.png")


def measure(
    source: dict[str, Any], out: Path, codes: Mapping[str, Path], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the measurements of one source, as they are made."""
    for workers in arguments.workers:
        for code, folder in codes.items():
            measured = run_side("prepare", source, out, workers=workers, code=folder)
            yield {"code": code, "workers": workers, "machines": None, **measured}
        for side in ("passes", "pass") if arguments.datasets and source["format"] == "ultrachat" else ():
            measured = run_side(side, source, out, workers=workers)
            yield {"code": f"datasets, {side}", "workers": workers, "machines": None, **measured}
    for machines in (1, 2) if arguments.nodes else ():
        for code, folder in codes.items():
            measured = run_nodes(machines, source, out, code=folder)
            yield {"code": code, "workers": 1, "machines": machines, **measured}


def run_side(side: str, source: dict[str, Any], out: Path, *, workers: int, code: Path = ROOT) -> dict[str, Any]:
    """Return what preparing_sides.py measures in an empty folder, which is deleted after it."""
    out.mkdir()
    measured = finish(start(SCRIPT, side, json.dumps(source), out, "--workers", workers, code=code))
    shutil.rmtree(out)
    return measured


def run_nodes(machines: int, source: dict[str, Any], out: Path, *, code: Path = ROOT) -> dict[str, Any]:
    """Return the measurement of so many processes, each of which takes itself for the only one on its machine.

    Seconds are those of the slowest; memory and the processors' seconds are added up; the bytes that each has read
    stay apart.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group = {**address, "WORLD_SIZE": str(machines), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    out.mkdir()
    command = (SCRIPT, "node", json.dumps(source), out)
    processes = [start(*command, code=code, **group, RANK=str(rank)) for rank in range(machines)]
    measured = [finish(process) for process in processes]
    shutil.rmtree(out)
    return {
        **max(measured, key=lambda one: one["seconds"]),
        "peak_memory_mb": sum(one["peak_memory_mb"] for one in measured),
        "processor_seconds": round(sum(one["processor_seconds"] for one in measured), 2),
        "read_mb": [one["read_mb"] for one in measured],
    }


HEADER = (
    f"{'kind':8}{'dialogues':>11} {'code':18}{'workers':>8}{'machines':>9}{'seconds':>9}{'a second':>10}{'again':>7}"
    f"{'peak MB':>9}{'stored MB':>11}{'of one':>8}{'of before':>11}  read MB"
)


SAME = ("kind", "dialogues", "code", "workers", "machines")


def _compare(results: Sequence[dict[str, Any]], result: dict[str, Any], **other: object) -> float | None:
    """Return how many times as fast a result is as another one, which differs from it in these keys alone."""
    wanted = {key: result[key] for key in SAME} | other
    for one in results:
        if all(one[key] == value for key, value in wanted.items()):
            return round(one["seconds"] / result["seconds"], 2)
    return None


def _add(results: list[dict[str, Any]], result: dict[str, Any], before: str | None) -> None:
    """Print a result, compared with earlier ones of the same data, and keep it."""
    result["of_one"] = _compare(results, result, **{"machines" if result["machines"] else "workers": 1})
    result["of_before"] = _compare(results, result, code=before)
    results.append(result)
    print(
        f"{result['kind']:8}{result['dialogues']:11,} {result['code']:18.17}{result['workers']:8}"
        f"{result['machines'] or '':>9}{result['seconds']:9.1f}{result['dialogues'] / result['seconds']:10,.0f}"
        f"{result.get('again_seconds', ''):>7}{result['peak_memory_mb']:9,}{result['stored_mb']:11,.1f}"
        f"{result['of_one'] or '':>8}{result['of_before'] or '':>11}  {result['read_mb']}",
        flush=True,
    )


def draw(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw seconds and memory over the number of dialogues, a line for each kind and number of workers."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, key, label in zip(axes, ("seconds", "peak_memory_mb"), ("seconds", "peak memory (MB)"), strict=True):
        for kind, workers in dict.fromkeys((result["kind"], result["workers"]) for result in results):
            line = [one for one in results if (one["kind"], one["workers"]) == (kind, workers) and not one["machines"]]
            name = f"{kind}, {workers} worker{'s' if workers > 1 else ''}"
            axis.plot([one["dialogues"] for one in line], [one[key] for one in line], marker="o", label=name)
        axis.set(xlabel="dialogues", ylabel=label, xscale="log", ylim=(0, None))
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/preparing"))
    parser.add_argument("--only", type=_size, nargs="+", metavar="KIND=COUNT", default=list(map(_size, SIZES)))
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="none: measure machines alone")
    parser.add_argument("--before", metavar="REVISION", help="measure this git revision as well")
    parser.add_argument("--datasets", action="store_true", help="for text, measure plain `datasets` as well")
    parser.add_argument("--nodes", action="store_true", help="measure one and two machines as well")
    return parser.parse_args()


def _size(text: str) -> tuple[str, int]:
    kind, _, count = text.partition("=")
    if kind not in WRITERS or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(WRITERS)}, and a number: text=1000; got {text}")
    return kind, int(count)


if __name__ == "__main__":
    main()
