"""The two sides of scripts/benchmarks/training.py, each in a process of its own: the same model, dialogues and LoRA.

    ours      this toolkit: packed rows, its attention, head and loss, through finetune.training.trainer.train
    random    transformers' Trainer and IdeficsProcessor, padded batches in random order
    grouped   the same, batches of like lengths, sorted over the whole set: the least padding there can be. The
              trainer's own group_by_length sorts within 50 batches, or less in a small set, and pads more.
    alone     the same, one dialogue a batch and as many batches a step: no padding at all. A CPU, whose products are
              fast at a hundred tokens already, is best off so; a GPU worst.

The stock side is given what it lacks: the loss over the whole decoupled vocabulary (its own crashes), labels of the
answers alone, ready-made.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from arithmetic import Arithmetic, Sizes, products_of_an_image
from check_plan import MIDDLE
from process_memory import memory, reset_highest
from torch import nn
from training_clock import Clock
from training_mixes import make_mix, vocabulary
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from finetune.data.chat_template import Rendered, Text, render
from finetune.data.collate import RowCollator
from finetune.data.conversation import Dialogue, Image
from finetune.data.images import Preprocessing, digest
from finetune.data.sampling import Mix, build_schedule
from finetune.data.tokenize import Encoder, Example, tokenize_all
from finetune.recipe.schema import Training
from finetune.training.image_features import FeatureCache
from finetune.training.trainer import train
from modeling import tiny
from modeling.adapters import attach
from modeling.loading import extend_vocabulary
from modeling.packed_forward import image_features, packed_loss
from modeling.shapes import Config
from modeling.tokens import FAKE, IGNORED, IMAGE

MODES = {"cross_attention": "lora", "decoder": "lora"}
RANK = 16
RATE = 1e-4

MODELS: dict[str, Config] = {
    "27m": {
        **MIDDLE,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vision_config": {**MIDDLE["vision_config"], "embed_dim": 192, "intermediate_size": 768},
        "perceiver_config": {**MIDDLE["perceiver_config"], "resampler_n_heads": 3},
    },
    "89m": MIDDLE,
    "354m": {
        **MIDDLE,
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "vision_config": {
            **MIDDLE["vision_config"],
            "embed_dim": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
        },
        "perceiver_config": {**MIDDLE["perceiver_config"], "resampler_n_heads": 12},
    },
}
"""Named by their millions of parameters; all have a vision tower of 12 layers that reads 224 pixels."""


@dataclass(frozen=True)
class Settings:
    """Of one measurement."""

    side: str
    """ours, random, grouped or alone."""
    model: str
    mix: str
    examples: int
    batch: int
    """Dialogues of a padded batch; a packed row has as many on average."""
    epochs: int
    features: str
    """live: pixels go through the vision tower every time. cached: once, before training. Of our side alone."""
    checkpointing: bool
    seed: int = 0
    busy: bool = False
    """Other programs run on this machine: one thread, and seconds that its processor spent on us."""

    @property
    def now(self) -> Callable[[], float]:
        return time.process_time if self.busy else time.perf_counter

    @classmethod
    def read(cls, text: str) -> "Settings":
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Data:
    """The dialogues of a mix, prepared."""

    dialogues: list[Dialogue]
    rendered: list[Rendered]
    examples: list[Example]
    processor: Any

    @classmethod
    def make(cls, settings: Settings) -> "Data":
        texts = [*vocabulary(), *["User: \nUser: \nAssistant: ? ."] * 50]
        tokenizer = tiny.train_tokenizer(texts, vocab_size=MIDDLE["vocab_size"], added=3)
        dialogues = make_mix(settings.mix, settings.examples, seed=settings.seed)
        rendered = [render(dialogue) for dialogue in dialogues]
        examples = [one for one in tokenize_all(rendered, Encoder(tokenizer)) if isinstance(one, Example)]
        assert len(examples) == len(dialogues)
        return cls(dialogues, rendered, examples, tiny.build_processor(tokenizer, image_size=224))

    @property
    def images(self) -> list[Image]:
        """Distinct ones."""
        return list(dict.fromkeys(image for dialogue in self.dialogues for image in dialogue.images))


def make_model(settings: Settings) -> nn.Module:
    """The model with LoRA, equal on both sides: the factors that begin with zeros do not, so that all learn."""
    model = tiny.build_model(MODELS[settings.model], seed=settings.seed, packed=settings.side == "ours")
    extend_vocabulary(model)
    torch.manual_seed(settings.seed)
    wrapped = attach(model, MODES, lora={"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0}, base="random")
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return wrapped.train()


# Ours


def our_rows(data: Data, settings: Settings) -> RowCollator:
    lengths = np.array([len(example) for example in data.examples])
    place = {image: number for number, image in enumerate(data.images)}
    image_ids = [[place[image] for image in one.images] for one in data.rendered]
    counts = np.array([len(set(ids)) for ids in image_ids])
    rows = build_schedule(
        Mix([len(lengths)], [None], lengths),
        counts,
        row_tokens=row_tokens(lengths, settings.batch),
        row_images=max(1, settings.batch * int(counts.max())),
        rows_per_step=1,
        seed=settings.seed,
        epochs=settings.epochs,
    )
    preprocessing = Preprocessing.of(data.processor.image_processor)
    return RowCollator(rows, data.examples, image_ids, data.images, preprocessing, filler=1)


def row_tokens(lengths: np.ndarray, batch: int) -> int:
    """A row has as many tokens as `batch` dialogues have on average, so that both sides take as many steps."""
    return int(max(lengths.max(), np.ceil(batch * lengths.mean())))


def with_features(model: nn.Module, rows: RowCollator, folder: Path) -> RowCollator:
    """Rows with the features of their images, from an empty cache; the model goes on without its image towers."""
    base = model.get_base_model()
    config = base.config
    cache = FeatureCache(
        folder / "features",
        "random",
        rows.preprocessing,
        (config.perceiver_config.resampler_n_latents, config.vision_config.embed_dim),
        torch.float32,
        limit=10**11,
    )
    digests = np.array([digest(image) for image in rows.images], dtype="S32")

    @torch.no_grad()
    def towers(pixels: torch.Tensor) -> torch.Tensor:
        return image_features(base, pixels)

    features = cache.open(rows.images, digests, np.arange(len(rows.images)), towers=lambda: towers)
    base.model.vision_model = base.model.perceiver_resampler = None
    return replace(rows, features=features)


def our_run(settings: Settings, data: Data, model: nn.Module, folder: Path, clock: Clock) -> dict[str, Any]:
    rows, filling = our_rows(data, settings), 0.0
    if settings.features == "cached" and rows.images:
        started = settings.now()
        rows = with_features(model, rows, folder)
        filling = settings.now() - started
    training = Training(
        epochs=settings.epochs,
        row_tokens=1,
        tokens_per_step=1,
        learning_rate=RATE,
        schedule="constant",
        checkpoint_every=10**6,
        checkpointing=settings.checkpointing,
    )
    tokenizer = data.processor.tokenizer
    train(model, tokenizer, folder, training, train_rows=rows, callbacks=[clock])
    ends = [sum(row.epoch <= epoch for row in rows.rows) for epoch in range(settings.epochs)]
    return {"filling": filling, "epoch_ends": ends, "tokens": sum(map(rows.tokens, range(ends[0]))), "padding": 0.0}


# Stock


@dataclass(frozen=True)
class StockCollator:
    """Dialogue numbers -> a padded batch from IdeficsProcessor, and labels."""

    data: Data

    def __call__(self, features: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        numbers = [feature["dialogue"] for feature in features]
        batch = self.data.processor(
            text=[stock_prompt(self.data.rendered[number]) for number in numbers],
            add_eos_token=True,
            add_end_of_utterance_token=False,
            padding="longest",
            padding_side="right",
            return_tensors="pt",
        )
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for place, number in enumerate(numbers):
            labels = torch.from_numpy(self.data.examples[number].labels)
            batch["labels"][place, : len(labels)] = labels
        return dict(batch)


def stock_prompt(rendered: Rendered) -> list[str | PIL.Image.Image]:
    """The text and images of `rendered` as the processor wants them: it writes image tokens and both ends itself."""
    images, prompt = iter(rendered.images), list[Any]()
    for piece in rendered.pieces[1:-1]:
        if isinstance(piece, Text):
            prompt.append(piece.text)
        elif piece.name == IMAGE:
            source = next(images).source
            assert isinstance(source, bytes)
            prompt.append(PIL.Image.open(BytesIO(source)).convert("RGB"))
        elif piece.name != FAKE:
            prompt.append(piece.name)
    return prompt


def whole_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """transformers' own loss, told how wide the logits are."""
    return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch=num_items_in_batch)


