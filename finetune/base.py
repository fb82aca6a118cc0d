"""A base's name -> its folder, or its model on this machine; and fresh bases, of a shape and the sources' texts."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from finetune.console import track
from finetune.data.records import read_dialogues
from finetune.data.stats import Account
from finetune.distributed import collectives
from finetune.distributed.device import device
from finetune.recipe.schema import Source
from finetune.stages import adapter_fingerprint, digest
from modeling import loading, tiny
from modeling.adapter_weights import AdapterWeights
from modeling.checkpoint import fingerprint, read_checkpoint, require_shapes
from modeling.config import is_folder, read_config
from modeling.errors import UserError
from modeling.quantize import quantized_checkpoint
from modeling.shapes import SHAPES, Config, tensor_shapes

QUANTIZED = "quantized"
"""Folder of quantised weights, beside that of prepared sets."""

DECIDING_FILES = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json"),
)
"""Of a base, beside its weights, what training depends on."""


def local_base(base: str, *, revision: str | None) -> Path:
    """Folder of a base; a hub id is fetched, by the main process first: the others find what it fetched."""
    return collectives.main_first("fetch the base", lambda: loading.local_folder(base, revision=revision))


def content_of(base: Path, continue_from: str | None = None) -> str | None:
    """A hash of what a run stands on: a base's weights, as `fingerprint` sees them, its settings and its tokenizer; and
    the adapter that it continues from. None where the folder holds no whole base."""
    try:
        weights = fingerprint(read_checkpoint(base))
        others = [path for path in sorted(base.iterdir()) if path.name in DECIDING_FILES]
        before = adapter_fingerprint(Path(continue_from)) if continue_from else None
        return digest([weights, before, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in others}])
    except (UserError, OSError):
        return None


def require_whole(base: str, *, revision: str | None, continue_from: str | None) -> None:
    """Base and adapter are whole and fit each other, as far as headers say: before hours of work, not after.

    Of a hub id, whose files may not be here yet, the config alone. Raises UserError.
    """
    config = read_config(base, revision=revision)
    if is_folder(base):
        require_shapes(Path(base), read_checkpoint(Path(base)), tensor_shapes(config))
    if continue_from:
        adapter = AdapterWeights.read(Path(continue_from))
        added = adapter.added_tokens or config["additional_vocab_size"]
        adapter.require_fit(tensor_shapes({**config, "additional_vocab_size": added}))


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
        quantized = collectives.on_main("quantise", lambda: quantized_checkpoint(folder, cache, name=name, track=track))
    return loading.load(
        base,
        revision=revision,
        dtype=dtype,
        instruct=instruct,
        quantized=quantized,
        device=loading.CPU if divided else device(),
        weights=not divided or collectives.is_main(),
        image_towers=image_towers,
    )


def make_base(shape: str, sources: list[Source], folder: Path, *, seed: int) -> None:
    """A fresh base of a shape, on disk; its tokenizer learns from the texts of the sources."""
    config = SHAPES[shape]
    tokenizer = learn_tokenizer(config, sources, seed=seed, instruct=False)
    processor = tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"])
    loading.save_processor(processor, folder)
    tiny.build_model(config, seed=seed).save_pretrained(folder)


def learn_tokenizer(config: Config, sources: list[Source], *, seed: int, instruct: bool) -> Any:
    texts = [
        f"{turn.role.capitalize()}: {turn.text}"
        for source in sources
        for _, dialogues in read_dialogues(source, Account(source.name), seed=seed, track=track)
        for dialogue in dialogues
        for turn in dialogue.turns
    ]
    if not texts:
        raise UserError("model.init: the sources hold no text to learn a vocabulary from")
    return tiny.train_tokenizer(texts, vocab_size=config["vocab_size"], added=3 if instruct else 2)
