#!/usr/bin/env python
"""What `finetune plan` predicts against what torch's allocator counts, on small random models: no network, any machine.

    python scripts/benchmarks/check_plan.py [NAME]...

Each recipe trains for four steps in a process of its own, through the same trainer as a run. Tensor memory is every
allocation and release of the third step (torch.profiler with profile_memory, temporaries inside operations included) on
top of the tensors that are there when it begins; on a GPU it is torch.cuda.max_memory_allocated. Resident memory is the
highest of the first two steps beyond what importing the libraries took, where freed blocks of a megabyte go back to the
system: glibc before 2.38 keeps them, and does not always find them again (its bug 14581), so that by default a run on a
CPU may hold twice its activations. Exits with 1 where a bound is missed.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from process_memory import memory, reset_highest

from finetune.data.collate import MadeRow, Rows
from finetune.planning.estimate import Memory, estimate
from finetune.planning.static_memory import RowSize, Setup
from modeling.shapes import TINY, Config
from modeling.towers import TOWERS

TENSORS, RESIDENT = 0.10, 0.20
"""Largest relative errors."""

LORA = {"cross_attention": "lora", "decoder": "lora", "gates": "full", "added_tokens": "full"}
FULL = dict.fromkeys(TOWERS, "full")

MIDDLE: Config = {
    **TINY,
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "cross_layer_interval": 4,
    "max_position_embeddings": 4096,
    "vision_config": {
        **TINY["vision_config"],
        "embed_dim": 384,
        "image_size": 224,
        "intermediate_size": 1536,
        "patch_size": 14,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
    "perceiver_config": {
        **TINY["perceiver_config"],
        "resampler_depth": 2,
        "resampler_n_heads": 6,
        "resampler_head_dim": 64,
        "resampler_n_latents": 64,
    },
}
"""85 million parameters: a decoder of 8 layers, a vision tower of 12 that reads 224 pixels."""


@dataclass(frozen=True)
class Case:
    """One recipe to measure."""

    name: str
    row: RowSize
    modes: dict[str, str] = field(default_factory=lambda: dict(LORA))
    dropout: float = 0.0
    dtype: str = "float32"
    quantize: bool = False
    checkpointing: int = 0
    """Layers of the decoder."""
    rows_per_step: int = 2
    sequence: int = 128
    """Tokens of each sequence of the row."""
    cached: bool = False
    """Image features come with the batch, and the model has no image towers."""

    def setup(self, *, gpu: bool) -> Setup:
        return Setup(
            {**MIDDLE, "additional_vocab_size": 3},
            self.modes,
            rank=16,
            dropout=self.dropout,
            item=2 if self.dtype == "bfloat16" else 4,
            quantize=self.quantize,
            checkpointing=self.checkpointing,
            rows_per_step=self.rows_per_step,
            gpu=gpu,
            cached=self.cached,
        )


CASES = (
    Case("lora", RowSize(1024, 400, 2)),
    Case("lora, checkpointing", RowSize(1024, 400, 2), checkpointing=8),
    Case("lora, checkpointing in 3 of 8 layers", RowSize(1024, 400, 2), checkpointing=3),
    Case("lora, long rows", RowSize(4096, 3000, 4), sequence=2048, dropout=0.05),
    Case("lora on all towers, 8 live images", RowSize(512, 200, 8), {**LORA, "vision": "lora", "resampler": "lora"}),
    Case("all towers in full", RowSize(512, 200, 2), FULL, rows_per_step=1),
    Case("lora in bf16", RowSize(1024, 400, 2), dtype="bfloat16", dropout=0.05),
    Case("all towers in full on bf16", RowSize(512, 200, 2), FULL, dtype="bfloat16"),
    Case("nf4 lora", RowSize(1024, 400, 2), quantize=True),
    Case("lora, 8 cached images", RowSize(512, 200, 8), cached=True),
    Case("nf4 lora, 8 cached images", RowSize(512, 200, 8), quantize=True, cached=True),
)


def main(names: Sequence[str]) -> int:
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        print(f"no such recipe: {', '.join(sorted(unknown))}; there are: {', '.join(case.name for case in CASES)}")
        return 2
    chosen = [case for case in CASES if not names or case.name in names]
    missed = 0
    for case in chosen:
        measured = _in_own_process(case)
        predicted = estimate(case.setup(gpu=measured["gpu"]), case.row)
        missed += _tell(case, predicted, measured)
    print(f"{len(chosen)} recipes, {missed} bounds missed")
    return int(missed > 0)


def _in_own_process(case: Case) -> dict[str, Any]:
    """What `measure` writes: bytes by kind, and whether they are a GPU's."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20), **os.environ}
        subprocess.run([sys.executable, __file__, "--measure", case.name, out.name], check=True, env=environment)  # noqa: S603 - itself
        return json.loads(Path(out.name).read_text())


def _tell(case: Case, predicted: Memory, measured: dict[str, Any]) -> int:
    """Print one recipe; returns how many bounds it misses."""
    fixed = ("weights", "adapters", "optimizer", "batch")
    parts = {name: predicted.parts[name] for name in fixed}
    held = {name: measured[name] for name in fixed}
    parts["gradients and activations"] = predicted.total - sum(parts.values())
    held["gradients and activations"] = measured["tensors"] - sum(held.values())
    rows = [(name, value, held[name], None) for name, value in parts.items()]
    rows.append(("tensors", predicted.total, measured["tensors"], TENSORS))
    if not measured["gpu"]:
        rows.append(("resident", predicted.resident, measured["resident"], RESIDENT))
    print(f"\n{case.name}: {case.row}" + (" (on the GPU)" if measured["gpu"] else ""))
    print(f"  {'MiB':26} {'predicted':>10} {'measured':>10} {'ratio':>7}")
    missed = 0
    for name, expected, got, bound in rows:
        ratio = expected / got if got else float(expected == got)
        bad = bound is not None and abs(ratio - 1) > bound
        missed += bad
        print(f"  {name:26} {expected / 2**20:10.1f} {got / 2**20:10.1f} {ratio:7.3f}" + ("  MISSED" if bad else ""))
    return missed