def stock_run(settings: Settings, data: Data, model: nn.Module, folder: Path, clock: Clock) -> dict[str, Any]:
    lengths = [len(example) for example in data.examples]
    grouped = settings.side == "grouped"
    order = by_length(lengths, settings.batch, seed=settings.seed) if grouped else list(range(len(lengths)))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1 if settings.side == "alone" else settings.batch,
        gradient_accumulation_steps=settings.batch if settings.side == "alone" else 1,
        train_sampling_strategy="sequential" if grouped else "random",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        gradient_checkpointing=settings.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.checkpointing else None,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=clock.reading(StockCollator(data)),
        train_dataset=datasets.Dataset.from_dict({"dialogue": order}),
        compute_loss_func=whole_loss,
        callbacks=[clock],
    )
    trainer.train()
    steps = -(-len(lengths) // settings.batch)
    tokens, multiplied = sum(lengths), clock.tokens / settings.epochs
    return {
        "filling": 0.0,
        "epoch_ends": [steps * (epoch + 1) for epoch in range(settings.epochs)],
        "tokens": tokens,
        "padding": 1 - tokens / multiplied,
    }


def by_length(lengths: Sequence[int], batch: int, *, seed: int) -> list[int]:
    """All numbers, so that batches are of like lengths and come in any order, what is left over last."""
    order = np.argsort(lengths, kind="stable")
    whole = len(order) // batch * batch
    batches = np.random.default_rng(seed).permutation(order[:whole].reshape(-1, batch))
    return [*batches.flatten().tolist(), *order[whole:].tolist()]


# Measuring


def measure(settings: Settings) -> dict[str, Any]:
    """One side's run: seconds by epoch and part, memory, what it read."""
    if settings.busy:
        torch.set_num_threads(1)
    imported = memory()["VmRSS"]
    data, model = Data.make(settings), make_model(settings)
    parameters = sum(one.numel() for one in model.parameters() if not one.requires_grad)
    rates = [multiplying_rate(settings.now)]
    clock = Clock(model, settings.now)
    reset_highest()
    run = our_run if settings.side == "ours" else stock_run
    with TemporaryDirectory() as folder:
        found = run(settings, data, model, Path(folder), clock)
    highest = memory()["VmHWM"] - imported
    rates.append(multiplying_rate(settings.now))
    return {
        **found,
        "epochs": clock.epochs(found["epoch_ends"]),
        "memory": highest,
        "rates": rates,
        "necessary": necessary(settings, data),
        "dialogues": len(data.dialogues),
        "images": len(data.images),
        "supervised": sum(example.supervised for example in data.examples),
        "median_tokens": float(np.median([len(example) for example in data.examples])),
        "parameters": parameters,
    }


def multiplying_rate(now: Callable[[], float]) -> float:
    """Floating-point operations a second of this machine's fp32 matrix products, right now: the median of twenty."""
    left, right = torch.ones(1024, 1024), torch.ones(1024, 4096)
    seconds = []
    for _ in range(20):
        started = now()
        left @ right
        seconds.append(now() - started)
    return 2 * 1024 * 1024 * 4096 / statistics.median(seconds)


def necessary(settings: Settings, data: Data) -> float:
    """Floating-point operations that an epoch cannot do without, whoever runs it; matrix products alone.

    With live features, every distinct image goes once through the vision tower; with cached ones, none.
    """
    arithmetic = Arithmetic(MODELS[settings.model], RANK)
    products = 0.0
    for example, rendered in zip(data.examples, data.rendered, strict=True):
        seeing = int((example.image_index >= 0).sum())
        products += arithmetic.products(Sizes(len(example), example.supervised, len(rendered.images), seeing))
    if settings.features == "live":
        products += len(data.images) * products_of_an_image(arithmetic.config)
    return 2 * products


def gradients(settings: Settings) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss per supervised token, gradient of every trained tensor) of the first dialogues, before any training."""
    few = replace(settings, examples=min(settings.examples, 2 * settings.batch), epochs=1)
    data, model = Data.make(few), make_model(few)
    supervised = sum(example.supervised for example in data.examples)
    losses = (_our_losses if few.side == "ours" else _stock_losses)(few, data, model)
    total = 0.0
    for loss in losses:
        (loss / supervised).backward()
        total += loss.item()
    return total / supervised, {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


def _our_losses(settings: Settings, data: Data, model: nn.Module) -> Any:
    rows = our_rows(data, settings)
    with TemporaryDirectory() as folder:
        if settings.features == "cached" and rows.images:
            rows = with_features(model, rows, Path(folder))
        for number in range(len(rows)):
            yield packed_loss(model, rows.at(number), config=model.config)


def _stock_losses(settings: Settings, data: Data, model: nn.Module) -> Any:
    collator = StockCollator(data)
    for start in range(0, len(data.dialogues), settings.batch):
        numbers = range(start, min(start + settings.batch, len(data.dialogues)))
        batch = collator([{"dialogue": number} for number in numbers])
        for place, number in enumerate(numbers):
            ids = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist()
            assert ids == data.examples[number].input_ids.tolist(), "the two sides do not read the same tokens"
        yield whole_loss(model(**{**batch, "labels": None}), batch["labels"], torch.tensor(1.0))
