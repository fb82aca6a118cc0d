"""The run folder: whose it is, what its training is made of, and which of its stages are done.

inputs.json holds the recipe that was trained, and hashes of its data and its base. Where something is trained (a whole
checkpoint, or an adapter), what decides the training may not change any more; everything else may. Where nothing is
trained yet, the folder belongs to the recipe that comes.

A stage writes its .json last: its figures, and under "made_of" a hash of what they were made of, the files that the
stage left with their sizes, and a hash of the figures themselves. A stage whose .json or files are not whole, or whose
inputs have changed, is done again.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.base_model import content_of
from finetune.console import log
from finetune.data.arrow import DamagedError
from finetune.data.dataset import Contents
from finetune.data.stale_images import find_changes
from finetune.distributed import collectives
from finetune.distributed.environment import commit, versions
from finetune.recipe.plain_yaml import parse_yaml
from finetune.recipe.schema import MAY_CHANGE, Recipe
from finetune.training.checkpoints import is_trained, last_checkpoint
from modeling.adapter_files import adapter_fingerprint
from modeling.atomic_files import atomic_write, flush, json_digest, read_json, write_json
from modeling.errors import UserError
from modeling.safetensors_io import fingerprint, read_checkpoint

STAGES = ("train", "evaluate", "merge")
FIGURES = {"train": "training.json", "evaluate": "evaluation.json", "merge": "merge.json"}
"""File of each stage's figures."""

LEFT = {"train": ("adapter/*",), "evaluate": ("predictions.jsonl",), "merge": ("merged/*",)}
"""Other files that each stage leaves."""

MADE_OF = "made_of"
INPUTS = "inputs.json"
RECIPE = "recipe.yaml"
CURVES = "curves.png"
WRITTEN_AGAIN = "delete it, and the same command writes it again"


@dataclass(frozen=True)
class RunDir:
    """A run folder opened for one recipe. Of several processes, the main one reads and writes for all."""

    folder: Path
    recipe: Recipe
    contents: Contents
    """Hashes of the data."""
    changed: str | None
    """What of the data is not as it was when training began; None where nothing is."""

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def is_to_do(self, stage: str) -> bool:
        """Return whether a stage is to be done, and say why it is done again or not done. Raises UserError."""
        if stage != "train":
            self.require_trained()
        again, file = self._why_not_done(stage), self.folder / FIGURES[stage]
        if again is None:
            log(f"{stage}: done before, see {file}")
        elif file.exists():
            log(f"{stage}: {again}; done again")
        return again is not None

    def is_done(self, stage: str) -> bool:
        return self._why_not_done(stage) is None

    def mark_done(self, stage: str, figures: Mapping[str, Any]) -> None:
        """Write a stage's figures: from here on it is done."""
        collectives.on_main(
            f"write {stage}", lambda: write_stage(self.folder, stage, figures, self._inputs_digest(stage))
        )
        (self.folder / CURVES).unlink(missing_ok=True)

    def require_trained(self) -> None:
        """Raises UserError where there is no whole adapter."""
        if why := self._why_not_done("train"):
            started = (self.folder / FIGURES["train"]).exists()
            raise UserError(
                f"{why if started else f'{self.folder}: nothing is trained here yet'}; first: finetune train RECIPE"
            )

    def require_checkpoint(self) -> None:
        """Raises UserError where training anew would lose an adapter: it is there, and no checkpoint to go on from."""
        if is_trained(self.folder) and last_checkpoint(self.folder) is None:
            raise UserError(
                f"{self.folder}: {why_not_done(self.folder, 'train', '')}, an adapter is there, and no checkpoint to "
                f"go on from\n  put the file back; or delete {self.adapter} to train anew"
            )

    def require_unchanged_data(self) -> None:
        """Raises UserError where the data has changed, unless the recipe says that what is trained is kept."""
        if self.changed is None:
            return
        done, what = self.is_done("train"), f"{self.folder}: the data has changed since this run began"
        if not done or self.recipe.data.changed == "refuse":
            kept = "keep what was trained as it is: data.changed=keep" if done else "put the data back, and go on"
            raise UserError(
                f"{what}: {self.changed}\n"
                f"  train on it in another folder (output=runs/NAME), or delete this one to train anew, or {kept}"
            )
        log(f"{what}: {self.changed}; what was trained is kept as it is")

    def _why_not_done(self, stage: str) -> str | None:
        return collectives.on_main(
            f"look at {stage}", lambda: why_not_done(self.folder, stage, self._inputs_digest(stage))
        )

    def _inputs_digest(self, stage: str) -> str:
        """Return a hash of what a stage is made of; what decides the training is in inputs.json."""
        if stage == "train":
            return ""
        adapter = adapter_fingerprint(self.adapter)
        if stage == "merge":
            return json_digest(adapter)
        asked = self.recipe.evaluation
        settings = asked and asked.model_dump(mode="json", exclude={"batch_size"})
        return json_digest([adapter, settings, self.contents["eval_sources"], self.contents["documents"]])


