"""The recipes that ship: they are listed with what they need, found by name, and copied to be edited."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.recipe.json_schema import EDITOR_LINE
from finetune.recipe.load import load_recipe, shipped_folder
from finetune.recipe.shipped_recipes import list_recipes, new_recipe
from modeling.errors import UserError

FOLDER = Path(__file__).parents[2] / "recipes"


def test_list_recipes():
    """Every recipe is listed, with what it does, its GPUs and its data."""
    found = {one["name"]: one for one in list_recipes()}
    assert sorted(found) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert found["quickstart"] == {
        "name": "quickstart",
        "description": "LoRA on a tiny base: after five minutes on two CPU cores it answers questions about drawn "
        "shapes, stops, and looks.",
        "gpus": None,
        "base": "tiny_base",
        "data": ["easy_vqa", "easy_vqa_captions"],
        "missing": [],
        "path": str(FOLDER / "quickstart.yaml"),
    }
    mixture = found["idefics-80b_mixture_384x80gb"]
    assert (mixture["gpus"], mixture["base"]) == ("384 x 80 GB", "HuggingFaceM4/idefics-80b")
    assert (mixture["data"], mixture["missing"]) == (["data"], [] if (FOLDER / "data").exists() else ["data"])
    assert found["tiny_base"]["base"] == "new: tiny"
    assert found["idefics-9b_qlora_1x24gb"]["data"] == ["own_data"]
    assert all(one["description"].endswith(".") for one in found.values())


def test_recipes_verb_lists_as_text_and_as_json():
    shown = CliRunner().invoke(app, ["recipes"])
    assert shown.exit_code == 0
    assert "quickstart\n  LoRA on a tiny base" in shown.stdout
    assert "GPUs: 8 x 80 GB · base: HuggingFaceM4/idefics-80b · data: own_data" in shown.stdout
    as_json = CliRunner().invoke(app, ["recipes", "--json"])
    assert json.loads(as_json.stdout) == {"recipes": list_recipes()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shipped_recipe_is_found_by_its_name_unless_a_file_has_it(here):
    assert load_recipe("quickstart").model.base == str(shipped_folder() / "tiny_base")
    assert load_recipe("quickstart").output == "runs/quickstart"
    (here / "own_data").mkdir()  # a folder is no recipe
    assert load_recipe("own_data").data.eval_split == 0.2
    (here / "quickstart").write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping"):
        load_recipe("quickstart")
    with pytest.raises(UserError, match=r"quikstart: no such recipe; did you mean quickstart, which ships\?"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match=r"quickstart.yaml: no such recipe; did you mean quickstart, which ships\?"):
        load_recipe("recipes/quickstart.yaml")
    with pytest.raises(UserError, match="xyz: no such recipe; `finetune recipes` lists some"):
        load_recipe("xyz")


def test_new_copies_a_recipe_with_what_it_needs(here):
    done = CliRunner().invoke(app, ["new", "mine", "--json"])
    assert json.loads(done.stdout) == {"recipe": "mine/mine.yaml", "from": "own_data", "missing": []}
    recipe = load_recipe("mine/mine.yaml")
    assert recipe.model.base == str(here / "mine" / "tiny_base")
    assert recipe.data.sources[0].path == (str(here / "mine" / "own_data" / "dialogues.jsonl"),)
    assert recipe.output == "runs/mine"
    text = (here / "mine" / "mine.yaml").read_text()
    assert text.startswith(EDITOR_LINE)
    assert "finetune run mine/mine.yaml" in text
    assert "recipes/" not in text
    for path in (
        "recipe.schema.json",
        "tiny_base/model.safetensors",
        "own_data/dialogues.jsonl",
        "own_data/rocket.jpg",
    ):
        assert (here / "mine" / path).read_bytes() == (FOLDER / path).read_bytes()
    assert sorted(path.name for path in (here / "mine").iterdir()) == [
        *("mine.yaml", "own_data", "recipe.schema.json", "tiny_base"),
    ]
    checked = CliRunner().invoke(app, ["check", "mine/mine.yaml", "--json"])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.yaml"))])
def test_every_recipe_can_be_copied(name, here):
    copied = new_recipe(Path("recipes/a.b"), source=name)  # the longest prefix is replaced, and once
    assert copied["recipe"] == "recipes/a.b/a.b.yaml"
    original, copy = load_recipe(FOLDER / f"{name}.yaml"), load_recipe(copied["recipe"])
    assert copy.training == original.training
    assert "finetune run recipes/a.b/a.b.yaml" in Path(copied["recipe"]).read_text()
    assert (here / "recipes" / "a.b" / "README.md").exists() == bool(copied["missing"])


def test_new_overwrites_nothing_and_leaves_nothing_half_done(here):
    (here / "mine").mkdir()
    (here / "gone").symlink_to("nowhere")
    for name, problem in {
        "mine": "mine: exists, and nothing is overwritten; choose another name",
        "gone": "gone: exists, and nothing is overwritten; choose another name",
        "mine.yaml": "mine.yaml: expected the name of a new folder, such as mine",
    }.items():
        done = CliRunner().invoke(app, ["new", name])
        assert (done.exit_code, done.stderr) == (1, f"{problem}\n")
    done = CliRunner().invoke(app, ["new", "other", "--from", "quikstart"])
    assert done.exit_code == 1
    assert re.match(r"--from: no recipe of the name 'quikstart' ships; expected one of idefics-80b_lora", done.stderr)
    (here / "new.partial").mkdir()
    (here / "new.partial" / "rest").touch()
    new_recipe(Path("new"))
    assert not (here / "new" / "rest").exists()
    assert sorted(path.name for path in here.iterdir()) == ["gone", "mine", "new"]
