"""The page to read first: one packed row after the other through TRL's SFTTrainer, and what had to be overridden.

`IdeficsTrainer` overrides, and the reason for each:

    __init__               what is trained stays in fp32; TRL casts it to bf16 on a 4-bit base
    compute_loss           the whole decoupled vocabulary; TRL's fused head leaves the added rows out
    evaluate               sums over tokens; TRL averages packs
    get_optimizer_cls_...  own rates for gates and added tokens, no decay where it would pull at a scale
    _determine_best_metric a new best is always a checkpoint, whatever the interval
    _save, _load_from_*    the adapter folder, which holds more than PEFT knows of, and no pickles
    create_model_card      TRL's says nothing true about this model
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerControl
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from finetune import ranks
from finetune.callbacks import MetricsFile
from finetune.data.ahead import RowsAhead
from finetune.data.collate import Batch, RowCollator, Rows
from finetune.data.schedule import Row
from finetune.progress import say
from modeling.adapters import count_trained, load_adapter_weights, save_adapter
from modeling.errors import UserError
from modeling.forward import packed_loss
from modeling.quantize import quantized_layers
from modeling.towers import is_lora, no_decay, stock_name, tower_of


@dataclass(frozen=True)
class Plan:
    """How a run is optimised: the numbers of a recipe's `training`, every one decided."""

    packs_per_step: int
    learning_rate: float
    final_learning_rate: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    """adamw, adamw_8bit or paged_adamw_8bit."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    tower_rates: Mapping[str, float | None] | None = None
    """Own learning rate of a tower, where it has one."""
    seed: int = 0
    checkpoint_every: int = 1
    evaluate_every: int | None = None
    early_stop: int | None = None
    trackers: Sequence[str] = ()
    unused_parameters: bool = False
    """Some trained parameters play no part, like the last norm of the vision tower: DDP must look for them."""
    autocast: bool = False
    """Multiply in bf16 although some trained matrices are fp32: for towers trained in full on a bf16 base."""
    checkpointing: bool | int = False
    """Keep only each layer's input for the backward, and compute the rest again; a number: in as many layers."""


