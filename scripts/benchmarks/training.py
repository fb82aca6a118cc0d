#!/usr/bin/env python
"""Training here against transformers' Trainer with PEFT and padded batches, at its honest best, side by side.

    python scripts/benchmarks/training.py --mix llava
    python scripts/benchmarks/training.py --mix short llava pages text --examples 64 --picture benchmark.png

training_sides.py holds the two sides, training_mixes.py the data. Each line is a process of its own, one after the
other, so that memory is its own; loss and gradients are compared in further processes, on the first dialogues and equal
weights. On our side tokens are there, as after `finetune prepare`; images are decoded on both. Rates are those of the
second epoch on, and once more of the first one with the time that filling the cached features took. Memory is the
highest resident size beyond what imports took, the model included.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = {
    "ours": "ours",
    "random": "stock, random order",
    "grouped": "stock, grouped by length",
    "alone": "stock, one by one",
}
SIDES = tuple(NAMES)


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        _work(*arguments.worker)
        return
    from training_sides import Settings

    found = {}
    for mix in arguments.mix:
        settings = Settings(
            "ours",
            arguments.model,
            mix,
            arguments.examples,
            arguments.batch,
            arguments.epochs,
            arguments.features,
            arguments.checkpointing,
            arguments.seed,
            arguments.busy,
        )
        found[mix] = compare(settings, arguments.lines)
        _show(mix, found[mix])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.picture:
        draw(found, arguments.picture)


def compare(settings: Any, lines: Sequence[str]) -> dict[str, Any]:
    """Measure all lines of one mix: {"lines": {side: figures}, "ratios": ..., "parity": ...}."""
    with TemporaryDirectory() as folder:
        measured = {}
        for side in lines:
            print(f"{settings.mix}: {NAMES[side]} ...", file=sys.stderr)
            measured[side] = _in_own_process("measure", replace(settings, side=side), Path(folder))
        found: dict[str, Any] = {"settings": json.loads(settings.write()), "lines": {}, "ratios": {}}
        rate = statistics.median(rate for one in measured.values() for rate in one["rates"])
        found["multiplying_rate"] = rate
        found["lines"] = {side: figures(one, rate) for side, one in measured.items()}
        for side in lines[1:]:
            found["ratios"][side] = _ratios(found["lines"]["ours"], found["lines"][side])
        if lines[1:]:
            found["parity"] = _parity(settings, Path(folder))
    return found


def figures(run: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """What a run says of itself; seconds of an epoch are the mean of those after the first, if there are any."""
    first, later = run["epochs"][0], run["epochs"][1:] or run["epochs"]
    seconds = {part: statistics.fmean(epoch[part] for epoch in later) for part in later[0]}
    whole = seconds.pop("seconds")
    seconds["other"] = whole - sum(seconds.values())
    return {
        "dialogues_per_second": run["dialogues"] / whole,
        "first_epoch_dialogues_per_second": run["dialogues"] / (first["seconds"] + run["filling"]),
        "supervised_per_second": run["supervised"] / whole,
        "epoch_seconds": whole,
        "filling_seconds": run["filling"],
        "split": {part: value / whole for part, value in seconds.items()},
        "padding": run["padding"],
        "memory": run["memory"],
        "of_multiplying_rate": run["necessary"] / whole / rate,
        **{key: run[key] for key in ("rates", "dialogues", "images", "tokens", "supervised", "median_tokens")},
        "parameters": run["parameters"],
    }


def _ratios(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    keys = ("dialogues_per_second", "first_epoch_dialogues_per_second", "supervised_per_second", "memory")
    return {key: ours[key] / other[key] for key in keys}


def _parity(settings: Any, folder: Path) -> dict[str, float]:
    """The largest relative differences; a tensor's gradient is held against its own norm, or 1e-3 of the largest."""
    import torch
    from safetensors.torch import load_file

    ours, other = (_in_own_process("gradients", replace(settings, side=side), folder) for side in ("ours", "random"))
    got, expected = load_file(ours["file"]), load_file(other["file"])
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(float(one.norm()) for one in expected.values())
    differences = [
        float((got[name] - one).norm()) / max(float(one.norm()), floor)
        for name, one in expected.items()
        if torch.isfinite(one).all()
    ]
    assert len(differences) == len(expected), "a gradient of the stock side is not finite"
    return {
        "loss": abs(ours["loss"] - other["loss"]) / other["loss"],
        "gradient": max(differences),
        "tensors": len(differences),
    }


