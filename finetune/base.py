"""A base's name -> its folder, processor and model; and fresh bases, whose tokenizer learns from the sources' texts."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.console import track
from finetune.data.images import Preprocessing
from finetune.data.records import read_dialogues
from finetune.data.stats import SourceStats
from finetune.distributed import collectives
from finetune.distributed.device import device
from finetune.recipe.schema import Recipe, Source, need_end_of_utterance
from modeling import loading, tiny
from modeling.adapter_files import adapter_fingerprint
from modeling.adapter_weights import AdapterWeights
from modeling.checkpoint import fingerprint, read_checkpoint, require_shapes
from modeling.config import is_folder, read_config
from modeling.device import auto_dtype
from modeling.errors import UserError
from modeling.files import flush, json_digest, partial_of, put_in_place
from modeling.quantize import quantized_checkpoint
from modeling.shapes import SHAPES, Config, tensor_shapes

QUANTIZED = "quantized"
"""Folder of quantised weights, beside that of prepared sets."""

DECIDING_FILES = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json"),
)
"""Of a base, beside its weights, what training depends on."""


@dataclass(frozen=True)
class Base:
    """The base of one recipe: what it is called, its processor, and how its model is loaded."""

    name: str
    """Folder or hub id."""
    revision: str | None
    processor: Any
    """transformers' IdeficsProcessor."""
    preprocessing: Preprocessing
    instruct: bool
    """Whether the model learns `<end_of_utterance>`: a run on documents alone leaves a base a base."""
    dtype: torch.dtype
    """Of what is not trained."""
    quantize: str | None
    cache: Path
    """Folder of quantised weights."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def fetch(self) -> Path:
        """Return the folder of its files; of a hub id, they are downloaded first."""
        return local_base(self.name, revision=self.revision)

    def load(self, *, image_towers: bool = True, divided: bool = False) -> nn.Module:
        """Return the model on its device; see `load_model`."""
        return load_model(
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            instruct=self.instruct,
            quantize=self.quantize,
            cache=self.cache,
            image_towers=image_towers,
            divided=divided,
        ).model


def open_base(recipe: Recipe, sources: Sequence[Source], run_folder: Path) -> Base:
    """Return the base that a recipe names, or make the fresh one that it asks for, in `run_folder`/base.

    sources: the training sources, their formats known; a fresh base's tokenizer learns from their texts. Of a hub id
    only its processor is downloaded. Every process of a group calls this.
    """
    model, instruct = recipe.model, need_end_of_utterance(sources)
    if model.base:
        name = model.base
    else:
        name = str(run_folder / "base")
        collectives.on_main("make the base", lambda: _make_base_once(recipe, sources, Path(name)))
    processor = loading.load_processor(name, revision=model.revision, instruct=instruct)
    return Base(
        name=name,
        revision=model.revision,
        processor=processor,
        preprocessing=Preprocessing.of(processor.image_processor, name),
        instruct=instruct,
        dtype={"auto": auto_dtype(), "fp32": torch.float32, "bf16": torch.bfloat16}[model.dtype],
        quantize=model.quantize,
        cache=Path(recipe.data.prepared).with_name(QUANTIZED),
    )


def _make_base_once(recipe: Recipe, sources: Sequence[Source], folder: Path) -> None:
    if folder.is_dir():
        return
    shape, partial = recipe.model.init, partial_of(folder)
    assert shape
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    make_base(shape, sources, partial, seed=recipe.training.seed)
    for path in partial.iterdir():
        flush(path)
    put_in_place(partial, folder)


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
        settings = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in others}
        return json_digest([weights, before, settings])
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


def make_base(shape: str, sources: Sequence[Source], folder: Path, *, seed: int) -> None:
    """A fresh base of a shape, on disk; its tokenizer learns from the texts of the sources."""
    config = SHAPES[shape]
    tokenizer = learn_tokenizer(config, sources, seed=seed, instruct=False)
    processor = tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"])
    loading.save_processor(processor, folder)
    tiny.build_model(config, seed=seed).save_pretrained(folder)


def learn_tokenizer(config: Config, sources: Sequence[Source], *, seed: int, instruct: bool) -> Any:
    texts = [
        f"{turn.role.capitalize()}: {turn.text}"
        for source in sources
        for _, dialogues in read_dialogues(source, SourceStats(source.name), seed=seed, track=track)
        for dialogue in dialogues
        for turn in dialogue.turns
    ]
    if not texts:
        raise UserError("model.init: the sources hold no text to learn a vocabulary from")
    return tiny.train_tokenizer(texts, vocab_size=config["vocab_size"], added=3 if instruct else 2)
