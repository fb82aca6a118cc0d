"""Recipe -> run folder: prepare -> train -> evaluate -> merge, each stage done once.

    runs/<name>/  recipe.yaml (resolved) · environment.json · base/ (a fresh one, from `init`) · data.json
                  metrics.jsonl · checkpoint-*/ · adapter/ · training.json · evaluation.json · predictions.jsonl
                  merged/ (with provenance.json) · merge.json · result.json · curves.png

A stage leaves its .json last, so a stage that was interrupted has none and is done again: training goes on from its
last checkpoint.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import set_seed

from finetune.data import prepare as data
from finetune.data.collate import RowCollator
from finetune.data.dialogue import RecordError
from finetune.data.images import Augmentation, Preprocessing
from finetune.data.schedule import build_schedule, draws_per_epoch
from finetune.data.sources import FORMATS
from finetune.evaluate import draw_questions, evaluate, exchange_images, held_out_loss
from finetune.folder import open_folder, read_json, versions, write_json
from finetune.generate import Assistant
from finetune.inspect import view
from finetune.merge import merge, prove
from finetune.picture import draw
from finetune.progress import console, say, track
from finetune.recipe import Recipe, Source
from finetune.train import Plan, ProgressBar, last_checkpoint, train
from modeling import loading
from modeling.adapters import attach, count_trained, expected_counts, load_adapter_weights, open_adapter
from modeling.errors import UserError
from modeling.shapes import SHAPES, Config, read_config

STAGES = ("train", "evaluate", "merge")
PROOF_ROWS = 2
PROOF_QUESTIONS = 8


class Run:
    """One recipe and its folder. What several stages need is made once, when first asked for."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        if recipe.model.base:
            read_config(recipe.model.base, revision=recipe.model.revision)  # a wrong base leaves no folder behind
        self.folder = open_folder(recipe)

    def do(self, *stages: str) -> dict[str, Any]:
        """Do these stages, those already done excepted, and return all figures there are. Raises UserError."""
        for stage in stages:
            if self._figures(_FILES[stage]) is None:
                write_json(self.folder / _FILES[stage], _DOES[stage](self))
            else:
                say(f"{stage}: done before, see {self.folder / _FILES[stage]}")
        files = {"data": "data.json", **_FILES}
        result = {name: figures for name, file in files.items() if (figures := self._figures(file)) is not None}
        write_json(self.folder / "result.json", result)
        if "train" in result:
            draw(self.folder / "metrics.jsonl", result.get("evaluate"), self.folder / "curves.png")
        return result

    def _figures(self, file: str) -> dict[str, Any] | None:
        return read_json(self.folder / file)

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
        return [_source(source) for source in self.recipe.data.sources]

    def load(self) -> loading.Idefics:
        revision = self.recipe.model.revision
        loaded = loading.load(self.base, revision=revision, dtype=self.dtype, instruct=self.instruct)
        loaded.model.to(_device())
        return loaded

    @property
    def instruct(self) -> bool:
        """Dialogues need `<end_of_utterance>`; a run on documents alone leaves a base a base."""
        return any(not FORMATS[source.format].documents for source in self.sources)

    @cached_property
    def processor(self) -> Any:
        return loading.load_processor(self.base, revision=self.recipe.model.revision, instruct=self.instruct)

    @cached_property
    def dtype(self) -> Any:
        import torch

        chosen = self.recipe.model.dtype
        if chosen == "auto":
            chosen = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen]

    @cached_property
    def prepared(self) -> tuple[data.Prepared, data.Prepared]:
        """(training, held out). Writes data.json."""
        recipe, tokenizer = self.recipe, self.processor.tokenizer
        training, accounts = data.prepare(self.sources, tokenizer, **self._limits)
        held_sources = [_source(source) for source in recipe.data.eval_sources]
        held, held_accounts = data.prepare(held_sources, tokenizer, **self._limits)
        data.require_examples(training, accounts)
        if recipe.data.eval_split:
            training, held = data.split_by_image(training, recipe.data.eval_split, seed=recipe.training.seed)
        if recipe.data.eval_sources:
            data.require_examples(held, held_accounts)
        for account, draws in zip(accounts, self._draws(training), strict=True):
            account.draws_per_epoch = draws
        report = {
            "training_examples": len(training),
            "held_out_examples": len(held),
            "sources": [account.to_json() for account in accounts],
            "eval_sources": [account.to_json() for account in held_accounts],
        }
        write_json(self.folder / "data.json", report)
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
        sources = [_source(source) for source in evaluation.documents]
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
        rows = build_schedule(
            held.lengths,
            held.image_counts,
            sizes=held.sizes,
            draws=held.sizes,
            row_tokens=settings.row_tokens,
            row_images=settings.row_images,
            packs_per_step=1,
            seed=settings.seed,
            epochs=1,
        )
        return replace(self._rows(held), rows=rows)

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

    def require_adapter(self) -> Path:
        if self._figures(_FILES["train"]) is None:
            raise UserError(f"{self.folder}: nothing is trained here yet; first: finetune train RECIPE")
        return self.folder / "adapter"


