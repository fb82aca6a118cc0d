"""Recipe -> what its stages work with: base, tokenizer, prepared data, rows, models; each made when first asked."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from finetune.data import prepare as data
from finetune.data.collate import RowCollator
from finetune.data.images import Augmentation, Preprocessing
from finetune.data.packing import pack_in_order
from finetune.data.schedule import Row, build_schedule, draws_per_epoch
from finetune.data.sources import hold_dialogues
from finetune.folder import read_json, write_json
from finetune.generate import Assistant
from finetune.progress import say, track
from finetune.recipe import Recipe, Source
from modeling import loading, tiny
from modeling.errors import UserError
from modeling.shapes import SHAPES, Config


class Materials:
    """What the stages of one recipe share. A fresh base and data.json are left in the run folder."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder

    @cached_property
    def base(self) -> str:
        """Folder or hub id of the base; a fresh one is made first."""
        model = self.recipe.model
        if model.base:
            return model.base
        assert model.init
        folder = self.folder / "base"
        if not (folder / "config.json").is_file():
            _make_base(model.init, self.sources, folder, seed=self.recipe.training.seed)
        return str(folder)

    @cached_property
    def sources(self) -> list[data.Source]:
        return [to_source(source) for source in self.recipe.data.sources]

    def load(self) -> loading.Idefics:
        revision = self.recipe.model.revision
        loaded = loading.load(self.base, revision=revision, dtype=self.dtype, instruct=self.instruct)
        loaded.model.to(device())
        return loaded

    @property
    def instruct(self) -> bool:
        """Dialogues need `<end_of_utterance>`; a run on documents alone leaves a base a base."""
        return hold_dialogues(source.format for source in self.sources)

    @cached_property
    def processor(self) -> Any:
        return loading.load_processor(self.base, revision=self.recipe.model.revision, instruct=self.instruct)

    @cached_property
    def dtype(self) -> torch.dtype:
        named = {"auto": auto_dtype(), "fp32": torch.float32, "bf16": torch.bfloat16}
        return named[self.recipe.model.dtype]

    @cached_property
    def prepared(self) -> tuple[data.Prepared, data.Prepared]:
        """(training, held out). Writes data.json."""
        recipe, tokenizer = self.recipe, self.processor.tokenizer
        training, accounts = data.prepare(self.sources, tokenizer, **self._limits)
        held_sources = [to_source(source) for source in recipe.data.eval_sources]
        held, held_accounts = data.prepare(held_sources, tokenizer, **self._limits)
        data.require_examples(training, accounts)
        if recipe.data.eval_split:
            training, held = data.split_by_image(training, recipe.data.eval_split, seed=recipe.training.seed)
        if recipe.data.eval_sources:
            data.require_examples(held, held_accounts)
        for account, draws in zip(accounts, self._draws(training), strict=True):
            account.draws_per_epoch = draws
        report: dict[str, Any] = {
            "training_examples": len(training),
            "held_out_examples": len(held),
            "sources": [account.to_json() for account in accounts],
            "eval_sources": [account.to_json() for account in held_accounts],
        }
        before = read_json(self.folder / "data.json")
        if before is not None and before != report:
            raise UserError(
                f"{self.folder}: the data has changed since this run began: {_first_difference(before, report)}\n"
                f"  go on with the data it began with, or choose another folder (output=runs/NAME)"
            )
        write_json(self.folder / "data.json", report)
        for account in (*accounts, *held_accounts):
            if account.rejected:
                say(f"{account.source}: {account.rejection()}; every reason is in {self.folder / 'data.json'}")
        return training, held

    def _draws(self, training: data.Prepared) -> list[int]:
        return draws_per_epoch(training.sizes, [source.weight for source in self.recipe.data.sources])

    @cached_property
    def train_rows(self) -> RowCollator:
        training, settings = self.prepared[0], self.recipe.training
        rows = build_schedule(
            training.lengths,
            training.image_counts,
            sizes=training.sizes,
            draws=self._draws(training),
            row_tokens=settings.row_tokens,
            row_images=settings.row_images,
            packs_per_step=settings.packs_per_step,
            seed=settings.seed,
            epochs=settings.epochs,
            steps=settings.steps,
        )
        augmentation = Augmentation(**self.recipe.data.augment.model_dump())
        blank = any(self.recipe.model.modes[tower] != "frozen" for tower in ("vision", "resampler"))
        return replace(
            self._rows(training), rows=rows, augmentation=augmentation, seed=settings.seed, blank_image=blank
        )

    @cached_property
    def held_rows(self) -> RowCollator:
        return self._held_rows(self.prepared[1])

    @cached_property
    def documents(self) -> RowCollator | None:
        """Held-out documents, where the evaluation names some."""
        evaluation = self.recipe.evaluation
        if not evaluation or not evaluation.documents:
            return None
        sources = [to_source(source) for source in evaluation.documents]
        prepared, accounts = data.prepare(sources, self.processor.tokenizer, **self._limits)
        data.require_examples(prepared, accounts)
        return self._held_rows(prepared)

    @property
    def _limits(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "max_length": recipe.data.max_length,
            "max_images": recipe.training.row_images,
            "seed": recipe.training.seed,
            "track": track,
        }

    def _held_rows(self, held: data.Prepared) -> RowCollator:
        settings = self.recipe.training
        packs = pack_in_order(
            held.lengths, held.image_ids, row_tokens=settings.row_tokens, row_images=settings.row_images
        )
        return replace(self._rows(held), rows=[Row(0, tuple(pack)) for pack in packs])

    def _rows(self, prepared: data.Prepared) -> RowCollator:
        return RowCollator(
            rows=[],
            examples=prepared.examples,
            image_ids=prepared.image_ids,
            images=prepared.images,
            preprocessing=self.preprocessing,
            filler=self.processor.tokenizer.bos_token_id,
        )

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of(self.processor.image_processor)

    def assistant(self, model: Any) -> Assistant:
        return Assistant(model, self.processor.tokenizer, self.preprocessing)


