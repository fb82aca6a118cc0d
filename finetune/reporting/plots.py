"""metrics.jsonl and the scores of a run -> one picture: loss, gates, and the scores of each model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.training.callbacks import read_metrics

SHARES = {
    "exact_open": "open questions",
    "exact_yes_no": "yes/no questions,\nbalanced",
    "vqa": "VQA accuracy",
    "rouge_l": "ROUGE-L",
    "eos_rate": "answers that\nend by themselves",
}
"""Scores between 0 and 1, and their labels."""

MODELS = {"base": "#9aa5b1", "image_swap": "#d9a441", "tuned": "#2f6fbb"}
"""Model -> its colour."""


def draw(metrics: Path, scores: Mapping[str, Any] | None, out: Path) -> None:
    """Write a PNG: training and eval loss by step, the gates, and where there are `scores`, those of each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(metrics)
    shares = {key: name for key, name in SHARES.items() if scores and scores["tuned"].get(key) is not None}
    gates = [(line["step"], line["gates"]) for line in lines if "gates" in line]
    widths = [6, *([3] if gates else []), *([5] if shares else [])]
    figure, axes = plt.subplots(1, len(widths), figsize=(sum(widths), 4), width_ratios=widths, squeeze=False)
    _losses(axes[0, 0], lines)
    if gates:
        _gates(axes[0, 1], gates)
    if shares and scores:
        _shares(axes[0, -1], shares, scores)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _losses(axis: Any, lines: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator

    for key, name, style in (("loss", "training", {"alpha": 0.8}), ("eval_loss", "eval", {"marker": "o"})):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axis.plot(*zip(*points, strict=True), label=name, **style)
    axis.set(xlabel="step", ylabel="loss per supervised token (nats)", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    low, high = axis.get_ylim()
    if high > 10 * low:  # labels of 3, 4, 6, ... would overlap
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.legend()
    axis.grid(alpha=0.3)


def _gates(axis: Any, gates: list[tuple[int, dict[str, list[float]]]]) -> None:
    """Draw a line for every layer's gate: the first layers light, the last ones dark."""
    steps = [step for step, _ in gates]
    for key, name, color in (("alpha_cross_attn", "attention", "#2f6fbb"), ("alpha_dense", "MLP", "#d9a441")):
        layers = list(zip(*(values[key] for _, values in gates), strict=True))
        for number, layer in enumerate(layers, start=1):
            label = name if number == len(layers) else None
            axis.plot(steps, layer, color=color, alpha=0.3 + 0.7 * number / len(layers), label=label, marker=".")
    axis.set(xlabel="step", ylabel="gates, tanh(alpha)")
    axis.legend()
    axis.grid(alpha=0.3)


def _shares(axis: Any, shares: Mapping[str, str], scores: Mapping[str, Any]) -> None:
    models = {name: color for name, color in MODELS.items() if scores.get(name)}
    width = 0.8 / len(models)
    for offset, (model, color) in enumerate(models.items()):
        places = [index + (offset - (len(models) - 1) / 2) * width for index in range(len(shares))]
        bars = axis.bar(
            places, [scores[model][key] for key in shares], width, label=model.replace("_", " "), color=color
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(range(len(shares)), list(shares.values()))
    axis.set(ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="mean over the eval questions")
    axis.legend(loc="upper center", ncols=len(models), frameon=False)
