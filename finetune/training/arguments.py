"""Plan -> what transformers' trainer is told: one SFTConfig, which also says how processes share the work."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.models.idefics.modeling_idefics import IdeficsDecoderLayer, IdeficsGatedCrossAttentionLayer
from trl import SFTConfig

from finetune.console import log
from finetune.distributed import collectives
from finetune.training.loss_spikes import DEFAULT_WATCH, Watch
from modeling.errors import UserError


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
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    watch: Watch = DEFAULT_WATCH
    rate_cuts: Sequence[int] = ()
    """From each of these steps on, all rates are half of what they would be."""


def training_arguments(folder: Path, *, steps: int, plan: Plan, scaled: bool) -> SFTConfig:
    """`scaled`: matrices are multiplied in fp16, whose small gradients would be lost if the loss were not scaled up."""
    available = get_available_reporting_integrations()
    if missing := sorted(set(plan.trackers) - set(available)):
        installed = ", ".join(available) or "none"
        raise UserError(f"training.trackers: {', '.join(missing)} not installed here; installed: {installed}")
    if "paged" in plan.optimizer and not torch.cuda.is_available():
        log(f"training.optimizer: {plan.optimizer} pages nothing without a GPU; its moments are in 8 bits all the same")
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=rows_per_process(plan.packs_per_step),
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
        **division(plan),
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,  # see checkpoint_layers
        dataloader_pin_memory=torch.cuda.is_available(),
        # Packed attention reaches every parameter it can, so that DDP seldom needs to search.
        ddp_find_unused_parameters=plan.unused_parameters,
        logging_steps=1,
        disable_tqdm=True,
        log_level_replica="error",  # what transformers has to say, the first process says
        report_to=list(plan.trackers) or "none",
        save_steps=plan.checkpoint_every,
        save_total_limit=2,
        eval_strategy="steps" if plan.evaluate_every else "no",
        eval_steps=plan.evaluate_every,
        metric_for_best_model="eval_loss" if plan.evaluate_every else None,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several in sight; the trainer would divide a row over them
    return arguments


def rows_per_process(packs_per_step: int) -> int:
    """Rows each rank runs before a step: ranks x accumulation = packs per step, or an error that names the nearest."""
    processes = collectives.count()
    if packs_per_step % processes:
        nearest = max(1, round(packs_per_step / processes)) * processes
        raise UserError(
            f"tokens_per_step / row_tokens gives {packs_per_step} packs a step, which {processes} processes cannot "
            f"share out evenly; the nearest is {nearest}: set training.tokens_per_step to {nearest} x row_tokens"
        )
    return packs_per_step // processes


def _schedule(plan: Plan) -> dict[str, Any]:
    """The trainer's own schedules, with a final value: all are ratios, so that groups keep their own rates' shape."""
    if plan.schedule == "cosine":
        kwargs = {"min_lr": plan.final_learning_rate}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    if plan.schedule == "linear":
        kwargs = {"lr_end": plan.final_learning_rate, "power": 1.0}
        return {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": kwargs}
    return {"lr_scheduler_type": "constant_with_warmup"}


def division(plan: Plan) -> dict[str, Any]:
    if plan.parallel == "ddp" or collectives.count() == 1:
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and collectives.count() > 1:
            raise UserError(
                "the launcher was configured for FSDP, and training.parallel says ddp; "
                "set training.parallel=fsdp2, or launch with recipes/accelerate/ddp.yaml"
            )
        return {}
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": [IdeficsDecoderLayer.__name__, IdeficsGatedCrossAttentionLayer.__name__],
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": True,
    }
    return {"fsdp": True, "fsdp_config": config}
