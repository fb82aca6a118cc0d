"""Write README.md of a dataset and of a merged model: markdown with the hub's metadata header."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from finetune.data.dataset import Dataset
from finetune.export.verify import PROVENANCE
from finetune.recipe.plain_yaml import parse_yaml
from finetune.recipe.schema import Recipe, Source
from modeling.atomic_files import atomic_write, read_json
from modeling.errors import UserError

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's size categories."""

COLUMNS = """Images are embedded, encoded as they came.

A row is one example. `messages` and `images` have the conversational form of TRL and transformers: the place of an
image is `{"type": "image"}`. An answer with `"weight": 0` is context. A document is one message of the role
`document`. `source` and `record_id` say where its record was. `input_ids` are the tokens, and `labels` are -100 where
nothing is trained on."""


def write_card(recipe: Recipe, sources: Sequence[Source], dataset: Dataset) -> Path:
    """Write README.md and the recipe to a folder of the run's name beside the prepared sets, and return the folder."""
    output = Path(recipe.output).resolve()
    folder = Path(recipe.data.prepared) / output.name
    try:
        there = str(parse_yaml((folder / "recipe.yaml").read_bytes())["output"])
    except (OSError, UserError, TypeError, KeyError):  # no recipe, or none that can be read
        there = str(output)
    if there != str(output):  # a run of the same name in another folder
        folder = folder.with_name(f"{output.name}-{hashlib.sha256(str(output).encode()).hexdigest()[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "recipe.yaml", recipe.model_copy(update={"output": str(output)}).to_yaml())
    atomic_write(folder / "README.md", dataset_card(recipe, sources, dataset))
    return folder


def dataset_card(recipe: Recipe, sources: Sequence[Source], dataset: Dataset, *, to_share: bool = False) -> str:
    """Return README.md of a dataset: sources, licences, revisions, counts, rejections, and its recipe.

    to_share: the images are in the dataset, which others load; folders of this machine are left out of all paths.
    """
    name = Path(recipe.output).name
    licences = sorted({source.license for source in sources if source.license})
    count = dataset.report["training_examples"]
    header = DatasetCardData(
        pretty_name=name,
        license=licences or "other",
        task_categories=["image-text-to-text", "visual-question-answering"],
        size_categories=[next((label for most, label in SIZES if count < most), "n>1M")],
        source_datasets=sorted({source.hub for source in sources if source.hub}) or None,
        tags=["idefics", "instruction-tuning"],
    )
    overlap = dataset.report["overlap"]
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        f"{count:,} training and {dataset.report['held_out_examples']:,} held-out examples, tokenised for IDEFICS. "
        + (COLUMNS if to_share else "Images are referred to where they are, not copied."),
        "## Sources",
        _table(
            ("source", "format", "revision", "licence"),
            [(source.name, source.format, source.revision, source.license or "not stated") for source in sources],
        ),
        "## Records",
        _table(
            (
                "source",
                "read",
                "kept",
                "rejected",
                "after the limit",
                "examples",
                "tokens",
                "trained on",
                "images",
                "repeats",
            ),
            [
                (
                    stats.source,
                    stats.read,
                    stats.kept,
                    sum(stats.rejected.values()),
                    "not counted" if stats.limited else None,
                    stats.examples,
                    stats.tokens,
                    stats.supervised_tokens,
                    stats.images,
                    stats.repeats_per_epoch,
                )
                for stats in dataset.source_stats
            ],
        ),
        "## Rejections",
        _table(("source", "reason", "records", "first"), _rejections(dataset)),
        f"Training and held-out data share {overlap['images']:,} images and {overlap['questions']:,} questions about "
        f"equal images; the {overlap['training_examples_with_images']:,} and "
        f"{overlap['training_examples_with_questions']:,} training examples concerned were "
        f"{'dropped as the recipe says' if overlap['dropped'] else 'kept'}.",
        *([] if to_share else _prepared_sets(dataset)),
        "## Recipe",
        f"```yaml\n{recipe.to_yaml()}```",
    ]
    card = "\n\n".join(sections) + "\n"
    return without_folders(card, recipe) if to_share else card


def _prepared_sets(dataset: Dataset) -> list[str]:
    names = dict.fromkeys(one.folder.name for one in (*dataset.train.sets, *dataset.eval.sets))
    return ["## Prepared sets", "\n".join(f"- `{name}`" for name in names)]


