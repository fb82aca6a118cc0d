"""Recipe -> what a run would read and train: the first records of every source, and each tower. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from finetune.console import display, panel, table, visible
from finetune.data.chat_template import Special, render
from finetune.data.chunking import Limits, fit_records, splitter
from finetune.data.conversation import Dialogue, Remote
from finetune.data.images import digest
from finetune.data.read_dialogues import look, read_dialogues, resolve_source, say_if_documents
from finetune.data.stats import SourceStats, loss_lines
from finetune.data.tokenize import Encoder
from finetune.planning.static_memory import Setup, count_by_tower
from finetune.recipe.schema import Recipe, Source, need_end_of_utterance
from modeling.config import read_config
from modeling.errors import UserError
from modeling.shapes import SHAPES, Config

FIRST_RECORDS = 20
"""Records of each source that are read."""


def check(recipe: Recipe, *, show: bool = False) -> dict[str, Any]:
    """Return what the first records of every source become, and what is trained, by tower. Takes seconds.

    `show`: print it, too. Raises UserError where a source has no usable record among its first ones.
    """
    config = _config(recipe)
    training = [resolve_source(source) for source in recipe.data.sources]
    say_if_documents(training)
    if need_end_of_utterance(training):
        config = {**config, "additional_vocab_size": 3}
    setup = Setup(config, recipe.model.modes, rank=recipe.adapter.rank)
    towers = {
        tower: {"mode": setup.mode(tower), "parameters": one.total, "trained": one.trained}
        for tower, one in count_by_tower(setup).items()
    }
    encoder = _encoder(recipe)
    sources, first = [], None
    documents = recipe.evaluation.documents if recipe.evaluation else []
    for source in (*training, *(resolve_source(source) for source in (*recipe.data.eval_sources, *documents))):
        report, dialogue = first_records(source, recipe, encoder)
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
    unusable = []
    for report in sources:
        if not report["usable"]:
            got = f"none of the first {report['read']} records is usable" if report["read"] else "no records"
            unusable += [f"{report['source']}: {got}", *(f"  {line}" for line in _problems(report))]
    if unusable:
        raise UserError("\n".join(unusable))
    return result


def _config(recipe: Recipe) -> Config:
    """Return the base's config. Raises UserError where the base has no weights, or the adapter is missing."""
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


def first_records(source: Source, recipe: Recipe, encoder: Encoder | None) -> tuple[dict[str, Any], Dialogue | None]:
    """Return what becomes of a source's first records, and the first usable dialogue. Downloads no image."""
    first = source.model_copy(update={"limit": min(source.limit or FIRST_RECORDS, FIRST_RECORDS)})
    stats = SourceStats(source.name)
    found = list(read_dialogues(first, stats, seed=recipe.training.seed, look=look))
    images = {image for _, dialogues in found for dialogue in dialogues for image in dialogue.images}
    remote = sum(isinstance(image.source, Remote) for image in images)
    usable = [dialogue for _, dialogues in found for dialogue in dialogues]
    kept = stats.read - sum(stats.rejected.values())
    if encoder:
        limits = Limits(recipe.data.max_length, recipe.training.row_images)
        same = {image: image if isinstance(image.source, Remote) else digest(image) for image in images}
        how = splitter(source, encoder, limits, seed=recipe.training.seed)
        usable = [piece.dialogue for piece, _, _ in fit_records(found, how, stats, same=same.__getitem__)]
        kept = stats.kept
    counted = ("read", "rejected", "parts_rejected", "first_rejected", "ignored", "broken")
    report = {"source": source.name, "format": source.format, **{name: getattr(stats, name) for name in counted}}
    report |= {"usable": kept, "not_downloaded": remote, "length_checked": encoder is not None}
    return report, next(iter(usable), None)


def _encoder(recipe: Recipe) -> Encoder | None:
    """Return an encoder from the base's tokenizer.json; None where that is not on this machine."""
    model = recipe.model
    if not model.base:
        return None
    path: Any = Path(model.base) / "tokenizer.json"
    if not Path(model.base).is_dir():
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(model.base, "tokenizer.json", revision=model.revision)
    if not path or not Path(str(path)).is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Encoder(_Tokenizer(Tokenizer.from_file(str(path))))
    except Exception:  # a damaged file: loading the whole base explains what is wrong
        return None


class _Tokenizer:
    """The part of a transformers tokenizer that `Encoder` uses; importing transformers takes seconds.

    A base's tokenizer does not have `<end_of_utterance>` yet, and it gets a free id: lengths are the same.
    """

    def __init__(self, tokenizer: Any):
        self.backend_tokenizer = tokenizer
        self.unk_token_id = tokenizer.token_to_id("<unk>")

    def convert_tokens_to_ids(self, names: Sequence[str]) -> list[int]:
        known = [self.backend_tokenizer.token_to_id(name) for name in names]
        size = self.backend_tokenizer.get_vocab_size()
        return [size + index if number is None else number for index, number in enumerate(known)]


def _show(result: dict[str, Any], first: Dialogue | None) -> None:
    towers = [(tower, *values.values()) for tower, values in result["towers"].items()]
    total = [sum(values[key] for values in result["towers"].values()) for key in ("parameters", "trained")]
    columns = ("tower", "mode", "parameters", "trained")
    display(table(f"model: {result['model']}", columns, [*towers, ("total", "", *total)]))
    for report in result["sources"]:
        counts = f"{report['usable']} of the first {report['read']} records usable"
        display(f"{report['source']} ({report['format']}): {counts}", "green" if report["usable"] else "red")
        for line in _problems(report):
            display(f"  {line}", "yellow")
    for doubt in result["doubts"]:
        display(doubt, "yellow")
    if first:
        display(panel(_coloured(first), title="the first dialogue; green: what the model learns to write"))


def _problems(report: dict[str, Any]) -> list[str]:
    """Return a line for each reason why records, or parts of them, are not trained on or could not be checked."""
    lines = loss_lines(report)
    if report["not_downloaded"]:
        lines.append(f"{report['not_downloaded']} images are not downloaded yet, and were not checked")
    if not report["length_checked"]:
        lines.append("lengths are not checked: the tokenizer is not on this machine yet")
    return lines


def _coloured(dialogue: Dialogue) -> Text:
    """Return a dialogue as the model reads it, with what it is trained on in green."""
    text = Text()
    for piece in render(dialogue).pieces:
        if isinstance(piece, Special):
            text.append(visible(piece.name), style="green" if piece.supervised else "dim")
        else:
            start = len(piece.text) if piece.supervised_from is None else piece.supervised_from
            text.append(visible(piece.text[:start]))
            text.append(visible(piece.text[start:]), style="green")
    return text
