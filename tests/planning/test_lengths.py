"""Rows of prepared data, and full rows without it."""

from pathlib import Path

from sources import make_source

from finetune.data.dataset import prepare_options
from finetune.data.prepare import prepare
from finetune.planning.estimate import plan
from finetune.recipe.load import load_recipe
from modeling.loading import load_processor


def test_rows_are_full_without_prepared_data(recipe_file, tmp_path):
    """A plan writes nothing."""
    made = plan(load_recipe(recipe_file), gpu="1GiB")
    assert made["row"] == {"tokens": 512, "supervised": 511, "images": 4, "from": "full rows"}
    assert (made["steps"], made["rows_per_step"], made["tokens_per_step"]) == (None, 2, 1024)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_prepared_lengths_equal_those_of_a_run(recipe_file, base_folder, make_rows):
    """A recipe whose data is prepared differently finds none of them."""
    recipe = load_recipe(recipe_file)
    source = make_source("messages", paths=tuple(map(Path, recipe.data.sources[0].path)))
    options = prepare_options(recipe.data, row_images=recipe.training.row_images, seed=recipe.training.seed)
    prepared, _ = prepare([source], load_processor(str(base_folder)).tokenizer, **options)
    made = plan(recipe, gpu="1GiB")
    rows = make_rows(rows_per_step=2)
    real = [rows.at(number) for number in range(len(rows))]
    assert made["row"] == {
        "tokens": max(batch["input_ids"].shape[1] for batch in real),
        "supervised": max(int((batch["labels"] >= 0).sum()) for batch in real),
        "images": max(sum(prepared.image_counts[list(row.examples)]) for row in rows.rows),
        "from": "prepared data",
    }
    assert made["steps"] == 3 * len(rows) // 2
    sets = sorted(Path(recipe.data.prepared).iterdir())
    changed = plan(load_recipe(recipe_file, ["data.max_length=256"]), gpu="1GiB")
    assert (changed["row"]["from"], changed["steps"]) == ("full rows", None)
    assert sorted(Path(recipe.data.prepared).iterdir()) == sets
