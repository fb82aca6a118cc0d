"""What README and docs/ say is so: commands are executed as they stand, code runs, recipes parse, names are real."""

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
from make_docs import PAGES
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.formats import FORMATS
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Source
from finetune.reporting.summary import SCORES

ROOT = Path(__file__).parents[2]
TEXTS = {page: page.read_text() for page in [*PAGES, ROOT / "CONTRIBUTING.md"]}


def blocks(language):
    """(page, block) of every block of a language."""
    found = [
        (page, block)
        for page, text in TEXTS.items()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    assert found
    return found


LINES = (line for _, block in blocks("sh") for line in block.replace("\\\n", "").splitlines())
COMMANDS = list(dict.fromkeys(line for line in LINES if line.strip()))

NOT_RUN = {
    "finetune run quickstart": "test_quickstart_script_runs_its_recipe",
    "finetune run recipes/own_data.yaml --processes 2": "test_two_processes",
    "scripts/test.sh": "this is running",
    "scripts/test.sh --cov": "the same",
    'scripts/test.sh -m "not slow" -n 0': "the same",
    "finetune run my9b/my9b.yaml": "needs the hub and a GPU",
}
"""Line -> why it is not executed here, or which test does it."""

NOT_RUN_PROGRAMS = {
    "python": "makes a virtual environment, or runs a script for minutes",
    "source": "puts finetune on the path",
    "pip": "installs",
    "pre-commit": "installs",
    "accelerate": "tests/distributed/test_launcher.py starts it",
    "sbatch": "needs Slurm; tests/distributed/test_launcher.py has stand-ins for scripts/train.slurm",
    "img2dataset": "downloads from the web",
}

STATUS = {"finetune plan recipes/idefics-9b_lora_1x80gb.yaml --gpu 24GiB": 3}
"""Exit status of a line where it is not 0."""

EXECUTED = [line for line in COMMANDS if line not in NOT_RUN and line.split()[0] not in NOT_RUN_PROGRAMS]

SHORT = ["training.epochs=null", "training.steps=2"]


def invoke(*arguments, status=0):
    outcome = CliRunner().invoke(app, list(map(str, arguments)))
    assert outcome.exit_code == status, outcome.output
    return outcome


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with recipes/, a file of prompts and a short run of own_data.yaml; lines are executed in it in order."""
    folder, here = tmp_path_factory.mktemp("home"), Path.cwd()
    (folder / "recipes").symlink_to(ROOT / "recipes")
    prompt = json.loads((ROOT / "recipes" / "own_data" / "dialogues.jsonl").read_text().splitlines()[0])
    prompt["messages"] = prompt["messages"][:1]
    prompt["messages"][0]["content"][0]["image"] = str(ROOT / "recipes" / "own_data" / "chelsea.jpg")
    (folder / "chelsea.jpg").write_bytes((ROOT / "recipes" / "own_data" / "chelsea.jpg").read_bytes())
    prompt["messages"][0]["content"][0]["image"] = "chelsea.jpg"
    (folder / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    os.chdir(folder)
    try:
        invoke("run", "recipes/own_data.yaml", *SHORT)
    finally:
        os.chdir(here)
    for name in ("quickstart", "mine"):
        (folder / "runs" / name).mkdir()
        (folder / "runs" / name / "merged").symlink_to(folder / "runs" / "own_data" / "merged")
    return folder


def test_lines_that_are_not_executed_are_there():
    assert [line for line in NOT_RUN if line not in COMMANDS and not line.startswith("scripts/test.sh")] == []
    assert len(EXECUTED) >= 10


@pytest.mark.parametrize("line", EXECUTED)
def test_command(line, home, monkeypatch):
    monkeypatch.chdir(home)
    program, *arguments = shlex.split(line)
    assert program == "finetune"
    if {"recipes/own_data.yaml", "mine/mine.yaml"} & set(arguments):
        arguments += SHORT
        arguments += ["output=runs/mine_again"] if "mine/mine.yaml" in arguments else []
    outcome = invoke(*arguments, status=STATUS.get(line, 0))
    assert outcome.stdout or outcome.stderr
    for option in ("--html", "--out", "--picture"):
        if option in arguments:
            assert Path(arguments[arguments.index(option) + 1]).exists()


def test_check_shows_the_first_dialogue(home, monkeypatch):
    monkeypatch.chdir(home)
    shown = invoke("check", "recipes/own_data.yaml").output
    assert "What animal is this?" in re.sub(r"[│\s]+", " ", shown)


def test_generate_answers_the_prompts(home, monkeypatch):
    monkeypatch.chdir(home)
    invoke("generate", "runs/own_data", "prompts.jsonl", "answers.jsonl")
    (line,) = (home / "answers.jsonl").read_text().splitlines()
    assert isinstance(json.loads(line)["answer"], str)


@pytest.mark.slow
def test_two_processes(tmp_path):
    line = shlex.split(next(line for line in COMMANDS if line.endswith("own_data.yaml --processes 2")))
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


def test_quickstart_script_runs_its_recipe(tmp_path):
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


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: getattr(value, "stem", ""))
def test_python_runs(page, code, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setitem(FORMATS, "riddle", None)  # which docs/adding_a_format.md adds; removed again after the test
    with PIL.Image.open(ROOT / "recipes" / "own_data" / "chelsea.jpg") as image:
        exec(code, {"image": image.convert("RGB")})
    if page.name == "adding_a_format.md":
        assert FORMATS["riddle"].names == ("picture", "asked", "answered")


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda value: getattr(value, "stem", ""))
def test_yaml_is_a_recipe(page, text, tmp_path):
    """A fragment is one with what it leaves out."""
    needed = {"model": {"base": "here"}, "data": {"sources": [{"path": "a.jsonl"}]}, "training": {"steps": 1}}
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump({**needed, **yaml.safe_load(text)}))
    assert load_recipe(tmp_path / "shown.yaml")


def test_recipe_page_counts_its_rows(tmp_path):
    ((_, text),) = [(page, text) for page, text in blocks("yaml") if page.name == "recipe.md"]
    (tmp_path / "shown.yaml").write_text(text)
    assert load_recipe(tmp_path / "shown.yaml").training.rows_per_step == 32


def test_dialogue_shown_is_the_first_of_the_example():
    (shown,) = [json.loads(block) for page, block in blocks("json") if page.name == "README.md"]
    first = json.loads((ROOT / "recipes" / "own_data" / "dialogues.jsonl").read_text().splitlines()[0])
    assert shown["messages"] == first["messages"][:2]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_overrides_change_every_recipe(name):
    lines = {line for text in TEXTS.values() for line in re.findall(r"`finetune run RECIPE (.*?)`", text)}
    assert lines == {"training.steps=50 output=runs/short"}
    recipe = load_recipe(ROOT / "recipes" / name, lines.pop().split())
    assert (recipe.training.steps, recipe.training.epochs, recipe.output) == (50, None, "runs/short")


def test_every_format_is_listed_with_a_line_that_selects_it():
    lines = re.findall(r"^\| .*? \| `(\{format: .*\})` \|$", TEXTS[ROOT / "docs" / "data.md"], re.MULTILINE)
    assert {Source.model_validate(yaml.safe_load(line)).format for line in lines} == set(FORMATS)


def test_every_recipe_and_every_verb_is_listed():
    text = TEXTS[ROOT / "docs" / "commands.md"]
    listed = set(re.findall(r"^\| `([\w.-]+\.yaml)`", text, re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert [verb for verb in verbs if not re.search(rf"`(finetune )?{verb}\b", text)] == []


def test_run_folder_is_what_a_run_leaves(home):
    (tree,) = re.findall(r"```\nruns/NAME/\n(.*?)```", TEXTS[ROOT / "docs" / "training.md"], re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    left = {re.sub(r"checkpoint-\d+", "checkpoint-*", path.name) for path in (home / "runs" / "own_data").iterdir()}
    assert left <= named
    # only where the recipe has init, where auto_fit changed it, where a step went wrong
    assert named - left == {"base", "auto_fit.json", "unstable.jsonl"}


def test_figures_of_the_9b_are_those_of_its_plan():
    plan = json.loads(invoke("plan", "idefics-9b_qlora_1x24gb", "--gpu", "24GiB", "--json").stdout)
    text = TEXTS[ROOT / "README.md"]
    assert f"{plan['totals']['total'] / 1e9:.1f} billion parameters" in text
    assert f"{plan['totals']['trained'] / 1e6:.0f} million of them trained" in text
    assert f"{plan['gpu']['needed'] / 2**30:.2f} GiB needed" in text


def test_every_score_is_explained():
    rows = re.findall(r"^\| (.*?) \| `(\w+)` \|", TEXTS[ROOT / "docs" / "evaluation.md"], re.MULTILINE)
    assert {key: label for label, key in rows} == SCORES


def test_readme_stays_short():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 170
