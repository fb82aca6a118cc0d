"""The run folder: whose it is, and what made it."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe import Recipe
from modeling.errors import UserError
from modeling.files import atomic_write, write_json

ELSEWHERE = ("data.prepared", "data.workers", "data.feature_cache_size", "training.checkpointing")
"""Keys that say where, how fast and in how much memory work is done, and nothing of what comes of it."""

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def open_folder(recipe: Recipe) -> Path:
    """The run folder, with its recipe and environment written. Raises UserError if it is another recipe's."""
    folder = Path(recipe.output)
    path, mine = folder / "recipe.yaml", recipe.to_yaml()
    if path.is_file():
        differing = _differing(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(mine))
        if differing := [key for key in differing if key not in ELSEWHERE]:
            raise UserError(
                f"{folder}: holds the run of another recipe; they differ in {', '.join(differing)}\n"
                f"  choose another folder (output=runs/NAME), or delete this one"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        atomic_write(path, mine)
        environment = {
            "versions": versions(),
            "commit": commit(),
            "base": recipe.model.base or f"init: {recipe.model.init}",
            "revision": recipe.model.revision,
            "seed": recipe.training.seed,
        }
        write_json(folder / "environment.json", environment)
    return folder


def _differing(one: Any, other: Any, prefix: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [place for key in keys for place in _differing(one.get(key), other.get(key), f"{prefix}.{key}")]
    return [] if one == other else [prefix.removeprefix(".")]


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def commit() -> str | None:
    """The commit of the toolkit's own checkout, or None where it was installed from elsewhere."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.strip() or None
