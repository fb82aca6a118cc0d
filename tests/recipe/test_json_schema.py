"""The JSON schema: the one that is committed is the one that the verb prints, and it accepts what a recipe accepts."""

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from finetune.cli import app
from finetune.recipe.json_schema import EDITOR_LINE, SCHEMA_FILE, recipe_schema
from finetune.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


class Yaml12(yaml.SafeLoader):
    """Reads numbers as editors do, by YAML 1.2: 1e-4 is one."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def mistakes(text):
    document = yaml.load(text, Yaml12)
    return [
        f"{error.json_path}: {error.message}" for error in Draft202012Validator(recipe_schema()).iter_errors(document)
    ]


def test_committed_schema_is_what_the_verb_prints():
    """Where this fails: finetune schema > recipes/recipe.schema.json"""
    printed = CliRunner().invoke(app, ["schema"])
    assert printed.exit_code == 0
    assert (FOLDER / SCHEMA_FILE).read_text() == printed.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_follows_the_schema_and_points_to_it(path):
    assert path.read_text().splitlines()[0] == EDITOR_LINE
    assert mistakes(path.read_text()) == []


def test_schema_accepts_a_resolved_recipe():
    assert mistakes(load_recipe(FOLDER / "quickstart.yaml").to_yaml()) == []


def test_schema_finds_mistakes():
    text = (FOLDER / "own_data.yaml").read_text()
    assert mistakes(text.replace("epochs: 3", "epochs: 0")) == [
        "$.training.epochs: 0 is not valid under any of the given schemas"
    ]
    assert mistakes(text.replace("eval_split", "eval_spilt")) == [
        "$.data: Additional properties are not allowed ('eval_spilt' was unexpected)"
    ]
    assert mistakes(text + "adapter: {use_rslora: true}\n") == []
    assert mistakes(text + "adapter: {rnak: 8}\n") == [
        "$.adapter: Additional properties are not allowed ('rnak' was unexpected)"
    ]


def test_every_key_has_a_description():
    schema = recipe_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = {key: value for section in sections for key, value in section.get("properties", {}).items()}
    assert len(keys) > 90
    undescribed = [key for key, value in keys.items() if "description" not in value and "$ref" not in value]
    assert undescribed == []