# In the measured process


def measure(case: Case, out: Path) -> None:
    """Train for four steps, and write what was held in the third."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    import finetune.training.trainer  # noqa: F401 - its imports are not what is measured

    reset_highest()
    imported = memory()["VmRSS"]
    gpu = torch.cuda.is_available()
    model = _model(case)
    with tempfile.TemporaryDirectory() as folder:
        measured = _train(case, model, Path(folder))
    out.write_text(json.dumps({**measured, "resident": measured["resident"] - imported, "gpu": gpu}))


def _model(case: Case) -> Any:
    import torch

    from modeling.adapters import attach

    model = _quantized_model(case) if case.quantize else _random_model(getattr(torch, case.dtype))
    if case.cached and not case.quantize:
        model.model.vision_model = model.model.perceiver_resampler = None
    if torch.cuda.is_available():
        model.cuda()
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": case.dropout}
    return attach(model, case.modes, lora=lora, base="random")


def _random_model(dtype: Any) -> Any:
    from modeling import tiny
    from modeling.loading import extend_vocabulary

    model = tiny.build_model(MIDDLE, seed=0, packed=True).to(dtype)
    extend_vocabulary(model)
    return model


def _quantized_model(case: Case) -> Any:
    """Written to a folder and loaded from its 4-bit copy, as a run does."""
    from modeling import loading, tiny
    from modeling.quantize import quantized_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        tiny.build_model(MIDDLE, seed=0).save_pretrained(base)
        tokenizer = tiny.train_tokenizer(["a b c"] * 4, vocab_size=MIDDLE["vocab_size"])
        loading.save_processor(tiny.build_processor(tokenizer, image_size=224), base)
        quantized = quantized_checkpoint(base, Path(folder) / "quantized", name="base")
        model = loading.load(str(base), quantized=quantized, image_towers=not case.cached).model
        gc.collect()
        reset_highest()
        return model


def _train(case: Case, model: Any, folder: Path) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from finetune.recipe.schema import Training
    from finetune.training.trainer import train
    from modeling import tiny
    from modeling.adapters import count_trained
    from modeling.towers import is_lora

    found: dict[str, Any] = {}

    class Measure(TrainerCallback):
        """Watches the third step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != 2:
                return
            gc.collect()
            found["resident"] = memory()["VmHWM"]
            found["weights"], found["adapters"] = 0, 0
            for name, parameter in model.named_parameters():
                trained_copy = is_lora(name) or ".modules_to_save." in name
                found["adapters" if trained_copy else "weights"] += parameter.nbytes
            states = kwargs["optimizer"].state.values()
            found["optimizer"] = sum(one.nbytes for state in states for one in state.values() if one.ndim)
            self.held = _live_bytes()
            found["batch"] = self.held - found["weights"] - found["adapters"] - found["optimizer"]
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            else:
                self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != 3:
                return
            if torch.cuda.is_available():
                found["tensors"] = torch.cuda.max_memory_allocated()
                return
            self.profiler.stop()
            found["tensors"] = self.held + _highest(self.profiler)

    tokenizer = tiny.train_tokenizer(["a b c"] * 4, vocab_size=300, added=3)
    train(
        model,
        tokenizer,
        folder,
        Training(
            steps=4,
            row_tokens=1,
            tokens_per_step=case.rows_per_step,
            schedule="constant",
            checkpoint_every=10,
            checkpointing=case.checkpointing,
        ),
        train_rows=_Rows(case),
        autocast=case.setup(gpu=False).autocast,
        callbacks=[Measure()],
    )
    count_trained(model)
    return found


class _Rows(Rows):
    """Rows of one size: sequences that begin with an image, as far as there are images."""

    def __init__(self, case: Case):
        self.case = case

    def __len__(self) -> int:
        return 4 * self.case.rows_per_step

    def workers(self, most: int, *, processes: int) -> int:
        return 0

    def make(self, number: int) -> MadeRow:
        from random_rows import make_row

        case = self.case
        row = make_row(MIDDLE, case.row, sequence=case.sequence, cached=case.cached, seed=number)
        return MadeRow(number, row)

    def epoch(self, number: int) -> int:
        return 0

    def tokens(self, number: int) -> int:
        return self.case.row.tokens


def _live_bytes() -> int:
    """Of every tensor on the device that Python can reach, each storage once."""
    import torch

    device, storages = "cuda" if torch.cuda.is_available() else "cpu", {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == device:
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def _highest(profiler: Any) -> int:
    """The most that was allocated at a time since the profiler began."""
    total = highest = 0
    for change in _changes(profiler):
        total += change
        highest = max(highest, total)
    return highest


def _changes(profiler: Any) -> Iterator[int]:
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    for one in sorted(events, key=lambda event: event.start_ns()):
        yield one.nbytes()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        (one,) = [case for case in CASES if case.name == sys.argv[2]]
        measure(one, Path(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
