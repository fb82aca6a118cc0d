"""Recipes: what is read, and how every mistake is told."""

import dataclasses

import peft
import pytest
import yaml

from finetune.recipe import LORA_FIELDS
from finetune.recipe_file import load_recipe
from modeling.errors import UserError

MINIMAL = """
model: {base: HuggingFaceM4/idefics-9b}
data: {sources: [{format: easy_vqa}]}
training: {epochs: 1}
"""


def written(tmp_path, text=MINIMAL, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def problems(path, *overrides):
    with pytest.raises(UserError) as raised:
        load_recipe(path, list(overrides))
    return str(raised.value).splitlines()


def test_a_minimal_recipe_trains_both_text_towers_with_lora_and_keeps_the_rest_frozen(tmp_path):
    recipe = load_recipe(written(tmp_path))
    assert recipe.model.modes == {
        "vision": "frozen",
        "resampler": "frozen",
        "cross_attention": "lora",
        "decoder": "lora",
        "gates": "full",
        "added_tokens": "full",
        "embeddings_and_head": "frozen",
    }
    assert recipe.adapter.lora == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    assert recipe.output == "runs/mine"
    assert recipe.evaluation is None


def test_overrides_are_yaml_and_reach_into_lists(tmp_path):
    overrides = ["training.epochs=null", "training.steps=7", "data.sources.0.limit=3", "training.learning_rate=1e-4"]
    recipe = load_recipe(written(tmp_path), overrides)
    assert (recipe.training.epochs, recipe.training.steps) == (None, 7)
    assert recipe.data.sources[0].limit == 3
    assert recipe.training.learning_rate == 1e-4


def test_all_errors_come_at_once_each_with_its_place_what_was_got_and_the_nearest_key(tmp_path):
    path = written(tmp_path)
    assert problems(
        path,
        "model.visoin=full",
        "model.decoder=lorra",
        "data.sources.0.fromat=x",
        "training.learning_rate=fast",
        "adapter.rnak=8",
        "modle=1",
        "nonsense",
    ) == [
        f"{path}: 7 errors",
        "  'nonsense': expected key=value, such as training.steps=10",
        "  model.decoder: input should be 'frozen', 'lora' or 'full', got 'lorra' (str); did you mean lora?",
        "  model.visoin: unknown key; did you mean vision?",
        "  adapter: rnak: unknown key; did you mean rank?",
        "  data.sources.0.fromat: unknown key; did you mean format?",
        "  training.learning_rate: input should be a valid number, unable to parse string as a number, "
        "got 'fast' (str)",
        "  modle: unknown key; did you mean model?",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.init=tiny", "model: expected either base (a folder or hub id) or init (a shape), got both"),
        ("model.base=null", "model: expected either base (a folder or hub id) or init (a shape), got neither"),
        ("training.steps=3", "training: expected either epochs or steps, got both"),
        ("training.early_stop=2", "training: early_stop needs evaluate_every"),
        ("training.final_learning_rate=1", "training: final_learning_rate must be below learning_rate (0.0002)"),
        (
            "data.max_length=4096",
            "recipe: data.max_length (4096) must not exceed training.row_tokens (2048): a dialogue is never cut",
        ),
        (
            "evaluation={}",
            "recipe: evaluation needs held-out data: set data.eval_sources or data.eval_split",
        ),
        ("data.sources.0.format=messages", "data.sources.0: format messages needs a path"),
        ("data.sources=[]", "data.sources: list should have at least 1 item after validation, not 0, got [] (list)"),
        ("adapter.r=4", "adapter: r is set by rank"),
        ("adapter.target_modules=all-linear", "adapter: target_modules is set by the towers under model"),
        ("adapter.bias=all", "adapter: bias: 'all' could not be merged exactly; expected one of ('none',)"),
        ("data.sources.3.limit=1", "'data.sources.3.limit=1': the recipe has no data.sources.3.limit to set"),
        ("training.seed=[", "'training.seed=[': the value is not YAML"),
    ],
)
def test_one_mistake(tmp_path, override, problem):
    path = written(tmp_path)
    assert problems(path, override) == [f"{path}: 1 error", f"  {problem}"]


def test_weights_are_for_every_source_or_for_none(tmp_path):
    path = written(
        tmp_path, MINIMAL.replace("[{format: easy_vqa}]", "[{format: easy_vqa, weight: 2}, {format: easy_vqa}]")
    )
    assert problems(path)[1:] == ["  data: expected a weight for every source or for none, got 1 of 2"]


def test_everything_frozen_is_no_training(tmp_path):
    off = [f"model.{tower}=frozen" for tower in ("cross_attention", "decoder", "gates", "added_tokens")]
    assert problems(written(tmp_path), *off)[1:] == [
        "  model: everything is frozen: expected at least one tower to be lora or full"
    ]


def test_a_key_given_twice_is_an_error(tmp_path):
    (line,) = [line for line in problems(written(tmp_path, MINIMAL + "training: {steps: 5}\n")) if "twice" in line]
    assert "'training' is there twice" in line


def test_what_is_not_a_recipe(tmp_path):
    assert "expected a mapping" in problems(written(tmp_path, "- 1\n"))[0]
    assert "not YAML" in problems(written(tmp_path, "model: [\n"))[0]
    assert "did you mean" in problems(tmp_path / "mien.yaml")[0]


def test_other_lora_fields_pass_through(tmp_path):
    recipe = load_recipe(written(tmp_path), ["adapter.use_rslora=true"])
    assert recipe.adapter.lora["use_rslora"] is True


def test_the_literal_list_of_lora_fields_is_peft_s():
    ours = {"r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"}
    peft_s_own = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"}
    peft_s_own |= {"revision", "inference_mode"}
    assert set(LORA_FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)} - ours - peft_s_own


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "base").mkdir()
    text = MINIMAL.replace("HuggingFaceM4/idefics-9b", "base").replace(
        "{format: easy_vqa}", "{format: messages, path: data/a.jsonl, image_root: ../images}"
    )
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.model.base == str(tmp_path / "base")
    assert recipe.data.sources[0].path == str(tmp_path / "data" / "a.jsonl")
    assert recipe.data.sources[0].image_root == str(tmp_path.parent / "images")


def test_the_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe(written(tmp_path))
    again = load_recipe(written(tmp_path, recipe.to_yaml(), "again.yaml"))
    assert again == recipe
    assert yaml.safe_load(recipe.to_yaml())["training"]["betas"] == [0.9, 0.999]


def test_packs_per_step_rounds(tmp_path):
    recipe = load_recipe(written(tmp_path), ["training.row_tokens=2048", "training.tokens_per_step=5200"])
    assert recipe.training.packs_per_step == 3
