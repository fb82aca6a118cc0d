"""The page to read first: packed rows through TRL's SFTTrainer, and what had to be overridden.

`IdeficsTrainer` overrides, and the reason for each:

    __init__               trained parameters stay in fp32; TRL casts them to bf16 on a 4-bit base
    train                  SIGTERM and SIGINT stop at the end of a step; the time spent waiting for rows is measured
    compute_loss           the whole decoupled vocabulary; TRL's fused head leaves the added rows out
    evaluate               sums over tokens; TRL averages rows
    get_optimizer_cls_...  own learning rates for gates and added tokens, no decay of scales and offsets
    create_scheduler       learning rates that are halved from a step on, after the run went back
    _get_grad_norm         loss and gradient are checked before a step is taken
    _determine_best_metric a new best is always a checkpoint, whatever the interval
    _save_checkpoint       complete or not there, whoever is killed meanwhile
    save_model, _load_...  the adapter folder, which holds more than PEFT knows of, and no pickles
    create_model_card      TRL's card says nothing true about this model
"""

import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerControl, set_seed
from trl import SFTTrainer

from finetune.data.collate import Batch, RowCollator, Rows
from finetune.data.sampling import Row
from finetune.distributed import collectives
from finetune.planning.estimate import PREFETCHED
from finetune.recipe.schema import Training
from finetune.training.arguments import training_arguments
from finetune.training.callbacks import MetricsFile
from finetune.training.checkpoints import mark_complete, remove_incomplete, require_room
from finetune.training.loss_spikes import WINDOW, StepDialogue, UnstableError, suspects, why_unstable
from finetune.training.prefetch import PrefetchedRows, row_workers
from finetune.training.signals import StopAfterStep, StopSignal, catch_stop_signals
from modeling.adapters import copy_adapter, count_trained, gathered_state, load_adapter_weights, save_adapter, whole
from modeling.device import choices, copy_batch
from modeling.errors import Interrupted, UserError
from modeling.packed_forward import packed_loss
from modeling.quantize import quantized_layers
from modeling.towers import is_lora, no_decay, stock_name, tower_of

ROWS_STATE = "rows.json"
"""File of a checkpoint: where each lane of a stream stands."""


def train(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    settings: Training,
    *,
    train_rows: Rows,
    eval_rows: RowCollator | None = None,
    autocast: bool = False,
    unused_parameters: bool = False,
    rate_cuts: Sequence[int] = (),
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    workers: int | None = 0,
) -> "IdeficsTrainer":
    """Train an attached `model` on all `train_rows`, and write `folder`/adapter and `folder`/metrics.jsonl.

    `settings` is the recipe's section; its epochs and steps are not read, as `train_rows` are all rows of the run.
    `autocast` and `unused_parameters`: see `training_arguments`. From each of the steps `rate_cuts` on, all learning
    rates are half of what they would be. Checkpoints go to `folder`/checkpoint-*; `resume_from` is one of them. Where
    `settings` evaluate, the checkpoint with the best eval loss becomes the adapter, else the last state. `workers`: see
    `row_workers`. Every process calls this; the main one writes.

    Raises Interrupted after SIGTERM or SIGINT, with a checkpoint saved; UnstableError before a step that must not be
    taken; UserError.
    """
    if collectives.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        remove_incomplete(folder)
    collectives.barrier()
    if resume_from:  # before FSDP shards the model
        load_adapter_weights(model, resume_from)
        train_rows.restore(json.loads((resume_from / ROWS_STATE).read_text(encoding="utf-8")))
    checkpoint_layers(model, settings.checkpointing)
    half = any(layer.compute_dtype == torch.float16 for layer in quantized_layers(model).values())
    arguments = training_arguments(
        folder,
        settings,
        steps=len(train_rows) // settings.rows_per_step,
        autocast=autocast,
        scaled=half,
        unused_parameters=unused_parameters,
    )
    steps_prefetched = choices(arguments.device.type).steps_prefetched
    prefetched = PrefetchedRows(
        train_rows,
        stride=collectives.world_size(),
        depth=PREFETCHED + steps_prefetched * arguments.gradient_accumulation_steps,
        device=arguments.device,
        workers=row_workers(train_rows, workers, processes=collectives.world_size()),
    )
    trainer = IdeficsTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        settings=settings,
        rate_cuts=rate_cuts,
        train_rows=prefetched,
        eval_rows=eval_rows,
        callbacks=[MetricsFile(folder / "metrics.jsonl", train_rows, settings.rows_per_step), *callbacks],
    )
    count_trained(model)  # asserts that TRL left every trained parameter in fp32
    if collectives.world_size() > 1:
        set_seed(settings.seed + collectives.rank())  # else all would drop the same; a checkpoint has its own states
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        prefetched.close()
    if received := int(max(collectives.gather_numbers([trainer.stop_signal.received]))[0]):
        saved = folder / f"checkpoint-{trainer.state.global_step}"
        name = signal.Signals(received).name
        raise Interrupted(f"{name}: saved as {saved}; the same command goes on from there", received)
    best = trainer.state.best_model_checkpoint if settings.evaluate_every else None
    if best is None:
        trainer.save_model(str(folder / "adapter"))
    elif collectives.is_main():
        copy_adapter(Path(best), folder / "adapter")
    collectives.barrier()
    return trainer


