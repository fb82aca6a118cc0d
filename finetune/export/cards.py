"""The data of a recipe -> a dataset card: markdown with the hub's metadata header."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from finetune.data.dataset import Dataset
from finetune.recipe.plain_yaml import parse_yaml
from finetune.recipe.schema import Recipe, Source
from modeling.errors import UserError
from modeling.files import atomic_write

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's size categories."""


def write_card(recipe: Recipe, sources: Sequence[Source], dataset: Dataset) -> Path:
    """README.md in a folder of the run's name beside the prepared sets, with the recipe; the folder."""
    output = Path(recipe.output).resolve()
    folder = Path(recipe.data.prepared) / output.name
    if _output_of(folder / "recipe.yaml") not in (None, str(output)):  # a run of the same name in another folder
        folder = folder.with_name(f"{output.name}-{hashlib.sha256(str(output).encode()).hexdigest()[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "recipe.yaml", recipe.model_copy(update={"output": str(output)}).to_yaml())
    atomic_write(folder / "README.md", dataset_card(recipe, sources, dataset))
    return folder


def _output_of(path: Path) -> str | None:
    """The run folder that a card's recipe names; None where there is no card, or none that can be read."""
    try:
        return str(parse_yaml(path.read_bytes())["output"])
    except (OSError, UserError, TypeError, KeyError):
        return None


def dataset_card(recipe: Recipe, sources: Sequence[Source], dataset: Dataset) -> str:
    """Sources, licences, revisions, counts, rejections, and the recipe that made it."""
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
        "Images are referred to where they are, not copied.",
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
        "## Prepared sets",
        "\n".join(dict.fromkeys(f"- `{one.folder.name}`" for one in (*dataset.train.sets, *dataset.eval.sets))),
        "## Recipe",
        f"```yaml\n{recipe.to_yaml()}```",
    ]
    return "\n\n".join(sections) + "\n"


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
    """Plain text in one cell, whatever a dataset's file may be called."""
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return re.sub(r"[\\`*_\[\]|<>&~!]", r"\\\g<0>", " ".join(text.split()))
