"""Recipe -> what it would do: first records of every source, the model's config, what is trained. No torch."""

from itertools import islice
from pathlib import Path
from typing import Any

from rich.text import Text

from finetune.data.dialogue import Dialogue, RecordError, Remote
from finetune.data.images import open_image
from finetune.data.sources import FORMATS, hold_dialogues
from finetune.data.sources.roots import ImageRoot
from finetune.data.sources.source import Source
from finetune.data.sources.streams import BrokenFileError
from finetune.data.template import Special, render
from finetune.progress import display, panel, table
from finetune.recipe import Recipe
from finetune.recipe_sources import to_source
from finetune.visible import visible
from modeling.errors import UserError
from modeling.shapes import SHAPES, Config, count_lora, count_parameters, read_config
from modeling.towers import TOWERS

FIRST_RECORDS = 20


def check(recipe: Recipe, *, show: bool) -> dict[str, Any]:
    """Read what can be read in seconds. Raises UserError if a source has no usable record among its first ones."""
    config = _config(recipe)
    training = [to_source(source) for source in recipe.data.sources]
    towers = _towers(config, recipe, instruct=hold_dialogues(training))
    sources, first = [], None
    for source in (*training, *map(to_source, recipe.data.eval_sources)):
        report, dialogue = _first_records(source)
        first = first or dialogue
        sources.append(report)
    result = {
        "model": recipe.model.base or f"init: {recipe.model.init}",
        "towers": towers,
        "sources": sources,
        "doubts": recipe.doubts(None),
    }
    if show:
        _show(result, first)
    bad = [report for report in sources if not report["usable"]]
    if bad:
        raise UserError(
            "\n".join(
                f"{report['source']}: none of the first {report['read']} records is usable: {report['rejected']}"
                for report in bad
            )
        )
    return result


def _config(recipe: Recipe) -> Config:
    model = recipe.model
    if model.init:
        return SHAPES[model.init]
    assert model.base
    config = read_config(model.base, revision=model.revision)
    folder = Path(model.base)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: expected safetensors weights, found none")
    if model.continue_from and not Path(model.continue_from).is_dir():
        raise UserError(f"model.continue_from: {model.continue_from}: no such adapter folder")
    return config


def _towers(config: Config, recipe: Recipe, *, instruct: bool) -> dict[str, dict[str, Any]]:
    sizes = count_parameters({**config, "additional_vocab_size": 3} if instruct else config)
    towers = {}
    for tower in TOWERS:
        mode = recipe.model.modes[tower]
        trained = sizes[tower] if mode == "full" else 0
        if mode == "lora":
            trained = count_lora(config, (tower,), recipe.adapter.rank)[1]
        towers[tower] = {"mode": mode, "parameters": sizes[tower], "trained": trained}
    return towers


def _first_records(source: Source) -> tuple[dict[str, Any], Dialogue | None]:
    """What becomes of the first records; images that would have to be downloaded are left alone."""
    family, root = FORMATS[source.format], ImageRoot(source)
    report: dict[str, Any] = {"source": source.name, "format": source.format, "read": 0, "usable": 0}
    rejected: list[str] = []
    first = None
    for place, record in islice(family.read(source), FIRST_RECORDS):
        if isinstance(record, BrokenFileError):
            rejected.append(f"{place} breaks off: {record}")
            continue
        report["read"] += 1
        try:
            if isinstance(record, RecordError):
                raise record
            dialogue = family.convert(record, root)
            for image in dialogue.images:
                if not isinstance(image.source, Remote):
                    open_image(image)
        except RecordError as error:
            rejected.append(f"{place}: {error}")
            continue
        report["usable"] += 1
        first = first or dialogue
    return {**report, "rejected": rejected}, first


def _show(result: dict[str, Any], first: Dialogue | None) -> None:
    towers = [(tower, *values.values()) for tower, values in result["towers"].items()]
    total = [sum(values[key] for values in result["towers"].values()) for key in ("parameters", "trained")]
    columns = ("tower", "mode", "parameters", "trained")
    display(table(f"model: {result['model']}", columns, [*towers, ("total", "", *total)]))
    for report in result["sources"]:
        place = f"{report['source']} ({report['format']})"
        title = f"{place}: {report['usable']} of the first {report['read']} usable"
        display(title, "green" if report["usable"] else "red")
        for line in report["rejected"]:
            display(f"  {line}", "yellow")
    for doubt in result["doubts"]:
        display(doubt, "yellow")
    if first:
        display(panel(_coloured(first), title="the first dialogue; trained on: green"))


def _coloured(dialogue: Dialogue) -> Text:
    text = Text()
    for piece in render(dialogue).pieces:
        if isinstance(piece, Special):
            text.append(visible(piece.name), style="green" if piece.supervised else "dim")
        else:
            start = len(piece.text) if piece.supervised_from is None else piece.supervised_from
            text.append(visible(piece.text[:start]))
            text.append(visible(piece.text[start:]), style="green")
    return text
