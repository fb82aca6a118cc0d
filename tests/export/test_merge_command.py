"""`finetune merge` as it is typed: a run, any adapter, verifying, and a model card that says the truth."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from merging import adapter_for, files_of, spoil
from safetensors.torch import load_file
from typer.testing import CliRunner

from finetune.cli import app
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.cards import model_card
from finetune.export.merge_command import merge_folder
from modeling.safetensors_io import fingerprint, read_checkpoint

RECIPE = "model:\n  base: some/base\n# ```\n# not the end of the recipe\n"
EVALUATION = {"base": {"exact": 0.25, "loss": 3.5, "vqa": None}, "tuned": {"exact": 0.5, "loss": 1.25, "vqa": None}}
DATA = {"sources": [{"source": "dialogues.jsonl", "examples": 12345}, {"source": "a`b\n# c|d", "examples": 1}]}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in ("merge", *arguments)])


def told(outcome):
    """The message of a command that failed, its line breaks undone."""
    assert outcome.exit_code == 1, outcome.output
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit)
    return " ".join(outcome.stderr.split())


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """A run folder after training and evaluating."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    adapter_for(base_folder, run / "adapter", {"decoder": "lora", "gates": "full"})
    metadata = AdapterMetadata(str(base_folder), None, True, None, fingerprint(read_checkpoint(base_folder)))
    metadata.write(run / "adapter")
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "data.json").write_text(json.dumps(DATA))
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "mine")


def test_merge_run_and_verify(run, base_folder):
    """A run folder is merged into itself and verified."""
    outcome = invoke(run, "--json")
    assert outcome.exit_code == 0, outcome.output
    record = json.loads(outcome.stdout)
    assert record == json.loads((run / "merged" / "provenance.json").read_text())
    assert record["made_of"] | {"adapter": None} == {
        "base": fingerprint(read_checkpoint(base_folder)),
        "adapter": None,
        "instruct": True,
        "base_precision": "full",
        "dtype": None,
        "shard_bytes": 5_000_000_000,
    }
    assert load_file(run / "merged" / "model.safetensors")["lm_head.additional_fc.weight"].shape == (3, 64)
    verified = invoke(run / "merged", "--verify", "--json")
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout) == record["parity"]
    before = files_of(run / "merged")
    again = invoke(run, "--json")
    assert json.loads(again.stdout) == record
    assert files_of(run / "merged") == before


def test_merge_shows_parity(run):
    """What was proved is shown."""
    outcome = invoke(run)
    assert outcome.exit_code == 0, outcome.output
    lines = [" ".join(line.replace("│", " ").split()) for line in outcome.stdout.splitlines()]
    assert "tensors compared with base + adapter, by sampled rows 177" in lines
    assert "blocks run, merged and as base + adapter 8" in lines
    assert any(line.startswith("largest difference of a tensor / what rounding explains 0.") for line in lines)
    verified = invoke(run / "merged", "--verify")
    assert verified.exit_code == 0
    assert "blocks run, merged and as base + adapter" in verified.stdout


@pytest.mark.parametrize("named", ["HuggingFaceM4/idefics-9b", None])
def test_merge_adapter_onto_named_base(run, base_folder, tmp_path, named):
    """An adapter is merged onto the base that is named into the folder that is named."""
    (run / "adapter" / "finetune.json").unlink()
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = named
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    options = ("--dtype", "bf16", "--shard-size", "500KB", "--json")
    outcome = invoke(run / "adapter", "--base", base_folder, "--out", tmp_path / "a" / "b", *options)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["sources"]["base"] == str(base_folder)
    shards = sorted((tmp_path / "a" / "b").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 520_000 for shard in shards)
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert not (run / "merged").exists()


def test_merge_adapter_beside_it(run):
    """An adapter's merged model lies beside it."""
    assert invoke(run / "adapter").exit_code == 0
    assert (run / "merged" / "provenance.json").is_file()


def test_merge_moved_base(run, base_folder, tmp_path):
    """The base it was trained on may have moved and no other may take its place."""
    moved, other = (shutil.copytree(base_folder, tmp_path / name) for name in ("moved", "other"))
    spoil(other / "model.safetensors", lambda tensors: tensors["lm_head.weight"].add_(1))
    AdapterMetadata(str(tmp_path / "gone"), None, True, None, fingerprint(read_checkpoint(base_folder))).write(
        run / "adapter"
    )
    assert "gone' is neither a folder here nor a hub id" in told(invoke(run))
    assert "was trained on other weights than those of" in told(invoke(run, "--base", other))
    assert not (run / "merged").exists()
    assert invoke(run, "--base", moved).exit_code == 0


def test_merge_run_in_nf4(run, base_folder, tmp_path):
    """A run trained in 4 bits is merged as it was trained."""
    AdapterMetadata(str(base_folder), None, True, "nf4", None).write(run / "adapter")
    record = json.loads(invoke(run, "--json").stdout)
    assert record["made_of"]["base_precision"] == "nf4"
    assert record["against"].keys() == {"full"}
    outcome = invoke(run, "--base-precision", "full", "--out", tmp_path / "full")
    assert outcome.exit_code == 0, outcome.output
    assert "that of a block, with the base in NF4" in outcome.stdout
    record = json.loads((tmp_path / "full" / "provenance.json").read_text())
    assert record["made_of"]["base_precision"] == "full"
    assert record["against"].keys() == {"nf4"}


