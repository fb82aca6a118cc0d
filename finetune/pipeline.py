"""Recipe -> run folder: prepare -> train -> evaluate -> merge, each stage done once.

    runs/<name>/  recipe.yaml (resolved) · inputs.json · environment.json · base/ (a fresh one, from `init`) · data.json
                  metrics.jsonl · checkpoint-*/ · unstable.jsonl · adapter/ · training.json · evaluation.json
                  predictions.jsonl, .html
                  merged/ (with provenance.json) · merge.json · result.json · curves.png

A stage leaves its .json last, so a stage that was interrupted has none and is done again: training goes on from its
last checkpoint. So is a stage whose files are not whole any more, or whose settings, data or adapter have changed.

Of several processes, all do the same stages: they prepare, train and evaluate together; the main one writes, and
merges.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from finetune.base import content_of, local_base, require_whole
from finetune.console import log, show_size, track
from finetune.data.collate import Rows
from finetune.data.conversation import Dialogue, Image
from finetune.data.dataset import contents
from finetune.data.images import describe, open_image
from finetune.distributed import collectives
from finetune.distributed.device import device, free_memory, gpu_memory
from finetune.distributed.lock import working_in
from finetune.evaluation.evaluate import draw_questions, eval_loss, evaluate, swap_images
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.answer_parity import compare_answers
from finetune.export.merge import merge
from finetune.export.merge_verb import model_card
from finetune.materials import Materials
from finetune.recipe.schema import Recipe
from finetune.reporting.html.predictions import predictions_page
from finetune.reporting.plots import draw
from finetune.run_dir import Contents, is_trained, note_base, open_folder, versions
from finetune.stages import FILES, adapter_fingerprint, digest, figures_of, files_of, why_not_done, write_stage
from finetune.training.arguments import rows_per_process
from finetune.training.auto_fit import apply_auto_fit
from finetune.training.callbacks import ProgressBar, tokens_trained
from finetune.training.checkpoints import last_checkpoint, what_has_changed_inside
from finetune.training.loss_spikes import UnstableError, go_back, read_events
from finetune.training.out_of_memory import explain_out_of_memory
from finetune.training.trainer import train
from modeling import loading
from modeling.adapters import attach, count_trained, expected_counts, load_adapter_weights, open_adapter
from modeling.checkpoint import fingerprint, read_checkpoint, weight_bytes
from modeling.config import read_config
from modeling.errors import UserError
from modeling.files import atomic_write, read_json, write_json
from modeling.towers import matrices_trained_in_full

STAGES = ("train", "evaluate", "merge")
PARITY_ROWS = 2
PARITY_QUESTIONS = 8
PARITY_DIALOGUES = 256

CURVES = "curves.png"
WRITTEN_AGAIN = "delete it, and the same command writes it again"


class Run:
    """One recipe and its folder."""

    def __init__(self, recipe: Recipe):
        """Raises UserError: no base, another command at work in the folder, or something else that is trained there."""
        if recipe.model.base:
            _require_base(recipe)  # a wrong one leaves no folder behind
        self.folder = Path(recipe.output)
        with _working_in(self.folder):
            self.recipe = recipe = apply_auto_fit(recipe)
            contents, self.changed = collectives.on_main("open the run folder", lambda: _open_folder(recipe))
        self.contents: Contents = contents
        collectives.require_shared("output", self.folder)
        self.materials = Materials(recipe, self.folder)

    def do(self, *stages: str) -> dict[str, Any]:
        """Do these stages, those already done excepted, and return all figures there are. Raises UserError."""
        with _working_in(self.folder):
            self._keep_what_is_trained()
            if "evaluate" in stages:
                self._require_room_to_evaluate()
            for stage in stages:
                if stage != "train":
                    self.require_adapter()
                again = self._why_not_done(stage)
                if again is None:
                    log(f"{stage}: done before, see {self.folder / FILES[stage]}")
                    continue
                if (self.folder / FILES[stage]).exists():
                    log(f"{stage}: {again}; done again")
                figures, inputs = _DOES[stage](self), self._inputs(stage)
                collectives.on_main(f"write {stage}", partial(write_stage, self.folder, stage, figures, inputs))
                (self.folder / CURVES).unlink(missing_ok=True)
            result = collectives.on_main("collect the figures", self._collect)
            if "evaluate" in result and self.changed is None and not (self.folder / "predictions.html").is_file():
                images = self.materials.dataset.held.images
                collectives.on_main("write the page", lambda: _write_page(self.folder, images))
            return result

    def _keep_what_is_trained(self) -> None:
        """Raises UserError where the data has changed since, unless the recipe says that what is trained is kept."""
        if self.changed is None:
            return
        done, said = self._why_not_done("train") is None, f"{self.folder}: the data has changed since this run began"
        if not done or self.recipe.data.changed == "refuse":
            kept = "keep what was trained as it is: data.changed=keep" if done else "put the data back, and go on"
            raise UserError(
                f"{said}: {self.changed}\n"
                f"  train on it in another folder (output=runs/NAME), or delete this one to train anew, or {kept}"
            )
        log(f"{said}: {self.changed}; what was trained is kept as it is")

    def _require_room_to_evaluate(self) -> None:
        """Known before a divided training begins: what is asked afterwards is whole on each GPU. Raises UserError."""
        made = self.materials
        if self.recipe.training.parallel == "ddp" or collectives.world_size() == 1 or (room := gpu_memory()) is None:
            return
        base = local_base(made.base, revision=self.recipe.model.revision)
        needed = collectives.on_main("weigh the base", lambda: weight_bytes(read_checkpoint(base), made.dtype))
        if needed > room:
            raise UserError(
                f"evaluation: asks a model that each GPU holds whole, {show_size(needed)}, and a GPU has "
                f"{show_size(room)}; leave `evaluation` out: evaluation=null (training.evaluate_every takes losses)"
            )

    def _why_not_done(self, stage: str) -> str | None:
        return collectives.on_main(f"look at {stage}", lambda: why_not_done(self.folder, stage, self._inputs(stage)))

    def _inputs(self, stage: str) -> str:
        """A hash of what a stage is made of; what decides the training is in inputs.json."""
        if stage == "train":
            return ""
        adapter = adapter_fingerprint(self.folder / "adapter")
        if stage == "merge":
            return digest(adapter)
        asked = self.recipe.evaluation
        settings = asked and asked.model_dump(mode="json", exclude={"batch_size"})
        return digest([adapter, settings, self.contents["eval_sources"], self.contents["documents"]])

    def _collect(self) -> dict[str, Any]:
        """The figures of all stages that are done, written to result.json, and curves.png."""
        data = read_json(self.folder / "data.json", repair=WRITTEN_AGAIN)
        result = {"data": data} if data else {}
        if self._why_not_done("train") is None:
            done = [stage for stage in STAGES if self._why_not_done(stage) is None]
            result |= {stage: figures for stage in done if (figures := figures_of(self.folder, stage)) is not None}
            if not (self.folder / CURVES).is_file():
                self._draw(result.get("evaluate"))
        write_json(self.folder / "result.json", result)
        return result

    def _draw(self, scores: dict[str, Any] | None) -> None:
        metrics = self.folder / "metrics.jsonl"
        try:
            draw(metrics, scores, self.folder / CURVES)
        except (ValueError, TypeError, KeyError) as error:
            log(f"{metrics}: not as this toolkit writes it ({error!r:.200}); {CURVES} is not drawn")

    def require_adapter(self) -> Path:
        if why := self._why_not_done("train"):
            began = (self.folder / FILES["train"]).exists()
            said = why if began else f"{self.folder}: nothing is trained here yet"
            raise UserError(f"{said}; first: finetune train RECIPE")
        return self.folder / "adapter"


def _require_base(recipe: Recipe) -> None:
    """The base is an IDEFICS; before training, it is whole, as is the adapter to continue from. Raises UserError."""
    model, trained = recipe.model, Path(recipe.output) / FILES["train"]
    read_config(str(model.base), revision=model.revision)
    if not trained.exists():
        require_whole(str(model.base), revision=model.revision, continue_from=model.continue_from)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Of several processes, the main one holds the lock for all."""
    with ExitStack() as held:
        collectives.on_main("lock the run folder", lambda: held.enter_context(working_in(folder)))
        yield


