"""The command itself: help, versions, completion; what it imports is test_layout's."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune import __version__
from finetune.cli import app

ROOT = Path(__file__).parents[1]
VERBS = {command.callback.__name__: command for command in app.registered_commands}


def test_version_names_the_toolkit_and_its_libraries():
    done = CliRunner().invoke(app, ["--version"])
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert (done.exit_code, lines["finetune"]) == (0, __version__)
    for library in ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets"):
        assert lines[library] == version(library)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_of_itself(verb):
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    assert f"Example: finetune {verb} " in " ".join(done.stdout.split()) + " "
    assert VERBS[verb].callback.__doc__.splitlines()[0].endswith((".", ";", ","))


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"schema"}))
def test_every_verb_can_print_json(verb):
    assert "--json" in CliRunner().invoke(app, [verb, "--help"]).stdout


def test_help_tells_every_status():
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", CliRunner().invoke(app, ["--help"]).stdout).split())
    assert "Status: 0 done, 1 an error, 2 a wrong command line, 3 plan: does not fit, 4 generate: not all" in shown


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("finetune ev", ["evaluate"]),
        ("finetune run quick", ["quickstart"]),
        ("finetune check recipes/own", ["recipes/own_data/", "recipes/own_data.yaml"]),
        ("finetune run quickstart training.le", ["training.learning_rate="]),
        ("finetune run quickstart tr", ["training."]),
        ("finetune run quickstart data.sources.0.lim", ["data.sources.0.limit="]),
        ("finetune run quickstart nothing.x", []),
    ],
)
def test_shell_completion(typed, completed):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_FINETUNE_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", "from finetune.cli import app; app(prog_name='finetune')"],
        env={"PYTHONPATH": str(ROOT), "PATH": "", **words},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (completed, "")


def test_merge_takes_the_name_of_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["merge", "own_data", "--out", "x"])
    assert (done.exit_code, done.stderr) == (1, "--out: not with a recipe; give the run's folder instead\n")


def test_chat_prints_json_for_one_question_alone(base_folder):
    done = CliRunner().invoke(app, ["chat", str(base_folder), "what is it?", "--max-new-tokens", "2", "--json"])
    assert json.loads(done.stdout).keys() == {"answer"}
    done = CliRunner().invoke(app, ["chat", str(base_folder), "--json"])
    assert (done.exit_code, done.stderr) == (1, "--json: prints one answer; expected a QUESTION with it\n")