def _in_own_process(task: str, settings: Any, folder: Path) -> dict[str, Any]:
    out = folder / f"{task}-{settings.side}.json"
    command = [sys.executable, __file__, "--worker", task, settings.write(), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - itself
    if done.returncode:
        sys.exit(f"{task}, {settings.side}:\n{done.stdout}\n{done.stderr}")
    return json.loads(out.read_text())


def _work(task: str, settings: str, out: str) -> None:
    import training_sides as sides
    from safetensors.torch import save_file

    if task == "measure":
        found = sides.measure(sides.Settings.read(settings))
    else:
        loss, gradients = sides.gradients(sides.Settings.read(settings))
        file = Path(out).with_suffix(".safetensors")
        save_file(gradients, file)
        found = {"loss": loss, "file": str(file)}
    Path(out).write_text(json.dumps(found))


@dataclass(frozen=True)
class _Line:
    """A row of the printed table."""

    title: str
    key: str
    unit: float = 1.0


LINES = (
    _Line("dialogues/s", "dialogues_per_second"),
    _Line("dialogues/s, first epoch with filling", "first_epoch_dialogues_per_second"),
    _Line("supervised tokens/s", "supervised_per_second"),
    _Line("filling, s", "filling_seconds"),
    _Line("peak memory, MiB", "memory", 2**-20),
    _Line("padding of all tokens, %", "padding", 100),
    _Line("of the multiplying rate, %", "of_multiplying_rate", 100),
)


def _show(mix: str, found: Mapping[str, Any]) -> None:
    from rich.console import Console

    from finetune.console import table

    lines = found["lines"]
    one = next(iter(lines.values()))
    title = (
        f"{mix}: {one['dialogues']} dialogues of {one['median_tokens']:.0f} tokens (median), {one['images']} images; "
        f"{one['parameters'] / 1e6:.0f}M parameters; {found['multiplying_rate'] / 1e9:.0f} GFLOP/s in fp32 products"
    )
    rows: list[list[object]] = [
        [line.title, *(figures[line.key] * line.unit for figures in lines.values())] for line in LINES
    ]
    for part in one["split"]:
        rows.append([f"of a step: {part}, %", *(100 * figures["split"][part] for figures in lines.values())])
    for key, name in (("dialogues_per_second", "speed"), ("first_epoch_dialogues_per_second", "speed, first epoch")):
        rows.append([f"ours / it: {name}", None, *(ratio[key] for ratio in found["ratios"].values())])
    rows.append(["ours / it: memory", None, *(ratio["memory"] for ratio in found["ratios"].values())])
    console = Console()
    console.print(table(title, ["", *(NAMES[side] for side in lines)], rows))
    if "parity" in found:
        parity = found["parity"]
        console.print(
            f"equal weights: loss differs by {parity['loss']:.1e}, gradients by at most {parity['gradient']:.1e} "
            f"(relative, {parity['tensors']} tensors)"
        )


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Bars: dialogues a second and memory, for each mix and line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    sides = [side for side in SIDES if all(side in one["lines"] for one in found.values())]
    for axis, (key, unit, title) in zip(
        axes, [("dialogues_per_second", 1, "dialogues a second"), ("memory", 2**-30, "peak memory, GiB")], strict=True
    ):
        for number, side in enumerate(sides):
            heights = [one["lines"][side][key] * unit for one in found.values()]
            places = [mix + (number - (len(sides) - 1) / 2) / (len(sides) + 1) for mix in range(len(found))]
            bars = axis.bar(places, heights, 1 / (len(sides) + 1), label=NAMES[side])
            axis.bar_label(bars, fmt="%.2g", fontsize=7)
        axis.set_xticks(range(len(found)), list(found))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="89m", choices=["27m", "89m", "354m"])
    parser.add_argument("--mix", nargs="+", default=["llava"], choices=["short", "llava", "pages", "text"])
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8, help="dialogues of a step")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--features", default="cached", choices=["cached", "live"], help="of images, on our side")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, on both sides")
    parser.add_argument("--lines", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--busy", action="store_true", help="one thread, and its own seconds: others use the machine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
