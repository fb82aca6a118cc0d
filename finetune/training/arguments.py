"""A recipe's `training` -> the arguments of transformers' trainer, every number decided."""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from finetune.console import log
from finetune.distributed import collectives
from finetune.distributed.launcher import CONFIGS
from finetune.planning.estimate import CHECKPOINTS_KEPT
from finetune.recipe.schema import Training
from modeling.errors import UserError


def training_arguments(
    folder: Path,
    settings: Training,
    *,
    steps: int,
    autocast: bool = False,
    scaled: bool = False,
    unused_parameters: bool = False,
) -> SFTConfig:
    """Return the trainer's arguments for a run of `steps` that writes to `folder`.

    `autocast`: multiply in bf16 although some trained matrices are fp32, as towers trained in full on a bf16 base are.
    `scaled`: matrices are multiplied in fp16, whose small gradients would be lost if the loss were not scaled up.
    `unused_parameters`: some trained parameters play no part, like the last norm of the vision tower, and DDP must look
    for them; packed attention reaches all others.
    """
    available = get_available_reporting_integrations()
    if missing := sorted(set(settings.trackers) - set(available)):
        installed = ", ".join(available) or "none"
        raise UserError(f"training.trackers: {', '.join(missing)} not installed here; installed: {installed}")
    if "paged" in settings.optimizer and not torch.cuda.is_available():
        log(f"training.optimizer: {settings.optimizer} pages nothing without a GPU; its moments are in 8 bits")
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=rows_per_process(settings.rows_per_step),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        learning_rate=settings.learning_rate,
        **_schedule(settings),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        **({} if settings.optimizer == "adamw" else {"optim": settings.optimizer}),
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        seed=settings.seed,
        bf16=autocast,
        fp16=scaled and not autocast,
        **sharding(settings.parallel),
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,  # see checkpoint_layers
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        # Before a step is taken its loss is looked at, once; the trainer would wait for that of every row.
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=unused_parameters,
        logging_steps=1,
        disable_tqdm=True,
        log_level_replica="error",  # the first process alone logs what transformers logs
        report_to=settings.trackers or "none",
        save_steps=settings.checkpoint_every or settings.evaluate_every or max(1, steps // 10),
        save_total_limit=CHECKPOINTS_KEPT,
        eval_strategy="steps" if settings.evaluate_every else "no",
        eval_steps=settings.evaluate_every,
        metric_for_best_model="eval_loss" if settings.evaluate_every else None,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs; the trainer would split a row over them
    return arguments


def rows_per_process(rows_per_step: int) -> int:
    """Return how many rows each process runs before a step. Raises UserError where they cannot be shared out."""
    processes = collectives.world_size()
    if rows_per_step % processes:
        nearest = max(1, round(rows_per_step / processes)) * processes
        raise UserError(
            f"tokens_per_step / row_tokens gives {rows_per_step} rows a step, which {processes} processes cannot "
            f"share out evenly; the nearest is {nearest}: set training.tokens_per_step to {nearest} x row_tokens"
        )
    return rows_per_step // processes


def _schedule(settings: Training) -> dict[str, Any]:
    """Return the trainer's schedule: factors of the learning rate, so that groups keep the shape of their own rates."""
    if settings.schedule == "cosine":
        kwargs = {"min_lr": settings.final_learning_rate}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    if settings.schedule == "linear":
        kwargs = {"lr_end": settings.final_learning_rate, "power": 1.0}
        return {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": kwargs}
    return {"lr_scheduler_type": "constant_with_warmup"}


def sharding(parallel: str) -> dict[str, Any]:
    """Return the trainer's FSDP arguments, from the file that configures the launcher; none for ddp or one process."""
    if parallel == "ddp" or collectives.world_size() == 1:
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and collectives.world_size() > 1:
            raise UserError(
                "the launcher was configured for FSDP, and training.parallel says ddp; "
                f"set training.parallel=fsdp2, or launch with {CONFIGS / 'ddp.yaml'}"
            )
        return {}
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    return {"fsdp": True, "fsdp_config": config}
