"""A plan -> its tables on the terminal, and a picture of stacked bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.console import display, show_size, table, visible
from finetune.planning.memory import GIB
from modeling.errors import UserError

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
"""Of the parts of memory."""


def show_plan(plan: Mapping[str, Any]) -> None:
    towers = [(tower, *values.values()) for tower, values in plan["parameters"].items()]
    columns = ("tower", "mode", "parameters", "trained", "in 4 bits")
    display(table(f"model: {plan['model']}", columns, [*towers, ("total", "", *plan["totals"].values())]))
    display(table(*_memory_table(plan)))
    disk = [(name, show_size(value)) for name, value in plan["disk"].items() if value]
    display(table("disk", ("", "size"), disk))
    row = plan["row"]
    display(
        f"largest row ({row['from']}): {row['tokens']:,} tokens, {row['supervised']:,} of them supervised, "
        f"{row['images']} images"
    )
    shared = (
        f", {plan['rows_per_process']} of them on each of {plan['processes']} GPUs" if plan["processes"] > 1 else ""
    )
    steps = "unknown until the data is prepared" if plan["steps"] is None else f"{plan['steps']:,}"
    display(
        f"steps: {steps}, each of at most {plan['tokens_per_step']:,} tokens in {plan['rows_per_step']} rows{shared}"
    )
    for note in plan["notes"]:
        display(note)
    if plan["gpu"]:
        _show_verdict(plan["gpu"])


def _memory_table(plan: Mapping[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, columns, rows: this recipe, and the changed one that fits."""
    memories = [plan["memory"]]
    columns = ["part", "this recipe"]
    if plan["gpu"] and plan["gpu"]["changed"]:
        memories.append(plan["gpu"]["changed"])
        columns.append("changed")
    rows = [
        (part, *(show_size(memory["parts"][part]) for memory in memories))
        for part in plan["memory"]["parts"]
        if part != "gathered" or any(memory["parts"][part] for memory in memories)
    ]
    rows.append(("tensors in all", *(show_size(memory["tensors"]) for memory in memories)))
    for key, name in (("gpu", "with the GPU's own"), ("resident", "resident")):
        if key in plan["memory"]:
            rows.append((name, *(show_size(memory[key]) for memory in memories)))
    other = "off" if plan["memory"]["tensors"] == plan["checkpointing"]["on"] else "on"
    rows.append((f"checkpointing {other}", show_size(plan["checkpointing"][other]), *[""] * (len(memories) - 1)))
    return f"memory at its peak ({plan['memory']['moment']}), predicted", tuple(columns), rows


def _show_verdict(gpu: Mapping[str, Any]) -> None:
    needed = f"{show_size(gpu['needed'])} needed, {show_size(gpu['bytes'])} there"
    if gpu["evaluation"] > gpu["bytes"]:
        whole = show_size(gpu["evaluation"])
        display(
            f"does not fit: evaluation asks a model that each GPU holds whole, {whole}; give evaluation=null", "red"
        )
    elif gpu["fits"]:
        display(f"fits: {needed}", "green")
    elif gpu["change"]:
        display(f"does not fit: {needed}; the cheapest change that makes it fit:", "yellow")
        display(f"  {' '.join(gpu['change'])}")
    else:
        display(f"does not fit: {needed}, and no change or pair of changes makes it fit", "red")


def draw(plan: Mapping[str, Any], out: Path) -> None:
    """Write a picture, its kind by the file's ending: a stacked bar a recipe, and a line where the GPU ends."""
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
        axis.bar(range(len(bars)), heights, 0.6, bottom=bottoms, color=color, label=part.replace("_", " "))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if plan["gpu"]:
        axis.axhline(
            (plan["gpu"]["bytes"] - plan["gpu"]["reserve"]) / GIB, color="#b3261e", linestyle="--", label="GPU"
        )
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
