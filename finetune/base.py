"""A base's name -> its folder, or its model on this machine; and fresh bases, of a shape and the sources' texts."""

from pathlib import Path
from typing import Any

import torch

from finetune import ranks
from finetune.data.account import Account
from finetune.data.records import read_dialogues
from finetune.data.sources.source import Source
from finetune.device import device
from finetune.progress import track
from modeling import loading, tiny
from modeling.errors import UserError
from modeling.quantize import quantized_checkpoint
from modeling.shapes import SHAPES, Config

QUANTIZED = "quantized"
"""Folder of quantised weights, beside that of prepared sets."""


def local_base(base: str, *, revision: str | None) -> Path:
    """Folder of a base; a hub id is fetched, by the main process first: the others find what it fetched."""
    return ranks.main_first("fetch the base", lambda: loading.local_folder(base, revision=revision))


def load_model(
    base: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    instruct: bool,
    quantize: str | None,
    cache: Path,
    image_towers: bool = True,
    divided: bool = False,
) -> loading.Idefics:
    """A model on the device that this machine has, in 4 bits where `quantize` says so; its NF4 is kept in `cache`.

    `divided`: for FSDP, which gives every process its share: the first one alone has the weights, in main memory, and
    the others room for them.
    """
    quantized, folder = None, local_base(base, revision=revision)
    if quantize:
        name = Path(base).name
        quantized = ranks.on_main("quantise", lambda: quantized_checkpoint(folder, cache, name=name, track=track))
    return loading.load(
        base,
        revision=revision,
        dtype=dtype,
        instruct=instruct,
        quantized=quantized,
        device=loading.CPU if divided else device(),
        weights=not divided or ranks.is_main(),
        image_towers=image_towers,
    )


def make_base(shape: str, sources: list[Source], folder: Path, *, seed: int) -> None:
    """A fresh base of a shape, on disk; its tokenizer learns from the texts of the sources."""
    config = SHAPES[shape]
    tokenizer = learn_tokenizer(config, sources, instruct=False)
    processor = tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"])
    loading.save_processor(processor, folder)
    tiny.build_model(config, seed=seed).save_pretrained(folder)


def learn_tokenizer(config: Config, sources: list[Source], *, instruct: bool) -> Any:
    texts = [
        f"{turn.role.capitalize()}: {turn.text}"
        for source in sources
        for _, dialogues in read_dialogues(source, Account(source.name), track=track)
        for dialogue in dialogues
        for turn in dialogue.turns
    ]
    if not texts:
        raise UserError("model.init: the sources hold no text to learn a vocabulary from")
    return tiny.train_tokenizer(texts, vocab_size=config["vocab_size"], added=3 if instruct else 2)