class IdeficsTrainer(SFTTrainer):
    """SFTTrainer over packed rows. One micro-batch is one row; the dataset holds the numbers of the rows alone."""

    # Our loss is a sum over tokens divided by the tokens of the whole step, so accumulation must not divide it again.
    loss_is_scaled_for_ga = True

    waiting: float
    """Share of the training time spent waiting for rows."""
    stop_signal: StopSignal
    """The signal that this process received."""
    stop_asked: bool = False
    """Whether any process received one."""

    def __init__(
        self,
        *,
        settings: Training,
        train_rows: PrefetchedRows,
        eval_rows: RowCollator | None = None,
        rate_cuts: Sequence[int] = (),
        model: nn.Module,
        **kwargs: Any,
    ):
        self.settings, self.rate_cuts, self.eval_rows = settings, rate_cuts, eval_rows
        self.ahead, self.rows = train_rows, train_rows.rows
        self._losses = list[torch.Tensor]()
        self.idefics_config = model.config
        eval_numbers = _row_numbers(len(eval_rows)) if eval_rows and settings.evaluate_every else None
        in_fp32 = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        super().__init__(
            model=model,
            data_collator=train_rows,
            train_dataset=_row_numbers(len(train_rows.rows)),
            eval_dataset=eval_numbers,
            **kwargs,
        )
        for parameter, data in in_fp32.items():
            if parameter.dtype != data.dtype:
                parameter.data = data
        rows_of_a_step = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        assert rows_of_a_step == settings.rows_per_step, f"{rows_of_a_step} rows a step, not {settings.rows_per_step}"
        if settings.parallel == "fsdp2" and collectives.world_size() > 1 and not self.is_fsdp_enabled:
            raise UserError(
                "training.parallel: fsdp2: accelerate shards models over GPUs alone, and the processes run on "
                f"{self.accelerator.device.type}; set training.parallel=ddp"
            )
        self.remove_callback(PrinterCallback)
        self.add_callback(StopAfterStep(lambda: self.stop_asked))
        if settings.early_stop:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=settings.early_stop))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        with catch_stop_signals() as self.stop_signal:
            output = super().train(*args, **kwargs)
        self.waiting = self.ahead.waited / (time.perf_counter() - started)
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return token losses / supervised tokens of the step, summed over all ranks and rows; undoes DDP's mean."""
        assert num_items_in_batch is not None
        assert not return_outputs
        loss = packed_loss(model, inputs, config=self.idefics_config)
        loss = loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        self._losses.append(loss.detach())
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the eval loss per supervised token, over all rows and ranks."""
        assert self.eval_rows is not None
        rows = [*self.eval_rows.rows, *[Row(0)] * (-len(self.eval_rows.rows) % collectives.world_size())]
        mine = range(collectives.rank(), len(rows), collectives.world_size())
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for number in mine:
                batch = copy_batch(self.eval_rows.batch(rows[number]), self.args.device)
                loss = packed_loss(self.model_wrapped, batch, config=self.idefics_config)
                sums += torch.stack([loss.double(), loss.new_full((), len(batch["targets"]), dtype=torch.float64)])
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # only a backward reshards the last ones: a checkpoint would find no weights
        loss, supervised = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / max(supervised, 1)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """Return the trainer's optimiser, with parameters grouped by learning rate and decay."""
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, {**kwargs, "params": parameter_groups(model or self.model, settings=self.settings)}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the trainer's schedule, halved from each of `rate_cuts` on."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)

        def with_cuts(rate: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: rate(step) * 0.5 ** sum(step >= cut for cut in self.rate_cuts)

        scheduler.lr_lambdas = [with_cuts(rate) for rate in scheduler.lr_lambdas]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take the rates of the next step from the schedule: those in the checkpoint may have been cut since."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        factors = [rate(scheduler.last_epoch) for rate in scheduler.lr_lambdas]
        scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check the step: called after its last row, before it is taken. Raises UnstableError, on all processes."""
        norm = super()._get_grad_norm(model, grad_norm)
        # The one time in a step that the host waits for the device.
        loss, size = torch.stack([torch.stack(self._losses).sum(), whole(norm).to(self._losses[0])]).tolist()
        self._losses = []
        losses, signals = zip(*collectives.gather_numbers([loss, float(self.stop_signal.received)]), strict=True)
        self.stop_asked = any(signals)
        before = [line["loss"] for line in self.state.log_history[-2 * WINDOW :] if "loss" in line]
        checked = (
            size if self.accelerator.scaler is None else 0.0
        )  # a scaler skips steps with infinite gradients itself
        if reason := why_unstable(fmean(losses), checked, before, spike=self.settings.instability.spike):
            raise UnstableError(self.state.global_step + 1, reason, self._dialogues_of_this_step(before))
        return size

    @torch.no_grad()
    def _dialogues_of_this_step(self, before: Sequence[float]) -> list[StepDialogue]:
        """Return the dialogues of this step, of all processes, each with its loss when it is computed alone."""
        self.model.eval()
        first = self.state.global_step * self.settings.rows_per_step
        mine = range(first + collectives.rank(), first + self.settings.rows_per_step, collectives.world_size())
        alone = [named for row in mine for named in self.rows.dialogues(row)]
        most = max(collectives.gather([len(alone)]))
        fillers = [(("", ""), self.rows.empty())] * (
            most - len(alone)
        )  # with FSDP all processes run each forward together
        measured = []
        for origin, batch in [*alone, *fillers]:
            prepared = copy_batch(batch, self.args.device)
            with self.compute_loss_context_manager():
                loss = packed_loss(self.model_wrapped, prepared, config=self.idefics_config)
            measured.append((*origin, float(loss) / max(len(batch["targets"]), 1)))
        found = collectives.gather(measured[: len(alone)])
        blamed = suspects([loss for *_, loss in found], before, spike=self.settings.instability.spike)
        return [
            StepDialogue(source, record_id, loss if math.isfinite(loss) else None, blame)
            for (source, record_id, loss), blame in zip(found, blamed, strict=True)
        ]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = gathered_state(self.model) if self.is_fsdp_enabled else None
        if collectives.is_main():
            save_adapter(self.model, Path(output_dir or self.args.output_dir), state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `train` has loaded the weights."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Mark it complete when all processes have written. Raises UserError where there is no room."""
        trained = [one for one in self.model.parameters() if one.requires_grad]
        states = [one for state in self.optimizer.state.values() for one in state.values() if torch.is_tensor(one)]
        folder, needed = Path(self.args.output_dir), sum(one.nbytes for one in (*trained, *states))
        collectives.on_main("look for room", lambda: require_room(folder, needed))
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError):
            require_room(folder, needed)  # other programs may have filled the disk meanwhile
            raise
        rows = collectives.gather(self.rows.state(self.state.global_step * self.settings.rows_per_step))
        if collectives.is_main():
            checkpoint = folder / f"checkpoint-{self.state.global_step}"
            (checkpoint / ROWS_STATE).write_text(json.dumps(rows), encoding="utf-8")
            mark_complete(checkpoint)
        collectives.barrier()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_new_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_new_best
        return is_new_best


def checkpoint_layers(model: nn.Module, layers: bool | int) -> None:
    """Keep only the inputs of the first `layers` of the decoder (True: of all), and of the cross-attention before them.

    Where `layers` is not 0, all layers of the vision tower, which are few and small, are checkpointed, too. Reentrant
    checkpointing would lose the gradients of a layer whose inputs need none.
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


def parameter_groups(model: nn.Module, *, settings: Training) -> list[dict[str, Any]]:
    """Return the trained parameters grouped by (learning rate, weight decay), in a stable order."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    own = {"gates": settings.gates_learning_rate, "added_tokens": settings.added_tokens_learning_rate}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stock = stock_name(name)
            rate = own.get(tower_of(stock)) or settings.learning_rate
            decay = settings.weight_decay if is_lora(name) or not no_decay(stock) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _row_numbers(rows: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"row": range(rows)})
