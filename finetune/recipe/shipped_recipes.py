"""The recipes that ship with the toolkit: list them, copy one to edit, and complete their names in a shell."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.recipe.json_schema import SCHEMA_FILE
from finetune.recipe.load import keys_at, load_recipe, shipped_folder
from finetune.recipe.schema import Recipe
from modeling.atomic_files import atomic_write, partial_of, put_in_place
from modeling.errors import UserError

PACKAGED = ("easy_vqa", "easy_vqa_captions")
"""Formats whose data is inside a Python package."""


def list_recipes() -> list[dict[str, Any]]:
    """Return the recipes that ship, sorted by name: purpose, GPUs and requirements.

    A GPU recipe is named after its GPUs: idefics-9b_qlora_1x24gb needs one of 24 GB. "missing" are files or folders
    beside the recipe that do not ship; recipes/README.md says where they come from.
    """
    found = []
    for path in sorted(shipped_folder().glob("*.yaml")):
        recipe, folder = load_recipe(path), path.parent
        base, gpus = recipe.model.base or f"new: {recipe.model.init}", re.search(r"_(\d+)x(\d+)gb$", path.stem)
        if Path(base).is_relative_to(folder):
            base = Path(base).name
        needed = _needed_files(recipe, folder)
        comment = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        prose = " ".join(line for line in comment if not line.startswith(("yaml-language-server", " ")))
        packaged = dict.fromkeys(source.format for source in recipe.data.sources if source.format in PACKAGED)
        found.append(
            {
                "name": path.stem,
                "description": re.split(r"(?<=\.)\s", prose, maxsplit=1)[0],  # its first sentence
                "gpus": f"{gpus[1]} x {gpus[2]} GB" if gpus else None,
                "base": base,
                "data": [*packaged, *(name for name in needed if name != base)],
                "missing": [name for name in needed if not (folder / name).exists()],
                "path": str(path),
            }
        )
    return found


def new_recipe(folder: Path, *, source: str = "own_data") -> dict[str, Any]:
    """Copy a recipe that ships, and the files that it needs, into a new folder; name the recipe after the folder.

    `new_recipe(Path("mine"))` writes mine/mine.yaml, mine/recipe.schema.json and mine/own_data/. Raises UserError where
    no recipe of the name `source` ships, or where `folder` exists: nothing is overwritten.
    """
    shipped = shipped_folder() / f"{source}.yaml"
    names = [path.stem for path in sorted(shipped_folder().glob("*.yaml"))]
    if source not in names:
        raise UserError(f"--from: no recipe of the name {source!r:.80} ships; expected one of {', '.join(names)}")
    if folder.suffix in (".yaml", ".yml"):
        raise UserError(f"{folder}: expected the name of a new folder, such as {folder.with_suffix('')}")
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: exists, and nothing is overwritten; choose another name")
    recipe = load_recipe(shipped)
    needed = _needed_files(recipe, shipped.parent)
    missing = [name for name in needed if not (shipped.parent / name).exists()]
    text = shipped.read_text(encoding="utf-8")
    renamed = {f"recipes/{source}.yaml": f"{folder / folder.name}.yaml", "recipes/": f"{folder}/"}
    renamed |= {f"runs/{source}/": f"runs/{folder.name}/"}
    text = re.sub("|".join(map(re.escape, renamed)), lambda match: renamed[match[0]], text)

    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted copy
    partial.mkdir(parents=True)
    for name in {*needed, SCHEMA_FILE, *(["README.md"] if missing else [])} - set(missing):
        original = shipped.parent / name
        (shutil.copytree if original.is_dir() else shutil.copyfile)(original, partial / name)
    atomic_write(partial / f"{folder.name}.yaml", text)
    put_in_place(partial, folder)
    return {"recipe": str(folder / f"{folder.name}.yaml"), "from": source, "missing": missing}


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shell completions of a RECIPE: files and folders whose names begin so, and recipes that ship."""
    start = Path(incomplete).expanduser()
    folder, name = (start, "") if incomplete.endswith("/") else (start.parent, start.name)
    found = sorted(path for path in folder.glob(f"{name}*") if path.is_dir() or path.suffix in (".yaml", ".yml"))
    shipped = sorted(path.stem for path in shipped_folder().glob("*.yaml"))
    return [*(f"{path}/" if path.is_dir() else str(path) for path in found), *shipped]


def complete_key(incomplete: str) -> list[str]:
    """Return the shell completions of a KEY=VALUE: the keys of the section typed so far.

    >>> [key for key in complete_key("training.le") if key.startswith("training.le")]
    ['training.learning_rate=']
    """
    *parents, _ = incomplete.split(".")
    keys = [(*parents, key) for key in keys_at(tuple(parents))]
    return [".".join(key) + ("=" if keys_at(key) == keys_at(tuple(parents)) else ".") for key in keys]


def _needed_files(recipe: Recipe, folder: Path) -> list[str]:
    """Return the files and folders that a recipe uses beside it: the first part of each path, in order."""

    def named() -> Iterator[str | None]:
        yield from (recipe.model.base, recipe.model.continue_from)
        documents = recipe.evaluation.documents if recipe.evaluation else []
        for source in (*recipe.data.sources, *recipe.data.eval_sources, *documents):
            yield from (*source.path, *source.image_root)

    beside = [Path(path).relative_to(folder) for path in named() if path and Path(path).is_relative_to(folder)]
    return list(dict.fromkeys(path.parts[0] for path in beside))