def _open_folder(recipe: Recipe) -> tuple[Contents, str | None]:
    """(what the data is made of, what of it has changed since something was trained on it)."""
    made_of, base = contents(recipe), Path(recipe.model.base or "")
    stands_on = content_of(base, recipe.model.continue_from) if recipe.model.base and base.is_dir() else None
    return made_of, open_folder(recipe, made_of, stands_on)


def _train(run: Run) -> dict[str, Any]:
    """As often as the run has to go back: each time from what is on the disk, as if it had been interrupted."""
    settings = run.recipe.training
    rows_per_process(settings.rows_per_step)  # who cannot share out a step knows it before all else
    while True:
        try:
            with explain_out_of_memory(run.recipe):
                return _train_once(run)
        except UnstableError as error:
            unstable = (error.step, error.reason, error.dialogues)
        go_back(run.folder, *unstable, settings.instability)
        gc.collect()  # of the attempt's model
        torch.cuda.empty_cache()


def _train_once(run: Run) -> dict[str, Any]:
    recipe, made, settings = run.recipe, run.materials, run.recipe.training
    rows = made.train_rows()
    base = local_base(made.base, revision=recipe.model.revision)
    base_fingerprint = collectives.on_main("fingerprint the base", lambda: fingerprint(read_checkpoint(base)))
    stands_on = collectives.on_main("hash the base", lambda: content_of(base, recipe.model.continue_from))
    collectives.on_main("note the base", lambda: note_base(run.folder, stands_on))
    idefics = made.load(divided=recipe.training.parallel == "fsdp2" and collectives.world_size() > 1).model
    set_seed(recipe.training.seed)  # LoRA factors start at random
    model = attach(idefics, recipe.model.modes, lora=recipe.adapter.lora, base=made.base)
    counts = count_trained(model)
    if not recipe.adapter.model_extra:
        expected = expected_counts(idefics.config.to_dict(), recipe.model.modes, rank=recipe.adapter.rank)
        assert counts == expected, f"trained {counts}, expected {expected}"
    if recipe.model.continue_from:
        load_adapter_weights(model, Path(recipe.model.continue_from))
    cuts = [event.back_to for event in read_events(run.folder) if event.action == "lower_rate"]
    resume_from = collectives.on_main("look for a checkpoint", lambda: _checkpoint_to_go_on_from(run.folder))
    started = time.perf_counter()
    for doubt in recipe.doubts(len(rows) // settings.rows_per_step):
        log(doubt)
    log(f"train: {counts.total:,} parameters" + (f", going on from {resume_from.name}" if resume_from else ""))
    with ProgressBar() as bar:
        trainer = train(
            model,
            made.processor.tokenizer,
            run.folder,
            settings,
            train_rows=rows,
            eval_rows=made.held_rows if settings.evaluate_every else None,
            autocast=_autocast(recipe, made.dtype),
            unused_parameters=recipe.model.vision == "full",
            rate_cuts=cuts,
            resume_from=resume_from,
            callbacks=[bar],
        )
    log(f"train: waited for data {trainer.waiting:.1%} of the time")
    metadata = AdapterMetadata(made.base, recipe.model.revision, made.instruct, recipe.model.quantize, base_fingerprint)
    collectives.on_main("write the metadata", lambda: metadata.write(run.folder / "adapter"))
    return {
        "steps": trainer.state.global_step,
        "epochs": rows.epoch(trainer.state.global_step * settings.rows_per_step - 1) + 1,
        "tokens_trained": collectives.on_main("count tokens", lambda: tokens_trained(run.folder / "metrics.jsonl")),
        "parameters_trained": asdict(counts),
        "best_step": trainer.state.best_global_step if settings.evaluate_every else None,
        "streamed": made.streamed(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "waiting_for_data": round(trainer.waiting, 4),
        "rollbacks": len(read_events(run.folder)),
    }


def _checkpoint_to_go_on_from(folder: Path) -> Path | None:
    """Raises UserError where an adapter would be lost: it is there, and no checkpoint from which it comes again."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is None and is_trained(folder):
        raise UserError(
            f"{folder}: {why_not_done(folder, 'train', '')}, an adapter is there, and no checkpoint to go on from\n"
            f"  put the file back; or delete {folder / 'adapter'} to train anew"
        )
    if checkpoint and (changed := what_has_changed_inside(checkpoint)):
        raise UserError(
            f"{checkpoint / changed}: is not what was written: its hash is another (a flipped byte on the disk?)\n"
            f"  delete {checkpoint}, and the same command goes on from the checkpoint before"
        )
    return checkpoint


def _evaluate(run: Run) -> dict[str, Any]:
    settings = run.recipe.evaluation
    if settings is None:
        raise UserError("evaluation: the recipe has no such section, and nothing to ask")
    if run.changed:
        raise UserError(
            f"{run.folder}: {run.changed}, and what is held out now may be what was trained on\n"
            f"  put the data back as it was, and the same command evaluates"
        )
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
    forgetting = {"before": eval_loss(base, documents, track=track)[0]} if documents else None
    tuned = made.assistant(open_adapter(model, adapter), made.held_rows)
    predictions = run.folder / "predictions.jsonl"
    figures["tuned"] = evaluate(tuned, made.held_rows, questions, predictions=predictions, **options).to_json()
    collectives.on_main("write the page", lambda: _write_page(run.folder, made.dataset.held.images))
    figures["image_swap"] = None
    if len({image for images in made.held_rows.image_ids for image in images}) > 1:
        rows, swapped = swap_images(
            made.held_rows, made.dataset.held.dialogues, questions, seed=run.recipe.training.seed
        )
        figures["image_swap"] = evaluate(tuned, rows, swapped, **options).to_json()
    if documents and forgetting:
        forgetting["after"] = eval_loss(tuned, documents, track=track)[0]
    return {**figures, "documents": forgetting}


def _write_page(folder: Path, images: Sequence[Image]) -> None:
    """predictions.html, from predictions.jsonl."""
    by_name = {describe(image): image for image in images}
    lines = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    page = predictions_page(lines, title=folder.name, image=lambda name: open_image(by_name[name]))
    atomic_write(folder / "predictions.html", page)


def _merge(run: Run) -> dict[str, Any]:
    adapter, made = run.require_adapter(), run.materials
    if run.changed:
        log(f"merge: the model is proved tensor by tensor and block by block, and not asked: {run.changed}")
        return collectives.on_main("merge", lambda: _merge_and_ask(run, adapter, None, ()))
    rows, some = made.rows_to_ask(), made.dataset.held if len(made.dataset.held) else made.dataset.training
    return collectives.on_main("merge", lambda: _merge_and_ask(run, adapter, rows, some.dialogues[:PARITY_DIALOGUES]))


def _merge_and_ask(run: Run, adapter: Path, rows: Rows | None, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """`rows` and `dialogues`: what the merged model is asked."""
    out, made = run.folder / "merged", run.materials
    provenance = {
        "base": run.recipe.model.base or f"init: {run.recipe.model.init}",
        "revision": run.recipe.model.revision,
        "trained": {tower: mode for tower, mode in run.recipe.model.modes.items() if mode != "frozen"},
        "versions": versions(),
    }
    metadata = AdapterMetadata.read(adapter)
    comparison = merge(
        adapter,
        made.base,
        out,
        revision=run.recipe.model.revision,
        instruct=made.instruct,
        base_fingerprint=metadata.fingerprint,
        base_precision=metadata.base_precision,
        trained_on=metadata.base_precision,
        may_replace=files_of(run.folder, "merge"),
        provenance=provenance,
        card=model_card(made.base, out, run.folder),
        track=track,
    )["parity"]
    asked = _ask(run, adapter, out, rows, dialogues) if rows is not None else {}
    return {"merged": str(out), **asked, "weights": comparison}


def _ask(run: Run, adapter: Path, out: Path, rows: Rows, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """What the merged model says, against base + adapter; nothing where it is too large for this machine."""
    made = run.materials
    needed = weight_bytes(read_checkpoint(out), made.dtype)
    if needed > (free := free_memory()):
        log(
            f"{out}: not asked as a whole, which takes {show_size(needed)} and {show_size(free)} are free; "
            f"it is proved tensor by tensor and block by block"
        )
        return {}
    questions = draw_questions(dialogues, limit=PARITY_QUESTIONS, seed=run.recipe.training.seed)
    proof = compare_answers(
        base=lambda: made.assistant(made.load(image_towers=True).model),
        tuned=lambda: made.assistant(open_adapter(made.load(image_towers=True).model, adapter)),
        merged=lambda: made.assistant(loading.load(str(out), dtype=made.dtype, instruct=False, device=device()).model),
        batches=[rows.at(number) for number in range(min(PARITY_ROWS, len(rows)))],
        prompts=[prompt for prompt, _ in questions],
    )
    return asdict(proof)


_DOES: dict[str, Callable[[Run], dict[str, Any]]] = {"train": _train, "evaluate": _evaluate, "merge": _merge}


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """What `finetune run` does: as far as the recipe asks."""
    asked = {"train": True, "evaluate": recipe.evaluation is not None, "merge": recipe.merge}
    return tuple(stage for stage in STAGES if asked[stage])


def _autocast(recipe: Recipe, dtype: Any) -> bool:
    """Towers trained in full are fp32; on a bf16 base they need autocast to meet its hidden states."""
    return dtype == torch.bfloat16 and bool(matrices_trained_in_full(recipe.model.modes))
