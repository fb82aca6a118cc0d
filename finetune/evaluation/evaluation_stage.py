"""The evaluation stage: base and tuned model answer the same eval questions, and the image-swap ablation."""

from pathlib import Path
from typing import Any

from torch import nn

from finetune.base_model import Base
from finetune.console import track
from finetune.data.collate import RowCollator
from finetune.data.dataset import Dataset, prepare_options
from finetune.data.prepare import prepare, require_examples
from finetune.data.read_dialogues import resolve_source
from finetune.distributed import collectives
from finetune.evaluation.evaluate import draw_questions, eval_loss, evaluate, swap_images
from finetune.evaluation.generate import Assistant, features_by_image
from finetune.recipe.schema import Recipe
from finetune.training.training_stage import make_eval_rows
from modeling.adapters import open_adapter


def evaluate_adapter(recipe: Recipe, base: Base, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Score the base and the tuned model on the eval data, and the tuned model again with swapped images."""
    settings, seed = recipe.evaluation, recipe.training.seed
    assert settings, "the recipe has no evaluation"
    eval_data = dataset.eval
    rows = make_eval_rows(recipe, base, eval_data)
    questions = draw_questions(eval_data.dialogues, limit=settings.limit, seed=seed)
    documents = _document_rows(recipe, base)
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "track": track,
    }

    def assistant(model: nn.Module) -> Assistant:
        return Assistant(model, base.tokenizer, base.preprocessing, features_by_image(rows))

    model = base.load(image_towers=not recipe.caches_features)
    before = assistant(model)
    figures: dict[str, Any] = {"base": evaluate(before, rows, questions, **options).to_json()}
    forgetting = {"before": eval_loss(before, documents, track=track)[0]} if documents else None
    tuned = assistant(open_adapter(model, folder / "adapter"))
    (folder / "predictions.html").unlink(missing_ok=True)  # it would show the previous answers
    predictions = folder / "predictions.jsonl"
    figures["tuned"] = evaluate(tuned, rows, questions, predictions=predictions, **options).to_json()
    figures["image_swap"] = None
    if len({image for images in rows.image_ids for image in images}) > 1:
        exchanged, swapped = swap_images(rows, eval_data.dialogues, questions, seed=seed)
        figures["image_swap"] = evaluate(tuned, exchanged, swapped, **options).to_json()
    if documents and forgetting:
        forgetting["after"] = eval_loss(tuned, documents, track=track)[0]
    return {**figures, "documents": forgetting}


def _document_rows(recipe: Recipe, base: Base) -> RowCollator | None:
    """Return the rows of `evaluation.documents`, or None if there are none."""
    if not recipe.evaluation or not recipe.evaluation.documents:
        return None
    sources = [resolve_source(source) for source in recipe.evaluation.documents]
    options = prepare_options(recipe.data, row_images=recipe.training.row_images, seed=recipe.training.seed)
    prepared, source_stats = prepare(sources, base.tokenizer, nodes=collectives.nodes(), **options)
    require_examples(prepared, source_stats)
    return make_eval_rows(recipe, base, prepared)
