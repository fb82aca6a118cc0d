"""Recipe -> run folder: prepare -> cache image features -> train -> evaluate -> merge, each stage done once.

    runs/<name>/  recipe.yaml (resolved) · inputs.json · environment.json · base/ (a fresh one, from `init`) · data.json
                  metrics.jsonl · checkpoint-*/ · unstable.jsonl · adapter/ · training.json · evaluation.json
                  predictions.jsonl, .html
                  merged/ (with provenance.json) · merge.json · result.json · curves.png

A stage leaves its .json last, so a stage that was interrupted has none and is done again: training goes on from its
last checkpoint. So is a stage whose files are not whole any more, or whose settings, data or adapter have changed.

Of several processes, all call the same functions in the same order: they prepare, train and evaluate together; the main
one writes, and merges.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from finetune.base_model import Base, learn_tokenizer, open_base, require_whole
from finetune.console import log, show_size
from finetune.data.conversation import Image
from finetune.data.dataset import Dataset, contents, log_losses, make_dataset, prepare_shares
from finetune.data.images import describe, open_image
from finetune.data.read_dialogues import resolve_source, say_if_documents
from finetune.distributed import collectives
from finetune.distributed.environment import gpu_memory
from finetune.distributed.lock import working_in
from finetune.evaluation.evaluation_stage import evaluate_adapter
from finetune.export import dataset_folder
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.cards import dataset_card, without_folders, write_card
from finetune.export.merge_stage import merge_adapter
from finetune.recipe.schema import Recipe, Source, need_end_of_utterance
from finetune.reporting.html.predictions import predictions_page
from finetune.reporting.plots import draw
from finetune.run_dir import (
    CURVES,
    FIGURES,
    STAGES,
    WRITTEN_AGAIN,
    RunDir,
    figures_of,
    files_of,
    held_out_decides,
    note_base,
    note_prepared,
    open_run_dir,
    write_report,
)
from finetune.training.fit_memory import apply_auto_fit
from finetune.training.training_stage import train_adapter
from modeling import loading
from modeling.atomic_files import atomic_write, read_json, write_json
from modeling.config import read_config
from modeling.errors import UserError
from modeling.safetensors_io import read_checkpoint, weight_bytes
from modeling.shapes import SHAPES


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the stages that a recipe asks for."""
    asked = {"train": True, "evaluate": recipe.evaluation is not None, "merge": recipe.merge}
    return tuple(stage for stage in STAGES if asked[stage])


def run(recipe: Recipe, stages: Sequence[str] | None = None) -> dict[str, Any]:
    """Do the stages of a recipe that are not done yet, and return the figures of all that are, as result.json has them.

    stages: some of STAGES, in their order; None: those that the recipe asks for. Raises UserError: a mistake that the
    user can repair; Interrupted: after SIGTERM or SIGINT, with everything saved.
    """
    stages = stages_of(recipe) if stages is None else stages
    if "evaluate" in stages and recipe.evaluation is None:
        raise UserError("evaluation: the recipe has no such section, so there is nothing to ask; add `evaluation: {}`")
    with open_run(recipe) as run_dir:
        run_dir.require_unchanged_data()
        if "train" not in stages:
            run_dir.require_trained()
        if not all(run_dir.is_done(stage) for stage in stages) or _misses_page(run_dir):
            _do_stages(stages, run_dir)
        else:
            log("\n".join(f"{stage}: done before, see {run_dir.folder / FIGURES[stage]}" for stage in stages))
        return collectives.on_main("collect the figures", lambda: collect_figures(run_dir))


