#!/usr/bin/env python
"""How time and memory of training grow, measured and drawn; and what that makes of the 9B and 80B on GPUs, predicted.

    python scripts/benchmarks/scale.py --out runs/scale
    python scripts/benchmarks/scale.py --only prediction

dialogues    1,000 to 1,000,000: preparing them, and laying out a run's rows
row          256 to 4,096 tokens of one row, sequences of 128
images       0 to 16 of a dialogue of 256 tokens, features cached
model        27, 89 and 354 million parameters
prediction   tokens a second from the arithmetic a row needs, at a stated share of a GPU's peak; memory from the plan

Each measurement is a process of its own, one after the other. A step is a row's forward and backward, LoRA on decoder
and cross-attention in fp32; memory is the highest resident size beyond that before the first step. GPUs were not
measured: their peaks are their makers' (dense, bf16), the share is an assumption.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arithmetic import Arithmetic, Sizes
from preparing import run_side
from preparing_data import write_data

DIALOGUES = (1_000, 10_000, 100_000, 1_000_000)
ROW_TOKENS = (256, 512, 1024, 2048, 4096)
IMAGES = (0, 2, 4, 8, 16)
MODELS = ("27m", "89m", "354m")
SEQUENCE, SUPERVISED, STEPS, RANK = 128, 0.4, 5, 16

GPUS = {"L4": (121, 24), "RTX 4090": (165, 24), "A100 80 GB": (312, 80), "H100 SXM": (989, 80)}
"""Teraflops of dense bf16 products, as their makers say; gigabytes."""

PREDICTED = (
    ("recipes/idefics-9b_qlora_1x24gb.yaml", ("L4", "RTX 4090", "A100 80 GB", "H100 SXM")),
    ("recipes/idefics-9b_lora_1x80gb.yaml", ("A100 80 GB", "H100 SXM")),
    ("recipes/idefics-80b_qlora_8x80gb.yaml", ("A100 80 GB", "H100 SXM")),
)


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(_WORKERS[arguments.worker[0]](*arguments.worker[1:])))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for part in arguments.only:
        found[part] = _PARTS[part](arguments)
        _show(part, found[part])
        (arguments.out / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    if drawn := [part for part in found if part in _DRAWN]:
        draw({part: found[part] for part in drawn}, arguments.out / "scale.png")
        print(arguments.out / "scale.png")


# The parts: each a list of lines


def measure_dialogues(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lines = []
    for count in DIALOGUES:
        folder = arguments.out / f"text-{count}"
        source = write_data("text", count, folder)
        prepared = run_side("prepare", source, folder / "prepared", workers=2)
        shutil.rmtree(folder)
        laid = _ran([__file__, "--worker", "rows", count])
        kept = {key: prepared[key] for key in ("dialogues", "seconds", "peak_memory_mb")}
        lines.append({**kept, "per_1000": 1000 * prepared["seconds"] / count, **laid})
    return lines


def measure_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lines = [_step("89m", tokens, SEQUENCE, tokens // 256) for tokens in ROW_TOKENS]
    return [{"row_tokens": line["tokens"], **line} for line in lines]


def measure_images(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Four dialogues of 256 tokens in a row."""
    return [{"images_a_dialogue": count, **_step("89m", 1024, 256, 4 * count)} for count in IMAGES]


def measure_models(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"model": model, **_step(model, 1024, SEQUENCE, 4)} for model in MODELS]


def predict(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """At `--share` of the peak. A row is full: sequences of 128 tokens, all of which see an image."""
    from finetune.planning.estimate import Planner
    from finetune.recipe.load import load_recipe

    lines = []
    for path, gpus in PREDICTED:
        recipe = load_recipe(Path(path))
        planner = Planner(recipe, on_gpu=True)
        training = recipe.training
        setup = planner.setup(recipe)
        arithmetic = Arithmetic(planner.config, recipe.adapter.rank)
        one = Sizes(SEQUENCE, int(SUPERVISED * SEQUENCE), 0, SEQUENCE)
        sequences = training.row_tokens // SEQUENCE
        images = Sizes(0, 0, training.row_images, 0)
        recomputed = setup.checkpointing / arithmetic.layers
        products = sequences * arithmetic.products(one, recomputed=recomputed)
        products += arithmetic.products(images, recomputed=recomputed)
        for gpu in gpus:
            teraflops, gigabytes = GPUS[gpu]
            speed = arguments.share * teraflops * 1e12 / (2 * products) * training.row_tokens
            memory = planner.estimate(recipe).on_gpu
            lines.append(
                {
                    "recipe": Path(path).stem,
                    "gpu": gpu,
                    "teraflops_a_row": 2 * products / 1e12,
                    "tokens_per_second": speed,
                    "hours_a_million_dialogues": 1e6 * SEQUENCE / speed / 3600,
                    "memory_gib": memory / 2**30,
                    "of_gib": gigabytes * 1e9 / 2**30 if gigabytes == 80 else gigabytes,
                }
            )
    return lines


# In processes of their own


def lay_out(count: str) -> dict[str, Any]:
    """All rows of an epoch over so many LLaVA-like lengths: log-normal, median 90 tokens, 1 to 3 images."""
    import numpy as np

    from finetune.data.sampling import Mix, build_schedule

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(90), 0.6, int(count)), 16, 2048).astype(np.int64)
    images = rng.integers(1, 4, int(count))
    started = time.perf_counter()
    mix = Mix([int(count)], [None], lengths)
    rows = build_schedule(mix, images, row_tokens=2048, row_images=48, rows_per_step=8, seed=0, epochs=1)
    seconds, used = time.perf_counter() - started, sum(bool(row.examples) for row in rows)
    return {
        "rows_seconds": seconds,
        "tokens_filled": lengths.sum() / (2048 * used),
        "images_filled": images.sum() / (48 * used),
    }