def open_run_dir(recipe: Recipe, contents: Contents) -> RunDir:
    """Make the run folder this recipe's, and look at what of its data has changed since it was trained on.

    contents: hashes of the data as it is now. Raises UserError where something else was trained here.
    """
    folder, base_folder = Path(recipe.output), Path(recipe.model.base or "")
    is_local = bool(recipe.model.base) and base_folder.is_dir()  # what lies on the hub is known when it is fetched
    base = content_of(base_folder, recipe.model.continue_from) if is_local else None
    folder.mkdir(parents=True, exist_ok=True)
    before = _read_inputs(folder)
    now = {"recipe": recipe.model_dump(mode="json"), "data": contents, "base": base}
    changed, trained = None, is_trained(folder)
    if trained:
        trained_recipe = _trained_recipe(folder, before)
        require_same_recipe(folder, trained_recipe, recipe)
        values = trained_recipe.model_dump(mode="json")
        before = before or {"recipe": values, "data": contents, "base": base}
        require_same_base(folder, before.get("base"), base)
        noted = before.get("prepared")
        sets = [one for one in noted if isinstance(one, str)] if isinstance(noted, list) else []
        changed = _changed_data(recipe, before["data"], contents) or _changed_image(sets)
        data = {**contents, **before["data"]}
        now = {**before, "recipe": values, "data": data, "base": before.get("base") or base}
    elif before is None or (before["recipe"], before["data"]) != (now["recipe"], now["data"]):
        # Nothing is trained here: what an earlier recipe, or earlier data, left is deleted.
        shutil.rmtree(folder / "base", ignore_errors=True)
        for name in ("data.json", "metrics.jsonl", "unstable.jsonl"):
            (folder / name).unlink(missing_ok=True)
    write_json(folder / INPUTS, now)
    if not trained or not (folder / "environment.json").is_file():
        environment = {
            "versions": versions(),
            "commit": commit(),
            "base": recipe.model.base or f"init: {recipe.model.init}",
            "revision": recipe.model.revision,
            "seed": recipe.training.seed,
        }
        write_json(folder / "environment.json", environment)
    atomic_write(folder / RECIPE, recipe.to_yaml())
    return RunDir(folder, recipe, contents, changed)


def _read_inputs(folder: Path) -> dict[str, Any] | None:
    """Return inputs.json; None where there is none, or none that can be read."""
    try:
        inputs = read_json(folder / INPUTS)
    except UserError as error:
        log(f"{error}\n  it is written again")
        return None
    if inputs is None:
        return None
    data = inputs.get("data")
    lists: list[Any] = list(data.values()) if isinstance(data, dict) else [None]
    whole = isinstance(inputs.get("recipe"), dict) and all(isinstance(sources, list) for sources in lists)
    if not whole or not all(isinstance(one, dict) and {"source", "sha256"} <= one.keys() for one in chain(*lists)):
        log(f"{folder / INPUTS}: not as this toolkit writes it; it is written again")
        return None
    return inputs


