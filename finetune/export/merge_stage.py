"""The merge stage: merge the adapter into a standalone model, verify its weights, and compare its answers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from finetune.base_model import Base
from finetune.console import log, show_size, track
from finetune.data.collate import Rows
from finetune.data.dataset import Dataset
from finetune.data.rows import train_rows
from finetune.distributed import collectives
from finetune.distributed.environment import device, free_memory, versions
from finetune.evaluation.evaluate import draw_questions
from finetune.evaluation.generate import Assistant
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.cards import model_card
from finetune.export.merge import merge
from finetune.export.verify import compare_answers
from finetune.recipe.schema import Recipe, Source
from finetune.training.training_stage import make_eval_rows
from modeling import loading
from modeling.adapters import open_adapter
from modeling.safetensors_io import read_checkpoint, weight_bytes

PARITY_ROWS = 2
PARITY_QUESTIONS = 8
PARITY_DIALOGUES = 256


def merge_adapter(
    recipe: Recipe,
    base: Base,
    sources: Sequence[Source],
    dataset: Dataset | None,
    folder: Path,
    *,
    may_replace: Sequence[Path] = (),
) -> dict[str, Any]:
    """Merge and verify the weights; with a `dataset`, also compare answers of the merged model and base + adapter."""
    rows: Rows | None = None
    if dataset and len(dataset.eval):
        rows = make_eval_rows(recipe, base, dataset.eval, live=True)
    elif dataset:
        rows = train_rows(
            dataset,
            sources,
            recipe.data,
            recipe.training,
            preprocessing=base.preprocessing,
            tokenizer=base.tokenizer,
        )
    provenance = {
        "base": recipe.model.base or f"init: {recipe.model.init}",
        "revision": recipe.model.revision,
        "trained": {tower: mode for tower, mode in recipe.model.modes.items() if mode != "frozen"},
        "versions": versions(),
    }

    def work() -> dict[str, Any]:
        adapter, out = folder / "adapter", folder / "merged"
        metadata = AdapterMetadata.read(adapter)
        weights = merge(
            adapter,
            base.name,
            out,
            revision=base.revision,
            instruct=base.instruct,
            base_fingerprint=metadata.fingerprint,
            base_precision=metadata.base_precision,
            trained_on=metadata.base_precision,
            may_replace=may_replace,
            provenance=provenance,
            card=model_card(base.name, out, folder),
            track=track,
        )["parity"]
        asked = _compare_answers(base, adapter, out, rows, dataset, recipe.training.seed) if dataset and rows else {}
        return {"merged": str(out), **asked, "weights": weights}

    return collectives.on_main("merge", work)


def _compare_answers(
    base: Base, adapter: Path, merged: Path, rows: Rows, dataset: Dataset, seed: int
) -> dict[str, Any]:
    """Compare answers of the merged model with base + adapter; return {} if the model is too large for this machine."""
    needed = weight_bytes(read_checkpoint(merged), base.dtype)
    if needed > (free := free_memory()):
        log(
            f"{merged}: not asked as a whole, which takes {show_size(needed)} and {show_size(free)} are free; "
            f"its weights are verified tensor by tensor and block by block"
        )
        return {}
    asked = dataset.eval if len(dataset.eval) else dataset.train
    questions = draw_questions(asked.dialogues[:PARITY_DIALOGUES], limit=PARITY_QUESTIONS, seed=seed)

    def assistant(model: nn.Module) -> Assistant:
        return Assistant(model, base.tokenizer, base.preprocessing)

    def load_merged() -> nn.Module:
        return loading.load(str(merged), dtype=base.dtype, instruct=False, device=device()).model

    parity = compare_answers(
        base=lambda: assistant(base.load()),
        tuned=lambda: assistant(open_adapter(base.load(), adapter)),
        merged=lambda: assistant(load_merged()),
        batches=[rows.at(number) for number in range(min(PARITY_ROWS, len(rows)))],
        prompts=[prompt for prompt, _ in questions],
    )
    return asdict(parity)