def test_verify_names_changes(run):
    """What changed is told by verify."""
    merge_folder(run, base=None, out=None, base_precision=None, dtype=None, shard_size=None, show=False)
    spoil(run / "merged" / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert "has changed since it was merged: model.safetensors is another" in told(invoke(run / "merged", "--verify"))
    assert "expected a merged model with its provenance.json, found none" in told(invoke(run, "--verify"))


MISTAKES = {
    "no folder": (["gone"], "gone: no such adapter folder"),
    "no adapter": (
        ["empty"],
        "empty: expected an adapter folder (adapter_config.json or trained.safetensors), found neither",
    ),
    "a model": (
        ["model"],
        "model: expected an adapter folder (adapter_config.json or trained.safetensors), found a model",
    ),
    "untrained": (["untrained"], "untrained/adapter: no such adapter folder; first: finetune train"),
    "size": (
        ["mine", "--shard-size", "5 bananas"],
        "--shard-size: expected a size with its unit, such as 5GB or 24GiB, got '5 bananas'",
    ),
    "overrides": (["mine", "training.steps=3"], "training.steps=3: only a recipe has keys to change"),
    "options of a recipe": (["a.yaml", "--dtype", "bf16", "--out", "x"], "--out, --dtype: not with a recipe"),
    "verify a recipe": (["a.yaml", "--verify"], "--verify: not with a recipe; give the run's folder instead"),
    "options of verify": (["mine", "--verify", "--base", "x"], "--base: not with --verify"),
    "out is a file": (["mine", "--out", "file"], "--out: 'file' is a file; expected a folder"),
    "out is in use": (["mine", "--out", "model"], "model: is not empty, and not the result of this merge"),
}


@pytest.mark.parametrize(("option", "got"), [("--dtype", "int8"), ("--base-precision", "nf5")])
def test_merge_choices(run, option, got):
    """typer names the values that an option takes, and nothing is written."""
    outcome = invoke(run, option, got)
    assert outcome.exit_code == 2
    assert f"'{got}' is not one of" in outcome.output
    assert not (run / "merged").exists()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_merge_mistakes(run, tmp_path, monkeypatch, mistake):
    """A mistake is one message and writes nothing."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "model", "untrained"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "untrained" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "file").write_text("mine")
    before = files_of(tmp_path)
    arguments, message = MISTAKES[mistake]
    assert message in told(invoke(*arguments))
    assert files_of(tmp_path) == before


def test_merge_full_disk(run, monkeypatch):
    """A full disk is told and the command goes on."""

    def write_shard(path, tensors):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("finetune.export.merge.write_shard", write_shard)
        assert "No space left on device; what is complete is kept, and the same command goes on" in told(invoke(run))
    assert invoke(run).exit_code == 0


def test_model_card_content(trained, tmp_path):
    """The card says what the model is made of and the truth about licences."""
    text = model_card("HuggingFaceM4/idefics-9b", tmp_path / "merged", trained)
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "HuggingFaceM4/idefics-9b",
        "library_name": "transformers",
        "license": "other",
        "pipeline_tag": "image-text-to-text",
        "tags": ["idefics", "instruction-tuning"],
    }
    assert card.text.splitlines() == [
        "",
        "# `mine`",
        "",
        "IDEFICS, fine-tuned from `HuggingFaceM4/idefics-9b`, with everything that was trained merged into its "
        "weights. `provenance.json` holds what it was made of, hashes, and its parity with base + adapter.",
        "",
        "## Data",
        "",
        "- `dialogues.jsonl`: 12,345 examples",
        "- `` a`b # c|d ``: 1 examples",
        "",
        "## Figures on eval data",
        "",
        "| | base | this model |",
        "| --- | --- | --- |",
        "| exact | 0.25 | 0.5 |",
        "| loss | 3.5 | 1.25 |",
        "",
        "## Recipe",
        "",
        "````yaml",
        *RECIPE.splitlines(),
        "````",
        "",
        "## Licence",
        "",
        "The language model inside IDEFICS is LLaMA, whose weights are for non-commercial research; CLIP's weights, "
        "and those that IDEFICS added, are MIT. What it was trained on has licences of its own. Merging lifts none.",
    ]


def test_model_card_beside_weights(run):
    """The card lies beside the merged weights."""
    assert invoke(run).exit_code == 0
    card = ModelCard.load(run / "merged" / "README.md")
    assert card.data.license == "other"
    assert "LLaMA, whose weights are for non-commercial research" in card.text


@pytest.mark.parametrize(
    "name", ["---", "a\n---\nlicense: mit\n---", "`", "``` x", "](http://x)", "<script>", "# a", "é 模"]
)
def test_model_card_hostile_name(tmp_path, name):
    """A hostile name stays a name."""
    base, out = tmp_path / name.replace("/", "_"), tmp_path / name.replace("/", "_")
    base.mkdir()
    card = ModelCard(model_card(str(base), out, None))
    assert card.data.license == "other"
    assert card.data.base_model is None
    lines = card.text.splitlines()
    assert [line for line in lines if line.startswith(("#", "---", "license"))] == [lines[1], "## Licence"]
    shown = " ".join(out.name.split())
    assert lines[1].startswith("# `")
    assert shown in lines[1]
    ticks = len(lines[1]) - len(lines[1].rstrip("`"))
    assert "`" * ticks not in shown


@pytest.mark.parametrize("name", ["data.json", "evaluation.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"sources": 3, "tuned": 3}', '{"sources": [{}], "tuned": {"loss": 1}}'])
def test_model_card_odd_files(run, name, content):
    """The card's files that are cut or odd are named before anything is merged."""
    (run / name).write_text(content)
    assert f"{run / name}: " in told(outcome := invoke(run))
    assert "delete it, and the card does without" in told(outcome)
    assert not (run / "merged").exists()
