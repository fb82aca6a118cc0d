"""What a training writes and shows: metrics.jsonl, a line for each step, and a progress bar."""

import json
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import TrainerCallback

from finetune.console import bar, log
from finetune.data.collate import Rows
from finetune.distributed import collectives
from modeling.adapters import whole
from modeling.atomic_files import atomic_write
from modeling.towers import stock_name, tower_of


class MetricsFile(TrainerCallback):
    """Writes each log of the trainer as a line of metrics.jsonl, with the epoch and the tokens of the step.

    The line of a step that is saved or evaluated, and of the last step, has the gates as well.
    """

    def __init__(self, path: Path, rows: Rows, rows_per_step: int):
        self.path, self.rows, self.rows_per_step = path, rows, rows_per_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines of steps after the checkpoint that the run goes on from: those steps were lost."""
        if collectives.is_main() and self.path.is_file():
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        milestone = control.should_save or control.should_evaluate or state.global_step == state.max_steps
        gates = gate_openings(kwargs["model"]) if milestone and "loss" in logs else {}
        last = state.global_step * self.rows_per_step
        step = range(max(last - self.rows_per_step, 0), last)
        # The tokens of a streamed row are known where it was made.
        mine = sum(self.rows.tokens(row) for row in step[collectives.rank() :: collectives.world_size()])
        tokens = int(sum(one for (one,) in collectives.gather_numbers([mine])))
        if not collectives.is_main():
            return
        line = {"step": state.global_step, "epoch": self.rows.epoch(step[0]) if step else 0}
        line |= {key: value for key, value in logs.items() if key != "epoch"} | {"tokens": tokens}
        if gates:
            line["gates"] = gates
        with self.path.open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")


class ProgressBar(TrainerCallback):
    """A bar over all steps, with the last loss. Use it as a context: whatever ends the training ends the bar."""

    def __enter__(self) -> Self:
        self.progress = bar()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.start()
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, note="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, completed=state.global_step, note=f"loss {logs['loss']:.3f}")


def gate_openings(model: nn.Module) -> dict[str, list[float]]:
    """Return tanh of every trained gate, layer by layer: {"alpha_cross_attn": [0.1, ...], "alpha_dense": [0.2, ...]}.

    0 is a closed gate. For a gate with a value per channel, the mean. Where parameters are sharded over processes, all
    of them must call this.
    """
    openings: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and tower_of(stock_name(name)) == "gates":
            openings.setdefault(name.rpartition(".")[2], []).append(float(whole(parameter).tanh().mean()))
    return openings


def tokens_trained(metrics: Path) -> int:
    """Return the tokens of all steps so far, by metrics.jsonl."""
    return sum(line["tokens"] for line in read_metrics(metrics) if "loss" in line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; log how many cannot be read, such as one that a power cut broke off."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = [one for line in lines if (one := _metrics_line(line)) is not None]
    if len(found) < len(lines):
        log(f"{path}: {len(lines) - len(found)} of {len(lines)} lines cannot be read, and are left out")
    return found


def _metrics_line(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = {"step": 0, "tokens": 0, "loss": 0.0, "eval_loss": 0.0}
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return values if all(isinstance(values.get(key, least), int | float) for key, least in numbers.items()) else None