def _trained_recipe(folder: Path, inputs: Mapping[str, Any] | None) -> Recipe:
    """Return the recipe that is trained here, by inputs.json, else by recipe.yaml. Raises UserError: by neither."""
    for read in (lambda: (inputs or {})["recipe"], lambda: parse_yaml((folder / RECIPE).read_bytes())):
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
        changes = ", ".join(f"{key} (was {_short(was)}, is {_short(has)})" for key, was, has in differing)
        raise UserError(
            f"{folder}: holds the run of another recipe; they differ in {changes}\n"
            f"  what is trained here stays as it is: choose another folder (output=runs/NAME), or delete this one\n"
            f"  what may change in it: {', '.join(MAY_CHANGE)}"
            + ("" if held_out_decides(now) else ", data.eval_sources")
        )


def require_same_base(folder: Path, before: str | None, now: str | None) -> None:
    """Raises UserError where the base is not the one that was trained on here."""
    if before and now and before != now:
        raise UserError(
            f"{folder}: the base (or the adapter of model.continue_from) has changed since this run began: same name, "
            f"other content\n"
            f"  put it back as it was, choose another folder (output=runs/NAME), or delete this one to train anew"
        )


def note_base(recipe: Recipe, base: Path) -> str:
    """Write the hash of the base to inputs.json, and return the fingerprint of its weights; `base` is its folder.

    Raises UserError as `require_same_base`.
    """
    folder, content = Path(recipe.output), content_of(base, recipe.model.continue_from)
    inputs = read_json(folder / INPUTS) or {}
    if is_trained(folder):
        require_same_base(folder, inputs.get("base"), content)
    write_json(folder / INPUTS, {**inputs, "base": content})
    return fingerprint(read_checkpoint(base))


def note_prepared(folder: Path, sets: Sequence[Path]) -> None:
    """Write to inputs.json which prepared sets hold the data that decides the training: they know its images."""
    inputs = read_json(folder / INPUTS) or {}
    write_json(folder / INPUTS, {**inputs, "prepared": [str(one.resolve()) for one in sets]})


def write_report(report: dict[str, Any], folder: Path, *, held_out_decides: bool) -> None:
    """Write data.json of a run folder. Raises UserError where its adapter was trained on other data.

    `held_out_decides`: held-out data counts as well.
    """
    path = folder / "data.json"
    before = read_json(path, repair=WRITTEN_AGAIN)
    if before is not None and is_trained(folder):
        free = () if held_out_decides else ("held_out_examples", "overlap", "eval_sources", "held_out_images")
        if not isinstance(before.get("sources"), list):
            raise UserError(f"{path}: not as this toolkit writes it; {WRITTEN_AGAIN}")
        was, now = ({key: one[key] for key in before.keys() & report.keys() - {*free}} for one in (before, report))
        if differing := differences(was, now):
            key, had, has = differing[0]
            raise UserError(
                f"{folder}: the data has changed since this run began: {key} was {had!r:.60}, is {has!r:.60}\n"
                f"  go on with the data it began with, choose another folder (output=runs/NAME), or delete this one"
            )
    write_json(path, report)


def _changed_data(recipe: Recipe, before: Contents, now: Contents) -> str | None:
    """Return what has changed of the data that decides the training; None where nothing has."""
    kinds = ("sources", "eval_sources") if held_out_decides(recipe) else ("sources",)
    for kind in kinds:
        for was, has in zip(before.get(kind, []), now[kind], strict=False):
            if was["sha256"] != has["sha256"] and "" not in (was["sha256"], has["sha256"]):
                gone = has["sha256"] is None
                return f"{has['source']} {'cannot be read any more' if gone else 'holds something else'}"
    return None


