"""Where the paths of a recipe lead: those in its file, those given as key=value, and those at home."""

import shutil

import pytest
from typer.testing import CliRunner

from finetune.cli import _expand_home, app
from finetune.recipe.load import absolute_paths, load_recipe
from modeling.errors import UserError

RECIPE = """
model: {base: base, continue_from: adapter}
data:
  sources:
    - {path: [a.jsonl, ~/b.jsonl, /c/d.jsonl, 's/*/[ab].jsonl'], image_root: ../images, columns: {path: where}}
    - {hub: local}
    - {hub: owner/name}
  eval_sources: [{path: held.jsonl}]
  max_length: 64
  prepared: ~/prepared
training: {steps: 1, row_tokens: 64}
evaluation: {documents: [{path: docs.txt}]}
output: ~/runs/x
"""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """recipes/r.yaml, and a command given in here/."""
    for folder in ("recipes/base", "recipes/local", "here/base", "home", "images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "recipes" / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_paths_of_the_file(places):
    recipe = load_recipe(places / "recipes" / "r.yaml")
    recipes, first, home = places / "recipes", recipe.data.sources[0], places / "home"
    names = [recipes / "a.jsonl", home / "b.jsonl", "/c/d.jsonl", recipes / "s/*/[ab].jsonl"]
    assert first.path == tuple(map(str, names))
    assert first.image_root == (str(places / "images"),)
    assert first.columns == {"path": "where"}
    assert [source.hub for source in recipe.data.sources[1:]] == [str(recipes / "local"), "owner/name"]
    assert recipe.data.eval_sources[0].path == (str(recipes / "held.jsonl"),)
    assert recipe.evaluation.documents[0].path == (str(recipes / "docs.txt"),)
    assert (recipe.model.base, recipe.model.continue_from) == (str(recipes / "base"), str(recipes / "adapter"))
    assert (recipe.output, recipe.data.prepared) == (str(home / "runs/x"), str(home / "prepared"))


@pytest.mark.parametrize(
    ("override", "found", "expected"),
    [
        ("data.sources.0.path=x.jsonl", lambda recipe: recipe.data.sources[0].path, ("here/x.jsonl",)),
        ("data.sources.0.path.1=x.jsonl", lambda recipe: recipe.data.sources[0].path[1:2], ("here/x.jsonl",)),
        ("data.sources.0.path.1=x.jsonl", lambda recipe: recipe.data.sources[0].path[:1], ("recipes/a.jsonl",)),
        ("data.sources.0.path=[../x, ~/y]", lambda recipe: recipe.data.sources[0].path, ("x", "home/y")),
        ("data.sources.0.image_root=x", lambda recipe: recipe.data.sources[0].image_root, ("here/x",)),
        ("data.sources=[{path: 's/*/d.jsonl'}]", lambda recipe: recipe.data.sources[0].path, ("here/s/*/d.jsonl",)),
        ("data.eval_sources=[{path: x}]", lambda recipe: recipe.data.eval_sources[0].path, ("here/x",)),
        ("evaluation={documents: [{path: x}]}", lambda recipe: recipe.evaluation.documents[0].path, ("here/x",)),
        ("evaluation.documents.0.path=x", lambda recipe: recipe.evaluation.documents[0].path, ("here/x",)),
        ("model.base=base", lambda recipe: (recipe.model.base,), ("here/base",)),
        ("model={base: base}", lambda recipe: (recipe.model.base,), ("here/base",)),
        ("model.continue_from=x", lambda recipe: (recipe.model.continue_from,), ("here/x",)),
    ],
)
def test_paths_of_an_override(override, found, expected, places):
    """They are relative to the current folder."""
    recipe = load_recipe(places / "recipes" / "r.yaml", [override])
    assert found(recipe) == tuple(str(places / path) for path in expected)


def test_overrides_without_paths(places):
    overrides = ["data.sources.0.columns={path: x}", "output=runs/y", "data.prepared=prepared", "model.base=owner/name"]
    recipe = load_recipe(places / "recipes" / "r.yaml", overrides)
    assert recipe.data.sources[0].columns == {"path": "x"}
    assert (recipe.output, recipe.data.prepared, recipe.model.base) == ("runs/y", "prepared", "owner/name")


def test_recipe_moves_with_its_folder(places):
    shutil.copytree(places / "recipes", places / "elsewhere")
    recipe = load_recipe(places / "elsewhere" / "r.yaml")
    assert recipe.data.sources[0].path[0] == str(places / "elsewhere" / "a.jsonl")


def test_path_of_a_link(places):
    (places / "recipes" / "d.jsonl").symlink_to(places / "here" / "e.jsonl")
    (places / "recipes" / "linked").symlink_to(places / "here")
    keys = ("data", "sources", "path")
    assert absolute_paths(["d.jsonl", "linked/e.jsonl", "..", "."], keys, places / "recipes") == [
        str(places / "recipes" / "d.jsonl"),
        str(places / "here" / "e.jsonl"),
        str(places),
        str(places / "recipes"),
    ]


@pytest.mark.parametrize("value", [7, None, True, "", [[1]], {"path": 3}, {3: "x"}, "~nobody-of-that-name/x"])
def test_values_that_are_no_paths(value, places):
    found = absolute_paths(value, ("data", "sources", "path"), places)
    assert found == (str(places / value) if isinstance(value, str) and value else value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["check", "~/none.yaml"], "home/none.yaml: no such recipe"),
        (["merge", "--out=~/file/merged", "--base", "b", "~/adapter"], "home/"),
        (["check", "~other"], "~other: no such recipe"),
    ],
)
def test_home_on_the_command_line(arguments, named, places):
    (places / "home" / "file").write_text("")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert (str(places / named) if named.startswith("home") else named) in done.output.replace("\n", "")


def test_home_in_other_arguments():
    assert [_expand_home(text) for text in ("~5 m?", "a~/b", "training.x=~/y", "--", "-~/x")] == [
        "~5 m?",
        "a~/b",
        "training.x=~/y",
        "--",
        "-~/x",
    ]


def test_path_in_a_loop_of_links(places):
    (places / "recipes" / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        load_recipe(places / "recipes" / "r.yaml", [f"data.sources.0.path={places}/recipes/loop/x"])
