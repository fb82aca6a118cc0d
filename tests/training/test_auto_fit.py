"""training.auto_fit: decided once, written down, found again by the same command, and the same in every process."""

import json

import pytest
import yaml
from processes import run_processes

from finetune.pipeline import open_run, run
from finetune.planning.estimate import Planner
from finetune.recipe.load import load_recipe
from finetune.training import fit_memory as memory
from finetune.training.fit_memory import apply_auto_fit
from modeling.errors import UserError

FIT = "training.auto_fit=true"


def needed(recipe):
    return Planner(recipe, on_gpu=True).needed(recipe)


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(bytes): this machine has a GPU of so many, or none."""
    return lambda size: monkeypatch.setattr(memory, "gpu_memory", lambda: size)


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(recipe_file, [FIT])


def begun(recipe):
    """The recipe of a run that has begun."""
    with open_run(recipe) as run_dir:
        return run_dir.recipe


def test_auto_fit_changes_a_recipe_too_large(
    recipe,
    recipe_file,
    tmp_path,
    on_gpu,
    capsys,
):
    """It runs with the least change, and the same command goes on with it whatever GPU there is."""
    asked = needed(recipe)
    on_gpu(asked - 1)
    fitted = begun(recipe)
    layers = fitted.training.checkpointing
    assert (recipe.training.checkpointing, layers) == (False, 1)
    assert fitted == load_recipe(recipe_file, [FIT, f"training.checkpointing={layers}"])
    assert needed(fitted) < asked
    assert f"runs with training.checkpointing={layers}" in " ".join(capsys.readouterr().err.split())
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["training"]["checkpointing"] == layers
    assert json.loads((tmp_path / "run" / "auto_fit.json").read_text()) == {
        "gpu": asked - 1,
        "needed": asked,
        "needed_changed": needed(fitted),
        "changed": {"training.checkpointing": {"asked": False, "run": layers}},
    }
    for later in (10 * asked, 1, None):  # whatever GPU there is by then
        on_gpu(later)
        assert begun(recipe) == fitted
        assert "as this run began, with training.checkpointing=1" in " ".join(capsys.readouterr().err.split())
    assert run(recipe, ("train",))["train"]["steps"] == 4


def test_auto_fit_keeps_a_change_of_what_is_trained(recipe, recipe_file, on_gpu, monkeypatch):
    on_gpu(1)
    monkeypatch.setattr(Planner, "fits", lambda self, recipe, budget: recipe.adapter.rank < 4 or recipe.model.quantize)
    first = begun(recipe)
    assert (recipe.model.quantize, first.model.quantize) == (None, "nf4")
    assert begun(recipe) == first
    assert begun(load_recipe(recipe_file, [FIT, "model.quantize=nf4"])) == first
    asked_without = load_recipe(recipe_file, ["model.quantize=nf4"])
    assert begun(asked_without) == asked_without  # nothing is trained yet


def test_auto_fit_takes_keys_given_later(recipe, recipe_file, on_gpu):
    on_gpu(needed(recipe) - 1)
    begun(recipe)
    again = load_recipe(recipe_file, [FIT, "training.checkpointing=3"])
    assert begun(again) == again


def test_auto_fit_leaves_what_fits(recipe, tmp_path, on_gpu, capsys):
    on_gpu(needed(recipe))
    assert begun(recipe) == recipe
    assert not (tmp_path / "run" / "auto_fit.json").exists()
    assert capsys.readouterr().err == ""
    on_gpu(1)  # in the middle of a run nothing is changed
    assert begun(recipe) == recipe


def test_auto_fit_without_gpu(recipe, on_gpu, capsys):
    """Nothing is done, and that is logged once."""
    on_gpu(None)
    assert begun(recipe) == recipe
    assert "there is no GPU here" in capsys.readouterr().err
    assert begun(recipe) == recipe
    assert capsys.readouterr().err == ""


def test_auto_fit_off(recipe_file, tmp_path, on_gpu):

    on_gpu(1)
    recipe = load_recipe(recipe_file)
    assert begun(recipe) == recipe
    assert not (tmp_path / "run" / "auto_fit.json").exists()


def test_auto_fit_nothing_fits(recipe, tmp_path, on_gpu):
    """The message says what was tried, and no folder is made."""
    on_gpu(2**20)
    with pytest.raises(UserError, match=r"1\.0 MiB there, and nothing makes it fit; tried, .*training\.checkpointing="):
        begun(recipe)
    assert not (tmp_path / "run").exists()


def in_a_group(recipe, sizes):
    """What one process of several runs, where each finds a GPU of its own size; or what it is told."""
    from accelerate import PartialState

    from finetune.distributed import collectives

    PartialState._reset_state()  # that of the test's own process, which is alone
    memory.gpu_memory = lambda: sizes[collectives.rank()]
    try:
        return apply_auto_fit(recipe)
    except UserError as error:
        return str(error)


def test_auto_fit_processes_decide_by_the_smallest_gpu(recipe, tmp_path):
    alone = Planner(recipe, on_gpu=True, processes=2)
    sizes = [10 * needed(recipe), alone.needed(recipe) - 1]
    both = run_processes(2, in_a_group, recipe, sizes)
    assert both[0] == both[1]
    assert both[0].training.checkpointing == 1
    assert both[0].training.parallel == "ddp"
    assert json.loads((tmp_path / "run" / "auto_fit.json").read_text())["gpu"] == sizes[1]


def test_auto_fit_processes_end_alike(recipe):
    """Several processes end alike where nothing fits."""
    both = run_processes(2, in_a_group, recipe, [2**40, 1])
    assert both[0] == both[1]
    assert "nothing makes it fit" in both[0]
