"""The figures of a plan -> tables on the terminal, and a picture of stacked bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.console import display, show_size, table, visible
from modeling.errors import UserError

GIB = 2**30
COLORS = {
    "weights": "#4b5563",
    "gathered": "#8b95a5",
    "adapters": "#2f6fbb",
    "optimizer": "#6aa5e0",
    "gradients": "#b9d3ee",
    "vision": "#d9a441",
    "resampler": "#eac98a",
    "cross_attention": "#8a5a9e",
    "decoder": "#b58cc6",
    "head": "#5f9e6e",
    "batch": "#c9ccd1",
}
"""Part of memory -> its colour in the picture."""


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what `planning.estimate.plan` returns."""
    towers = [(tower, *values.values()) for tower, values in plan["parameters"].items()]
    columns = ("tower", "mode", "parameters", "trained", "in 4 bits")
    display(table(f"model: {plan['model']}", columns, [*towers, ("total", "", *plan["totals"].values())]))
    display(_memory_table(plan))
    disk = [(name, show_size(value)) for name, value in plan["disk"].items() if value]
    display(table("disk space", ("files", "size"), disk))
    row, steps, processes = plan["row"], plan["steps"], plan["processes"]
    display(
        f"largest row ({row['from']}): {row['tokens']:,} tokens, {row['supervised']:,} of them supervised, "
        f"{row['images']} images"
    )
    display(
        f"steps: {'unknown until the data is prepared' if steps is None else f'{steps:,}'}, each of at most "
        f"{plan['tokens_per_step']:,} tokens in {plan['rows_per_step']} rows"
        + (f", {plan['rows_per_process']} of them on each of {processes} GPUs" if processes > 1 else "")
    )
    for note in plan["notes"]:
        display(f"note: {note}")
    if plan["gpu"]:
        _show_verdict(plan["gpu"])


def _memory_table(plan: Mapping[str, Any]) -> Any:
    """Return the table of memory: a column for this recipe, and one for the changed recipe that fits."""
    memories = {"this recipe": plan["memory"]}
    if plan["gpu"] and plan["gpu"]["changed"]:
        memories["changed recipe"] = plan["gpu"]["changed"]
    rows = [
        (part.replace("_", " "), *(show_size(memory["parts"][part]) for memory in memories.values()))
        for part in plan["memory"]["parts"]
        if any(memory["parts"][part] for memory in memories.values())
    ]
    totals = {"tensors": "all tensors", "gpu": "all tensors and the GPU's reserve", "resident": "resident memory"}
    rows += [
        (label, *(show_size(memory[key]) for memory in memories.values()))
        for key, label in totals.items()
        if key in plan["memory"]
    ]
    other = "off" if plan["memory"]["tensors"] == plan["checkpointing"]["on"] else "on"
    without = show_size(plan["checkpointing"][other])
    rows.append((f"all tensors, checkpointing {other}", without, *[""] * (len(memories) - 1)))
    return table(f"memory at its peak ({plan['memory']['moment']}), predicted", ("part", *memories), rows)


def _show_verdict(gpu: Mapping[str, Any]) -> None:
    sizes = f"{show_size(gpu['needed'])} needed, {show_size(gpu['bytes'])} available"
    if gpu["evaluation"] > gpu["bytes"]:
        whole = show_size(gpu["evaluation"])
        display(
            f"does not fit: evaluation needs the whole model on each GPU, {whole}; skip it with evaluation=null", "red"
        )
    elif gpu["fits"]:
        display(f"fits: {sizes}", "green")
    elif gpu["change"]:
        display(f"does not fit: {sizes}; the cheapest change that makes it fit:", "yellow")
        display(f"  {' '.join(gpu['change'])}")
    else:
        display(f"does not fit: {sizes}, and no change or pair of changes makes it fit", "red")


def draw_plan(plan: Mapping[str, Any], out: Path) -> None:
    """Write a picture, its type by the file's suffix: one stacked bar per recipe, and a line at the GPU's memory.

    Raises UserError for a suffix that is no type of picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    bars = {"this recipe": plan["memory"]["parts"]}
    if plan["gpu"] and plan["gpu"]["changed"]:
        bars["\n".join(plan["gpu"]["change"])] = plan["gpu"]["changed"]["parts"]
    figure, axis = plt.subplots(figsize=(3 + 2 * len(bars), 5))
    bottoms = [0.0] * len(bars)
    for part, color in COLORS.items():
        heights = [parts[part] / GIB for parts in bars.values()]
        if any(heights):
            axis.bar(range(len(bars)), heights, 0.6, bottom=bottoms, color=color, label=part.replace("_", " "))
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if plan["gpu"]:
        usable = (plan["gpu"]["bytes"] - plan["gpu"]["reserve"]) / GIB
        axis.axhline(usable, color="#b3261e", linestyle="--", label="GPU, less its reserve")
    axis.set_xticks(range(len(bars)), list(bars), fontsize=8)
    axis.set(ylabel="GiB at the peak, predicted", title=visible(plan["model"]), xlim=(-0.6, len(bars) - 0.4))
    for text in (axis.title, *axis.get_xticklabels()):
        text.set_parse_math(False)  # a dollar in a name is no formula
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out, dpi=120, bbox_inches="tight")
    except ValueError as error:
        raise UserError(f"--picture: {out}: {error}") from error
    finally:
        plt.close(figure)