def _changed_image(sets: Sequence[str]) -> str | None:
    """Return the first image file that changed since its set was prepared, as far as the sets are still there."""
    for one in sets:
        try:
            changes = find_changes(Path(one)) if Path(one).is_dir() else None
        except (DamagedError, OSError):
            continue  # it is made anew before it is used
        if changes:
            return next((f"{path}: is not there any more" for path in changes.missing), None) or changes.changed[0]
    return None


def held_out_decides(recipe: Recipe) -> bool:
    """Return whether held-out data decides what is trained: which checkpoint is best, or what is dropped."""
    return recipe.training.evaluate_every is not None or recipe.data.overlap != "report"


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """Return the keys that decide what is trained, with their values."""
    values = recipe.model_dump(mode="json")
    free = [*MAY_CHANGE, *([] if held_out_decides(recipe) else ["data.eval_sources"])]
    for key in free:
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section.pop(last)
    for source in values["data"]["sources"]:
        source.pop("license")
    return values


def differences(one: Any, other: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return (key, value, other value) of every difference between two nested values."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys: Sequence[Any] = sorted({*one, *other})
        ones, others = [one.get(key) for key in keys], [other.get(key) for key in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        keys, ones, others = range(len(one)), one, other
    else:
        return [] if one == other else [(key.removeprefix("."), one, other)]
    pairs = zip(keys, ones, others, strict=True)
    return [found for inner, was, has in pairs for found in differences(was, has, f"{key}.{inner}")]


def _short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_stage(folder: Path, stage: str, figures: Mapping[str, Any], inputs: str) -> None:
    """Write a stage's figures, when all its files are on the disk. `inputs`: a hash of what it was made of."""
    left = [path for pattern in LEFT[stage] for path in sorted(folder.glob(pattern)) if path.is_file()]
    for path in {*left, *(path.parent for path in left)}:
        flush(path)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in left}
    made_of = {"inputs": inputs, "files": files, "figures": json_digest(figures)}
    write_json(folder / FIGURES[stage], {**figures, MADE_OF: made_of})


def figures_of(folder: Path, stage: str) -> dict[str, Any] | None:
    """Return a stage's figures; None where its file is not there, or not whole."""
    record = _read_stage(folder, stage)
    return None if record is None else {key: value for key, value in record.items() if key != MADE_OF}


def files_of(folder: Path, stage: str) -> list[Path]:
    """Return the files that a stage left, as far as they are still there."""
    record = _read_stage(folder, stage) or {}
    return [path for name in record.get(MADE_OF, {"files": {}})["files"] if (path := folder / name).is_file()]


def why_not_done(folder: Path, stage: str, inputs: str) -> str | None:
    """Return why a stage is to be done (again); None where it is done."""
    file = folder / FIGURES[stage]
    if not file.exists():
        return f"{file} is not there"
    record = _read_stage(folder, stage)
    if record is None:
        return f"{file} is not whole, or was changed"
    made_of = record[MADE_OF]
    if made_of["inputs"] != inputs:
        return "its settings, its data or the adapter have changed since"
    for name, size in made_of["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is not there any more"
        if path.stat().st_size != size:
            return f"{path} is not as it was left"
    return None


def _read_stage(folder: Path, stage: str) -> dict[str, Any] | None:
    """Return a stage's .json, if it is as the stage wrote it."""
    try:
        record = read_json(folder / FIGURES[stage])
    except UserError:
        return None
    made_of = record and record.get(MADE_OF)
    if not record or not isinstance(made_of, dict) or not isinstance(made_of.get("files"), dict):
        return None
    figures = {key: value for key, value in record.items() if key != MADE_OF}
    inside = all(not {"..", "/"} & set(Path(name).parts) for name in made_of["files"])
    return record if inside and made_of.get("figures") == json_digest(figures) and "inputs" in made_of else None
