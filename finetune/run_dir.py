"""The run folder: what the training in it is made of, and whether this recipe and its data are still that.

inputs.json holds the recipe that was trained, and hashes of its data and its base. Where something is trained (a whole
checkpoint, or an adapter), what decides the training may not change any more; everything else may. Where nothing is
trained yet, the folder is the recipe's that comes.
"""

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.console import log
from finetune.data.arrow import DamagedError
from finetune.data.image_changes import find_changes
from finetune.recipe.plain_yaml import parse_yaml
from finetune.recipe.schema import Recipe
from finetune.training.checkpoints import last_checkpoint
from modeling.errors import UserError
from modeling.files import atomic_write, read_json, write_json

INPUTS = "inputs.json"
RECIPE = "recipe.yaml"

MAY_CHANGE = (
    *("evaluation", "merge", "output", "data.prepared", "data.workers", "data.feature_cache_size", "data.changed"),
    *("training.checkpointing", "training.checkpoint_every", "training.trackers", "training.instability"),
)
"""Keys of later stages, and keys that say where, how fast, in how much memory and how carefully work is done: what they
stand for is trained the same."""

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")

Contents = Mapping[str, Sequence[Mapping[str, str | None]]]
"""`finetune.data.dataset.contents`."""


def is_trained(folder: Path) -> bool:
    """Whether there is anything that a training left and another one would lose: a checkpoint, or an adapter."""
    return any((folder / "adapter").glob("*.safetensors")) or last_checkpoint(folder) is not None


def open_folder(recipe: Recipe, contents: Contents, base: str | None) -> str | None:
    """Make the run folder this recipe's, and return what of its data has changed since it was trained on, or None.

    `base` is a hash of the base's content, None where it is not known yet. Raises UserError where something else was
    trained here.
    """
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    began = _read_inputs(folder)
    now = {"recipe": recipe.model_dump(mode="json"), "data": contents, "base": base}
    changed = None
    if is_trained(folder):
        before = _trained_recipe(folder, began)
        require_same_recipe(folder, before, recipe)
        began = began or {"recipe": before.model_dump(mode="json"), "data": contents, "base": base}
        require_same_base(folder, began.get("base"), base)
        noted = began.get("prepared")
        sets = [one for one in noted if isinstance(one, str)] if isinstance(noted, list) else []
        changed = _changed_data(recipe, began["data"], contents) or _changed_image(sets)
        mended = {"recipe": before.model_dump(mode="json"), "data": {**contents, **began["data"]}}
        now = {**began, **mended, "base": began.get("base") or base}
    elif began is None or (began["recipe"], began["data"]) != (now["recipe"], now["data"]):
        _clear(folder)
    _write(folder, recipe, now)
    return changed


def _read_inputs(folder: Path) -> dict[str, Any] | None:
    """inputs.json; None where there is none, or none that can be read."""
    try:
        inputs = read_json(folder / INPUTS)
    except UserError as error:
        log(f"{error}\n  it is written anew")
        return None
    if inputs is None:
        return None
    if not isinstance(inputs.get("recipe"), dict) or not _are_contents(inputs.get("data")):
        log(f"{folder / INPUTS}: not as this toolkit writes it; it is written anew")
        return None
    return inputs


def _are_contents(data: Any) -> bool:
    if not isinstance(data, dict) or not all(isinstance(kind, list) for kind in data.values()):
        return False
    return all(isinstance(one, dict) and {"source", "sha256"} <= one.keys() for kind in data.values() for one in kind)


def _trained_recipe(folder: Path, began: Mapping[str, Any] | None) -> Recipe:
    """What is trained here, by inputs.json, else by recipe.yaml. Raises UserError where neither says it."""
    for read in (lambda: (began or {})["recipe"], lambda: parse_yaml((folder / RECIPE).read_bytes())):
        try:
            return Recipe.model_validate(read())
        except (KeyError, OSError, UserError, ValidationError):
            continue
    raise UserError(
        f"{folder}: something is trained here, and neither {INPUTS} nor {RECIPE} can be read, which say what\n"
        f"  put one of them back, choose another folder (output=runs/NAME), or delete this one to train anew"
    )


def require_same_recipe(folder: Path, before: Recipe, now: Recipe) -> None:
    """Raises UserError where keys that decide the training differ."""
    differing = differences(_deciding(before), _deciding(now))
    if differing:
        told = ", ".join(f"{key} (was {_short(was)}, is {_short(has)})" for key, was, has in differing)
        raise UserError(
            f"{folder}: holds the run of another recipe; they differ in {told}\n"
            f"  what is trained here stays as it is: choose another folder (output=runs/NAME), or delete this one\n"
            f"  what may change in it: {', '.join(MAY_CHANGE)}"
            + ("" if held_out_decides(now) else ", data.eval_sources")
        )