def without_folders(text: str, recipe: Recipe) -> str:
    """Return a text in which paths of the recipe's files begin below the folders that only this machine has.

    >>> data = {"sources": [{"format": "qa", "path": "/me/data/train.jsonl"}]}
    >>> recipe = Recipe.model_validate({"model": {"base": "/me/base"}, "data": data, "training": {"steps": 1},
    ...                                 "output": "/me/runs/mine"})
    >>> without_folders("/me/data/train.jsonl:3: /me/data/images/cat.jpg is missing", recipe)
    'train.jsonl:3: images/cat.jpg is missing'
    """
    every = (*recipe.data.sources, *recipe.data.eval_sources)
    paths = [path for source in every for path in (*source.paths, *source.image_roots)]
    paths += map(Path, filter(None, (recipe.output, recipe.data.prepared, recipe.model.base)))
    folders = {str(path.parent) for path in paths if path.is_absolute()} - {"/"}
    for folder in sorted(folders, key=len, reverse=True):
        for written in {folder, _cell(folder)}:
            text = re.sub(rf"(?<![\w.-]){re.escape(written)}/", "", text)  # not inside of another path, or of a URL
    return text


def model_card(base: str, out: Path, run: Path | None) -> str:
    """Return README.md of a merged model: base, licences and, if the run folder has them, data and figures."""
    header = ModelCardData(
        base_model=None if Path(base).is_dir() else base,
        library_name="transformers",
        license="other",
        pipeline_tag="image-text-to-text",
        tags=["idefics", "instruction-tuning"],
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {_code((run or out).resolve().name)}",
        f"IDEFICS, fine-tuned from {_code(base)}, with everything that was trained merged into its weights. "
        f"{_code(PROVENANCE)} holds what it was made of, hashes, and its parity with base + adapter.",
    ]
    if run:
        sections += [*_described(run / "data.json", _data), *_described(run / "evaluation.json", _figures)]
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8", errors="backslashreplace")
        fence = _backticks(recipe, least=3)
        sections += ["## Recipe", f"{fence}yaml\n{recipe}{fence}"]
    sections += [
        "## Licence",
        "The language model inside IDEFICS is LLaMA, whose weights are for non-commercial research; CLIP's weights, "
        "and those that IDEFICS added, are MIT. What it was trained on has licences of its own. Merging lifts none.",
    ]
    return "\n\n".join(sections) + "\n"


def _described(path: Path, describe: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Return the sections made from a JSON file of the run folder. Raises UserError: its content is unexpected."""
    repair = "delete it, and the card does without"
    values = read_json(path, repair=repair) or {}
    try:
        return describe(values)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not as this toolkit writes it ({error!r:.100}); {repair}") from error


def _data(data: dict[str, Any]) -> list[str]:
    lines = [f"- {_code(source['source'])}: {source['examples']:,} examples" for source in data.get("sources", [])]
    return ["## Data", "\n".join(lines)] if lines else []


def _figures(figures: dict[str, Any]) -> list[str]:
    if not (tuned := figures.get("tuned")):
        return []
    before = figures["base"]
    rows = [f"| {key} | {before[key]} | {value} |" for key, value in tuned.items() if value is not None]
    return ["## Figures on eval data", "\n".join(["| | base | this model |", "| --- | --- | --- |", *rows])]


def _code(text: str) -> str:
    """Return text as inline code, in enough backticks for any text."""
    fence, line = _backticks(text, least=1), " ".join(text.split())
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _backticks(text: str, *, least: int) -> str:
    """Return more backticks than the text has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _rejections(dataset: Dataset) -> list[tuple[Any, ...]]:
    return [
        (stats.source, reason, records, stats.first_rejected[reason])
        for stats in dataset.source_stats
        for reason, records in {**stats.rejected, **stats.parts_rejected}.items()
    ] + [
        (stats.source, "file breaks off", "not counted", broken)
        for stats in dataset.source_stats
        for broken in stats.broken
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "None."
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """Return text for one table cell, with any characters escaped."""
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return re.sub(r"[\\`*_\[\]|<>&~!]", r"\\\g<0>", " ".join(text.split()))
