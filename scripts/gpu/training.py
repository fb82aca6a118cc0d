"""Stages `lora`, `qlora`, `stock`, `variants`: steps of the 9B, through the toolkit's trainer and the stock one."""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from arithmetic import Arithmetic, Sizes
from gpu import models
from gpu.figures import Figures, now
from torch.profiler import ProfilerActivity, profile
from training_sides import Data, StockCollator, whole_loss
from transformers import Trainer, TrainerCallback, TrainingArguments

from finetune.data.collate import RowCollator
from finetune.planning.estimate import estimate
from finetune.planning.static_memory import RowSize, Setup
from finetune.recipe.schema import Training
from finetune.training.trainer import train
from modeling import flash
from modeling.device import CHOICES
from modeling.shapes import Config

WARM = 2
"""Steps before the clock starts."""


@dataclass(frozen=True)
class Size:
    """How much a stage trains."""

    dialogues: int
    row_tokens: int
    rows_per_step: int
    steps: int
    """At most so many are timed."""
    padded: int
    """Dialogues of a padded batch."""


SIZES = {False: Size(400, 2048, 2, 8, 12), True: Size(60, 768, 1, 2, 4)}
"""Of the true shape, and of the stand-in (`--tiny`)."""

KINDS = {
    "attention": ("flash", "fmha", "attention", "varlen"),
    "NF4": ("4bit", "dequant", "quantize"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "wgmma", "gemv", "aten::mm", "aten::addmm", "aten::bmm"),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset", "copy", "cat", "fill"),
}
"""Parts of the names of what runs on the device, looked for in this order; the rest is elementwise work and sums."""


@dataclass
class StepClock(TrainerCallback):
    """When each step ends, with all that was asked of the device done; the last step is profiled, and not timed."""

    device: torch.device
    steps: int
    ends: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[str, float]] = field(default_factory=list)
    profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if state.global_step == WARM + self.steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.profiler = profile(activities=activities)
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(now(self.device))
        if self.profiler is not None:
            self.profiler.stop()
            self._read(self.profiler)
            self.profiler, control.should_training_stop = None, True

    @property
    def seconds(self) -> float:
        """Of a step, on average."""
        return (self.ends[WARM + self.steps - 1] - self.ends[WARM - 1]) / self.steps

    def _read(self, profiler: Any) -> None:
        on_gpu = self.device.type == "cuda"
        found = []
        for one in profiler.key_averages():
            if on_gpu and one.device_type != torch.autograd.DeviceType.CUDA:
                continue
            spent = (one.self_device_time_total if on_gpu else one.self_cpu_time_total) / 1e6
            self.kinds[kind_of(one.key)] += spent
            found.append((one.key[:80], spent))
        self.slowest = sorted(found, key=lambda pair: -pair[1])[:12]


def kind_of(name: str) -> str:
    low = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in low for part in parts)), "elementwise")


