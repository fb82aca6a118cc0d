"""A recipe on a small base and twelve dialogues."""

import pytest
from planned import recipe_of


@pytest.fixture
def recipe_file(dialogue_folder, base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(
        model={"base": str(base_folder)},
        data={"sources": [{"format": "messages", "path": str(dialogue_folder / "dialogues.jsonl")}], "max_length": 512},
        training={"steps": None, "epochs": 3, "row_tokens": 512, "row_images": 4, "tokens_per_step": 1024},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return path