def _train(run: Run) -> dict[str, Any]:
    recipe, rows = run.recipe, run.train_rows
    idefics = run.load().model
    set_seed(recipe.training.seed)  # LoRA factors start at random
    model = attach(idefics, recipe.model.modes, lora=recipe.adapter.lora, base=run.base)
    counts = count_trained(model)
    if not recipe.adapter.model_extra:
        expected = expected_counts(idefics.config.to_dict(), recipe.model.modes, rank=recipe.adapter.rank)
        assert counts == expected, f"trained {counts}, expected {expected}"
    if recipe.model.continue_from:
        load_adapter_weights(model, Path(recipe.model.continue_from))
    plan = _plan(recipe, len(rows.rows), autocast=_autocast(recipe, run.dtype))
    resume_from, started = last_checkpoint(run.folder), time.perf_counter()
    say(f"train: {counts.total:,} parameters" + (f", going on from {resume_from.name}" if resume_from else ""))
    trainer = train(
        model,
        run.processor.tokenizer,
        run.folder,
        train_rows=rows,
        eval_rows=run.held_rows if plan.evaluate_every else None,
        plan=plan,
        resume_from=resume_from,
        callbacks=[ProgressBar()],
    )
    return {
        "steps": trainer.state.global_step,
        "epochs": rows.rows[trainer.state.global_step * plan.packs_per_step - 1].epoch + 1,
        "tokens_trained": sum(
            len(rows.examples[index])
            for row in rows.rows[: trainer.state.global_step * plan.packs_per_step]
            for index in row.examples
        ),
        "parameters_trained": asdict(counts),
        "best_step": trainer.state.best_global_step if plan.evaluate_every else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _evaluate(run: Run) -> dict[str, Any]:
    settings = run.recipe.evaluation
    if settings is None:
        raise UserError("evaluation: the recipe has no such section, and nothing to ask")
    adapter = run.require_adapter()
    questions = draw_questions(run.prepared[1].dialogues, limit=settings.limit, seed=run.recipe.training.seed)
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "track": track,
    }
    model = run.load().model
    base = run.assistant(model)
    figures: dict[str, Any] = {"base": evaluate(base, run.held_rows, questions, **options).to_json()}
    documents = run.documents
    forgetting = {"before": held_out_loss(base, documents, track=track)[0]} if documents else None
    tuned = run.assistant(open_adapter(model, adapter))
    predictions = run.folder / "predictions.jsonl"
    figures["tuned"] = evaluate(tuned, run.held_rows, questions, predictions=predictions, **options).to_json()
    figures["blind"] = None
    if len({image for images in run.held_rows.image_ids for image in images}) > 1:
        rows, swapped = exchange_images(
            run.held_rows, run.prepared[1].dialogues, questions, seed=run.recipe.training.seed
        )
        figures["blind"] = evaluate(tuned, rows, swapped, **options).to_json()
    if documents and forgetting:
        forgetting["after"] = held_out_loss(tuned, documents, track=track)[0]
    return {**figures, "documents": forgetting}


def _merge(run: Run) -> dict[str, Any]:
    adapter, out = run.require_adapter(), run.folder / "merged"
    provenance = {
        "base": run.recipe.model.base or f"init: {run.recipe.model.init}",
        "revision": run.recipe.model.revision,
        "trained": {tower: mode for tower, mode in run.recipe.model.modes.items() if mode != "frozen"},
        "versions": versions(),
    }
    merge(
        adapter,
        run.base,
        out,
        revision=run.recipe.model.revision,
        instruct=run.instruct,
        provenance=provenance,
    )
    training, held = run.prepared
    rows, dialogues = (run.held_rows, held.dialogues) if len(held) else (run.train_rows, training.dialogues)
    rows = replace(rows, rows=rows.rows[:PROOF_ROWS], augmentation=Augmentation())
    questions = draw_questions(dialogues, limit=PROOF_QUESTIONS, seed=run.recipe.training.seed)
    proof = prove(
        base=lambda: run.assistant(run.load().model),
        tuned=lambda: run.assistant(open_adapter(run.load().model, adapter)),
        merged=lambda: run.assistant(loading.load(str(out), dtype=run.dtype, instruct=False).model.to(_device())),
        rows=rows,
        prompts=[prompt for prompt, _ in questions],
    )
    return {"merged": str(out), **asdict(proof)}


