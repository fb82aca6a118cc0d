"""Small models and tokenizers that several tests share, made once."""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import mistral_common
import pytest
import torch
from transformers import AutoTokenizer

from modeling import loading, tiny
from modeling.shapes import IDEFICS_9B, stand_in

TEXTS = (
    "User: What is in this image?",
    "Assistant: A small dog, and a red ball.",
    "is there a blue circle in the image? yes, no",
    "The quick brown fox jumps over the lazy dog.",
) * 8


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(2)


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
        "additional_special_tokens": list(tiny.ADDED),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A stand-in of the 9B (same structure, 0.9M parameters, 2 added tokens) on disk, with its processor."""
    folder = tmp_path_factory.mktemp("base")
    config = stand_in(IDEFICS_9B)
    model = tiny.build_model(config, seed=0)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "alpha" not in name:
            parameter.data *= 3  # fresh weights are so small that every answer would look the same
    model.save_pretrained(folder)
    tokenizer = tiny.train_tokenizer(TEXTS, vocab_size=config["vocab_size"])
    loading.save_processor(tiny.build_processor(tokenizer, image_size=64), folder)
    return folder


@pytest.fixture
def idefics(base_folder):
    """The stand-in, loaded afresh in fp32 and extended to instruct."""
    return loading.load(str(base_folder))