def train(recipe: Recipe) -> dict[str, Any]:
    """Train the adapter of a recipe, or go on from its last checkpoint; return the figures, as `run` does."""
    return run(recipe, ("train",))


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Ask the base and the tuned model the held-out questions; return the figures, as `run` does."""
    return run(recipe, ("evaluate",))


def merge(recipe: Recipe) -> dict[str, Any]:
    """Write base + adapter as a standalone model, and verify it; return the figures, as `run` does."""
    return run(recipe, ("merge",))


@contextmanager
def open_run(recipe: Recipe) -> Iterator[RunDir]:
    """Open the run folder of a recipe, locked against other commands; `training.auto_fit` may change the recipe first.

    Of several processes, the main one holds the lock for all. Raises UserError: no such base, another command at work
    in the folder, or something else that is trained there.
    """
    model, folder = recipe.model, Path(recipe.output)
    if model.base:  # first of all, so that a wrong one leaves no folder behind
        read_config(model.base, revision=model.revision)
        if not (folder / FIGURES["train"]).exists():
            require_whole(model.base, revision=model.revision, continue_from=model.continue_from)
    with ExitStack() as stack:
        collectives.on_main("lock the run folder", lambda: stack.enter_context(working_in(folder)))
        fitted = apply_auto_fit(recipe)
        documents = recipe.evaluation.documents if recipe.evaluation else ()
        found = contents(recipe.data, documents, collectives.nodes())
        run_dir = collectives.on_main("open the run folder", lambda: open_run_dir(fitted, found))
        collectives.require_shared("output", folder)
        yield run_dir


def _do_stages(stages: Sequence[str], run_dir: RunDir) -> None:
    recipe, folder = run_dir.recipe, run_dir.folder
    sources = resolve_sources(recipe)
    base = open_base(recipe, sources, folder)
    if "evaluate" in stages:
        _require_room_to_evaluate(recipe, base)
    dataset = None if run_dir.changed else prepare_dataset(recipe, sources, base, folder)
    if "train" in stages and run_dir.is_to_do("train"):
        assert dataset, "data that has changed is not trained on"
        run_dir.require_checkpoint()
        files = base.fetch()
        fingerprint = collectives.on_main("note the base", lambda: note_base(recipe, files))
        figures = train_adapter(recipe, base, sources, dataset, folder)
        metadata = AdapterMetadata(base.name, base.revision, base.instruct, base.quantize, fingerprint)
        collectives.on_main("write the adapter's metadata", lambda: metadata.write(run_dir.adapter))
        run_dir.mark_done("train", figures)
    if "evaluate" in stages and run_dir.is_to_do("evaluate"):
        if dataset is None:
            raise UserError(
                f"{folder}: {run_dir.changed}, and what is held out now may be what was trained on\n"
                f"  put the data back as it was, and the same command evaluates"
            )
        run_dir.mark_done("evaluate", evaluate_adapter(recipe, base, dataset, folder))
    if "merge" in stages and run_dir.is_to_do("merge"):
        if dataset is None:
            log(f"merge: verified tensor by tensor and block by block, without questions: {run_dir.changed}")
        before = files_of(folder, "merge")
        figures = merge_adapter(recipe, base, sources, dataset, folder, may_replace=before)
        run_dir.mark_done("merge", figures)
    if dataset and _misses_page(run_dir):
        collectives.on_main("write the page", lambda: _write_page(folder, dataset.eval.images))


def resolve_sources(recipe: Recipe) -> list[Source]:
    """Return the training sources with their formats known, and say what a person must know of them."""
    sources = [resolve_source(source) for source in recipe.data.sources]
    say_if_documents(sources)
    return sources


def prepare(
    recipe: Recipe, *, to: Path | None = None, push: str | None = None, private: bool = True, dry_run: bool = False
) -> dict[str, Any]:
    """Convert, tokenise and check the data of a recipe; return the figures of each source, as data.json has them.

    Data that is prepared already is opened. Several nodes divide the work. The dataset card lies beside the prepared
    data.

    to: a new folder for the examples and their images, which `datasets.load_from_disk` opens
    push: the name of a dataset on the hub that gets the same
    dry_run: log what would be written and pushed, and do neither

    With `to` or `push`, the figures have "shared": what was written, or would be. Raises UserError.
    """
    if to:
        dataset_folder.require_new(to)
    if push and not dry_run:
        collectives.on_main("look on the hub", lambda: dataset_folder.require_repository(push, private=private))
    sources, dataset, _ = open_dataset(recipe)
    card = collectives.on_main("write the card", lambda: write_card(recipe, sources, dataset)) / "README.md"
    log_losses(dataset, card)
    log(f"the dataset card: {card}")
    if not to and not push:
        return dataset.report
    shared = collectives.on_main(
        "share the examples",
        lambda: dataset_folder.share(
            {"train": dataset.train, "eval": dataset.eval},
            dataset_card(recipe, sources, dataset, to_share=True),
            to=to,
            push=push,
            private=private,
            dry_run=dry_run,
            scratch=Path(recipe.data.prepared),
            source_name=lambda name: without_folders(name, recipe),
        ),
    )
    if streams := [source.name for source in recipe.data.sources if source.stream]:
        log(f"streamed, so not among them: {', '.join(streams)}")
    return {**dataset.report, "shared": shared}


def prepare_shard(recipe: Recipe, number: int, of: int) -> dict[str, Any]:
    """Prepare share `number` (from 1 on) of `of`; return {"sources": [{"source", "done", "shards"}]}.

    For arrays of jobs on machines that share the folder `data.prepared`: each calls this with another number, in any
    order; `prepare` then joins what they have made. Raises UserError.
    """
    sources = resolve_sources(recipe)
    found = prepare_shares(
        recipe.data,
        sources,
        _tokenizer(recipe, sources),
        row_images=recipe.training.row_images,
        seed=recipe.training.seed,
        share=(number - 1, of),
    )
    names = [source.name for source in (*sources, *recipe.data.eval_sources) if not source.stream]
    report = [
        {"source": name, "done": done, "shards": shards} for name, (done, shards) in zip(names, found, strict=True)
    ]
    for one in report:
        log(f"{one['source']}: {one['done']} of {one['shards']} shards are prepared")
    if all(one["done"] == one["shards"] for one in report):
        log("all shards are prepared; `finetune prepare` without --shard joins them")
    return {"sources": report}


def open_dataset(recipe: Recipe) -> tuple[list[Source], Dataset, Any]:
    """Return (training sources, what is prepared, tokenizer), without a run folder or a model."""
    sources = resolve_sources(recipe)
    tokenizer = _tokenizer(recipe, sources)
    dataset = make_dataset(
        recipe.data,
        sources,
        tokenizer,
        row_images=recipe.training.row_images,
        seed=recipe.training.seed,
        nodes=collectives.nodes(),
    )
    return sources, dataset, tokenizer


def _tokenizer(recipe: Recipe, sources: Sequence[Source]) -> Any:
    instruct = need_end_of_utterance(sources)
    if recipe.model.init:
        # The ids of the fresh base that a run would make; the extension to an instruct vocabulary comes on top.
        return learn_tokenizer(SHAPES[recipe.model.init], sources, seed=recipe.training.seed, instruct=instruct)
    revision = recipe.model.revision
    return loading.load_processor(str(recipe.model.base), revision=revision, instruct=instruct).tokenizer


def prepare_dataset(recipe: Recipe, sources: Sequence[Source], base: Base, folder: Path) -> Dataset:
    """Prepare the data, or open what is prepared already; leave data.json in the run folder.

    Raises UserError where the run was trained on other data.
    """
    prepared = Path(recipe.data.prepared)
    collectives.on_main("make the folder of prepared sets", lambda: prepared.mkdir(parents=True, exist_ok=True))
    collectives.require_shared("data.prepared", prepared)
    dataset = make_dataset(
        recipe.data,
        sources,
        base.tokenizer,
        row_images=recipe.training.row_images,
        seed=recipe.training.seed,
        nodes=collectives.nodes(),
    )
    decides = held_out_decides(recipe)
    sets = dict.fromkeys(one.folder for one in (*dataset.train.sets, *(dataset.eval.sets if decides else ())))

    def note() -> None:
        write_report(dataset.report, folder, held_out_decides=decides)
        note_prepared(folder, list(sets))

    collectives.on_main("write data.json", note)
    log_losses(dataset, folder / "data.json")
    return dataset


def _misses_page(run_dir: RunDir) -> bool:
    """Return whether predictions.html is to be written again, from predictions.jsonl."""
    page = run_dir.folder / "predictions.html"
    misses = collectives.on_main("look for the page", lambda: not page.is_file())
    return misses and run_dir.changed is None and run_dir.is_done("evaluate")


def _write_page(folder: Path, images: Sequence[Image]) -> None:
    by_name = {describe(image): image for image in images}
    lines = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    page = predictions_page(lines, title=folder.name, image=lambda name: open_image(by_name[name]))
    atomic_write(folder / "predictions.html", page)


def collect_figures(run_dir: RunDir) -> dict[str, Any]:
    """Return the figures of all stages that are done; write them to result.json, and draw curves.png."""
    folder = run_dir.folder
    data = read_json(folder / "data.json", repair=WRITTEN_AGAIN)
    result = {"data": data} if data else {}
    if run_dir.is_done("train"):
        done = [stage for stage in STAGES if run_dir.is_done(stage)]
        result |= {stage: figures for stage in done if (figures := figures_of(folder, stage)) is not None}
        if not (folder / CURVES).is_file():
            metrics = folder / "metrics.jsonl"
            try:
                draw(metrics, result.get("evaluate"), folder / CURVES)
            except (ValueError, TypeError, KeyError) as error:
                log(f"{metrics}: not as this toolkit writes it ({error!r:.200}); {CURVES} is not drawn")
    write_json(folder / "result.json", result)
    return result


def _require_room_to_evaluate(recipe: Recipe, base: Base) -> None:
    """Known before a divided training begins: what is asked afterwards is whole on each GPU. Raises UserError."""
    if recipe.training.parallel == "ddp" or collectives.world_size() == 1 or (room := gpu_memory()) is None:
        return
    folder = base.fetch()
    needed = collectives.on_main("weigh the base", lambda: weight_bytes(read_checkpoint(folder), base.dtype))
    if needed > room:
        raise UserError(
            f"evaluation: asks a model that each GPU holds whole, {show_size(needed)}, and a GPU has "
            f"{show_size(room)}; leave `evaluation` out: evaluation=null (training.evaluate_every takes losses)"
        )
