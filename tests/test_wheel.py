"""The built wheel, installed into an empty environment and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the tree, without network: an old build/ would bring deleted files back."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("finetune", "modeling", "recipes"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "data" if name == "recipes" else "")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def finetune(wheel, tmp_path_factory):
    """finetune(*arguments) -> the installed command's finished process, in an empty folder.

    The environment holds the wheel; its libraries are those of the environment that runs the tests.
    """
    environment, here = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("here")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments):
        command = [environment / "bin" / "finetune", *map(str, arguments)]
        return subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, check=False)

    run.folder = here
    run.package = packages / "finetune"
    return run


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_wheel_holds_every_file_of_the_packages(wheel):
    """Whatever lies beside the code is needed by it, but for README.md; every recipe is there with its files."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    inside = [name for name in tracked if name.startswith(("finetune/", "modeling/"))]
    code = [name for name in inside if not name.endswith("/README.md")]
    shipped = [name for name in tracked if name.startswith("recipes/")]
    assert len(code) > 100
    assert len(shipped) > 20
    expected = {*code, *(f"finetune/recipe/shipped/{name.removeprefix('recipes/')}" for name in shipped)}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


def test_wheel_is_what_runs(finetune):
    assert finetune("--version").stdout.startswith("finetune ")
    found = {one["name"]: one for one in result_of(finetune("recipes", "--json"))["recipes"]}
    assert found["quickstart"]["path"] == str(finetune.package / "recipe" / "shipped" / "quickstart.yaml")
    assert finetune("schema").stdout == (ROOT / "recipes" / "recipe.schema.json").read_text()
    assert sorted(path.name for path in finetune.folder.iterdir()) == []


def test_wheel_new_check_plan_inspect(finetune):
    assert result_of(finetune("new", "mine", "--json"))["recipe"] == "mine/mine.yaml"
    assert all(source["usable"] for source in result_of(finetune("check", "mine/mine.yaml", "--json"))["sources"])
    planned = result_of(finetune("plan", "idefics-9b_qlora_1x24gb", "--gpu", "24GiB", "--json"))
    assert planned["gpu"]["fits"]
    assert result_of(finetune("inspect", "mine/mine.yaml", "--html", "page.html", "--json"))
    assert (finetune.folder / "page.html").stat().st_size > 10_000


def test_wheel_runs_a_shipped_recipe_in_two_processes(finetune):
    """A run of few steps, from data to a verified model; then one answer of it."""
    changes = ["training.steps=2", "training.warmup_steps=0", "evaluation.limit=4"]
    changes += ["data.sources.0.limit=40", "data.sources.1.limit=20", "data.eval_sources.0.limit=10"]
    changes += ["evaluation.documents.0.limit=10", "output=runs/two"]
    done = result_of(finetune("run", "quickstart", *changes, "--processes", "2", "--json"))
    assert done["train"]["steps"] == 2
    assert done["merge"]["largest_difference"] < 1e-4
    asked = finetune("chat", "runs/two/merged", "is there a circle?", "--max-new-tokens", "4")
    assert (asked.returncode, bool(asked.stdout.strip())) == (0, True), asked.stderr