def require_same_base(folder: Path, before: str | None, now: str | None) -> None:
    """Raises UserError where the base is another one than what was trained here stands on."""
    if before and now and before != now:
        raise UserError(
            f"{folder}: the base (or the adapter of model.continue_from) has changed since this run began: same name, "
            f"other content\n"
            f"  put it back as it was, choose another folder (output=runs/NAME), or delete this one to train anew"
        )


def note_base(folder: Path, base: str | None) -> None:
    """Write down the base's hash as soon as it is known. Raises UserError as `require_same_base`."""
    inputs = read_json(folder / INPUTS) or {}
    if is_trained(folder):
        require_same_base(folder, inputs.get("base"), base)
    write_json(folder / INPUTS, {**inputs, "base": base})


def note_prepared(folder: Path, sets: Sequence[Path]) -> None:
    """Write down in which prepared sets the data that decides the training is: they know its images."""
    inputs = read_json(folder / INPUTS) or {}
    write_json(folder / INPUTS, {**inputs, "prepared": [str(one.resolve()) for one in sets]})


def _changed_data(recipe: Recipe, before: Contents, now: Contents) -> str | None:
    """Which of the data that decides the training is not what it was."""
    kinds = ("sources", "eval_sources") if held_out_decides(recipe) else ("sources",)
    for kind in kinds:
        for was, has in zip(before.get(kind, []), now[kind], strict=False):
            if was["sha256"] != has["sha256"] and "" not in (was["sha256"], has["sha256"]):
                gone = has["sha256"] is None
                return f"{has['source']} {'cannot be read any more' if gone else 'holds something else'}"
    return None


def _changed_image(sets: Sequence[str]) -> str | None:
    """The first image file that is not as it was when a set was prepared, as far as the sets are still there."""
    for one in sets:
        try:
            changes = find_changes(Path(one)) if Path(one).is_dir() else None
        except (DamagedError, OSError):
            continue  # it is made anew before it is used
        if changes:
            return next((f"{path}: is not there any more" for path in changes.missing), None) or changes.changed[0]
    return None


def held_out_decides(recipe: Recipe) -> bool:
    """Whether held-out data has a say in what is trained: in which checkpoint is best, or in what is dropped."""
    return recipe.training.evaluate_every is not None or recipe.data.overlap != "report"


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what is trained."""
    values = recipe.model_dump(mode="json")
    free = [*MAY_CHANGE, *([] if held_out_decides(recipe) else ["data.eval_sources"])]
    for key in free:
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place.pop(last)
    for source in values["data"]["sources"]:
        source.pop("license")
    return values


def differences(one: Any, other: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """(key, value, other value) of every difference."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys: Sequence[Any] = sorted({*one, *other})
        ones, others = [one.get(key) for key in keys], [other.get(key) for key in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        keys, ones, others = range(len(one)), one, other
    else:
        return [] if one == other else [(place.removeprefix("."), one, other)]
    pairs = zip(keys, ones, others, strict=True)
    return [found for key, was, has in pairs for found in differences(was, has, f"{place}.{key}")]


def _short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _clear(folder: Path) -> None:
    """Delete what an earlier recipe, or earlier data, left in a folder where nothing is trained."""
    shutil.rmtree(folder / "base", ignore_errors=True)
    for name in ("data.json", "metrics.jsonl", "unstable.jsonl"):
        (folder / name).unlink(missing_ok=True)


def _write(folder: Path, recipe: Recipe, inputs: Mapping[str, Any]) -> None:
    write_json(folder / INPUTS, inputs)
    if not is_trained(folder) or not (folder / "environment.json").is_file():
        environment = {
            "versions": versions(),
            "commit": commit(),
            "base": recipe.model.base or f"init: {recipe.model.init}",
            "revision": recipe.model.revision,
            "seed": recipe.training.seed,
        }
        write_json(folder / "environment.json", environment)
    atomic_write(folder / RECIPE, recipe.to_yaml())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; those that cannot be read, such as one that a power cut broke off, are counted."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = [one for line in lines if (one := _metrics_line(line)) is not None]
    if len(found) < len(lines):
        log(f"{path}: {len(lines) - len(found)} of {len(lines)} lines cannot be read, and are left out")
    return found


def _metrics_line(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = {"step": 0, "tokens": 0, "loss": 0.0, "eval_loss": 0.0}
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return values if all(isinstance(values.get(key, least), int | float) for key, least in numbers.items()) else None


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