def _make_base(shape: str, sources: list[data.Source], folder: Path, *, seed: int) -> None:
    """A fresh base of a shape, on disk; its tokenizer learns from the texts of the sources."""
    config = SHAPES[shape]
    tokenizer = learn_tokenizer(config, sources, seed=seed, instruct=False)
    processor = tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"])
    loading.save_processor(processor, folder)
    tiny.build_model(config, seed=seed).save_pretrained(folder)


def learn_tokenizer(config: Config, sources: list[data.Source], *, seed: int, instruct: bool) -> Any:
    texts = [
        f"{turn.role.capitalize()}: {turn.text}"
        for source in sources
        for _, dialogue in data.read_dialogues(source, data.Account(source.name), seed=seed, track=track)
        for turn in dialogue.turns
    ]
    if not texts:
        raise UserError("model.init: the sources hold no text to learn a vocabulary from")
    return tiny.train_tokenizer(texts, vocab_size=config["vocab_size"], added=3 if instruct else 2)


def to_source(source: Source) -> data.Source:
    return data.Source(
        format=source.format,
        path=Path(source.path) if source.path else None,
        image_root=Path(source.image_root) if source.image_root else None,
        split=source.split,
        limit=source.limit,
        turns=source.turns,
    )


def auto_dtype() -> torch.dtype:
    """bf16 where the hardware has it, else fp32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Where two data.json differ first, as "key: was, is"."""
    for key in before:
        if isinstance(before[key], list):
            for one, other in zip(before[key], now[key], strict=False):
                if one != other:
                    return f"{one['source']}: {_first_difference(one, other)}"
        elif before[key] != now.get(key):
            return f"{key} was {before[key]}, is {now.get(key)}"
    return "sources"
