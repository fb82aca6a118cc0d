"""README's commands are executed, its code runs, its recipe parses, and its figures are those of the measured run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import yaml
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.formats import FORMATS
from finetune.recipe import schema as recipe
from finetune.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


def invoke(*arguments):
    outcome = CliRunner().invoke(app, list(map(str, arguments)))
    assert outcome.exit_code == 0, outcome.output
    return outcome


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """The run folder of README's second command line, in fewer steps."""
    output = tmp_path_factory.mktemp("readme") / "own_data"
    settings = [f"output={output}", f"data.prepared={output.parent}", "training.epochs=null", "training.steps=2"]
    invoke("run", ROOT / "recipes" / "own_data.yaml", *settings)
    return output


def test_every_command_is_known_here():
    """A new command in README needs a line here that runs it."""
    assert COMMANDS == [
        "scripts/quickstart.sh",  # test_the_quickstart_s_script_runs_the_quickstart_s_recipe
        "source .venv/bin/activate",  # puts finetune on the path
        # test_the_chat_line_answers
        'finetune chat runs/quickstart/merged --image recipes/own_data/horse.jpg "what shape is in the image?"',
        "finetune check recipes/own_data.yaml",  # test_check
        "finetune prepare recipes/own_data.yaml",  # test_prepare
        "finetune inspect recipes/own_data.yaml --html own_data.html",  # test_inspect
        "finetune run recipes/own_data.yaml",  # own_data
        # test_the_line_for_two_processes
        "finetune run recipes/own_data.yaml --processes 2",
        "scripts/test.sh",  # this is running
    ]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_the_line_that_changes_a_key_changes_it_in_every_recipe(name):
    (line,) = re.findall(r"`finetune run RECIPE (.*?)`", README)
    assert line == "training.steps=50 output=runs/short"
    recipe = load_recipe(ROOT / "recipes" / name, line.split())
    assert (recipe.training.steps, recipe.training.epochs, recipe.output) == (50, None, "runs/short")


def command(verb):
    (line,) = [line for line in COMMANDS if line.startswith(f"finetune {verb} ")]
    return shlex.split(line)[1:]


