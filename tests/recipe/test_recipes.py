"""Every recipe that ships is parsed, checked and run for two steps on a small stand-in of its shape."""

import json
import re
import shutil
from pathlib import Path

import pytest
from mixture_files import beside_files
from small_models import stand_in
from typer.testing import CliRunner

from finetune.cli import app
from finetune.planning.estimate import plan
from finetune.recipe.load import load_recipe
from modeling import loading, tiny
from modeling.config import read_config
from modeling.shapes import SHAPES

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def test_there_are_recipes():
    assert {"quickstart.yaml", "own_data.yaml", "tiny_base.yaml", "idefics-9b_lora_1x80gb.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_header(name):
    """It holds the command, and the recipe is short."""
    lines = (FOLDER / name).read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert any(f"finetune run recipes/{name}" in line for line in header)
    assert len(lines) <= 60


@pytest.mark.parametrize("name", [name for name in RECIPES if "80gb" in name])
def test_recipe_not_run_here_says_so(name):
    assert "Not run here" in (FOLDER / name).read_text()


def test_readme_lists_all_recipes():
    listed = re.findall(r"^\| `([\w.-]+\.yaml)`", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == RECIPES


SIZED = {name: found.groups() for name in RECIPES if (found := re.search(r"_(\d+)x(\d+)gb\.yaml$", name))}
"""Name -> (GPUs, GB of each) of the recipes that are named by them."""

PLANNED = {name: f"{size}GB" if int(size) >= 80 else f"{size}GiB" for name, (_, size) in SIZED.items()}
"""The larger ones have no more than their makers' gigabytes."""


def processes_of(name):
    return int(SIZED[name][0])


@pytest.mark.parametrize("name", SIZED)
def test_recipe_fits_its_gpus(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpu, processes = PLANNED[name], processes_of(name)
    outcome = CliRunner().invoke(
        app, ["plan", str(FOLDER / name), "--gpu", gpu, "--processes", str(processes), "--json"]
    )
    assert outcome.exit_code == 0, outcome.output
    made = json.loads(outcome.stdout)
    assert made["gpu"]["fits"]
    assert made["rows_per_step"] == made["rows_per_process"] * processes
    header = (FOLDER / name).read_text().split("model:")[0]
    nodes = f"--nodes {processes // 8} " if processes > 8 else f"--processes {processes}" if processes > 1 else ""
    assert nodes in header
    recipe = load_recipe(FOLDER / name)
    assert ("PARALLEL=fsdp2" in header) == (processes > 8 and recipe.training.parallel == "fsdp2")


def test_recipes_are_named_by_their_gpus():
    assert len(SIZED) == 7


def plan_line(name, gpu):
    """The line of a recipe in the folder's README."""
    made = plan(load_recipe(FOLDER / name), gpu=gpu, processes=processes_of(name))
    parts = dict(made["memory"]["parts"])
    fixed = (
        parts.pop("weights") + parts.pop("gathered"),
        sum(parts.pop(part) for part in ("adapters", "optimizer", "gradients")),
    )
    sizes = (*fixed, sum(parts.values()), made["gpu"]["needed"])
    assert made["gpu"]["fits"]
    trained, disk = made["totals"]["trained"], made["disk"]["total"]
    cells = (f"`{name.removesuffix('.yaml')}`", f"{trained:,}", *map(gib, sizes), gpu, gib(disk))
    return f"| {' | '.join(cells)} |"


def gib(nbytes):
    return f"{nbytes / 2**30:.1f}"


@pytest.mark.parametrize("name", PLANNED)
def test_readme_shows_the_plan(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is prepared here
    assert plan_line(name, PLANNED[name]) in (FOLDER / "README.md").read_text().splitlines()


@pytest.fixture(scope="session")
def place_of(tmp_path_factory):
    """place_of(name) -> a recipe with its data: where it ships, or a copy beside small files of the same names."""
    folder = tmp_path_factory.mktemp("recipes")
    return lambda name: beside_files(name, folder)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_checks(name, place_of):
    outcome = CliRunner().invoke(app, ["check", str(place_of(name)), "--json"])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert sum(tower["trained"] for tower in result["towers"].values()) > 0
    assert all(source["usable"] for source in result["sources"])


@pytest.fixture(scope="session")
def stand_in_of(tmp_path_factory):
    """A base of the recipe's structure and number of added tokens, small enough for two steps in a second."""

    def make(recipe):
        model = recipe.model
        config = stand_in(SHAPES[model.init] if model.init else read_config(model.base))
        folder = tmp_path_factory.mktemp("stand-in")
        tiny.build_model(config, seed=0).save_pretrained(folder)
        tokenizer = tiny.train_tokenizer(
            ["User: Assistant: a shape"], vocab_size=config["vocab_size"], added=config["additional_vocab_size"]
        )
        loading.save_processor(tiny.build_processor(tokenizer, image_size=64), folder)
        return folder

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(name, place_of, stand_in_of, tmp_path):
    """Two steps, on a small stand-in of its shape."""
    recipe = load_recipe(place_of(name))
    # its vocabulary is bytes and little more, so a dialogue has more tokens than with the real one
    overrides = [f"model.base={stand_in_of(recipe)}", "model.init=null", "model.dtype=fp32"]
    overrides += [f"output={tmp_path / 'run'}", f"data.prepared={tmp_path / 'prepared'}", "data.workers=0"]
    overrides += ["training.epochs=null", "training.steps=2", "training.tokens_per_step=2048", "data.max_length=1024"]
    overrides += ["training.row_tokens=1024", "training.evaluate_every=null", "training.checkpoint_every=null"]
    overrides += ["training.warmup_steps=0", "evaluation={limit: 4, max_new_tokens: 4}"]
    overrides += [f"data.sources.{index}.limit=24" for index in range(len(recipe.data.sources))]
    overrides += [f"data.eval_sources.{index}.limit=8" for index in range(len(recipe.data.eval_sources))]
    overrides += [] if recipe.data.eval_sources else ["data.eval_split=0.3"]
    outcome = CliRunner().invoke(app, ["run", str(place_of(name)), *overrides, "--json"])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert result["train"]["steps"] == 2
    assert result["merge"]["largest_difference"] < 1e-4 < result["merge"]["largest_difference_to_base"]
    shutil.rmtree(tmp_path / "run")
