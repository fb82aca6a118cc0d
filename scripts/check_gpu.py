#!/usr/bin/env python
"""Whether the toolkit is right and fast on a GPU: stages sorted by worth, each a process with its own time.

    python scripts/check_gpu.py --minutes 9 --out runs/gpu-check                 on a machine with a GPU, and no network
    python scripts/check_gpu.py --device cpu --tiny --out runs/gpu-check         the same code here, on a stand-in
    python scripts/check_gpu.py --only lora stock --out runs/gpu-check           some stages again

A stage prints and writes each figure as soon as it has it (FOLDER/STAGE.json), so one that fails, or runs out of time,
loses nothing, and the next one runs. In the end: a table, and FOLDER/summary.md. Exits with 1 where a stage failed, or
a difference was larger than rounding explains; a target that is missed is only marked. docs/gpu.md says how to read it.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LEAST = 15
"""Seconds without which a stage is not begun."""


@dataclass(frozen=True)
class Stage:
    name: str
    module: str
    seconds: int
    """At most."""
    proves: str


STAGES = (
    Stage("environment", "gpu.rates", 60, "what is installed; how fast this device multiplies and copies"),
    Stage("parity", "gpu.parity", 90, "every computation of ours against the plain way, in fp32 and bf16"),
    Stage("works", "gpu.pipeline", 150, "finetune run, shortened: LoRA, then QLoRA, from data to merged model"),
    Stage("lora", "gpu.training", 120, "9B shape, LoRA on bf16: tokens/s, share of the matrix rate, memory, profile"),
    Stage("stock", "gpu.training", 120, "the same dialogues through transformers' Trainer, padded"),
    Stage("qlora", "gpu.training", 120, "9B shape in NF4: the same figures"),
    Stage("generation", "gpu.decoding", 120, "9B shape: 1, 8 and 32 conversations, against transformers' generate"),
    Stage("variants", "gpu.training", 240, "each choice in the code, the other way"),
)
"""In the order in which they run: what a later one would prove is worth less while an earlier one fails."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.stage:
        return _run(options.stage, options)
    options.out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if stage.name in (options.only or [one.name for one in STAGES])]
    ends, outcomes = time.monotonic() + 60 * options.minutes, {}
    for stage in stages:
        (options.out / f"{stage.name}.json").unlink(missing_ok=True)
    for stage in stages:
        left = ends - time.monotonic()
        if left < LEAST:
            outcomes[stage.name] = "not begun: no time was left"
            continue
        print(f"{stage.name}: {stage.proves}", flush=True)
        started = time.monotonic()
        outcome = _in_own_process(stage, options, min(stage.seconds * options.patience, left))
        outcomes[stage.name] = f"{outcome}, {time.monotonic() - started:.0f} s"
        print(f"{stage.name}: {outcomes[stage.name]}\n", flush=True)
    summary = summarise(options.out, outcomes)
    (options.out / "summary.md").write_text(summary, encoding="utf-8")
    print(summary)
    return int(any(not outcome.startswith("done") for outcome in outcomes.values()))


def _in_own_process(stage: Stage, options: argparse.Namespace, limit: float) -> str:
    """Run one stage; return "done", or what went wrong. Its process, and those it started, end with it."""
    path = [str(HERE.parent), str(HERE), str(HERE / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(one for one in path if one),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(_command(stage, options), env=environment, start_new_session=True)  # noqa: S603 - itself
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"ended after its {limit:.0f} s; what it found until then is kept"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "done" if status == 0 else "a difference is too large" if status == 3 else f"failed with status {status}"


def _command(stage: Stage, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(HERE / "check_gpu.py"), "--stage", stage.name, "--out", str(options.out)]
    return [*command, "--device", options.device, *["--tiny"] * options.tiny]


def _run(name: str, options: argparse.Namespace) -> int:
    """In the stage's process."""
    import torch
    from gpu.figures import Figures

    (stage,) = [one for one in STAGES if one.name == name]
    figures = Figures(options.out, name)
    try:
        work = getattr(importlib.import_module(stage.module), name)
        work(figures, torch.device(options.device), tiny=options.tiny)
    except Exception as error:
        traceback.print_exc()
        figures.add("error", f"{type(error).__name__}: {str(error)[:300]}")
        return 1
    return 3 if figures.failed else 0


def summarise(folder: Path, outcomes: dict[str, str]) -> str:
    """All figures of all stages as one page of Markdown."""
    lines = ["# The check of the GPU", ""]
    for stage in STAGES:
        path = folder / f"{stage.name}.json"
        if stage.name not in outcomes and not path.is_file():
            continue
        lines += [f"## {stage.name}: {outcomes.get(stage.name, 'from an earlier call')}", "", f"{stage.proves}", ""]
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if found:
            lines += ["| figure | value | unit | bound | |", "|---|---|---|---|---|"]
        for one in found:
            value = f"{one['value']:.4g}" if isinstance(one["value"], float) else one["value"]
            mark = "" if one["holds"] is None else "holds" if one["holds"] else "WRONG" if one["required"] else "missed"
            lines.append(
                f"| {one['name']} | {value} | {one['unit']} | {one['bound']} | {mark} |".replace("|  |", "| |")
            )
        lines.append("")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=9, help="for all stages together (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the figures")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a stand-in of 0.02 billion parameters instead of the 9B")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"some of: {', '.join(names)}")
    parser.add_argument("--patience", type=float, default=1, help="times the longest that each stage may take")
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
