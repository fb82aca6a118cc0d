"""Find and load a base by its name, or make a fresh one, whose tokenizer is trained on the sources' texts."""

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
from finetune.data.read_dialogues import read_dialogues
from finetune.data.stats import SourceStats
from finetune.distributed import collectives
from finetune.distributed.environment import device
from finetune.recipe.schema import Recipe, Source, need_end_of_utterance
from modeling import loading, tiny
from modeling.adapter_files import adapter_fingerprint
from modeling.adapter_weights import AdapterWeights
from modeling.atomic_files import flush, json_digest, partial_of, put_in_place
from modeling.config import is_folder, read_config
from modeling.device import auto_dtype
from modeling.errors import UserError
from modeling.quantize import quantized_checkpoint
from modeling.safetensors_io import fingerprint, read_checkpoint, require_shapes
from modeling.shapes import SHAPES, Config, tensor_shapes

QUANTIZED = "quantized"
"""Name of the folder of quantised weights, beside the folder of prepared sets."""

DECIDING_FILES = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json"),
)
"""Files of a base that training depends on, besides its weights."""


@dataclass(frozen=True)
class Base:
    """The base of one recipe: its name, its processor, and how its model is loaded."""

    name: str
    """Folder or hub id."""
    revision: str | None
    processor: Any
    """transformers' IdeficsProcessor."""
    preprocessing: Preprocessing
    instruct: bool
    """Whether the model has `<end_of_utterance>`; a run only on documents does not add it to a base."""
    dtype: torch.dtype
    """Dtype of the frozen weights."""
    quantize: str | None
    cache: Path
    """Folder of quantised weights."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def fetch(self) -> Path:
        """Return the folder of its files; for a hub id, download them first."""
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
    """Return a recipe's base; for `model.init`, make a fresh one in `run_folder`/base.

    sources: the training sources, their formats resolved; a fresh base's tokenizer is trained on their texts. For a hub
    id, only the processor is downloaded. Every process of a group must call this.
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
    """Return the folder of a base; for a hub id, the main process downloads it, then the others use the same files."""
    return collectives.main_first("fetch the base", lambda: loading.local_folder(base, revision=revision))


def content_of(base: Path, continue_from: str | None = None) -> str | None:
    """Return a hash of the model that a run starts from, or None if the folder holds no whole base.

    It covers the base's weights (by `fingerprint`), settings and tokenizer, and the adapter that is continued.
    """
    try:
        weights = fingerprint(read_checkpoint(base))
        others = [path for path in sorted(base.iterdir()) if path.name in DECIDING_FILES]
        before = adapter_fingerprint(Path(continue_from)) if continue_from else None
        settings = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in others}
        return json_digest([weights, before, settings])
    except (UserError, OSError):
        return None


def require_whole(base: str, *, revision: str | None, continue_from: str | None) -> None:
    """Check from the file headers, before any long work, that base and adapter are complete and fit each other.

    For a hub id, whose files may not be downloaded yet, only the config is checked. Raises UserError.
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
    """Load a model on this machine's device; `quantize` loads it in 4 bits (NF4), cached in the folder `cache`.

    `divided`: for FSDP, which then gives every process its shard. Only the first process loads the weights, in main
    memory; the others allocate empty parameters.
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
    """Write a fresh base of a shape to disk; its tokenizer is trained on the texts of the sources."""
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
