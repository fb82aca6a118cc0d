"""Kills a run again and again, and shows that it ends as if nothing had happened.

    python scripts/benchmarks/chaos.py --kills 20
    python scripts/benchmarks/chaos.py --kills 20 --processes 2

A small IDEFICS is trained on drawn shapes: once uninterrupted, once with kill -9 at random moments, some of them while
a checkpoint or the feature cache is being written. Then adapters, losses and record counts are compared, byte by byte.
With several processes one of them is killed, by chance, and the launcher has to end the others.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

STEPS = 12
POLL = 0.002
"""Seconds between two looks at a run that is to be killed."""

MOMENTS = ("any", "checkpoint", "any", "features")
"""When the kills come, in turn: whenever, while a checkpoint is written, while the feature cache is filled."""

RECIPE = """
model: {{init: tiny, cross_attention: lora, decoder: lora, gates: full, added_tokens: full}}
adapter: {{rank: 4, alpha: 8, dropout: 0.1}}
data:
  sources: [{{format: easy_vqa, turns: 10, limit: 400}}]
  max_length: 256
  prepared: {folder}/prepared
training:
  {{steps: {steps}, row_tokens: 256, tokens_per_step: 1024, learning_rate: 1e-3, checkpoint_every: 1}}
merge: false
output: {folder}/run
"""


def command(folder: Path, processes: int) -> list[str]:
    """What trains in this folder; its recipe is written where there is none."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        recipe.write_text(RECIPE.format(folder=folder, steps=STEPS), encoding="utf-8")
    return [sys.executable, "-m", "finetune", "train", str(recipe), "--processes", str(processes)]


def start(folder: Path, processes: int) -> "subprocess.Popen[bytes]":
    """A run in a process group of its own."""
    line, environment = command(folder, processes), {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / "chaos.log").open("ab") as log:
        return subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True)  # noqa: S603


def run_whole(folder: Path, processes: int) -> float:
    """Seconds that a run takes to its end."""
    started = time.monotonic()
    if start(folder, processes).wait() != 0:
        sys.exit(f"the run itself fails: see {folder.parent / 'chaos.log'}")
    return time.monotonic() - started


def completed(folder: Path) -> int:
    """The newest step that is safe; 0 where none is."""
    written = (folder / "run").glob("checkpoint-*/complete.json")
    return max((int(one.parent.name.split("-")[1]) for one in written), default=0)


def writes_checkpoint(folder: Path, step: int) -> bool:
    """A checkpoint of this step or a later one has been begun and is not complete."""
    checkpoints = (folder / "run").glob("checkpoint-*")
    begun = [one for one in checkpoints if not (one / "complete.json").is_file()]
    return any(int(one.name.split("-")[1]) >= step for one in begun)


def fills_features(folder: Path) -> bool:
    """The cache has been begun and holds no file as yet."""
    return any((folder / "features").glob("*/")) and not any((folder / "features").glob("*/*.safetensors"))


def kill_once(folder: Path, processes: int, moment: str, seconds: float, chance: random.Random) -> str:
    """Start, kill at one of `MOMENTS`, and say when it was and what had been reached; a whole run takes `seconds`."""
    if moment == "features":
        shutil.rmtree(folder / "features", ignore_errors=True)  # else there would be nothing to write
    step = min(completed(folder) + chance.randint(1, 4), STEPS)
    pause = chance.uniform(0, 0.3)
    started = time.monotonic()
    run = start(folder, processes)
    at = chance.uniform(0.4, 1.0) * seconds
    reached: dict[str, Callable[[], bool]] = {
        "any": lambda: time.monotonic() - started > at,
        "checkpoint": lambda: writes_checkpoint(folder, step),
        "features": lambda: fills_features(folder),
    }
    while run.poll() is None and not reached[moment]():
        time.sleep(POLL)
    if moment == "features":
        time.sleep(pause)
    ended = run.poll() is not None
    workers = [] if ended else psutil.Process(run.pid).children(recursive=True)
    victim = chance.choice(workers).pid if workers and processes > 1 else run.pid
    if not ended:
        os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    run.wait()
    ends = time.monotonic() - killed
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)  # what a dead launcher has left
    what = "had ended before" if ended else f"after {killed - started:5.1f} s, all had ended {ends:4.1f} s later"
    return f"{what}; newest checkpoint {completed(folder)}"


def differences(one: Path, other: Path) -> list[str]:
    """Return the files in which two runs differ: weights and record counts by bytes, metrics without their times."""
    found = []
    for name in ("adapter/adapter_model.safetensors", "adapter/trained.safetensors", "data.json"):
        if (one / "run" / name).read_bytes() != (other / "run" / name).read_bytes():
            found.append(name)
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens")
    lines = [
        [
            [json.loads(line).get(key) for key in keys]
            for line in (folder / "run/metrics.jsonl").read_text().splitlines()
        ]
        for folder in (one, other)
    ]
    if lines[0] != lines[1] or len(lines[0]) != STEPS:
        found.append("metrics.jsonl")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)  # noqa: S311
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        whole, chaos = Path(temporary) / "whole", Path(temporary) / "chaos"
        seconds = run_whole(whole, arguments.processes)
        print(f"uninterrupted: {seconds:.1f} s, {STEPS} steps, {arguments.processes} processes", flush=True)
        for number in range(arguments.kills):
            moment = MOMENTS[number % len(MOMENTS)]
            told = kill_once(chaos, arguments.processes, moment, seconds, chance)
            print(f"kill {number + 1:2}, {moment:10}: {told}", flush=True)
            if (chaos / "run" / "training.json").is_file():  # it got to its end: another one begins
                found = differences(whole, chaos)
                print(f"         it had reached its end: {found or 'the same'}", flush=True)
                shutil.rmtree(chaos / "run")
        run_whole(chaos, arguments.processes)
        found = differences(whole, chaos)
    print("in the end: adapter, losses and record counts are " + ("the same" if not found else f"different: {found}"))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
