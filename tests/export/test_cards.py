"""The dataset card: a header the hub reads, tables that hold whatever a file is called, the recipe."""

import json
from pathlib import Path

import PIL.Image
import pytest
import yaml
from huggingface_hub import DatasetCard

from finetune.data.conversation import RecordError
from finetune.data.dataset import make_dataset
from finetune.data.read_dialogues import resolve_source
from finetune.data.stats import SourceStats
from finetune.export.cards import dataset_card, without_folders, write_card
from finetune.recipe.schema import Recipe


def ask(question, *images, answer="Me."):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


RECORDS = [
    ask("1?", "a.png"),
    ask("2?", "none|<b>.png"),
    ask("3?", "`none`\n# Hello ![x](https://example.org/x.png).png"),
    ask("4?"),
    ask("5?", answer="long " * 200),
]


@pytest.fixture
def made(tmp_path, tiny_tokenizer):
    """(recipe, its sources, its data, their folder)."""
    folder = tmp_path / "data"
    folder.mkdir()
    PIL.Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    for name, records in (("data.jsonl", RECORDS), ("held.jsonl", [ask("1?", "a.png")])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = Recipe.model_validate(
        {
            "model": {"base": "base"},
            "data": {
                "sources": [
                    {"format": "messages", "path": str(folder / "data.jsonl"), "license": "cc-by-4.0"},
                    {"format": "messages", "path": str(folder / "data.jsonl"), "limit": 1},
                ],
                "eval_sources": [{"format": "messages", "path": str(folder / "held.jsonl")}],
                "max_length": 200,
                "prepared": str(tmp_path / "prepared"),
                "workers": 1,
            },
            "training": {"epochs": 1, "row_tokens": 200},
            "output": "runs/mine",
        }
    )
    sources = [resolve_source(source) for source in recipe.data.sources]
    return (
        recipe,
        sources,
        make_dataset(recipe.data, sources, tiny_tokenizer, row_images=recipe.training.row_images, seed=0),
        folder,
    )


def test_dataset_card_content(made):
    """The card says what was made of what."""
    recipe, sources, dataset, folder = made
    card = dataset_card(recipe, sources, dataset)
    names = [one.folder.name for one in (*dataset.train.sets, *dataset.eval.sets)]
    tokens, one, _ = (stats.tokens for stats in dataset.source_stats)
    trained, one_trained, _ = (stats.supervised_tokens for stats in dataset.source_stats)
    path = str(folder).replace("_", "\\_")
    long = dataset.source_stats[0].first_rejected["too long"].partition(": ")[2].replace("_", "\\_")
    missing = [f"data.jsonl:{line}: {path}/" for line in (2, 3)]
    assert (
        card
        == f"""---
license:
- cc-by-4.0
size_categories:
- n<1K
task_categories:
- image-text-to-text
- visual-question-answering
pretty_name: mine
tags:
- idefics
- instruction-tuning
---

# mine

3 training and 1 held-out examples, tokenised for IDEFICS. Images are referred to where they are, not copied.

## Sources

| source | format | revision | licence |
| --- | --- | --- | --- |
| {path}/data.jsonl\\[train\\] | messages | - | cc-by-4.0 |
| {path}/data.jsonl\\[train\\] | messages | - | not stated |

## Records

| source | read | kept | rejected | after the limit | examples | tokens | trained on | images | repeats |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| {path}/data.jsonl\\[train\\] | 5 | 2 | 3 | - | 2 | {tokens} | {trained} | 1 | 1.0 |
| {path}/data.jsonl\\[train\\] | 1 | 1 | 0 | not counted | 1 | {one} | {one_trained} | 1 | 1.0 |
| {path}/held.jsonl\\[train\\] | 1 | 1 | 0 | - | 1 | {one} | {one_trained} | 1 | - |

## Rejections

| source | reason | records | first |
| --- | --- | --- | --- |
| {path}/data.jsonl\\[train\\] | missing image | 2 | {missing[0]}none\\|\\<b\\>.png: No such file or directory |
| {path}/data.jsonl\\[train\\] | too long | 1 | data.jsonl:5: {long} |

Training and held-out data share 1 images and 1 questions about equal images; the 2 and 2 training examples concerned \
were kept.

## Prepared sets

- `{names[0]}`
- `{names[1]}`
- `{names[2]}`

## Recipe

```yaml
{recipe.to_yaml()}```
"""
    )


def test_dataset_card_header(made):
    """The header is read by the hubs own library."""
    recipe, sources, dataset, _ = made
    card = DatasetCard(dataset_card(recipe, sources, dataset))
    assert card.data.to_dict() == {
        "license": ["cc-by-4.0"],
        "pretty_name": "mine",
        "size_categories": ["n<1K"],
        "tags": ["idefics", "instruction-tuning"],
        "task_categories": ["image-text-to-text", "visual-question-answering"],
    }
    assert card.text.strip().startswith("# mine")


def test_dataset_card_names_escaped(made):
    """No name can break a table."""
    recipe, sources, dataset, _ = made
    hostile = (
        "a|b\n| c | d |\n# Title <script>x</script> ![i](https://x.org) [l](https://x.org) `code` \\| **b** _i_.jsonl"
    )
    stats = SourceStats(hostile, read=1)
    stats.reject(hostile, RecordError("not JSON", hostile))
    dataset.source_stats.append(stats)
    card = dataset_card(recipe, sources, dataset)
    (line,) = [line for line in card.split("\n") if "not JSON" in line]
    safe = (
        "a\\|b \\| c \\| d \\| # Title \\<script\\>x\\</script\\> \\!\\[i\\](https://x.org) \\[l\\](https://x.org) "
        "\\`code\\` \\\\\\| \\*\\*b\\*\\* \\_i\\_.jsonl"
    )
    assert line == f"| {safe} | not JSON | 1 | {safe}: {safe} |"


def test_dataset_card_no_rejections(made, tiny_tokenizer):
    """No rejections are none and a split names its set once."""
    recipe, _, _, folder = made
    (folder / "data.jsonl").write_text("".join(json.dumps(ask(f"{number}?")) + "\n" for number in range(4)))
    data = {
        "sources": [{**recipe.data.sources[0].model_dump(), "license": None}],
        "eval_sources": [],
        "eval_split": 0.25,
    }
    split = recipe.model_copy(update={"data": recipe.data.model_validate({**recipe.data.model_dump(), **data})})
    sources = [resolve_source(source) for source in split.data.sources]
    dataset = make_dataset(split.data, sources, tiny_tokenizer, row_images=split.training.row_images, seed=0)
    card = dataset_card(split, sources, dataset)
    assert "## Rejections\n\nNone.\n" in card
    assert card.count(f"- `{dataset.train.sets[0].folder.name}`") == 1
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"


@pytest.mark.parametrize(
    ("count", "label"),
    [(999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (100_000, "100K<n<1M"), (1_000_000, "n>1M")],
)
def test_dataset_card_size(count, label, made):
    """The size is one of the hubs categories."""
    recipe, sources, dataset, _ = made
    dataset.report["training_examples"] = count
    assert DatasetCard(dataset_card(recipe, sources, dataset)).data.size_categories == [label]


def test_dataset_card_beside_sets(made, tmp_path):
    """The card lies beside the sets with its recipe."""
    recipe, sources, dataset, _ = made
    folder = write_card(recipe, sources, dataset)
    assert folder == tmp_path / "prepared" / "mine"
    assert (folder / "README.md").read_text() == dataset_card(recipe, sources, dataset)
    output = str(Path(recipe.output).resolve())
    written = Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert written == recipe.model_copy(update={"output": output})


def test_dataset_cards_of_one_name(made, tmp_path):
    """Cards of runs of one name in two folders lie side by side."""
    recipe, sources, dataset, _ = made
    first, second = (recipe.model_copy(update={"output": str(tmp_path / name / "mine")}) for name in "ab")
    folders = [write_card(one, sources, dataset) for one in (first, second, first, second)]
    assert folders[:2] == folders[2:]
    assert folders[0].name == "mine"
    assert folders[1].name.startswith("mine-")
    outputs = [yaml.safe_load((folder / "recipe.yaml").read_text())["output"] for folder in folders[:2]]
    assert outputs == [first.output, second.output]
    (folders[0] / "recipe.yaml").write_text("{")  # cut: it is written anew
    assert write_card(first, sources, dataset) == folders[0]


def test_folders_of_this_machine_are_cut_off_at_the_beginning_of_a_path_alone():
    sources = [{"format": "qa", "path": path} for path in ("/data/train.jsonl", "s3://bucket/data/a.jsonl")]
    recipe = Recipe.model_validate(
        {"model": {"base": "/me/base"}, "data": {"sources": sources}, "training": {"steps": 1}, "output": "/me/mine"}
    )
    text = "s3://bucket/data/a.jsonl:3, `/data/train.jsonl`, ./data/b.png, file:///data/c.png"
    assert without_folders(text, recipe) == "s3://bucket/data/a.jsonl:3, `train.jsonl`, ./data/b.png, file://c.png"
