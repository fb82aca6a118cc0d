"""Small models and tokenizers that several tests share, made once."""

import gc
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import mistral_common
import PIL.Image
import pytest
import torch
import yaml
from small_models import stand_in
from sources import make_source
from transformers import AutoTokenizer

from finetune.data.collate import RowCollator
from finetune.data.images import Preprocessing
from finetune.data.prepare import prepare
from finetune.data.sampling import Mix, build_schedule
from finetune.recipe.schema import Augment
from modeling import loading, tiny
from modeling.shapes import IDEFICS_9B
from modeling.tokens import ADDED

hypothesis.settings.register_profile("patient", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("patient")  # how fast a machine is, and what else it does, is no test's result

TEXTS = (
    "User: What is in this image?",
    "Assistant: A small dog, and a red ball.",
    "is there a blue circle in the image? yes, no",
    "The quick brown fox jumps over the lazy dog.",
) * 8


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small lose more by waiting for a second thread than it brings them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _collected_once():
    """Every training begins with a collection, which takes half a second if it walks through all that is imported."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """300 + 3 ids, trained on a handful of sentences."""
    return tiny.train_tokenizer(TEXTS, vocab_size=300, added=3)


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory):
    """32,000 + 3 ids: a LLaMA-style SentencePiece model, which behaves like IDEFICS's own tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "additional_special_tokens": list(ADDED),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def save_stand_in(folder, dtype=torch.float32, **changes):
    """Write a stand-in of the 9B with `changes` to its configuration, and its processor."""
    config = stand_in(IDEFICS_9B) | changes
    model = tiny.build_model(config, seed=0)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "alpha" not in name:
            parameter.data *= 3  # fresh weights are so small that every answer would look the same
    model.to(dtype).save_pretrained(folder)
    tokenizer = tiny.train_tokenizer(TEXTS, vocab_size=config["vocab_size"])
    loading.save_processor(tiny.build_processor(tokenizer, image_size=64), folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A stand-in of the 9B (same structure, 0.9M parameters, 2 added tokens) on disk, with its processor."""
    return save_stand_in(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory):
    """A stand-in of half the layers, with as many gated blocks: at this size a step takes its time a tensor."""
    return save_stand_in(tmp_path_factory.mktemp("shallow"), num_hidden_layers=4, cross_layer_interval=2)


@pytest.fixture(scope="session")
def bf16_folder(tmp_path_factory):
    """A stand-in as the released models are: bf16 files, every width a whole number of groups."""
    vision = {**stand_in(IDEFICS_9B)["vision_config"], "embed_dim": 128}
    folder = tmp_path_factory.mktemp("bf16")
    return save_stand_in(folder, torch.bfloat16, intermediate_size=128, vision_config=vision)


@pytest.fixture
def idefics(base_folder):
    """The stand-in, loaded afresh in fp32 and extended to instruct."""
    return loading.load(str(base_folder))


COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "gray": (128, 128, 128)}


@pytest.fixture(scope="session")
def dialogue_folder(tmp_path_factory):
    """Twelve dialogues in `messages` JSONL about four plain images: several turns, two images, none, a system line."""
    folder = tmp_path_factory.mktemp("dialogues")
    for name, color in COLORS.items():
        PIL.Image.new("RGB", (20, 30), color).save(folder / f"{name}.png")
    dialogues = []
    for index, name in enumerate([*COLORS, *COLORS]):
        image = {"type": "image", "image": f"{name}.png"}
        question = {"role": "user", "content": [image, {"type": "text", "text": "what color is it?" + "?" * index}]}
        turns = [question, {"role": "assistant", "content": name}]
        if index % 2:
            turns += [
                {"role": "user", "content": "is it a dog?"},
                {"role": "assistant", "content": "no" + " no" * index},
            ]
        dialogues.append(turns)
    pair = [{"type": "image", "image": f"{name}.png"} for name in ("red", "blue")]
    pair.append({"type": "text", "text": "which two?"})
    dialogues += [
        [{"role": "user", "content": pair}, {"role": "assistant", "content": "red and blue"}],
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello, show me an image"}],
        [{"role": "system", "content": "be brief"}, *dialogues[0]],
        [*dialogues[4], {"role": "user", "content": pair[:1]}, {"role": "assistant", "content": "red"}],
    ]
    lines = [json.dumps({"messages": messages}) for messages in dialogues]
    (folder / "dialogues.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def write_recipe(shallow_folder, dialogue_folder):
    """write_recipe(folder, training={"steps": 8}) -> a recipe about the twelve dialogues, all of it in `folder`: data/,
    which holds a copy of them and the recipe, prepared/ and run/."""

    def write(folder, **changes):
        data = {"format": "messages", "path": "dialogues.jsonl"}
        sections = {
            "model": {"base": str(shallow_folder)},
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"sources": [data], "eval_split": 0.2, "max_length": 256, "workers": 0},
            "training": {"steps": 4, "row_tokens": 256, "row_images": 4, "tokens_per_step": 512},
            "evaluation": {"max_new_tokens": 4},
        }
        sections["data"]["prepared"] = str(folder / "prepared")
        sections["training"] |= {"learning_rate": 1e-2, "checkpoint_every": 2}
        for name, change in changes.items():
            sections[name] = sections[name] | change if isinstance(change, dict) else change
        shutil.copytree(dialogue_folder, folder / "data")
        path = folder / "data" / "recipe.yaml"
        path.write_text(yaml.safe_dump({**sections, "output": str(folder / "run")}))
        return path

    return write


@pytest.fixture
def recipe_file(write_recipe, tmp_path):
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def make_rows(base_folder, dialogue_folder, tmp_path_factory):
    """rows(**schedule) -> a RowCollator over the twelve dialogues, tokenised for the stand-in."""
    processor = loading.load_processor(str(base_folder))
    source = make_source("messages", paths=(dialogue_folder / "dialogues.jsonl",))
    folder = tmp_path_factory.mktemp("prepared")
    prepared, _ = prepare([source], processor.tokenizer, max_length=512, max_images=4, seed=0, folder=folder)
    assert len(prepared) == 12

    def rows(*, augment=None, **schedule):
        settings = {"row_tokens": 512, "row_images": 4, "rows_per_step": 1, "seed": 0, "epochs": 1} | schedule
        mix = Mix(prepared.sizes, [None], prepared.lengths)
        planned = build_schedule(mix, prepared.image_counts, **settings)
        return RowCollator(
            planned,
            prepared.examples,
            prepared.image_ids,
            prepared.images,
            Preprocessing.of(processor.image_processor),
            filler=1,
            augment=augment or Augment(),
        )

    return rows