def train(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    train_rows: Rows,
    eval_rows: RowCollator | None,
    plan: Plan,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> "IdeficsTrainer":
    """Train an attached `model` on every row of `train_rows`, and leave `folder`/adapter and `folder`/metrics.jsonl.

    Checkpoints go to `folder`/checkpoint-*; `resume_from` is one of them. The best one by held-out loss becomes the
    adapter where `plan` evaluates, else the last state.
    """
    checkpoint_layers(model, plan.checkpointing)
    half = any(layer.compute_dtype == torch.float16 for layer in quantized_layers(model).values())
    arguments = _arguments(folder, steps=len(train_rows) // plan.packs_per_step, plan=plan, scaled=half)
    ahead = RowsAhead(train_rows, stride=ranks.count())
    trainer = IdeficsTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        plan=plan,
        train_rows=ahead,
        eval_rows=eval_rows,
        callbacks=[MetricsFile(folder / "metrics.jsonl", train_rows, plan.packs_per_step), *callbacks],
    )
    count_trained(model)  # asserts that TRL left every trained parameter in fp32
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        ahead.close()
    trainer.waiting = ahead.waited / (time.perf_counter() - started)
    if plan.evaluate_every and trainer.state.best_model_checkpoint:
        load_adapter_weights(model, Path(trainer.state.best_model_checkpoint))
    if trainer.is_world_process_zero():
        save_adapter(model, folder / "adapter")
    return trainer


class IdeficsTrainer(SFTTrainer):
    """SFTTrainer over packed rows. One micro-batch is one row; the row's number is all the dataset holds."""

    # Our loss is a sum over tokens divided by the tokens of the whole step, so accumulation must not divide it again.
    loss_is_scaled_for_ga = True

    waiting: float = 0.0
    """Share of the training's time that went by without a row to train on."""

    def __init__(
        self, *, plan: Plan, train_rows: RowsAhead, eval_rows: RowCollator | None, model: nn.Module, **kwargs: Any
    ):
        self.plan, self.eval_rows = plan, eval_rows
        self.idefics_config = model.config
        held_out = _row_numbers(len(eval_rows)) if eval_rows and plan.evaluate_every else None
        in_fp32 = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        super().__init__(
            model=model,
            data_collator=train_rows,
            train_dataset=_row_numbers(len(train_rows.rows)),
            eval_dataset=held_out,
            **kwargs,
        )
        for parameter, data in in_fp32.items():
            if parameter.dtype != data.dtype:
                parameter.data = data
        self.remove_callback(PrinterCallback)
        if plan.early_stop:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=plan.early_stop))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of token losses / supervised tokens of the step over all ranks and rows; DDP's mean is undone."""
        assert num_items_in_batch is not None
        assert not return_outputs
        loss = packed_loss(model, inputs, config=self.idefics_config)
        return loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss per supervised token, over all rows and ranks."""
        assert self.eval_rows is not None
        rows = [*self.eval_rows.rows, *[Row(0)] * (-len(self.eval_rows.rows) % ranks.count())]
        mine = range(ranks.rank(), len(rows), ranks.count())
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for number in mine:
                batch = self._prepare_inputs(self.eval_rows.batch(rows[number]))
                loss = packed_loss(self.model_wrapped, batch, config=self.idefics_config)
                sums += torch.stack([loss.double(), (batch["labels"] >= 0).sum().double()])
        loss, supervised = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / max(supervised, 1)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """The trainer's optimiser, over groups that share a rate and a decay."""
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, {**kwargs, "params": parameter_groups(model or self.model, plan=self.plan)}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, Path(output_dir or self.args.output_dir), state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter_weights(model or self.model, Path(resume_from_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_new_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_new_best
        return is_new_best


def checkpoint_layers(model: nn.Module, layers: bool | int) -> None:
    """Keep only the inputs of the first `layers` of the decoder (True: of all), and of the cross-attention before them.

    Layers of the vision tower, which are few and small, follow as soon as there are any. Reentrant checkpointing would
    lose the gradients of a layer whose inputs need none.
    """
    idefics = model.get_base_model() if isinstance(model, PeftModel) else model
    if not layers:
        idefics.gradient_checkpointing_disable()
        return
    idefics.gradient_checkpointing_enable({"use_reentrant": False})
    if layers is not True:
        interval = idefics.config.cross_layer_interval
        for kept in (idefics.model.layers[layers:], idefics.model.gated_cross_attn_layers[-(-layers // interval) :]):
            for layer in kept:
                layer.gradient_checkpointing = False


def parameter_groups(model: nn.Module, *, plan: Plan) -> list[dict[str, Any]]:
    """Trained parameters grouped by (learning rate, weight decay), in a stable order."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    rates = plan.tower_rates or {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stock = stock_name(name)
            rate = rates.get(tower_of(stock)) or plan.learning_rate
            decay = plan.weight_decay if is_lora(name) or not no_decay(stock) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder: the trainer writes trainer_state.json last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _row_numbers(rows: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"row": range(rows)})


def _arguments(folder: Path, *, steps: int, plan: Plan, scaled: bool) -> SFTConfig:
    """`scaled`: matrices are multiplied in fp16, whose small gradients would be lost if the loss were not scaled up."""
    available = get_available_reporting_integrations()
    if missing := sorted(set(plan.trackers) - set(available)):
        installed = ", ".join(available) or "none"
        raise UserError(f"training.trackers: {', '.join(missing)} not installed here; installed: {installed}")
    if "paged" in plan.optimizer and not torch.cuda.is_available():
        say(f"training.optimizer: {plan.optimizer} pages nothing without a GPU; its moments are in 8 bits all the same")
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=_accumulation(plan.packs_per_step),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        learning_rate=plan.learning_rate,
        **_schedule(plan),
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        **({} if plan.optimizer == "adamw" else {"optim": plan.optimizer}),
        adam_beta1=plan.betas[0],
        adam_beta2=plan.betas[1],
        max_grad_norm=plan.clip,
        seed=plan.seed,
        bf16=plan.autocast,
        fp16=scaled and not plan.autocast,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,  # see checkpoint_layers
        dataloader_pin_memory=torch.cuda.is_available(),
        # Packed attention reaches every parameter it can, so that DDP seldom needs to search.
        ddp_find_unused_parameters=plan.unused_parameters,
        logging_steps=1,
        disable_tqdm=True,
        report_to=list(plan.trackers) or "none",
        save_steps=plan.checkpoint_every,
        save_total_limit=2,
        eval_strategy="steps" if plan.evaluate_every else "no",
        eval_steps=plan.evaluate_every,
        metric_for_best_model="eval_loss" if plan.evaluate_every else None,
    )


def _schedule(plan: Plan) -> dict[str, Any]:
    """The trainer's own schedules, with a final value: all are ratios, so that groups keep their own rates' shape."""
    if plan.schedule == "cosine":
        kwargs = {"min_lr": plan.final_learning_rate}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    if plan.schedule == "linear":
        kwargs = {"lr_end": plan.final_learning_rate, "power": 1.0}
        return {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": kwargs}
    return {"lr_scheduler_type": "constant_with_warmup"}


def _accumulation(packs_per_step: int) -> int:
    """Rows each rank runs before a step: ranks x accumulation = packs per step, or an error that names the nearest."""
    processes = ranks.count()
    if packs_per_step % processes:
        nearest = max(1, round(packs_per_step / processes)) * processes
        raise UserError(
            f"tokens_per_step / row_tokens gives {packs_per_step} packs a step, which {processes} processes cannot share "
            f"out evenly; the nearest is {nearest}: set training.tokens_per_step to {nearest} x row_tokens"
        )
    return packs_per_step // processes
