"""Recipe -> run folder: prepare -> train -> evaluate -> merge, each stage done once.

    runs/<name>/  recipe.yaml (resolved) · environment.json · base/ (a fresh one, from `init`) · data.json
                  metrics.jsonl · checkpoint-*/ · adapter/ · training.json · evaluation.json · predictions.jsonl
                  merged/ (with provenance.json) · merge.json · result.json

A stage leaves its .json last, so a stage that was interrupted has none and is done again: training goes on from its
last checkpoint.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from finetune.data import prepare as data
from finetune.data.collate import RowCollator
from finetune.data.images import Augmentation, Preprocessing
from finetune.data.schedule import build_schedule, draws_per_epoch
from finetune.data.sources import FORMATS
from finetune.evaluate import draw_questions, evaluate
from finetune.generate import Assistant
from finetune.merge import merge, prove
from finetune.progress import console, say, table, track
from finetune.recipe import Recipe, Source
from finetune.train import Plan, ProgressBar, last_checkpoint, train
from modeling import loading
from modeling.adapters import attach, count_trained, expected_counts, load_adapter_weights, open_adapter
from modeling.errors import UserError
from modeling.shapes import SHAPES

STAGES = ("train", "evaluate", "merge")
PROOF_ROWS = 2
PROOF_QUESTIONS = 8
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


class Run:
    """One recipe and its folder. What several stages need is made once, when first asked for."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = _open_folder(recipe)

    def do(self, *stages: str) -> dict[str, Any]:
        """Do these stages, those already done excepted, and return all figures there are. Raises UserError."""
        for stage in stages:
            if self._figures(_FILES[stage]) is None:
                _write_json(self.folder / _FILES[stage], _DOES[stage](self))
            else:
                say(f"{stage}: done before, see {self.folder / _FILES[stage]}")
        files = {"data": "data.json", **_FILES}
        result = {name: figures for name, file in files.items() if (figures := self._figures(file)) is not None}
        _write_json(self.folder / "result.json", result)
        return result

    def _figures(self, file: str) -> dict[str, Any] | None:
        path = self.folder / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

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
        limits: dict[str, Any] = {
            "max_length": recipe.data.max_length,
            "max_images": recipe.training.row_images,
            "seed": recipe.training.seed,
            "track": track,
        }
        training, accounts = data.prepare(self.sources, tokenizer, **limits)
        held_sources = [_source(source) for source in recipe.data.eval_sources]
        held, held_accounts = data.prepare(held_sources, tokenizer, **limits)
        if recipe.data.eval_split:
            training, held = data.split_by_image(training, recipe.data.eval_split, seed=recipe.training.seed)
        data.require_examples(training, accounts)
        if recipe.data.eval_sources or recipe.data.eval_split:
            data.require_examples(held, held_accounts or accounts)
        for account, draws in zip(accounts, self._draws(training), strict=True):
            account.draws_per_epoch = draws
        report = {
            "training_examples": len(training),
            "held_out_examples": len(held),
            "sources": [account.to_json() for account in accounts],
            "eval_sources": [account.to_json() for account in held_accounts],
        }
        _write_json(self.folder / "data.json", report)
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
        return replace(self._rows(training), rows=rows, augmentation=augmentation, seed=settings.seed)

    @cached_property
    def held_rows(self) -> RowCollator:
        held, settings = self.prepared[1], self.recipe.training
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
    base = evaluate(run.assistant(model), run.held_rows, questions, **options)
    tuned = open_adapter(model, adapter)
    predictions = run.folder / "predictions.jsonl"
    scores = evaluate(run.assistant(tuned), run.held_rows, questions, predictions=predictions, **options)
    return {"base": base.to_json(), "tuned": scores.to_json()}


def _merge(run: Run) -> dict[str, Any]:
    adapter, out = run.require_adapter(), run.folder / "merged"
    provenance = {
        "base": run.recipe.model.base or f"init: {run.recipe.model.init}",
        "revision": run.recipe.model.revision,
        "trained": {tower: mode for tower, mode in run.recipe.model.modes.items() if mode != "frozen"},
        "versions": _versions(),
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


def show(recipe: Recipe, result: dict[str, Any]) -> None:
    """The figures of a run as tables, and the line to type next."""
    if scores := result.get("evaluate"):
        rows = [(name, scores["base"][key], scores["tuned"][key]) for key, name in _SCORES.items()]
        console.print(table("held out", ("", "base", "tuned"), rows))
    if proof := result.get("merge"):
        console.print(
            table(
                "merged against base + adapter",
                ("", ""),
                [
                    ("largest difference of logits", proof["largest_difference"]),
                    ("the same, to the base", proof["largest_difference_to_base"]),
                    ("equal answers", f"{proof['same_answers']} of {proof['answers']}"),
                ],
            )
        )
        say(f"the model: {proof['merged']}")
    say(f"the run: {recipe.output}")


_SCORES = {
    "exact": "exact answers",
    "exact_open": "  open questions",
    "exact_yes_no": "  yes/no questions",
    "stopped": "stopped by itself",
    "loss": "loss per supervised token",
    "questions": "questions",
}


def _open_folder(recipe: Recipe) -> Path:
    """The run folder, with its recipe and environment written. Raises UserError if it is another recipe's."""
    folder = Path(recipe.output)
    path, mine = folder / "recipe.yaml", recipe.to_yaml()
    if path.is_file() and (theirs := path.read_text(encoding="utf-8")) != mine:
        differing = _differing(yaml.safe_load(theirs), yaml.safe_load(mine))
        raise UserError(
            f"{folder}: holds the run of another recipe; they differ in {', '.join(differing)}\n"
            f"  choose another folder (output=runs/NAME), or delete this one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.write_text(mine, encoding="utf-8")
        environment = {"versions": _versions(), "seed": recipe.training.seed, "revision": recipe.model.revision}
        _write_json(folder / "environment.json", environment)
    return folder


def _differing(one: Any, other: Any, prefix: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [place for key in keys for place in _differing(one.get(key), other.get(key), f"{prefix}.{key}")]
    return [] if one == other else [prefix.removeprefix(".")]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def _make_base(shape: str, sources: list[data.Source], folder: Path, *, seed: int) -> None:
    """A fresh base of a shape; its tokenizer learns from the texts of the sources."""
    from modeling import tiny

    config = SHAPES[shape]
    texts = [
        f"{turn.role.capitalize()}: {turn.text}"
        for source in sources
        for _, dialogue in data.read_dialogues(source, data.Account(source.name), seed=seed, track=track)
        for turn in dialogue.turns
    ]
    if not texts:
        raise UserError("model.init: the sources hold no text to learn a vocabulary from")
    tokenizer = tiny.train_tokenizer(texts, vocab_size=config["vocab_size"])
    processor = tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"])
    loading.save_processor(processor, folder)
    tiny.build_model(config, seed=seed).save_pretrained(folder)


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


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