def lora(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    _measure_ours(figures, device, tiny=tiny, nf4=False)


def qlora(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    _measure_ours(figures, device, tiny=tiny, nf4=True)


def _measure_ours(figures: Figures, device: torch.device, *, tiny: bool, nf4: bool) -> None:
    config, dtype, size = models.shape_of(tiny=tiny), models.dtype_of(device), SIZES[tiny]
    data = models.dialogues(size.dialogues)
    model = _model(config, device, dtype, nf4=nf4)
    figures.add("parameters", sum(one.numel() for one in model.parameters()) / 1e9, "billion")
    rows = models.packed_rows(data, config, dtype, row_tokens=size.row_tokens, rows_per_step=size.rows_per_step)
    clock = _train(model, data, rows, device, size)
    tokens = _tokens_a_step(rows, size)
    figures.add("tokens a second", tokens / clock.seconds, "tokens/s")
    necessary = 2 * _products(config, data, rows, size)
    if rate := figures.earlier("environment", "matrix rate"):
        figures.add("share of the matrix rate", necessary / clock.seconds / rate / 1e12, least=0.35 if nf4 else 0.45)
    if device.type == "cuda":
        _compare_memory(figures, config, rows, size, nf4=nf4)
    _add_profile(figures, clock)


def _model(config: Config, device: torch.device, dtype: torch.dtype, *, nf4: bool) -> Any:
    model = models.build(config, device, dtype)
    return models.with_lora(models.quantize(model, config, dtype) if nf4 else model)


def _train(
    model: Any, data: Data, rows: RowCollator, device: torch.device, size: Size, *, autocast: bool = False, **more: Any
) -> StepClock:
    """Steps through the toolkit's trainer, as a run takes them."""
    steps = min(size.steps, len(rows) // size.rows_per_step - WARM - 1)
    settings = Training(
        steps=1,
        row_tokens=size.row_tokens,
        tokens_per_step=size.row_tokens * size.rows_per_step,
        learning_rate=1e-4,
        schedule="constant",
        checkpoint_every=10**6,
        **more,
    )
    clock = StepClock(device, steps)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = data.processor.tokenizer
        train(model, tokenizer, Path(folder), settings, train_rows=rows, autocast=autocast, callbacks=[clock])
    return clock


def _timed(rows: RowCollator, size: Size) -> range:
    """Numbers of the rows whose steps are timed."""
    steps = min(size.steps, len(rows) // size.rows_per_step - WARM - 1)
    return range(WARM * size.rows_per_step, (WARM + steps) * size.rows_per_step)


def _tokens_a_step(rows: RowCollator, size: Size) -> float:
    timed = _timed(rows, size)
    return sum(rows.tokens(number) for number in timed) / (len(timed) / size.rows_per_step)


def _products(config: Config, data: Data, rows: RowCollator, size: Size) -> float:
    """Multiply-adds that a step cannot do without, of the timed ones' mean."""
    arithmetic, total, timed = Arithmetic(config, models.RANK), 0.0, _timed(rows, size)
    for number in timed:
        for index in rows.rows[number].examples:
            example = data.examples[index]
            seeing = int((example.image_index >= 0).sum())
            shown = len(data.rendered[index].images)
            total += arithmetic.products(Sizes(len(example), example.supervised, shown, seeing))
    return total / (len(timed) / size.rows_per_step)


def _compare_memory(figures: Figures, config: Config, rows: RowCollator, size: Size, *, nf4: bool) -> None:
    """The most that tensors took in the timed steps, against what `finetune plan` says of the largest row."""
    measured = torch.cuda.max_memory_allocated()
    batches = [rows.at(number) for number in _timed(rows, size)]
    largest = RowSize(
        max(batch["input_ids"].shape[1] for batch in batches),
        max(len(batch["targets"]) for batch in batches),
        max(len(batch["image_features"]) for batch in batches),
    )
    setup = Setup(
        {**config, "additional_vocab_size": 3},
        models.MODES,
        rank=models.RANK,
        item=2,
        quantize=nf4,
        rows_per_step=size.rows_per_step,
        gpu=True,
        cached=True,
    )
    planned = estimate(setup, largest).total
    figures.add("memory", measured / 2**30, "GiB")
    figures.add("memory by the plan", planned / 2**30, "GiB")
    figures.add("plan / measured", planned / measured)
    figures.add("the plan is off by", abs(planned / measured - 1), most=0.1)


def _add_profile(figures: Figures, clock: StepClock) -> None:
    for kind, spent in clock.kinds.most_common():
        figures.add(f"of a step: {kind}", spent / clock.seconds)
    if clock.device.type == "cuda":
        figures.add("of a step: idle", 1 - sum(clock.kinds.values()) / clock.seconds)
    for name, spent in clock.slowest:
        figures.add(f"slowest: {name}", spent, "s")


def stock(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    """transformers' Trainer, PEFT and padded batches on the same dialogues, images through the vision tower."""
    config, dtype, size = models.shape_of(tiny=tiny), models.dtype_of(device), SIZES[tiny]
    data = models.dialogues(size.dialogues)
    model = models.with_lora(models.build(config, device, dtype, packed=False, image_towers=True))
    on_gpu, batch, clock = device.type == "cuda", size.padded, None
    while clock is None:
        try:
            clock = _train_stock(model, data, device, size, batch, workers=8 if on_gpu else 0)
        except torch.OutOfMemoryError:
            batch //= 2
            torch.cuda.empty_cache()
    figures.add("dialogues of a padded batch", batch)
    rate = batch * sum(map(len, data.examples)) / len(data.examples) / clock.seconds
    figures.add("tokens a second, padding not counted", rate, "tokens/s")
    if device.type == "cuda":
        figures.add("memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if ours := figures.earlier("lora", "tokens a second"):
        figures.add("this toolkit / stock", ours / rate, least=2.5)
    _add_profile(figures, clock)


def _train_stock(model: Any, data: Data, device: torch.device, size: Size, batch: int, *, workers: int) -> StepClock:
    steps = min(size.steps, len(data.examples) // batch - WARM - 1)
    clock = StepClock(device, steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=WARM + steps + 1,
            per_device_train_batch_size=batch,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            bf16=device.type == "cuda",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            dataloader_num_workers=workers,
        )
        Trainer(
            model=model,
            args=arguments,
            data_collator=StockCollator(data),
            train_dataset=datasets.Dataset.from_dict({"dialogue": range(len(data.examples))}),
            compute_loss_func=whole_loss,
            callbacks=[clock],
        ).train()
    return clock


def variants(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    """One model; each choice that the code has, the other way."""
    config, dtype, size = models.shape_of(tiny=tiny), models.dtype_of(device), replace(SIZES[tiny], steps=3)
    data = models.dialogues(size.dialogues)
    model = _model(config, device, dtype, nf4=False)
    rows = models.packed_rows(data, config, dtype, row_tokens=size.row_tokens, rows_per_step=size.rows_per_step)

    def measure(name: str, **options: Any) -> float:
        clock = _train(model, data, rows, device, size, **options)
        figures.add(name, _tokens_a_step(rows, size) / clock.seconds, "tokens/s")
        return clock.seconds

    tried: dict[str, Callable[[], float]] = {
        "LoRA multiplied in bf16 (autocast)": lambda: measure("autocast", autocast=True),
        "attention in slices": lambda: _in_slices(measure),
        "128 head rows at once": lambda: _with_head_rows(measure, device, 128),
        "2,048 head rows at once": lambda: _with_head_rows(measure, device, 2048),
        "checkpointing": lambda: measure("checkpointing", checkpointing=True),
        "torch.compile of MLPs and norms": lambda: _compiled(measure, model, tiny=tiny),
    }
    usual = measure("as it is")
    for name, run in tried.items():
        try:
            figures.add(f"speed with {name}", usual / run(), "times")
        except torch.OutOfMemoryError:
            figures.add(f"speed with {name}", "out of memory")
            torch.cuda.empty_cache()


def _in_slices(measure: Callable[..., float]) -> float:
    usual, flash.serves = flash.serves, lambda query, dropout: False
    try:
        return measure("attention in slices")
    finally:
        flash.serves = usual


def _with_head_rows(measure: Callable[..., float], device: torch.device, rows: int) -> float:
    usual = CHOICES[device.type]
    CHOICES[device.type] = replace(usual, head_rows=rows)
    try:
        return measure(f"{rows} head rows")
    finally:
        CHOICES[device.type] = usual


def _compiled(measure: Callable[..., float], model: Any, *, tiny: bool) -> float:
    """MLPs and norms alone: a layer also takes where sequences lie, which is another constant in every row."""
    inner = model.get_base_model().model
    for layer in (*inner.layers, *inner.gated_cross_attn_layers):
        for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            module.compile(dynamic=True, backend="aot_eager" if tiny else "inductor")
    return measure("compiled")
