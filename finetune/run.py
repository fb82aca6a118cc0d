"""Recipe -> run folder: prepare -> train -> evaluate -> merge, each stage done once.

    runs/<name>/  recipe.yaml (resolved) · environment.json · base/ (a fresh one, from `init`) · data.json
                  metrics.jsonl · checkpoint-*/ · unstable.jsonl · adapter/ · training.json · evaluation.json
                  predictions.jsonl, .html
                  merged/ (with provenance.json) · merge.json · result.json · curves.png

A stage leaves its .json last, so a stage that was interrupted has none and is done again: training goes on from its
last checkpoint.

Of several processes, all do the same stages: they prepare, train and evaluate together; the main one writes, and
merges.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from finetune import ranks
from finetune.arguments import Plan, rows_per_process
from finetune.auto_fit import fitted
from finetune.base import local_base
from finetune.callbacks import ProgressBar, tokens_trained
from finetune.checkpoints import last_checkpoint
from finetune.data.collate import RowCollator, Rows
from finetune.data.dialogue import Dialogue, Image
from finetune.data.images import describe, open_image
from finetune.device import device, free_memory
from finetune.evaluate import draw_questions, evaluate, exchange_images, held_out_loss
from finetune.folder import open_folder, versions
from finetune.materials import Materials
from finetune.merge import merge
from finetune.merge_verb import model_card
from finetune.origin import Origin
from finetune.out_of_memory import told_if_memory_runs_out
from finetune.pages.predictions import predictions_page
from finetune.picture import draw
from finetune.progress import say, track
from finetune.proof import prove
from finetune.recipe import Recipe
from finetune.sizes import show_size
from finetune.stability import UnstableError, Watch, go_back, read_events
from finetune.train import train
from modeling import loading
from modeling.adapters import attach, count_trained, expected_counts, load_adapter_weights, open_adapter
from modeling.checkpoint import identity, read_checkpoint, weight_bytes
from modeling.errors import UserError
from modeling.files import read_json, write_json
from modeling.shapes import read_config

STAGES = ("train", "evaluate", "merge")
PROOF_ROWS = 2
PROOF_QUESTIONS = 8
PROOF_DIALOGUES = 256


class Run:
    """One recipe and its folder."""

    def __init__(self, recipe: Recipe):
        if recipe.model.base:
            read_config(recipe.model.base, revision=recipe.model.revision)  # a wrong base leaves no folder behind
        self.recipe = recipe = fitted(recipe)
        self.folder = ranks.on_main("open the run folder", lambda: open_folder(recipe))
        ranks.require_shared("output", self.folder)
        self.materials = Materials(recipe, self.folder)

    def do(self, *stages: str) -> dict[str, Any]:
        """Do these stages, those already done excepted, and return all figures there are. Raises UserError."""
        for stage in stages:
            if self._figures(_FILES[stage]) is None:
                self._write(_FILES[stage], _DOES[stage](self))
            else:
                say(f"{stage}: done before, see {self.folder / _FILES[stage]}")
        files = {"data": "data.json", **_FILES}
        result = {name: figures for name, file in files.items() if (figures := self._figures(file)) is not None}
        self._write("result.json", result)
        if "train" in result:
            curves = self.folder / "curves.png"
            ranks.on_main("draw", lambda: draw(self.folder / "metrics.jsonl", result.get("evaluate"), curves))
        return result

    def _figures(self, file: str) -> dict[str, Any] | None:
        return ranks.on_main(f"read {file}", lambda: read_json(self.folder / file))

    def _write(self, file: str, figures: dict[str, Any]) -> None:
        ranks.on_main(f"write {file}", lambda: write_json(self.folder / file, figures))

    def require_adapter(self) -> Path:
        if self._figures(_FILES["train"]) is None:
            raise UserError(f"{self.folder}: nothing is trained here yet; first: finetune train RECIPE")
        return self.folder / "adapter"


def _train(run: Run) -> dict[str, Any]:
    """As often as the run has to go back: each time from what is on the disk, as if it had been interrupted."""
    settings = run.recipe.training
    rows_per_process(settings.packs_per_step)  # who cannot share out a step knows it before all else
    watch = Watch(**settings.instability.model_dump())
    while True:
        try:
            with told_if_memory_runs_out(run.recipe):
                return _train_once(run, watch)
        except UnstableError as error:
            unstable = (error.step, error.reason, error.dialogues)
        go_back(run.folder, *unstable, watch=watch)
        gc.collect()  # of the attempt's model
        torch.cuda.empty_cache()


def _train_once(run: Run, watch: Watch) -> dict[str, Any]:
    recipe, made = run.recipe, run.materials
    rows = made.train_rows()
    base = local_base(made.base, revision=recipe.model.revision)
    base_identity = ranks.on_main("identify the base", lambda: identity(read_checkpoint(base)))
    idefics = made.load(divided=recipe.training.parallel == "fsdp2" and ranks.count() > 1).model
    set_seed(recipe.training.seed)  # LoRA factors start at random
    model = attach(idefics, recipe.model.modes, lora=recipe.adapter.lora, base=made.base)
    counts = count_trained(model)
    if not recipe.adapter.model_extra:
        expected = expected_counts(idefics.config.to_dict(), recipe.model.modes, rank=recipe.adapter.rank)
        assert counts == expected, f"trained {counts}, expected {expected}"
    if recipe.model.continue_from:
        load_adapter_weights(model, Path(recipe.model.continue_from))
    cuts = [event.back_to for event in read_events(run.folder) if event.action == "lower_rate"]
    plan = _plan(recipe, len(rows), autocast=_autocast(recipe, made.dtype), watch=watch, rate_cuts=cuts)
    resume_from = ranks.on_main("look for a checkpoint", lambda: last_checkpoint(run.folder))
    started = time.perf_counter()
    for doubt in recipe.doubts(len(rows) // plan.packs_per_step):
        say(doubt)
    say(f"train: {counts.total:,} parameters" + (f", going on from {resume_from.name}" if resume_from else ""))
    trainer = train(
        model,
        made.processor.tokenizer,
        run.folder,
        train_rows=rows,
        eval_rows=made.held_rows if plan.evaluate_every else None,
        plan=plan,
        resume_from=resume_from,
        callbacks=[ProgressBar()],
    )
    say(f"train: waited for data {trainer.waiting:.1%} of the time")
    origin = Origin(made.base, recipe.model.revision, made.instruct, recipe.model.quantize, base_identity)
    ranks.on_main("write the origin", lambda: origin.write(run.folder / "adapter"))
    return {
        "steps": trainer.state.global_step,
        "epochs": rows.epoch(trainer.state.global_step * plan.packs_per_step - 1) + 1,
        "tokens_trained": ranks.on_main("count tokens", lambda: tokens_trained(run.folder / "metrics.jsonl")),
        "parameters_trained": asdict(counts),
        "best_step": trainer.state.best_global_step if plan.evaluate_every else None,
        "streamed": made.streamed(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "waiting_for_data": round(trainer.waiting, 4),
        "rollbacks": len(read_events(run.folder)),
    }


def _evaluate(run: Run) -> dict[str, Any]:
    settings = run.recipe.evaluation
    if settings is None:
        raise UserError("evaluation: the recipe has no such section, and nothing to ask")
    adapter, made = run.require_adapter(), run.materials
    questions = draw_questions(made.dataset.held.dialogues, limit=settings.limit, seed=run.recipe.training.seed)
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "track": track,
    }
    model = made.load().model
    base = made.assistant(model, made.held_rows)
    figures: dict[str, Any] = {"base": evaluate(base, made.held_rows, questions, **options).to_json()}
    documents = made.documents
    forgetting = {"before": held_out_loss(base, documents, track=track)[0]} if documents else None
    tuned = made.assistant(open_adapter(model, adapter), made.held_rows)
    predictions = run.folder / "predictions.jsonl"
    figures["tuned"] = evaluate(tuned, made.held_rows, questions, predictions=predictions, **options).to_json()
    ranks.on_main("write the page", lambda: _write_page(run.folder, made.dataset.held.images))
    figures["blind"] = None
    if len({image for images in made.held_rows.image_ids for image in images}) > 1:
        rows, swapped = exchange_images(
            made.held_rows, made.dataset.held.dialogues, questions, seed=run.recipe.training.seed
        )
        figures["blind"] = evaluate(tuned, rows, swapped, **options).to_json()
    if documents and forgetting:
        forgetting["after"] = held_out_loss(tuned, documents, track=track)[0]
    return {**figures, "documents": forgetting}


def _write_page(folder: Path, images: Sequence[Image]) -> None:
    """predictions.html, from predictions.jsonl."""
    by_name = {describe(image): image for image in images}
    lines = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    page = predictions_page(lines, title=folder.name, image=lambda name: open_image(by_name[name]))
    (folder / "predictions.html").write_text(page, encoding="utf-8")


def _merge(run: Run) -> dict[str, Any]:
    adapter, made = run.require_adapter(), run.materials
    training, held = made.dataset.training, made.dataset.held
    rows, some = (made.held_rows, held) if len(held) else (made.train_rows(), training)
    return ranks.on_main("merge", lambda: _merge_and_ask(run, adapter, rows, some.dialogues[:PROOF_DIALOGUES]))


def _merge_and_ask(run: Run, adapter: Path, rows: Rows, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """`rows` and `dialogues`: what the merged model is asked."""
    out, made = run.folder / "merged", run.materials
    provenance = {
        "base": run.recipe.model.base or f"init: {run.recipe.model.init}",
        "revision": run.recipe.model.revision,
        "trained": {tower: mode for tower, mode in run.recipe.model.modes.items() if mode != "frozen"},
        "versions": versions(),
    }
    origin = Origin.of(adapter)
    comparison = merge(
        adapter,
        made.base,
        out,
        revision=run.recipe.model.revision,
        instruct=made.instruct,
        base_identity=origin.identity,
        onto=origin.onto,
        trained_onto=origin.onto,
        provenance=provenance,
        card=model_card(made.base, out, run.folder),
        track=track,
    )["proof"]
    return {"merged": str(out), **_ask(run, adapter, out, rows, dialogues), "weights": comparison}


def _ask(run: Run, adapter: Path, out: Path, rows: Rows, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """What the merged model says, against base + adapter; nothing where it is too large for this machine."""
    made = run.materials
    needed = weight_bytes(read_checkpoint(out), made.dtype)
    if needed > (free := free_memory()):
        say(
            f"{out}: not asked as a whole, which takes {show_size(needed)} and {show_size(free)} are free; "
            f"it is proved tensor by tensor and block by block"
        )
        return {}
    if isinstance(rows, RowCollator):
        rows = replace(rows, features=None)  # the merged model looks with its own towers
    questions = draw_questions(dialogues, limit=PROOF_QUESTIONS, seed=run.recipe.training.seed)
    proof = prove(
        base=lambda: made.assistant(made.load(image_towers=True).model),
        tuned=lambda: made.assistant(open_adapter(made.load(image_towers=True).model, adapter)),
        merged=lambda: made.assistant(loading.load(str(out), dtype=made.dtype, instruct=False, device=device()).model),
        batches=[rows.at(number) for number in range(min(PROOF_ROWS, len(rows)))],
        prompts=[prompt for prompt, _ in questions],
    )
    return asdict(proof)


_FILES = {"train": "training.json", "evaluate": "evaluation.json", "merge": "merge.json"}
_DOES: dict[str, Callable[[Run], dict[str, Any]]] = {"train": _train, "evaluate": _evaluate, "merge": _merge}


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """What `finetune run` does: as far as the recipe asks."""
    asked = {"train": True, "evaluate": recipe.evaluation is not None, "merge": recipe.merge}
    return tuple(stage for stage in STAGES if asked[stage])


def _plan(recipe: Recipe, rows: int, *, autocast: bool, watch: Watch, rate_cuts: Sequence[int]) -> Plan:
    settings = recipe.training
    steps = rows // settings.packs_per_step
    return Plan(
        packs_per_step=settings.packs_per_step,
        learning_rate=settings.learning_rate,
        final_learning_rate=settings.final_learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        optimizer=settings.optimizer,
        betas=settings.betas,
        clip=settings.clip,
        tower_rates={"gates": settings.gates_learning_rate, "added_tokens": settings.added_tokens_learning_rate},
        seed=settings.seed,
        checkpoint_every=settings.checkpoint_every or settings.evaluate_every or max(1, steps // 10),
        evaluate_every=settings.evaluate_every,
        early_stop=settings.early_stop,
        trackers=settings.trackers,
        checkpointing=settings.checkpointing,
        unused_parameters=recipe.model.vision == "full",
        autocast=autocast,
        parallel=settings.parallel,
        watch=watch,
        rate_cuts=rate_cuts,
    )


def _autocast(recipe: Recipe, dtype: Any) -> bool:
    """Towers trained in full are fp32; on a bf16 base they need autocast to meet its hidden states."""
    matrices = {tower: mode for tower, mode in recipe.model.modes.items() if tower not in ("gates", "added_tokens")}
    return dtype == torch.bfloat16 and "full" in matrices.values()
