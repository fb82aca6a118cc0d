"""The training stage: rows and model of a recipe, trained; begun again from the last checkpoint after a loss spike."""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from finetune.base_model import Base
from finetune.console import log, parse_size, track
from finetune.data.collate import RowCollator, Rows
from finetune.data.dataset import Dataset
from finetune.data.prepared import Prepared
from finetune.data.rows import eval_rows, train_rows
from finetune.data.streaming import StreamedRows
from finetune.distributed import collectives
from finetune.distributed.environment import device
from finetune.recipe.schema import Recipe, Source
from finetune.training.arguments import rows_per_process
from finetune.training.callbacks import ProgressBar, tokens_trained
from finetune.training.checkpoints import find_damage, last_checkpoint
from finetune.training.fit_memory import explain_out_of_memory
from finetune.training.image_features import FeatureCache, ImageFeatures
from finetune.training.loss_spikes import UnstableError, go_back, read_events
from finetune.training.trainer import train
from modeling.adapters import attach, count_trained, expected_counts, load_adapter_weights
from modeling.config import read_config
from modeling.errors import UserError
from modeling.image_towers import feature_shape, image_towers_fingerprint, load_image_towers
from modeling.towers import matrices_trained_in_full

FEATURES = "features"
"""Folder of image features, beside that of prepared sets."""


def train_adapter(
    recipe: Recipe, base: Base, sources: Sequence[Source], dataset: Dataset, folder: Path
) -> dict[str, Any]:
    """Train as often as the run has to go back after a loss spike: each time from what is on the disk."""
    rows_per_process(recipe.training.rows_per_step)  # a step that cannot be shared out is refused before all else
    with explain_out_of_memory(recipe):
        features = cache_image_features(recipe, base, dataset.train)
    while True:
        try:
            with explain_out_of_memory(recipe):
                return _train_once(recipe, base, sources, dataset, folder, features)
        except UnstableError as error:
            unstable = UnstableError(error.step, error.reason, error.dialogues)  # without the attempt's traceback
        go_back(folder, unstable, recipe.training.instability)
        gc.collect()  # of the attempt's model
        torch.cuda.empty_cache()


