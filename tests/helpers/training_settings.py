"""Training sections for tests, without a recipe around them."""

from typing import Any

from finetune.recipe.schema import Training


def training(rows_per_step: int = 1, **settings: Any) -> Training:
    """At a constant rate, with checkpoints only where a test asks for them; the rows decide how long it takes."""
    size = {"steps": 1, "row_tokens": 1, "tokens_per_step": rows_per_step}
    return Training(**{"schedule": "constant", "learning_rate": 1e-2, "checkpoint_every": 100, **size, **settings})
