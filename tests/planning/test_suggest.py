"""The cheapest change that makes a recipe fit."""

from functools import partial

import pytest
from planned import GIB, recipe_of

from finetune.planning.estimate import plan
from finetune.planning.suggest import Change, apply_change, cheapest_changes
from finetune.recipe.load import load_recipe


def test_shard_is_suggested_for_several_gpus():
    recipe = recipe_of(model={"base": "HuggingFaceM4/idefics-80b"}, training={"tokens_per_step": 16 * 2048})
    assert "training.parallel=fsdp2" in plan(recipe, gpu="80GB", processes=8)["gpu"]["change"]
    alone = plan(recipe, gpu="80GB")["gpu"]["change"]
    assert [change.split("=")[0] for change in alone] == ["training.checkpointing", "model.quantize"]


def test_9b_in_24_gib_needs_checkpointing_only():
    gpu = plan(recipe_of(), gpu="24GiB")["gpu"]
    assert (gpu["bytes"], gpu["fits"]) == (24 * GIB, False)
    ((key, layers),) = (change.split("=") for change in gpu["change"])
    assert key == "training.checkpointing"
    assert gpu["changed"]["gpu"] <= 24 * GIB < gpu["needed"]
    fewer = recipe_of(training={"checkpointing": int(layers) - 1})
    assert not plan(fewer, gpu="24GiB")["gpu"]["fits"]


def test_no_change_where_the_recipe_fits():
    gpu = plan(recipe_of(), gpu="80GiB")["gpu"]
    assert (gpu["fits"], gpu["change"], gpu["changed"]) == (True, None, None)


@pytest.mark.parametrize("gib", [12, 16, 20, 24, 28, 32])
def test_change_makes_it_fit_as_overrides(gib, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of().to_yaml())
    change = plan(load_recipe(path), gpu=f"{gib}GiB")["gpu"]["change"]
    assert change
    assert plan(load_recipe(path, change), gpu=f"{gib}GiB")["gpu"]["fits"]


def test_no_change_where_none_helps():
    gpu = plan(recipe_of(model={"base": "HuggingFaceM4/idefics-80b"}), gpu="16GiB")["gpu"]
    assert (gpu["fits"], gpu["change"]) == (False, None)


def cheapest_change(recipe, fits):
    return next(iter(cheapest_changes(recipe, fits, layers=32)), None)


def test_cheapest_change_first_then_pairs():
    recipe = recipe_of()
    cheapest = partial(cheapest_change, recipe)
    assert cheapest(lambda changed: True).overrides == ["training.row_tokens=1024"]
    pair = cheapest(lambda changed: changed.training.checkpointing is True and changed.model.quantize == "nf4")
    assert pair.overrides == ["training.checkpointing=true", "model.quantize=nf4"]
    assert cheapest(lambda changed: False) is None


@pytest.mark.parametrize("needed", [1, 7, 31, 32])
def test_checkpointing_in_as_few_layers_as_are_enough(needed):
    def fits(changed):
        kept = changed.training.checkpointing
        return kept is True or kept >= needed

    change = cheapest_change(recipe_of(training={"row_tokens": 128}, data={"max_length": 128}), fits)
    assert change.overrides == [f"training.checkpointing={'true' if needed == 32 else needed}"]


def test_no_change_contains_a_cheaper_one():
    recipe = recipe_of(training={"row_tokens": 1024, "checkpointing": 4})

    def fits(changed):
        return changed.training.row_tokens < 1024 or changed.model.quantize == "nf4"

    changes = cheapest_changes(recipe, fits, layers=32, number=3)
    assert [change.overrides for change in changes] == [["training.row_tokens=512"], ["model.quantize=nf4"]]
    assert changes[0].price < changes[1].price


@pytest.mark.parametrize(
    ("training", "model", "changed"),
    [
        ({}, {}, ["training.parallel=fsdp2"]),
        ({"optimizer": "adamw_8bit"}, {}, ["training.parallel=fsdp2", "training.optimizer=adamw"]),
        ({}, {"quantize": "nf4"}, None),
    ],
)
def test_shard_with_several_processes_and_no_nf4(training, model, changed):
    recipe = recipe_of(training=training, model=model)

    def divided(changed):
        return changed.training.parallel == "fsdp2"

    found = cheapest_changes(recipe, divided, layers=32, may_shard=True)
    assert [change.overrides for change in found] == ([changed] if changed else [])
    assert cheapest_changes(recipe, divided, layers=32) == []


def test_rows_shorter_than_examples_shorten_examples():
    recipe = recipe_of(data={"max_length": 2048})
    change = cheapest_change(recipe, lambda changed: changed.training.row_tokens == 512)
    assert change.overrides == ["training.row_tokens=512", "data.max_length=512"]


def test_apply_change_that_contradicts_the_recipe():
    full = recipe_of(model={"decoder": "full"})
    assert apply_change(full, Change(2, {"model.quantize": "nf4"})) is None
    assert apply_change(recipe_of(), Change(2, {"model.quantize": "nf4"})).model.quantize == "nf4"