def _train_once(
    recipe: Recipe,
    base: Base,
    sources: Sequence[Source],
    dataset: Dataset,
    folder: Path,
    features: ImageFeatures | None,
) -> dict[str, Any]:
    training, events = recipe.training, read_events(folder)
    rows = train_rows(
        dataset,
        sources,
        recipe.data,
        training,
        preprocessing=base.preprocessing,
        tokenizer=base.tokenizer,
        features=features,
        blank_image=recipe.model.trains_image_towers,
        skipped=frozenset().union(*(event.skipped for event in events)),
    )
    held_out_rows = make_eval_rows(recipe, base, dataset.eval) if training.evaluate_every else None
    model = attach_adapter(recipe, base)
    cuts = [event.back_to for event in events if event.action == "lower_rate"]
    resume_from = collectives.on_main("look for a checkpoint", lambda: checkpoint_to_resume(folder))
    started, counts = time.perf_counter(), count_trained(model)
    for doubt in recipe.doubts(len(rows) // training.rows_per_step):
        log(doubt)
    log(f"train: {counts.total:,} parameters" + (f", going on from {resume_from.name}" if resume_from else ""))
    with ProgressBar() as bar:
        trainer = train(
            model,
            base.tokenizer,
            folder,
            training,
            train_rows=rows,
            eval_rows=held_out_rows,
            # Towers trained in full are fp32; on a bf16 base they need autocast to meet its hidden states.
            autocast=base.dtype == torch.bfloat16 and bool(matrices_trained_in_full(recipe.model.modes)),
            unused_parameters=recipe.model.vision == "full",
            rate_cuts=cuts,
            resume_from=resume_from,
            callbacks=[bar],
            workers=recipe.data.workers,
        )
    log(f"train: waited for data {trainer.waiting:.1%} of the time")
    trained = trainer.state.global_step * training.rows_per_step
    rows.restore(collectives.gather(rows.state(trained)))
    return {
        "steps": trainer.state.global_step,
        "epochs": rows.epoch(trained - 1) + 1,
        "tokens_trained": collectives.on_main("count tokens", lambda: tokens_trained(folder / "metrics.jsonl")),
        "parameters_trained": asdict(counts),
        "best_step": trainer.state.best_global_step if training.evaluate_every else None,
        "streamed": _streamed_stats(rows, sources),
        "seconds": round(time.perf_counter() - started, 1),
        "waiting_for_data": round(trainer.waiting, 4),
        "rollbacks": len(read_events(folder)),
    }


def attach_adapter(recipe: Recipe, base: Base) -> nn.Module:
    """Return the base as the recipe trains it: LoRA added, towers frozen or not, and what it continues from loaded."""
    idefics = base.load(
        image_towers=not recipe.caches_features,
        divided=recipe.training.parallel == "fsdp2" and collectives.world_size() > 1,
    )
    set_seed(recipe.training.seed)  # LoRA factors start at random
    model = attach(idefics, recipe.model.modes, lora=recipe.adapter.lora, base=base.name)
    if not recipe.adapter.model_extra:
        counts = count_trained(model)
        expected = expected_counts(idefics.config.to_dict(), recipe.model.modes, rank=recipe.adapter.rank)
        assert counts == expected, f"trained {counts}, expected {expected}"
    if recipe.model.continue_from:
        load_adapter_weights(model, Path(recipe.model.continue_from))
    return model


def cache_image_features(recipe: Recipe, base: Base, prepared: Prepared) -> ImageFeatures | None:
    """Return the features of all images that these examples show, the missing ones computed first.

    None where images run live: through towers that are trained, with augmentation, or as they are streamed.
    """
    if not recipe.caches_features:
        return None
    data, folder = recipe.data, base.fetch()
    cache = FeatureCache(
        Path(data.prepared).with_name(FEATURES),
        image_towers_fingerprint(folder),
        base.preprocessing,
        shape=feature_shape(read_config(str(folder))),
        dtype=base.dtype,
        limit=parse_size("data.feature_cache_size", data.feature_cache_size),
    )
    _, shown = prepared.shown_images()
    return cache.open(
        prepared.images,
        prepared.digests,
        np.flatnonzero(np.isin(prepared.digests, shown)),
        towers=lambda: load_image_towers(folder, dtype=base.dtype, device=device()),
        track=track,
    )


def make_eval_rows(recipe: Recipe, base: Base, prepared: Prepared, *, live: bool = False) -> RowCollator:
    """Rows of held-out examples; `live` opens their images instead of computing features of all of them."""
    features = None if live else cache_image_features(recipe, base, prepared)
    return eval_rows(
        prepared, recipe.training, preprocessing=base.preprocessing, tokenizer=base.tokenizer, features=features
    )


def checkpoint_to_resume(folder: Path) -> Path | None:
    """Return the last checkpoint, or None. Raises UserError where a file in it is not as it was written."""
    checkpoint = last_checkpoint(folder)
    if checkpoint and (changed := find_damage(checkpoint, hash_all=True)):
        raise UserError(
            f"{checkpoint / changed}: is not what was written: its hash is another (a flipped byte on the disk?)\n"
            f"  delete {checkpoint}, and the same command goes on from the checkpoint before"
        )
    return checkpoint


def _streamed_stats(rows: Rows, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What became of the records that were read while training, per streamed source."""
    source_stats = rows.source_stats if isinstance(rows, StreamedRows) else []
    for broken in (broken for stats in source_stats for broken in stats.broken):
        log(broken)
    return [stats.to_json() for stats, source in zip(source_stats, sources, strict=False) if source.stream]