_FILES = {"train": "training.json", "evaluate": "evaluation.json", "merge": "merge.json"}
_DOES: dict[str, Callable[[Run], dict[str, Any]]] = {"train": _train, "evaluate": _evaluate, "merge": _merge}


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """What `finetune run` does: as far as the recipe asks."""
    asked = {"train": True, "evaluate": recipe.evaluation is not None, "merge": recipe.merge}
    return tuple(stage for stage in STAGES if asked[stage])


def inspect(recipe: Recipe, *, count: int, ids: bool) -> None:
    """Print the first dialogues of every source as the model will see them; writes nothing."""
    model = recipe.model
    sources = [_source(source) for source in (*recipe.data.sources, *recipe.data.eval_sources)]
    instruct = any(not FORMATS[source.format].documents for source in sources)
    if model.init:
        tokenizer = _learn_tokenizer(SHAPES[model.init], sources[: len(recipe.data.sources)], seed=0, instruct=instruct)
    else:
        tokenizer = loading.load_processor(str(model.base), revision=model.revision, instruct=instruct).tokenizer
    for source in sources:
        account = data.Account(source.name)
        for place, dialogue in data.read_dialogues(source, account, seed=recipe.training.seed)[:count]:
            try:
                console.print(view(dialogue, tokenizer, title=f"{source.name} {place}", ids=ids))
            except RecordError as error:
                say(f"{source.name} {place}: {error}")
        for reason, records in account.rejected.items():
            say(f"{source.name}: {records} x {reason} (first: {account.first_rejected[reason]})")


def _make_base(shape: str, sources: list[data.Source], folder: Path, *, seed: int) -> None:
    """A fresh base of a shape, on disk; its tokenizer learns from the texts of the sources."""
    from modeling import tiny

    config = SHAPES[shape]
    tokenizer = _learn_tokenizer(config, sources, seed=seed, instruct=False)
    processor = tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"])
    loading.save_processor(processor, folder)
    tiny.build_model(config, seed=seed).save_pretrained(folder)


def _learn_tokenizer(config: Config, sources: list[data.Source], *, seed: int, instruct: bool) -> Any:
    from modeling import tiny

    texts = [
        f"{turn.role.capitalize()}: {turn.text}"
        for source in sources
        for _, dialogue in data.read_dialogues(source, data.Account(source.name), seed=seed, track=track)
        for turn in dialogue.turns
    ]
    if not texts:
        raise UserError("model.init: the sources hold no text to learn a vocabulary from")
    return tiny.train_tokenizer(texts, vocab_size=config["vocab_size"], added=3 if instruct else 2)


def _source(source: Source) -> data.Source:
    return data.Source(
        format=source.format,
        path=Path(source.path) if source.path else None,
        image_root=Path(source.image_root) if source.image_root else None,
        split=source.split,
        limit=source.limit,
        turns=source.turns,
    )


def _plan(recipe: Recipe, rows: int, *, autocast: bool) -> Plan:
    settings = recipe.training
    steps = rows // settings.packs_per_step
    return Plan(
        packs_per_step=settings.packs_per_step,
        learning_rate=settings.learning_rate,
        final_learning_rate=settings.final_learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        clip=settings.clip,
        tower_rates={"gates": settings.gates_learning_rate, "added_tokens": settings.added_tokens_learning_rate},
        seed=settings.seed,
        checkpoint_every=settings.checkpoint_every or settings.evaluate_every or max(1, steps // 10),
        evaluate_every=settings.evaluate_every,
        early_stop=settings.early_stop,
        trackers=settings.trackers,
        unused_parameters=recipe.model.vision == "full",
        autocast=autocast,
    )


def _autocast(recipe: Recipe, dtype: Any) -> bool:
    """Towers trained in full are fp32; on a bf16 base they need autocast to meet its hidden states."""
    import torch

    matrices = {tower: mode for tower, mode in recipe.model.modes.items() if tower not in ("gates", "added_tokens")}
    return dtype == torch.bfloat16 and "full" in matrices.values()


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
