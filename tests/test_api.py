"""The Python API: `import finetune` is cheap, and its functions return what the verbs print with --json."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import finetune
from finetune.cli import app

ROOT = Path(__file__).parents[1]
FUNCTIONS = ["load_recipe", "check", "plan", "prepare", "run", "train", "evaluate", "merge", "load_assistant"]


def modules_after(code):
    """Return the modules that are loaded after some lines, without those that Python itself needs to start."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_else():
    loaded = modules_after("import finetune\nassert 'run' in dir(finetune)")
    assert {name.split(".")[0] for name in loaded} <= {"finetune", "typing", "_typing", "collections"}
    assert {name for name in loaded if name.startswith("finetune")} == {"finetune"}


def test_a_recipe_is_loaded_without_torch():
    loaded = modules_after("import finetune\nfinetune.load_recipe('quickstart')\nfinetune.check")
    assert "finetune.planning.check" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "peft", "trl"}


def test_names_are_functions_with_types_and_help():
    assert set(FUNCTIONS) < set(finetune.__all__)
    for name in finetune.__all__:
        value = getattr(finetune, name)
        assert inspect.getdoc(value), name
        if name in FUNCTIONS:
            signature = inspect.signature(value)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values()), name
    with pytest.raises(AttributeError, match="module 'finetune' has no attribute 'trian'"):
        finetune.trian  # noqa: B018


def test_static_imports_name_the_same_modules():
    """What type checkers read is what __getattr__ imports."""
    source = (ROOT / "finetune" / "__init__.py").read_text()
    found = re.findall(r"^    from ([\w.]+) import (\w+) as \2$", source, re.MULTILINE)
    assert {name: module for module, name in found} == finetune._MODULES


def test_check_and_plan_return_what_the_verbs_print(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb, function in (("check", finetune.check), ("plan", finetune.plan)):
        printed = CliRunner().invoke(app, [verb, "own_data", "--json"])
        assert json.loads(printed.stdout) == json.loads(json.dumps(function(finetune.load_recipe("own_data"))))


def test_prepare_run_and_ask(recipe_file, tmp_path, dialogue_folder, capsys):
    """The stages of a recipe, one after the other, then all at once; and a question to the result."""
    recipe = finetune.load_recipe(recipe_file, ["training.steps=2"])
    assert finetune.prepare(recipe)["sources"][0]["read"] == 12
    assert finetune.train(recipe)["train"]["steps"] == 2
    assert "tuned" in finetune.evaluate(recipe)["evaluate"]
    merged = finetune.merge(recipe)["merge"]
    assert merged["merged"] == str(tmp_path / "run" / "merged")
    assert finetune.run(recipe).keys() == {"data", "train", "evaluate", "merge"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()).keys() == finetune.run(recipe).keys()
    chat = finetune.Conversation(finetune.load_assistant(merged["merged"]), max_new_tokens=4)
    chat.show(str(dialogue_folder / "red.png"))
    assert isinstance(chat.ask("what color is it?"), str)
    assert capsys.readouterr().out == ""  # results are returned; messages go to stderr
    with pytest.raises(finetune.UserError, match="neither a folder here nor a hub id"):
        finetune.run(finetune.load_recipe(recipe_file, ["model.base=/nowhere", "output=x"]))