@pytest.mark.slow
def test_the_line_for_two_processes(tmp_path):
    line = shlex.split(next(line for line in COMMANDS if line.endswith("--processes 2")))
    settings = [f"output={tmp_path / 'run'}", f"data.prepared={tmp_path / 'prepared'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *line, *settings, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["train"]["steps"], done.stderr.count("parameters")) == (3, 1)  # one process speaks
    assert "LOAD REPORT" not in done.stderr  # transformers' trainer lets all processes but the first speak again
    assert result["merge"]["answers"] == result["merge"]["same_answers"] > 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint-3").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]


def test_check():
    verb, recipe = command("check")
    assert "What animal is this?" in re.sub(r"[│\s]+", " ", invoke(verb, ROOT / recipe).output)


def test_prepare(tmp_path):
    verb, recipe = command("prepare")
    invoke(verb, ROOT / recipe, f"data.prepared={tmp_path}")
    assert "10" in (tmp_path / "own_data" / "README.md").read_text()


def test_inspect(tmp_path):
    verb, recipe, option, page = command("inspect")
    invoke(verb, ROOT / recipe, f"data.prepared={tmp_path}", option, tmp_path / page)
    assert "What animal is this?" in re.sub(r"<[^>]*>", "", (tmp_path / page).read_text())


def test_every_format_is_listed_with_a_line_that_selects_it():
    lines = re.findall(r"^\| .*? \| `(\{format: .*\})` \|$", README, re.MULTILINE)
    sources = [recipe.Source.model_validate(yaml.safe_load(line)) for line in lines]
    assert {source.format for source in sources} == set(FORMATS)


def test_the_fields_shown_are_those_that_formats_read():
    (block,) = re.findall(r"^  ```\n(  IMAGE  .*?)^  ```", README, re.MULTILINE | re.DOTALL)
    joined = re.sub(r"\n {9,}", lambda match: " ", block).replace("| ", "|")
    shown = dict(line.split(maxsplit=1) for line in joined.splitlines())
    words = [(word, shown.pop(word)) for word in ("IMAGE", "CAPTION")]
    for word, names in words:
        shown = {name: fields.replace(word, names) for name, fields in shown.items()}
    assert shown == {name: ", ".join(family.reads) for name, family in FORMATS.items() if family.reads}


def test_the_quickstart_s_script_runs_the_quickstart_s_recipe(tmp_path):
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    (line,) = [line for line in script.splitlines() if line.startswith("exec")]
    assert line == 'exec .venv/bin/finetune run recipes/quickstart.yaml "$@"'
    overrides = ["training.steps=2", "evaluation.limit=8", "data.sources.0.limit=60", "data.eval_sources.0.limit=20"]
    overrides += [
        "evaluation.documents.0.limit=10",
        f"output={tmp_path / 'run'}",
        f"data.prepared={tmp_path}",
        "--json",
    ]
    result = json.loads(invoke("run", ROOT / "recipes" / "quickstart.yaml", *overrides).stdout)
    assert result["train"]["steps"] == 2
    assert result["evaluate"]["image_swap"]["questions"] == 8


def test_the_chat_line_answers(own_data):
    verb, _, option, image, question = command("chat")
    assert invoke(verb, own_data / "merged", question, option, ROOT / image).stdout.strip()


def test_the_python_code_runs_on_the_merged_model(own_data, capsys):
    (code,) = blocks("python")
    assert code.count("runs/own_data/merged") == 2
    with PIL.Image.open(ROOT / "recipes" / "own_data" / "chelsea.jpg") as image:
        exec(code.replace("runs/own_data/merged", str(own_data / "merged")), {"image": image.convert("RGB")})
    assert "What animal is this?" in capsys.readouterr().out


def test_the_recipe_shown_is_a_recipe(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "shown.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "shown.yaml")
    assert recipe.training.rows_per_step == 32


def test_the_dialogue_shown_is_the_first_of_the_example():
    (shown,) = map(json.loads, blocks("json"))
    first = json.loads((ROOT / "recipes" / "own_data" / "dialogues.jsonl").read_text().splitlines()[0])
    assert shown["messages"] == first["messages"][:2]


def test_the_run_folder_shown_is_what_a_run_leaves(own_data):
    (tree,) = re.findall(r"```\nruns/NAME/\n(.*?)```", README, re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    left = {re.sub(r"checkpoint-\d+", "checkpoint-*", path.name) for path in own_data.iterdir()}
    assert left <= named
    # only where the recipe has init, where auto_fit changed it, where a step went wrong
    assert named - left == {"base", "auto_fit.json", "unstable.jsonl"}


def test_every_recipe_and_every_verb_is_listed():
    listed = set(re.findall(r"^\| `([\w.-]+\.yaml)`", README, re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    verbs = {command.callback.__name__ for command in app.registered_commands}
    assert all(re.search(rf"`(finetune )?{verb}\b", README) for verb in verbs)


def test_the_figures_are_those_of_the_measured_run():
    """recipes/quickstart.result.json is the result.json of the run whose output README shows."""
    result = json.loads((ROOT / "recipes" / "quickstart.result.json").read_text())
    rows = re.findall(r"^│ (\S.*?) │ +(\S+) │ +(\S+) │ +(\S+) │$", README, re.MULTILINE)
    shown = {name.strip(): [float(value.replace(",", "")) for value in values] for name, *values in rows}
    keys = {
        "open questions, exact": "exact_open",
        "yes/no questions, balanced, exact": "exact_yes_no",
        "all questions, exact": "exact",
        "all questions, first word": "first_word",
        "stopped by itself": "eos_rate",
        "loss per supervised token": "loss",
        "questions": "questions",
    }
    assert shown.keys() == keys.keys()
    for name, key in keys.items():
        measured = [result["evaluate"][model][key] for model in ("base", "tuned", "image_swap")]
        assert shown[name] == pytest.approx(measured, rel=1e-3)  # shown to four digits