def step(model: str, tokens: str, sequence: str, images: str) -> dict[str, Any]:
    """Seconds of a row's forward and backward, and what they hold."""
    from process_memory import memory, reset_highest
    from random_rows import make_row
    from training_sides import MODELS as CONFIGS
    from training_sides import MODES, multiplying_rate

    from finetune.planning.static_memory import RowSize
    from modeling import tiny
    from modeling.adapters import attach
    from modeling.loading import extend_vocabulary
    from modeling.packed_forward import packed_loss

    config = CONFIGS[model]
    idefics = tiny.build_model(config, seed=0, packed=True)
    idefics.model.vision_model = idefics.model.perceiver_resampler = None
    extend_vocabulary(idefics)
    tuned = attach(idefics, MODES, lora={"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0}, base="x").train()
    sequences = int(tokens) // int(sequence)
    one = Sizes(int(sequence), int(SUPERVISED * int(sequence)), 0, int(sequence) * (int(images) > 0))
    size = RowSize(int(tokens), sequences * one.supervised, int(images))
    row = make_row(config, size, sequence=one.tokens)

    def run() -> float:
        started = time.perf_counter()
        packed_loss(tuned, row, config=idefics.config).backward()
        return time.perf_counter() - started

    reset_highest()
    before = memory()["VmRSS"]
    run()
    seconds = statistics.median(run() for _ in range(STEPS))
    arithmetic = Arithmetic(config, RANK)
    products = sequences * arithmetic.products(one) + arithmetic.products(Sizes(0, 0, int(images), 0))
    return {
        "tokens": int(tokens),
        "seconds": seconds,
        "per_token": seconds / int(tokens),
        "memory": memory()["VmHWM"] - before,
        "of_multiplying_rate": 2 * products / seconds / multiplying_rate(time.perf_counter),
    }


def _step(model: str, tokens: int, sequence: int, images: int) -> dict[str, Any]:
    return _ran([__file__, "--worker", "step", model, tokens, sequence, images])


def _ran(command: Sequence[object]) -> dict[str, Any]:
    """The JSON on the last line of what a script prints."""
    made = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)  # noqa: S603 - our own
    if made.returncode:
        sys.exit(f"{' '.join(map(str, command))}:\n{made.stderr}")
    return json.loads(made.stdout.splitlines()[-1])


# What is shown

COLUMNS: dict[str, tuple[str, float]] = {
    "dialogues": ("dialogues", 1),
    "row_tokens": ("tokens of a row", 1),
    "images_a_dialogue": ("images a dialogue", 1),
    "model": ("model", 1),
    "recipe": ("recipe", 1),
    "gpu": ("GPU", 1),
    "per_1000": ("preparing 1,000, s", 1),
    "peak_memory_mb": ("memory, MB", 1),
    "rows_seconds": ("rows laid out, s", 1),
    "tokens_filled": ("tokens filled, %", 100),
    "images_filled": ("images filled, %", 100),
    "seconds": ("seconds", 1),
    "per_token": ("ms a token", 1000),
    "memory": ("memory, MiB", 2**-20),
    "of_multiplying_rate": ("of the multiplying rate, %", 100),
    "teraflops_a_row": ("Tflop a row", 1),
    "tokens_per_second": ("tokens/s, predicted", 1),
    "hours_a_million_dialogues": ("hours a million dialogues", 1),
    "memory_gib": ("GiB, predicted", 1),
    "of_gib": ("of GiB", 1),
}


def _show(part: str, lines: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console

    from finetune.console import table

    keys = [key for key in COLUMNS if key in lines[0]]
    rows: list[list[object]] = [
        [line[key] if isinstance(line[key], str) else line[key] * COLUMNS[key][1] for key in keys] for line in lines
    ]
    Console(width=120).print(table(part, [COLUMNS[key][0] for key in keys], rows))


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """For each part, time above and memory below, both from zero."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.4 * len(found), 5), layout="constrained", squeeze=False)
    for column, (part, lines) in enumerate(found.items()):
        first, time_key, memory_key = _DRAWN[part]
        places = [line[first] for line in lines]
        for axis, key in zip(axes[:, column], (time_key, memory_key), strict=True):
            title, unit = COLUMNS[key]
            axis.plot(places, [line[key] * unit for line in lines], marker="o")
            axis.set(xlabel=COLUMNS[first][0], title=title)
            axis.margins(y=0.1)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


_PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "dialogues": measure_dialogues,
    "row": measure_rows,
    "images": measure_images,
    "model": measure_models,
    "prediction": predict,
}
_DRAWN: dict[str, tuple[str, str, str]] = {
    "dialogues": ("dialogues", "seconds", "peak_memory_mb"),
    "row": ("row_tokens", "per_token", "memory"),
    "images": ("images_a_dialogue", "seconds", "memory"),
    "model": ("model", "per_token", "memory"),
}
_WORKERS: dict[str, Callable[..., dict[str, Any]]] = {"rows": lay_out, "step": step}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS), help="these parts")
    parser.add_argument("--share", type=float, default=0.4, help="of a GPU's peak that is reached (default: 0.4)")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
